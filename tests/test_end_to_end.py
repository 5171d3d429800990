"""`make figures` in small: the smoke batch in a temporary folder, and its figures' tables."""

import json
import re
import subprocess

import pandas as pd
import pytest

from conftest import LAUNCH
from mtprune_utils.files import PROJECT
from mtprune_utils.study import store


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """The folder of figures, and a function that runs the batch again."""
    place = tmp_path_factory.mktemp("batch")

    def run(*more):
        command = [*LAUNCH, "figures", "--profile", "smoke"]
        folders = ["--runs", str(place / "runs"), "--figures", str(place / "figures")]
        return subprocess.run(
            [*command, *folders, *more], cwd=PROJECT, capture_output=True, text=True, timeout=1800
        )

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    return place, run


def test_every_figure_has_data_and_provenance(batch):
    place, _ = batch
    for name in store.figure_notebooks():
        for kind in ("png", "pdf", "csv", "json"):
            assert (place / "figures" / "smoke" / f"{name}.{kind}").stat().st_size > 0
        origin = json.loads((place / "figures" / "smoke" / f"{name}.json").read_text())
        assert origin["profile"]["name"] == "smoke"
        assert origin["seeds"][:2] == ([0] if name == "fig4_speedup" else [0, 1])
        assert {"commit", "dirty", "code", "python", "packages", "runs"} <= set(origin)
        assert all(len(run["data_digest"]) == 16 for run in origin["runs"].values())


def test_figure_1_compares_both_criteria_from_the_dense_network_to_the_floor(batch):
    table = pd.read_csv(batch[0] / "figures" / "smoke" / "fig1_iterative_pruning.csv")
    assert table.drop(columns=["low", "high"]).notna().all(axis=None)
    assert table[["low", "high"]].notna().all(axis="columns").eq(table["kind"] == "point").all()
    assert set(table["criterion"]) == {"taylor", "cosprune"} and set(table["seeds"]) == {2}
    curves = table[table["kind"] == "curve"]
    filters = curves[curves["size"] == "filters"].groupby(["criterion", "metric"])["x"]
    assert filters.min().round(6).eq(65).all() and filters.max().round(6).eq(272).all()
    means = curves.sort_values("x").groupby(["size", "metric", "criterion"])["mean"]
    dense = means.last().unstack("criterion")
    assert (dense["taylor"] - dense["cosprune"]).abs().max() < 1e-9, (
        "both start from the same dense weights"
    )
    shares = table[table["metric"] == "segmentation.pixel_accuracy"]["mean"]
    assert shares.between(0, 1).all()


def test_figure_2_starts_whole_and_ends_at_the_floor(batch):
    table = pd.read_csv(batch[0] / "figures" / "smoke" / "fig2_layer_widths.csv")
    assert set(table["layer"]) == set(range(13))
    assert (table[table["filters"] == 272]["share"] == 1).all()
    last = table[table["filters"] == 65].sort_values(["criterion", "layer"])
    shares = last.groupby("criterion")["share"].apply(list)
    assert shares.map(lambda s: s[0] == 5 / 8 and s[-1] == 5 / 32).all()
    assert table["cosine"].between(-0.5, 1).all() and table["dead_share"].between(0, 1).all()


def test_figure_3_has_both_arms_at_the_same_sizes(batch):
    table = pd.read_csv(batch[0] / "figures" / "smoke" / "fig3_retrained_from_scratch.csv")
    points = table[table["kind"] == "point"].set_index(["size", "metric", "criterion", "tuned_for"])
    scratch, iterative = (points[points["arm"] == arm] for arm in ("scratch", "iterative"))
    assert len(scratch) == len(iterative) == 4 * 3 * 2 and set(scratch["seeds"]) == {2}
    assert (scratch["x"] / iterative["x"].reindex(scratch.index) - 1).abs().max() < 0.03


def test_figure_4_compares_every_network_with_the_dense_one(batch):
    table = pd.read_csv(batch[0] / "figures" / "smoke" / "fig4_speedup.csv")
    assert set(table["criterion"]) == {"taylor", "cosprune"}
    assert set(table["network"]) == {"found", "rounded up"}
    assert {("cpu", "PyTorch"), ("cpu", "ONNX Runtime")} <= set(
        zip(table["device"], table["runtime"])
    )
    assert set(table["batch"]) == {1, 16} and (table[["theoretical", "speedup"]] > 0).all(axis=None)
    floor = table[table["filters"] == 65]
    assert (floor["widths"] == " ".join(["5"] * 13)).all()
    assert floor["theoretical"].round(2).eq(4.28).all()


def test_pruning_and_retraining_agree_on_the_architecture(batch):
    runs = batch[0] / "runs" / "smoke"
    for retrain in sorted((runs / "retrain").iterdir()):
        params = json.loads((retrain / "params.json").read_text())
        if params["criterion"] == "uniform":
            continue  # not found by pruning
        pruned = pd.read_csv(runs / "prune" / params["inputs"][0] / "evaluations.csv")
        found = pd.read_csv(retrain / "evaluations.csv").iloc[0]
        match = pruned[(pruned["widths"] == found["widths"]) & (pruned["phase"] == "recovered")]
        assert match["parameters"].tolist() == [found["parameters"]]


def judged(figures):
    """Table 1 by claim, and its cells."""
    (folder,) = figures.iterdir()
    cells = pd.read_csv(folder / "table1_cells.csv", keep_default_na=False)
    return pd.read_csv(folder / "table1_claims.csv", index_col="claim"), cells


def test_every_claim_is_judged_cell_by_cell(batch):
    table, cells = judged(batch[0] / "figures")
    assert list(table.index[:2]) == ["1", "1 strict"]
    some = {"2", "2 literal", "2i", "2 vs uniform", "3", "4", "4 compute", "4 longer"}
    assert some <= set(table.index)
    assert set(table["paper"]) <= {"agrees", "disagrees", "cannot say", "not claimed"}
    tasks = {"segmentation", "depth", "normals"}
    for claim in ("2", "2i", "4"):
        mine = cells[cells["claim"] == claim]
        assert set(mine["task"]) == tasks
        assert mine.groupby(["criterion", "size"])["task"].apply(set).eq(tasks).all()
        assert len(mine) == table.loc[claim, "cells"].count("[") > 0
    premise = pd.read_csv(batch[0] / "figures" / "smoke" / "table2_premise.csv")
    premise = premise.set_index("quantity")
    assert premise.loc["networks"].tolist()[:2] == [1, 3]
    assert premise.loc["parameters", "single-task"] > 119_320


def test_one_criterion_alone_is_judged_too(batch):
    """Nothing is compared with another criterion, and nothing fails for want of one."""
    place, _ = batch
    alone = {"criteria": ["taylor"], "seeds": 1, "controls.seeds": 0}
    parameters = {
        "profile": "smoke",
        "runs": str(place / "runs"),
        "figures": str(place / "alone"),
        "overrides": json.dumps(alone),
    }
    command = [*LAUNCH, "notebook", "notebooks/08_judge_claims.ipynb"]
    given = [word for name, value in parameters.items() for word in ("-p", name, value)]
    result = subprocess.run(
        [*command, str(place / "alone.ipynb"), *given], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table, _ = judged(place / "alone")
    assert "2" not in table.index and table.loc["4", "seeds"] == 1
    assert "one seed decides nothing" in table.loc["4", "note"]


def test_nothing_is_done_twice(batch):
    place, run = batch
    marks = {path: path.stat().st_mtime_ns for path in place.rglob("done.json")}
    assert len(marks) == 41
    again = run()
    assert again.returncode == 0 and "Everything is up to date: all 47 jobs" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in place.rglob("done.json")} == marks


def test_a_batch_goes_on_from_the_tables_alone(batch):
    place, run = batch
    (place / "runs").rename(place / "gone")
    timings = (place / "figures" / "smoke" / "timings.csv").read_text()
    again = run("--restore")
    assert again.returncode == 0 and "41 finished runs laid out" in again.stdout, again.stdout
    stages = "dense|tune|prune|retrain|score"
    assert not re.search(rf"\] ({stages}) .* started", again.stdout), "no training"
    timed = (place / "figures" / "smoke" / "timings.csv").read_text()
    assert len(timed.splitlines()) == len(timings.splitlines())
