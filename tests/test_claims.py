"""The claims on made-up result tables in which the answers are planted, and the tables themselves."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import test_runs

from mtprune_utils import claims, results, stages
from mtprune_utils.files import checksum, csv_text, read_json, write_atomically
from mtprune_utils.plots import fig5_claims, fig6_training_curves
from mtprune_utils.profiles import get_profile
from mtprune_utils.runs import Experiment

SEEDS = range(5)
TASKS = ("segmentation", "depth", "normals")
ENDPOINTS = {"segmentation": "segmentation.miou", "depth": "depth.relative_error", "normals": "normals.mean_angle"}
PRIOR, DENSE = {"segmentation": 0.1, "depth": 0.4, "normals": 40.0}, {"segmentation": 0.5, "depth": 0.2, "normals": 20.0}
SIZES = (30_000, 10_000)


def metrics(kept, noise):
    """Metrics of a network that keeps so much of the gap: of every task, or {task: so much}."""
    shares = kept if isinstance(kept, dict) else dict.fromkeys(TASKS, kept)
    return {ENDPOINTS[task]: PRIOR[task] + (shares[task] + noise) * (DENSE[task] - PRIOR[task]) for task in TASKS}


def made_up(kept) -> dict[str, pd.DataFrame]:
    """Tables in which arms keep what `kept(stage, arm, criterion, rank)` says, with small noise by seed."""
    noise = np.random.default_rng(0).normal(0, 0.01, 5)
    noise -= noise.mean()
    names = ("dense_evaluations", "dense_trivial", "prune_evaluations", "retrain_evaluations", "retrain_curve")
    rows = {name: [] for name in names}
    for seed in SEEDS:
        for arm in ("multitask", *TASKS):
            cell = {"criterion": None, "seed": seed, "rank": None, "arm": arm}
            size = {"parameters": 100_000, "macs": 10**6, "widths": "64 64"}
            rows["dense_evaluations"].append({**cell, **size, **metrics(kept("dense", arm, None, None), 0)})
        cell["arm"] = "multitask"
        rows["dense_trivial"].append({**cell, "predictor": "position prior", **metrics(0, 0)})
        for arm in ("iterative", "cosine_rate", "geometric"):
            for criterion in ("taylor", "cosprune", "random"):
                for removal, (rank, parameters) in enumerate([(None, 100_000), (0, SIZES[0]), (1, SIZES[1] + 50), (2, 5000)]):
                    share = 1.0 if rank is None else kept("prune", arm, criterion, rank)
                    rows["prune_evaluations"].append({
                        "criterion": criterion, "seed": seed, "rank": None, "arm": arm, "removal": removal, "phase": "recovered",
                        "landing": rank if rank in (0, 1) else None, "step": 100 * removal, "macs": 10 * parameters,
                        "parameters": parameters, "widths": f"{criterion} {parameters}", **metrics(share, noise[seed]),
                    })
        for arm in ("scratch", "scratch_longer", "finetune"):
            for criterion in ("taylor", "cosprune", "random", "uniform"):
                for rank, parameters in enumerate(SIZES):
                    cell = {"criterion": criterion, "seed": seed, "rank": rank, "arm": arm}
                    found = {"parameters": parameters, "widths": f"{criterion} {parameters}", "steps": 100_000}
                    share = kept("retrain", arm, criterion, rank)
                    rows["retrain_evaluations"].append({**cell, **found, **metrics(share, noise[-seed])})
                    for step in (1, 2):
                        rows["retrain_curve"].append({**cell, "step": step, **metrics(share, 0)})
    return {name: pd.DataFrame(table) for name, table in rows.items()}


SETTINGS = {"seeds": 5, "controls.seeds": 5, "controls.ranks": [0, 1], "sizes": [0.3, 0.1], "tuning.trials": 16}


def evidence(kept, **overrides) -> claims.Evidence:
    profile = get_profile("quick", SETTINGS | {"controls.schedules_of": ["taylor", "cosprune"]} | overrides)
    return claims.Evidence(Experiment(profile), made_up(kept))


def whole_verdicts(of: claims.Evidence) -> pd.DataFrame:
    table = claims.verdict_table(claims.all_claims(of))
    return table[table["task"] == "all"].set_index("claim")


def verdicts(kept):
    return whole_verdicts(evidence(kept))


def as_the_paper_says(stage, arm, criterion, rank):
    if stage == "dense":
        return 1.0
    if stage == "prune":
        return {0: 0.7, 1: 0.5, 2: 0.2}[rank] - 0.1 * (criterion == "random")
    return 0.8 - 0.1 * (criterion in ("random", "uniform")) + {"scratch": 0, "scratch_longer": 0.08, "finetune": -0.05}[arm]


def test_what_the_paper_says_is_supported_where_the_tables_say_so():
    found = verdicts(as_the_paper_says)
    assert (found["verdict"] == "supported").all(), found["verdict"]
    assert found.loc["2", "estimate"] == pytest.approx(0, abs=0.01)
    assert found.loc["4", "estimate"] == pytest.approx(0.8 - (0.7 + 0.5) / 2, abs=0.01), "averaged over sizes"
    assert found.loc["4 compute", "estimate"] == pytest.approx(0.88 - (0.7 + 0.5) / 2, abs=0.01)
    assert found.loc["3", "estimate"] == pytest.approx(0.2, abs=0.01)
    assert (found["seeds"] == 5).all()


@pytest.mark.parametrize("claim, changed", [
    ("1", lambda stage, arm, criterion, rank: 0.3 if stage == "dense" and arm != "multitask" else None),
    ("2", lambda stage, arm, criterion, rank: 0.4 if (stage, criterion) == ("retrain", "taylor") else None),
    ("2i", lambda stage, arm, criterion, rank: 0.4 if (stage, criterion) == ("prune", "taylor") else None),
    ("2 vs uniform", lambda stage, arm, criterion, rank: 0.95 if criterion == "uniform" else None),
    ("2 vs random", lambda stage, arm, criterion, rank: 0.95 if (stage, criterion) == ("retrain", "random") else None),
    ("2i vs random", lambda stage, arm, criterion, rank: 0.95 if (stage, criterion) == ("prune", "random") else None),
    ("3", lambda stage, arm, criterion, rank: 0.8 if stage == "prune" and arm == "iterative" and rank == 2 else None),
    ("3 geometric", lambda stage, arm, criterion, rank: 0.8 if arm == "geometric" and rank == 2 else None),
    ("3 cosine_rate", lambda stage, arm, criterion, rank: 0.8 if arm == "cosine_rate" and rank == 2 else None),
    ("4", lambda stage, arm, criterion, rank: 0.9 if stage == "prune" and arm == "iterative" and rank in (0, 1) else None),
    ("4 compute", lambda stage, arm, criterion, rank: 0.4 if arm == "scratch_longer" else None),
    ("4 finetune", lambda stage, arm, criterion, rank: 0.95 if arm == "finetune" else None),
])
def test_each_claim_is_refuted_where_the_tables_say_otherwise(claim, changed):
    def kept(*cell):
        other = changed(*cell)
        if claim == "1" and other is not None:
            return 1.3  # single-task networks are better
        return as_the_paper_says(*cell) if other is None else other

    assert verdicts(kept).loc[claim, "verdict"] == "refuted"


def test_a_claim_stays_undecided_while_retraining_still_improves():
    tables = made_up(as_the_paper_says)
    improving = tables["retrain_curve"]
    improving.loc[improving["step"] == 1, "depth.relative_error"] += 0.05  # a quarter of the gap
    base = evidence(as_the_paper_says)
    row = whole_verdicts(claims.Evidence(base.experiment, tables)).loc["4"]
    assert row["verdict"] == "undecided" and "still improves depth" in row["note"]


def test_an_arm_that_more_steps_bring_further_was_not_at_its_end():
    found = verdicts(lambda *cell: as_the_paper_says(*cell) + 0.03 * (cell[1] == "scratch_longer"))  # 0.11 ahead, the margin 0.1
    assert found.loc["4", "verdict"] == "undecided" and "still improves depth, normals, segmentation" in found.loc["4", "note"]
    assert found.loc["4 compute", "verdict"] == "supported"


@pytest.mark.parametrize("longer, verdict", [(0.4, "undecided"), (0.88, "supported")])
def test_re_training_for_less_than_equal_compute_may_support_but_not_refute(longer, verdict):
    capped = evidence(lambda *cell: longer if cell[1] == "scratch_longer" else as_the_paper_says(*cell))
    capped.tables["retrain_evaluations"]["steps"] = 1000
    # Taylor's and CosPrune's networks alike: 1300 dense steps, then 100 at each size on the way.
    spent = 1300 * 10**6 + 100 * 10**6 + np.array([0, 100 * 10 * SIZES[0]])
    shares = 1000 * 10 * np.array([SIZES[0], SIZES[1] + 50]) / spent
    assert sorted(set(capped.equal_compute_shares().round(6))) == sorted(shares.round(6))
    row = whole_verdicts(capped).loc["4 compute"]
    assert row["verdict"] == verdict and f"given {shares.min():.0%} to {shares.max():.0%} of equal compute" in row["note"]


def test_claim_2_is_about_tuned_networks_and_says_what_decides_it():
    untuned = whole_verdicts(evidence(as_the_paper_says, **{"tuning.trials": 0}))
    assert untuned.loc["2", "verdict"] == untuned.loc["2i", "verdict"] == "undecided" and "not tuned" in untuned.loc["2", "note"]
    assert untuned.loc["2", "decided_by"] == "make study" and untuned.loc["3", "decided_by"] != "make study", "3 is supported"
    real = Experiment(get_profile("fashion"), "multifashion", "somewhere")
    assert claims.deciding_command(real).startswith("make figures PROFILE=fashion DATA=multifashion ROOT=... OVERRIDES=")
    assert claims.deciding_command(Experiment(get_profile("study"))) == ""


def test_no_difference_where_nothing_differs_says_so():
    note = "not shown to beat the controls"
    found = verdicts(lambda *cell: 0.8 if cell[0] == "retrain" else as_the_paper_says(*cell))
    assert found.loc["2", "verdict"] == "supported" and note in found.loc["2", "note"]
    assert note not in found.loc["2i", "note"] and note not in verdicts(as_the_paper_says).loc["2", "note"]


def test_networks_that_learnt_nothing_decide_nothing():
    def nothing(stage, arm, criterion, rank):
        return -0.5 if stage == "dense" else as_the_paper_says(stage, arm, criterion, rank)

    found = verdicts(nothing)
    assert (found["verdict"] == "undecided").all() and found["note"].str.contains("does not beat the position prior").all()
    table = claims.verdict_table(claims.all_claims(evidence(nothing)))
    assert (table["verdict"] == "undecided").all(), "of single tasks too"


def test_sizes_at_which_both_criteria_left_the_same_widths_are_left_out():
    base = evidence(as_the_paper_says)
    tables = base.tables
    same = (tables["retrain_evaluations"]["rank"] == 1) & (tables["retrain_evaluations"]["seed"] == 0)
    tables["retrain_evaluations"].loc[same, "widths"] = "5 5"
    taylor = same & (tables["retrain_evaluations"]["criterion"] == "taylor")
    tables["retrain_evaluations"].loc[taylor, "segmentation.miou"] = 0.1  # as if the same widths came out otherwise
    found = claims.Evidence(base.experiment, tables)
    assert set(found.coinciding("scratch", ("taylor", "cosprune"))) == {(0, 1)}
    row = whole_verdicts(found).loc["2"]
    assert row["seeds"] == 5 and row["estimate"] == pytest.approx(0, abs=1e-9), "seed 0 counts by its other size"


def test_a_network_of_another_size_is_not_compared():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    rows.loc[rows["rank"] == 1, "parameters"] = 10_400  # 4 % off
    points = claims.Evidence(base.experiment, base.tables).points
    assert set(points[points["arm"] == "scratch"]["rank"]) == {0}


def test_a_study_of_which_only_the_first_runs_are_finished_is_judged_as_far_as_it_goes():
    base = evidence(as_the_paper_says)
    tables = dict(base.tables)
    for name in ("retrain_evaluations", "retrain_curve", "prune_evaluations"):
        tables[name] = pd.DataFrame()
        found = claims.verdict_table(claims.all_claims(claims.Evidence(base.experiment, tables))).set_index("claim")
        assert found.loc["4", "note"] == "no run of it is finished"
    begun = claims.Evidence(base.experiment, tables)
    assert csv_text(claims.collapses(begun).to_dict("records")) == "" and begun.training_curves().empty
    dense = base.tables["dense_evaluations"]
    tables["dense_evaluations"] = dense[(dense["arm"] != "multitask") | (dense["seed"] > 0)]
    assert 0 not in claims.delta_m_by_seed(claims.Evidence(base.experiment, tables)).index
    tables["dense_evaluations"] = base.tables["dense_evaluations"].query("seed > 90")
    with pytest.raises(ValueError, match="no dense network of the evaluation's seeds is finished yet"):
        claims.Evidence(base.experiment, tables)


def test_seeds_without_every_size_and_criterion_are_left_out():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    rows = rows[~((rows["seed"] == 0) & (rows["rank"] == 1)) & ~((rows["seed"] == 1) & (rows["criterion"] == "taylor"))]
    floor = base.tables["prune_evaluations"]
    floor = floor[~((floor["seed"] == 2) & (floor["criterion"] == "taylor"))]
    tables = base.tables | {"retrain_evaluations": rows, "prune_evaluations": floor}
    seeds = whole_verdicts(claims.Evidence(base.experiment, tables))["seeds"]
    assert seeds["2"] == 3 and seeds["3"] == 4 and seeds["4"] == 2


def test_equal_arms_with_independent_noise_are_neither_better_nor_worse():
    """Pairing, averaging and Holm leave the error rate alone: of 60 made-up studies without a difference few find one."""
    generator, found = np.random.default_rng(0), []
    for _ in range(60):
        found.append(verdicts(
            lambda *cell: 1.0 if cell[0] == "dense" else {task: 0.7 + generator.normal(0, 0.1) for task in TASKS}
        )["verdict"])
    shares = pd.DataFrame(found)[["2 vs uniform", "2i vs random", "4", "4 finetune"]].isin(["supported", "refuted"]).mean()
    assert shares.max() <= 0.1  # a half of 5 % expected, each, over 60 studies


def test_a_single_seed_decides_nothing_and_says_so():
    base = evidence(as_the_paper_says)
    one = {name: table[table["seed"] == 0] for name, table in base.tables.items()}
    found = claims.verdict_table(claims.all_claims(claims.Evidence(base.experiment, one)))
    whole = found[found["task"] == "all"]
    assert (whole["verdict"] == "undecided").all() and whole["note"].str.contains("one seed decides nothing").all()
    figure, rows = fig5_claims(found, 0.1)
    assert len(rows) == len(found)


def test_the_collapse_table_counts_seeds_and_censors():
    found = claims.collapses(evidence(as_the_paper_says)).set_index(["criterion", "schedule", "task"])
    assert (found["seeds"] == 5).all()
    assert found.loc[("taylor", "geometric", "depth"), "collapsed"] == 5
    assert found.loc[("random", "iterative", "depth"), "median_parameters"] == SIZES[1] + 50
    never = claims.collapses(evidence(lambda *cell: 0.9))
    assert (never["collapsed"] == 0).all() and never["median_parameters"].isna().all()
    assert found.loc[("taylor", "iterative"), "earlier"].isna().all(), "it is what the controls are held against"
    assert (found.loc[("taylor", "geometric"), ["earlier", "later", "tied"]].sum(axis=1) == 5).all()
    controls = never[never["schedule"] != "iterative"]
    assert len(controls) and (controls["tied"] == 5).all() and (controls["p_sign"] == 1).all()


def test_the_premise_counts_the_backbone_of_every_single_task_network():
    table = claims.premise(evidence(lambda *cell: 0.9 if cell[0] == "dense" and cell[1] in TASKS else as_the_paper_says(*cell)))
    assert table.loc["parameters"].tolist() == [100_000, 300_000]
    assert table.loc["activations_mib", "single-task"] > 2 * table.loc["activations_mib", "multi-task"]
    by_hand = ((0.5 - 0.46) / 0.46 + (0.22 - 0.2) / 0.22 + (22 - 20) / 22) / 3
    assert table.loc["delta_m", "multi-task"] == pytest.approx(by_hand) and table.loc["seeds", "multi-task"] == 5


def test_training_curves_are_drawn_by_size_and_task():
    figure, means = fig6_training_curves(evidence(as_the_paper_says).training_curves(), get_profile("quick").sizes)
    assert len(figure.axes) == 2 * 3 and set(means["arm"]) == {"scratch", "scratch_longer", "finetune"}


# --- the tables: collected from run folders, and laid out again ---

TINY = test_runs.TINY | {"seeds": 1, "criteria": ["taylor"], "controls.seeds": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    experiment = Experiment.open("smoke", "rooms", "", str(place / "runs"), TINY)
    for run in experiment.runs():
        stages.execute(run, report=lambda line: None)
    return experiment, place / "figures", results.collect(experiment, place / "figures")


def test_the_tables_hold_every_run(finished):
    experiment, figures, tables = finished
    assert len(experiment.runs()) == 3
    assert set(tables["prune_evaluations"]["criterion"]) == {"taylor"} and len(tables["retrain_evaluations"]) == 1
    assert tables["prune_evaluations"]["landing"].notna().sum() == 1
    records = [json.loads(line) for line in (figures / "smoke-custom/results/runs.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == [run.name for run in experiment.runs()]
    assert all(record["files"]["provenance.json"]["commit"] for record in records)


def test_run_folders_laid_out_from_the_tables_are_those_that_were(finished, tmp_path):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    assert results.restore(elsewhere, figures) == 3 and results.restore(elsewhere, figures) == 0
    for run, again in zip(experiment.runs(), elsewhere.runs()):
        assert again.done and not again.path("model.safetensors").exists()
        for file in again.folder.iterdir():
            if file.name == "done.json":  # it knows of no weights
                assert read_json(file)["files"].items() <= read_json(run.path(file.name))["files"].items()
            else:
                assert file.read_bytes() == run.path(file.name).read_bytes()
    before = {file.name: file.read_bytes() for file in (figures / "smoke-custom/results").iterdir()}
    results.collect(elsewhere, figures)
    assert {file.name: file.read_bytes() for file in (figures / "smoke-custom/results").iterdir()} == before


def test_weights_that_lie_where_a_run_is_laid_out_again_are_not_taken_for_its_own(finished, tmp_path):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    run, source = elsewhere.prune("taylor", 0), experiment.prune("taylor", 0).path("model.safetensors")
    write_atomically(run.path("model.safetensors"), source.read_bytes() + b" ")
    write_atomically(elsewhere.dense(0).path("checkpoints/step000000001-0.safetensors"), b"")
    results.restore(elsewhere, figures)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    before = run.path("done.json").stat().st_mtime_ns
    stages.network(run, "model.safetensors")  # made again
    assert run.path("done.json").stat().st_mtime_ns == before, "or all that was made from it would count as out of date"
    files = read_json(run.path("done.json"))["files"]
    assert files["model.safetensors"] == checksum(source) == checksum(run.path("model.safetensors"))
    assert not list((tmp_path / "runs" / "repeated").iterdir())


def test_a_run_whose_weights_are_gone_is_repeated_for_them(finished, tmp_path):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    results.restore(elsewhere, figures)
    retrain = elsewhere.runs()[-1]
    marks = {file: file.stat().st_mtime_ns for file in retrain.source.folder.iterdir()}
    assert stages.found_architecture(retrain) == stages.found_architecture(experiment.runs()[-1])
    assert {file: file.stat().st_mtime_ns for file in marks} == marks


def test_rows_of_runs_that_are_not_of_the_grid_any_more_are_dropped(finished, tmp_path):
    figures = shutil.copytree(finished[1], tmp_path / "figures")
    other = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY | {"retrain.lr": 0.5})
    assert results.restore(other, figures) == 2
    assert results.collect(other, figures)["retrain_evaluations"].empty
    nothing = Experiment.open("smoke", "rooms", "", str(tmp_path / "nothing"), TINY)
    with pytest.raises(FileNotFoundError, match="make figures PROFILE=smoke"):
        results.collect(nothing, tmp_path / "empty")
