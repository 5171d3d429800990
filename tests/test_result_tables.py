"""Committed result tables are laid out as they were collected, or refused in one line."""

import json
import shutil

import pytest

import test_runs
from mtprune_utils.study import tables
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment

TINY = test_runs.TINY | {"seeds": 1, "criteria": ["taylor"], "controls.seeds": 0}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The tables of two dense networks."""
    place = tmp_path_factory.mktemp("collected")
    experiment = Experiment.open("smoke", "rooms", "", str(place / "runs"), TINY | {"seeds": 2})
    for seed in (0, 1):
        execute(experiment.dense(seed), report=lambda line: None)
    tables.collect(experiment, place / "figures")
    return place / "figures"


def lines(text):
    return text.splitlines(keepends=True)


def record(text, **changed):
    return json.dumps(json.loads(lines(text)[0]) | changed) + "\n"


@pytest.mark.parametrize(
    "file, edit",
    [
        ("runs.jsonl", lambda text: text[: len(text) // 3]),
        ("runs.jsonl", lambda text: '{"stage": "dense"}\n' + text),
        ("runs.jsonl", lambda text: "[1]\n" + text),
        ("runs.jsonl", lambda text: "[" * 100_000 + "\n" + text),
        ("runs.jsonl", lambda text: lines(text)[0] * 2),
        ("runs.jsonl", lambda text: record(text, stage="other")),
        ("runs.jsonl", lambda text: record(text, name="../dense")),
        ("runs.jsonl", lambda text: record(text, files={})),
        (
            "runs.jsonl",
            lambda text: record(text, files=json.loads(lines(text)[0])["files"] | {"/x.json": {}}),
        ),
        (
            "runs.jsonl",
            lambda text: record(
                text, files=json.loads(lines(text)[0])["files"] | {"../x.json": {}}
            ),
        ),
        ("dense_curve.csv", lambda text: lines(text)[0]),
        ("dense_curve.csv", lambda text: None),
        ("dense_curve.csv", lambda text: text.replace("run,", "ran,", 1)),
        ("dense_curve.csv", lambda text: bytes(range(256))),
        ("dense_curve.csv", lambda text: text.rsplit(",", 3)[0] + "\n"),
        ("dense_curve.csv", lambda text: text.rstrip() + ",1,2\n"),
        ("dense_curve.csv", lambda text: "".join(lines(text)[:-1])),
        ("dense_evaluations.csv", lambda text: text + "".join(lines(text)[1:])),
        ("dense_evaluations.csv", lambda text: text.rstrip().rsplit(",", 1)[0] + ",abc\n"),
        ("dense_evaluations.csv", lambda text: text.replace("0.", "9.", 1)),
    ],
)
def test_tables_that_are_not_as_they_were_collected_are_refused_in_one_line(
    collected, tmp_path, file, edit
):
    figures = shutil.copytree(collected, tmp_path / "figures")
    (path,) = figures.glob(f"*/results/{file}")
    text = edit(path.read_text())
    path.unlink() if text is None else path.write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    settings = TINY | {"seeds": 2}
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), settings)
    with pytest.raises(ValueError, match=file) as error:
        tables.restore(elsewhere, figures)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "runs").rglob("*.csv")), "nothing is laid out"


def test_line_ends_and_the_order_of_columns_do_not_count(collected, tmp_path):
    figures = shutil.copytree(collected, tmp_path / "figures")
    for path in figures.glob("*/results/*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    settings = TINY | {"seeds": 2}
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), settings)
    assert tables.restore(elsewhere, figures) == 2
