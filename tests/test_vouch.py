"""make vouch: a refactoring takes the committed tables over, a changed number does not."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from mtprune_utils import files
from mtprune_utils.study import vouch
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES

TINY = """
import dataclasses
_smoke = PROFILES["smoke"]
PROFILES["smoke"] = dataclasses.replace(
    _smoke, train_images=24, test_images=8, crop=32, image_height=32, seeds=1, sizes=(0.6,),
    criteria=("taylor",), tuning=dataclasses.replace(_smoke.tuning, trials=1),
    dense=dataclasses.replace(_smoke.dense, steps=3, evaluations=1),
    retrain=dataclasses.replace(_smoke.retrain, steps=3, evaluations=1),
    prune=dataclasses.replace(_smoke.prune, prune_interval=1, filters_per_step=60),
    controls=dataclasses.replace(_smoke.controls, seeds=0),
)
"""
MAKE_TABLES = """
from pathlib import Path
from mtprune_utils.study import tables
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
experiment = Experiment.open("smoke", "rooms", "", "runs")
for run in experiment.runs():
    execute(run, report=lambda line: None)
tables.collect(experiment, Path("figures"))
"""


def python(repository, *arguments):
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def commit(repository):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["add", "."], [*identity, "commit", "-q", "-m", "a change"]):
        subprocess.run(["git", *command], cwd=repository, check=True)


def edit(repository, file, old, new):
    text = (repository / file).read_text()
    assert old in text
    (repository / file).write_text(text.replace(old, new, 1))
    commit(repository)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A copy of the repository with a tiny profile, whose tables are committed."""
    repository = tmp_path_factory.mktemp("vouch") / "repository"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(files.PACKAGE, repository / "mtprune_utils", ignore=ignored)
    (repository / "notebooks").mkdir()
    (repository / ".gitignore").write_text("runs\n__pycache__\n")
    with (repository / "mtprune_utils/study/profiles.py").open("a") as file:
        file.write(TINY)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    commit(repository)
    result = python(repository, "-c", MAKE_TABLES)
    assert result.returncode == 0, result.stderr
    commit(repository)
    return repository


@pytest.fixture
def repository(made, tmp_path):
    return shutil.copytree(made, tmp_path / "repository")


def stamps(repository):
    path = repository / "figures/smoke/results/vouched.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_refactoring_is_vouched_for_and_a_changed_number_is_not(repository, elsewhere):
    """On the kind of machine that made the tables, and on another."""
    if elsewhere:
        records = repository / "figures/smoke/results/runs.jsonl"
        records.write_text(records.read_text().replace('"cpu ', '"cpu of old, '))
        commit(repository)
    edit(
        repository, "mtprune_utils/core/trainer.py", "\n\n\ndef", "\n\n\nREFACTORED = True\n\n\ndef"
    )
    result = python(repository, "-m", "mtprune_utils.run.cli", "vouch", "--profile", "smoke")
    assert result.returncode == 0, result.stderr
    found = {stamp["stage"]: stamp for stamp in stamps(repository)}
    assert list(found) == ["dense", "tune", "prune", "retrain"]
    assert ("this machine" in found["dense"]["compared"]) is elsewhere
    repeated = [name.split("/")[0] for name in found["dense"]["repeated"]]
    assert sorted(repeated) == ["dense", "prune", "retrain", "tune", "tune"], "two codes tune"
    if not elsewhere:
        again = python(repository, "-m", "mtprune_utils.run.cli", "vouch", "--profile", "smoke")
        assert "nothing to vouch for" in again.stdout
    end = 'if run.arm == "scratch_longer" else '
    slower = "replace(own, lr=own.lr / 2)"
    edit(repository, "mtprune_utils/stages/retrain.py", f"{end}own", f"{end}{slower}")
    result = python(repository, "-m", "mtprune_utils.run.cli", "vouch", "--profile", "smoke")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("retrain taylor")
    assert "evaluations.csv is not that of" in result.stderr
    assert len(stamps(repository)) == 5, "of each code of before"


def test_only_the_code_that_made_the_tables_is_compared_with(repository):
    edit(
        repository, "mtprune_utils/core/trainer.py", "\n\n\ndef", "\n\n\nREFACTORED = True\n\n\ndef"
    )
    result = python(
        repository, "-m", "mtprune_utils.run.cli", "vouch", "--profile", "smoke", "--base", "HEAD"
    )
    assert result.returncode == 1
    assert "not the code and the numbers that made the tables" in result.stderr
    with (repository / "mtprune_utils/core/trainer.py").open("a") as file:
        file.write("UNCOMMITTED = True\n")
    result = python(repository, "-m", "mtprune_utils.run.cli", "vouch", "--profile", "smoke")
    assert result.returncode == 1 and "commit what has changed" in result.stderr
    assert not stamps(repository)


def test_every_stage_and_criterion_is_drawn_and_by_chance():
    runs = Experiment(PROFILES["study"]).runs()
    cells = {(run.stage, run.criterion, run.code) for run in runs}
    one, same, other = (vouch.draw(runs, seed) for seed in (1, 1, 2))
    assert one == same != other
    found = [{(run.stage, run.criterion, run.code) for run in drawn} for drawn in (one, other)]
    assert found == [cells] * 2
    assert len(one) == len(cells)


def test_codes_that_are_vouched_for_are_one_code(tmp_path, monkeypatch):
    experiment = Experiment(PROFILES["quick"])
    stamps = {"b": "c", "a": "b"}
    found = [{"stage": "dense", "from": [old], "to": new} for old, new in stamps.items()]
    files.write_json(tmp_path / "vouched.json", found)
    monkeypatch.setattr(Experiment, "vouched_file", tmp_path / "vouched.json")
    assert experiment.same_code("a") == experiment.same_code("c") == {*"abc"}
    assert experiment.same_code("x") == {"x"}
