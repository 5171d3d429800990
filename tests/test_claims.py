"""The claims on made-up result tables in which answers are planted, and the tables themselves."""

import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
import readme

import test_runs
from mtprune_utils.files import PROJECT, checksum, csv_text, read_json, write_atomically
from mtprune_utils.run import notebook
from mtprune_utils.stages import retrain
from mtprune_utils.stages._training import at_level
from mtprune_utils.study import claims, statistics, store, tables
from mtprune_utils.study.execute import execute, restore_weights
from mtprune_utils.study.figures import fig5_claims, fig6_training_curves
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import get_profile

SEEDS = range(5)
TASKS = ("segmentation", "depth", "normals")
ENDPOINTS = {
    "segmentation": "segmentation.miou",
    "depth": "depth.relative_error",
    "normals": "normals.mean_angle",
}
PRIOR, DENSE = (
    {"segmentation": 0.1, "depth": 0.4, "normals": 40.0},
    {"segmentation": 0.5, "depth": 0.2, "normals": 20.0},
)
SIZES = (30_000, 10_000)


def metrics(kept, noise):
    """Metrics of a network that keeps so much of the gap: of every task, or {task: so much}."""
    shares = kept if isinstance(kept, dict) else dict.fromkeys(TASKS, kept)
    return {
        ENDPOINTS[task]: PRIOR[task] + (shares[task] + noise) * (DENSE[task] - PRIOR[task])
        for task in TASKS
    }


def made_up(kept) -> dict[str, pd.DataFrame]:
    """Tables in which arms keep what `kept(stage, arm, criterion, level)` says.

    Small noise by seed comes on top.
    """
    noise = np.random.default_rng(0).normal(0, 0.01, 5)
    noise -= noise.mean()
    names = (
        "dense_evaluations",
        "dense_trivial",
        "dense_curve",
        "prune_evaluations",
        "retrain_evaluations",
        "retrain_curve",
    )
    rows = {name: [] for name in names}
    for seed in SEEDS:
        for arm in ("multitask", *TASKS):
            cell = {"criterion": None, "seed": seed, "level": None, "arm": arm}
            size = {"parameters": 100_000, "macs": 10**6, "widths": "64 64"}
            rows["dense_evaluations"].append(
                {**cell, **size, **metrics(kept("dense", arm, None, None), 0)}
            )
        cell["arm"] = "multitask"
        rows["dense_trivial"].append({**cell, "predictor": "position prior", **metrics(0, 0)})
        rows["dense_curve"] += [{**cell, "step": step, **metrics(1, 0)} for step in (1, 2)]
        for arm in ("iterative", "cosine_rate", "geometric"):
            for criterion in ("taylor", "cosprune", "random"):
                for removal, (level, parameters) in enumerate(
                    [(None, 100_000), (0, SIZES[0]), (1, SIZES[1] + 50), (2, 5000)]
                ):
                    share = 1.0 if level is None else kept("prune", arm, criterion, level)
                    rows["prune_evaluations"].append(
                        {
                            "criterion": criterion,
                            "seed": seed,
                            "level": None,
                            "arm": arm,
                            "removal": removal,
                            "phase": "recovered",
                            "target_level": level if level in (0, 1) else None,
                            "step": 100 * removal,
                            "macs": 10 * parameters,
                            "parameters": parameters,
                            "widths": f"{criterion} {parameters}",
                            **metrics(share, noise[seed]),
                        }
                    )
        for arm in ("scratch", "scratch_longer", "finetune"):
            for criterion in ("taylor", "cosprune", "random", "uniform"):
                for level, parameters in enumerate(SIZES):
                    cell = {"criterion": criterion, "seed": seed, "level": level, "arm": arm}
                    found = {
                        "parameters": parameters,
                        "macs": 10 * parameters,
                        "steps": 100_000,
                        "widths": f"{criterion} {parameters}",
                    }
                    share = kept("retrain", arm, criterion, level)
                    rows["retrain_evaluations"].append(
                        {**cell, **found, **metrics(share, noise[-seed])}
                    )
                    for step in (1, 2):
                        rows["retrain_curve"].append({**cell, "step": step, **metrics(share, 0)})
    return {name: pd.DataFrame(table) for name, table in rows.items()}


SETTINGS = {
    "seeds": 5,
    "controls.seeds": 5,
    "controls.levels": [0, 1],
    "sizes": [0.3, 0.1],
    "tuning.trials": 16,
}


def evidence(kept, **overrides) -> claims.Evidence:
    profile = get_profile(
        "quick", SETTINGS | {"controls.schedules_of": ["taylor", "cosprune"]} | overrides
    )
    return claims.Evidence(Experiment(profile), made_up(kept))


def table1(of: claims.Evidence) -> pd.DataFrame:
    return claims.judge(of)[0].set_index("claim")


def cells_of(of: claims.Evidence) -> dict[str, pd.DataFrame]:
    return dict(list(claims.judge(of)[1].groupby("claim")))


def verdicts(kept, **overrides):
    return table1(evidence(kept, **overrides))


def as_the_paper_says(stage, arm, criterion, level):
    if stage == "dense":
        return 1.0
    if stage == "prune":
        return {0: 0.7, 1: 0.5, 2: 0.2}[level] - 0.1 * (criterion == "random")
    longer = {"scratch": 0.0, "scratch_longer": 0.08, "finetune": -0.05}[arm]
    # Fine-tuning gains nothing on the iterative run, so that this one was at its end.
    floor = {0: 0.7, 1: 0.5}[level] if arm == "finetune" else 0.8
    return floor + longer - 0.15 * (criterion in ("random", "uniform"))


def changed(condition, share):
    """As the paper says, but for the cells that meet the condition."""
    return lambda *cell: share if condition(*cell) else as_the_paper_says(*cell)


def test_what_the_paper_says_is_agreed_with_where_the_tables_say_so():
    found = verdicts(as_the_paper_says)
    claimed = found[found["paper"] != "not claimed"]
    assert set(claimed.index) >= {"1", "2", "2 literal", "2i", "3", "4", "4 compute", "4 longer"}
    assert (claimed["paper"] == "agrees").all(), claimed[["paper", "note"]]
    assert (found["seeds"] == 5).all() and (found["seeds_most"] == 5).all()
    controls = found.loc[["2 vs uniform", "2 vs random", "2i vs random"]]
    assert controls["outcome"].tolist() == ["different", "different", "differ, size open"]


@pytest.mark.parametrize(
    "claim, outcome, condition, share",
    [
        ("2", "different", lambda stage, arm, c, r: (arm, c) == ("scratch", "taylor"), 0.4),
        ("2 literal", "differs", lambda stage, arm, c, r: (arm, c) == ("scratch", "taylor"), 0.75),
        (
            "2 longer",
            "different",
            lambda stage, arm, c, r: (arm, c) == ("scratch_longer", "taylor"),
            0.5,
        ),
        (
            "2 finetune",
            "different",
            lambda stage, arm, c, r: (arm, c) == ("finetune", "taylor"),
            0.2,
        ),
        ("2i", "different", lambda stage, arm, c, r: (stage, c) == ("prune", "taylor"), 0.2),
        ("3", "above half", lambda stage, arm, c, r: (arm, r) == ("iterative", 2), 0.8),
        ("4", "worse", lambda stage, arm, c, r: arm == "iterative" and r in (0, 1), 0.95),
        ("4 compute", "worse", lambda stage, arm, c, r: arm == "scratch_longer", 0.3),
        ("4 finetune", "worse", lambda stage, arm, c, r: arm == "finetune", 0.95),
        (
            "4 longer",
            "mixed",
            lambda stage, arm, c, r: (arm, c) == ("scratch_longer", "taylor"),
            0.3,
        ),
    ],
)
def test_each_claim_is_disagreed_with_where_the_tables_say_otherwise(
    claim, outcome, condition, share
):
    found = verdicts(changed(condition, share)).loc[claim]
    assert (found["outcome"], found["paper"]) == (outcome, "disagrees")


@pytest.mark.parametrize(
    "claim, outcome, condition, share",
    [
        (
            "1 strict",
            "worse",
            lambda stage, arm, c, r: stage == "dense" and arm != "multitask",
            1.3,
        ),
        ("2 vs uniform", "different", lambda stage, arm, c, r: c == "uniform", 0.99),
        (
            "2 vs random",
            "equivalent",
            lambda stage, arm, c, r: (stage, c) == ("retrain", "random"),
            0.8,
        ),
        (
            "2i vs random",
            "different",
            lambda stage, arm, c, r: (stage, c) == ("prune", "random"),
            0.95,
        ),
        ("3 geometric", "above half", lambda stage, arm, c, r: (arm, r) == ("geometric", 2), 0.8),
        (
            "3 cosine_rate",
            "above half",
            lambda stage, arm, c, r: (arm, r) == ("cosine_rate", 2),
            0.8,
        ),
    ],
)
def test_what_the_paper_does_not_claim_has_an_outcome_and_no_verdict(
    claim, outcome, condition, share
):
    found = verdicts(changed(condition, share)).loc[claim]
    assert (found["outcome"], found["paper"]) == (outcome, "not claimed")


# --- the cell is the unit ---


def opposite(stage, arm, criterion, level):
    """CosPrune is ahead of Taylor at one size by as much as it is behind at the other."""
    share = as_the_paper_says(stage, arm, criterion, level)
    sign = {0: 1, 1: -1}.get(level, 0)
    return share - 0.2 * sign * (criterion == "cosprune" and stage != "dense")


def test_opposite_effects_at_two_sizes_are_called_even_nowhere(tmp_path):
    of = evidence(opposite)
    found = table1(of)
    for claim in ("2", "2 longer", "2 finetune", "2i"):
        row = found.loc[claim]
        assert (row["outcome"], row["paper"]) == ("different", "disagrees"), claim
        assert row["lowest_size"] == "30%"
        assert row["lowest_estimate"] == pytest.approx(-0.2, abs=0.01)
        assert row["highest_size"] == "10%"
        assert row["highest_estimate"] == pytest.approx(0.2, abs=0.01)
        assert "From -0.20" in row["says"] and "to +0.20" in row["says"]
        assert row["cells"].count("different") == 6
    assert found.loc["2 literal", "outcome"] == found.loc["2i literal", "outcome"] == "differs"
    cells = cells_of(of)["2"].groupby("size")["estimate"]
    assert cells.max()["30%"] < -0.15 and cells.min()["10%"] > 0.15
    _, shown = fig5_claims(*claims.judge(of), 0.1)
    assert (shown[shown["claim"] == "2"]["outcome"] == "different").all()
    # Nor in the README, nor in a figure of training curves.
    place = tmp_path / "study"
    rows = claims.judge(of)[0].to_dict("records")
    write_atomically(place / "table1_claims.csv", csv_text(rows).encode())
    text = readme.claims_table(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    assert "different" in line and "disagrees" in line and "equivalent" not in line
    _, means = fig6_training_curves(of.training_curves(), (0.3, 0.1))
    assert not set(means) & {"all"} and {"criterion", "level", "task"} <= set(means)


def test_no_estimate_is_an_average_over_cells():
    found = table1(evidence(opposite))
    assert "estimate" not in found
    averages = found["says"].str.contains("mean|average")
    assert found.index[averages].tolist() == ["1"], "Delta_m, beside its lowest and highest task"
    of = evidence(opposite)
    for claim in claims.comparisons(of, claims.premise(of)["saved"]):
        assert len(claim.cells()) == claim.values.shape[1]
        assert not claim.cells().duplicated(claims.CELL).any()


def test_a_cell_has_the_seeds_that_have_both_sides():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    rows = rows[~((rows["seed"] == 0) & (rows["level"] == 1))]
    rows = rows[~((rows["seed"] == 1) & (rows["criterion"] == "taylor"))]
    tables = base.tables | {"retrain_evaluations": rows}
    of = claims.Evidence(base.experiment, tables)
    cells = cells_of(of)
    assert cells["2"].groupby("size")["seeds"].first().to_dict() == {"10%": 3, "30%": 4}
    by = cells["4"].groupby(["criterion", "size"])["seeds"].first()
    assert by.to_dict() == {
        ("cosprune", "10%"): 4,
        ("cosprune", "30%"): 5,
        ("taylor", "10%"): 3,
        ("taylor", "30%"): 4,
    }
    row = table1(of).loc["2"]
    assert (row["seeds"], row["seeds_most"]) == (3, 4)


# --- equal MACs ---


def test_at_equal_macs_the_smaller_pruning_run_is_read_where_it_had_as_many():
    of = evidence(lambda *cell: {0: 0.7, 1: 0.5, 2: 0.2}[cell[3]] if cell[0] == "prune" else 1.0)
    rows = of.tables["prune_evaluations"]
    smaller = (rows["criterion"] == "cosprune") & (rows["parameters"] < 90_000)
    rows["macs"] = rows["macs"].where(~smaller, rows["macs"] // 2)  # half, at equal parameters
    of = claims.Evidence(of.experiment, of.tables)
    found = {name: cells.set_index(["size", "task"]) for name, cells in cells_of(of).items()}
    assert found["2i"]["estimate"].abs().max() < 1e-9, "alike at equal parameters"
    # CosPrune has Taylor's 300,000 MACs between 1,000,000 (keeping 1) and 150,000 (keeping 0.7).
    share = 1 - 0.3 * np.log(1_000_000 / 300_000) / np.log(1_000_000 / 150_000)
    at = found["2i (MACs)"].loc[("30%", "depth")]
    assert at["estimate"] == pytest.approx(share - 0.7) and at["seeds"] == 5


def test_re_trained_networks_of_other_macs_are_left_out_and_that_is_said():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    rows["macs"] = rows["parameters"] * 10
    rows.loc[(rows["criterion"] == "cosprune") & (rows["level"] == 1), "macs"] *= 1.04
    found = table1(claims.Evidence(base.experiment, base.tables))
    assert "5 of 10 pairs left out" in found.loc["2 (MACs)", "note"]
    assert found.loc["2 (MACs)", "highest_size"] == "30%" and found.loc["2", "note"] == ""
    rows.loc[rows["criterion"] == "cosprune", "macs"] *= 2
    found = table1(claims.Evidence(base.experiment, base.tables)).loc["2 (MACs)"]
    assert found["says"] == "no two networks compare" and found["paper"] == "cannot say"


# --- claim 1 ---


def test_claim_1_is_about_what_is_saved_and_says_at_which_price():
    def better_singles(stage, arm, criterion, level):
        if stage == "dense" and arm in TASKS:
            return 1.3
        return as_the_paper_says(stage, arm, criterion, level)

    found = verdicts(better_singles)
    row = found.loc["1"]
    assert (row["outcome"], row["paper"]) == ("saves", "agrees")
    assert row["says"].startswith(
        "67% of the parameters and 67% of the MACs saved against 3 full-size"
    )
    change = (0.5 - 0.62) / 0.62  # mIoU of 0.62 where single-task networks keep 1.3 of the gap
    assert f"to {change:+.1%} (segmentation)" in row["says"], "an average shows its extremes"
    strict = found.loc["1 strict"]
    assert strict["note"] == "those take 3.0 times the parameters and 3.0 times the MACs"
    of = evidence(better_singles)
    dense = of.tables["dense_evaluations"]
    dense.loc[dense["arm"] == "multitask", "macs"] *= 4
    assert claims.savings(claims.premise(of))["paper"] == "disagrees"


def test_the_premise_counts_the_backbone_of_every_single_task_network():
    def singles(stage, arm, criterion, level):
        return 0.9 if arm in TASKS else as_the_paper_says(stage, arm, criterion, level)

    table = claims.premise(evidence(singles))
    sizes = ["multi-task", "single-task", "saved"]
    assert table.loc["parameters", sizes].tolist() == [100_000, 300_000, pytest.approx(2 / 3)]
    activations = table.loc["activations_mib"]
    assert activations["single-task"] > 2 * activations["multi-task"]
    by_hand = ((0.5 - 0.46) / 0.46 + (0.22 - 0.2) / 0.22 + (22 - 20) / 22) / 3
    ends = table["multi-task"]
    assert ends[["delta_m", "delta_m_low", "delta_m_high"]].tolist() == [pytest.approx(by_hand)] * 3
    assert ends["seeds"] == 5


# --- claim 4: who was not at the end of its training ---


def paper_on(claim, kept=as_the_paper_says, **tables):
    base = evidence(kept)
    row = table1(claims.Evidence(base.experiment, base.tables | tables)).loc[claim]
    return row["outcome"], row["paper"], row["note"]


def test_unfinished_re_training_cannot_block_better_but_blocks_worse():
    def curve(kept):
        improving = made_up(kept)["retrain_curve"]
        # A quarter of the gap.
        improving.loc[improving["step"] == 1, "depth.relative_error"] += 0.05
        return improving

    outcome, paper, note = paper_on("4", retrain_curve=curve(as_the_paper_says))
    assert (outcome, paper) == ("better", "agrees")

    def behind(stage, arm, criterion, level):
        if arm == "iterative" and level in (0, 1):
            return 0.95
        return as_the_paper_says(stage, arm, criterion, level)

    assert paper_on("4", behind)[:2] == ("worse", "disagrees")
    outcome, paper, note = paper_on("4", behind, retrain_curve=curve(behind))
    assert (outcome, paper) == ("worse", "cannot say")
    assert "re-training is not at its end, more steps gain up to 0.25 (depth)" in note


def test_an_arm_that_more_steps_bring_further_was_not_at_its_end():
    """0.11 ahead with more steps, by a margin of 0.1: a flat end of the curve proves nothing."""

    def kept(*cell):
        if cell[1] == "finetune":
            return 0.95
        return as_the_paper_says(*cell) + 0.03 * (cell[1] == "scratch_longer")

    outcome, paper, note = paper_on("4 finetune", kept)
    assert (outcome, paper) == ("worse", "cannot say") and "re-training is not at its end" in note


def test_an_unfinished_opponent_blocks_better():
    def trained_on(*cell):  # fine-tuned, the iterative run's weights gain 0.12
        return as_the_paper_says(*cell) + 0.17 * (cell[1] == "finetune")

    for claim in ("4", "4 compute"):
        outcome, paper, note = paper_on(claim, trained_on)
        assert (outcome, paper) == ("better", "cannot say")
        assert "the iterative run is not at its end, more steps gain up to 0.12" in note
    assert paper_on("4 longer", trained_on)[0] == "better", "fine-tuning itself was at its end"
    assert paper_on("4 longer", trained_on)[1] == "agrees"

    def beyond_dense(*cell):  # fine-tuned, smaller networks are ahead of the dense network
        return 1.15 if cell[1] == "finetune" else as_the_paper_says(*cell)

    note = paper_on("4", beyond_dense)[2]
    assert "the dense network is not at its end, more steps gain up to 0.15" in note
    dense = made_up(as_the_paper_says)["dense_curve"]
    dense.loc[dense["step"] == 1, "normals.mean_angle"] += 4.0  # a fifth of the gap
    outcome, paper, note = paper_on("4", dense_curve=dense)
    assert (outcome, paper) == ("better", "cannot say") and "the dense network" in note


def test_an_opponent_of_which_nothing_shows_whether_it_was_at_its_end_blocks_better():
    rows = made_up(as_the_paper_says)["retrain_evaluations"]
    outcome, paper, note = paper_on("4", retrain_evaluations=rows[rows["arm"] != "finetune"])
    assert (outcome, paper) == ("better", "cannot say")
    assert "nothing shows whether the iterative run is at its end" in note


@pytest.mark.parametrize("longer, paper", [(0.3, "cannot say"), (0.88, "agrees")])
def test_re_training_for_less_than_equal_compute_may_agree_but_not_disagree(longer, paper):
    capped = evidence(changed(lambda stage, arm, c, r: arm == "scratch_longer", longer))
    capped.tables["retrain_evaluations"]["steps"] = 1000
    # Taylor's and CosPrune's networks alike: 1300 dense steps, then 100 at each size on the way.
    spent = 1300 * 10**6 + 100 * 10**6 + np.array([0, 100 * 10 * SIZES[0]])
    shares = 1000 * 10 * np.array([SIZES[0], SIZES[1] + 50]) / spent
    assert sorted(set(capped.equal_compute_shares().round(6))) == sorted(shares.round(6))
    row = table1(capped).loc["4 compute"]
    assert row["paper"] == paper
    assert f"given {shares.min():.0%} to {shares.max():.0%} of equal compute" in row["note"]


def test_the_decisive_contrast_tells_the_steps_in_all_of_both_sides():
    row = verdicts(as_the_paper_says).loc["4 longer"]
    # 100,000 steps; or dense training (1300), pruning (100 or 200) and as many again.
    assert "100000 steps in all against 101400 to 101500" in row["note"]


# --- what leaves a claim open ---


def test_claim_2_is_about_tuned_networks_and_says_what_decides_it():
    untuned = verdicts(as_the_paper_says, **{"tuning.trials": 0})
    for claim in ("2", "2 literal", "2i", "2i literal"):
        assert untuned.loc[claim, "paper"] == "cannot say"
        assert "not tuned" in untuned.loc[claim, "note"]
        assert untuned.loc[claim, "decided_by"] == "make study"
    assert untuned.loc["3", "decided_by"] == "", "it agrees"
    real = Experiment(get_profile("fashion"), "multifashion", "somewhere")
    command = "make figures PROFILE=fashion DATA=multifashion ROOT=... OVERRIDES="
    assert claims.deciding_command(real).startswith(command)
    assert claims.deciding_command(Experiment(get_profile("study"))) == ""


def test_networks_that_learnt_nothing_decide_nothing():
    def nothing(stage, arm, criterion, level):
        return -0.5 if stage == "dense" else as_the_paper_says(stage, arm, criterion, level)

    found = verdicts(nothing).drop("1")
    claimed = found[found["paper"] != "not claimed"]
    assert (claimed["paper"] == "cannot say").all()
    assert claimed["note"].str.contains("does not beat the position prior").all()


def test_sizes_at_which_both_criteria_left_the_same_widths_are_left_out():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    same = (rows["level"] == 1) & (rows["seed"] == 0)
    rows.loc[same, "widths"] = "5 5"
    rows.loc[same & (rows["criterion"] == "taylor"), "segmentation.miou"] = 0.1  # as if by chance
    of = claims.Evidence(base.experiment, base.tables)
    cells = cells_of(of)["2"]
    assert cells.groupby("size")["seeds"].first().to_dict() == {"10%": 4, "30%": 5}
    assert cells["estimate"].abs().max() < 1e-9
    assert "1 of 10 pairs left out: the same widths" in table1(of).loc["2", "note"]


def test_a_network_of_another_size_is_not_compared():
    base = evidence(as_the_paper_says)
    rows = base.tables["retrain_evaluations"]
    rows.loc[rows["level"] == 1, "parameters"] = 10_400  # 4 % off
    points = claims.Evidence(base.experiment, base.tables).points
    assert set(points[points["arm"] == "scratch"]["level"]) == {0}


def test_a_study_of_which_only_the_first_runs_are_finished_is_judged_as_far_as_it_goes():
    base = evidence(as_the_paper_says)
    tables = dict(base.tables)
    for name in ("retrain_evaluations", "retrain_curve", "prune_evaluations"):
        tables[name] = pd.DataFrame()
        found = table1(claims.Evidence(base.experiment, tables))
        assert found.loc["4", "says"] == "no run of it is finished"
        assert found.loc["4", "paper"] == "cannot say"
    begun = claims.Evidence(base.experiment, tables)
    assert csv_text(claims.collapses(begun).to_dict("records")) == ""
    assert begun.training_curves().empty
    dense = base.tables["dense_evaluations"]
    tables["dense_evaluations"] = dense[(dense["arm"] != "multitask") | (dense["seed"] > 0)]
    assert 0 not in claims.changes_by_seed(claims.Evidence(base.experiment, tables)).index
    tables["dense_evaluations"] = dense[dense["arm"] == "multitask"]
    assert table1(claims.Evidence(base.experiment, tables)).loc["1", "paper"] == "cannot say"
    tables["dense_evaluations"] = base.tables["dense_evaluations"].query("seed > 90")
    with pytest.raises(ValueError, match="no dense network of the evaluation's seeds is finished"):
        claims.Evidence(base.experiment, tables)


@pytest.mark.parametrize("seeds, words", [(1, "one seed decides"), (2, "two seeds decide")])
def test_one_or_two_seeds_decide_nothing_and_that_is_said(seeds, words):
    base = evidence(as_the_paper_says)
    few = {name: table[table["seed"] < seeds] for name, table in base.tables.items()}
    of = claims.Evidence(base.experiment, few)
    found = table1(of).drop("1")
    claimed = found[found["paper"] != "not claimed"]
    assert (claimed["paper"] == "cannot say").all()
    assert claimed["note"].str.contains(f"{words} nothing").all()
    table, cells = claims.judge(of)
    assert len(fig5_claims(table, cells, 0.1)[1]) == len(cells)


def test_equal_arms_with_independent_noise_are_seldom_told_apart():
    """Cells, pairing and Holm leave the error rate alone: of 60 studies of nothing few find any."""
    generator, found = np.random.default_rng(0), []

    def kept(*cell):
        noise = {task: 0.7 + generator.normal(0, 0.1) for task in TASKS}
        return 1.0 if cell[0] == "dense" else noise

    for _ in range(60):
        of = evidence(kept)
        values = [
            of.compare([("", ("scratch", "cosprune"), ("scratch", "taylor"))])[0],
            of.compare([("", ("iterative", "cosprune"), ("iterative", "random"))])[0],
            of.ahead("scratch", "finetune"),
        ]
        judged = [statistics.judge_cells(v.mean(), v.std(), v.count(), "zero", 0.1) for v in values]
        found.append([(cells["outcome"] == "differs").any() for cells in judged])
    assert np.mean(found, axis=0).max() <= 0.15, "5 % expected, each, over 60 studies"


def test_the_collapse_table_counts_seeds_and_censors():
    found = claims.collapses(evidence(as_the_paper_says)).set_index(
        ["criterion", "schedule", "task"]
    )
    assert (found["seeds"] == 5).all()
    assert found.loc[("taylor", "geometric", "depth"), "collapsed"] == 5
    assert found.loc[("random", "iterative", "depth"), "median_parameters"] == SIZES[1] + 50
    never = claims.collapses(evidence(lambda *cell: 0.9))
    assert (never["collapsed"] == 0).all() and never["median_parameters"].isna().all()
    own = found.loc[("taylor", "iterative"), "earlier"]
    assert own.isna().all(), "it is what the controls are held against"
    assert (found.loc[("taylor", "geometric"), ["earlier", "later", "tied"]].sum(axis=1) == 5).all()
    controls = never[never["schedule"] != "iterative"]
    assert len(controls) and (controls["tied"] == 5).all() and (controls["p_sign"] == 1).all()


def test_training_curves_are_drawn_by_criterion_size_and_task():
    curves = evidence(as_the_paper_says).training_curves()
    figure, means = fig6_training_curves(curves, get_profile("quick").sizes)
    assert len(figure.axes) == 2 * 2 * 3
    assert set(means["arm"]) == {"scratch", "scratch_longer", "finetune"}


# --- the tables: collected from run folders, and laid out again ---

TINY = test_runs.TINY | {"seeds": 1, "criteria": ["taylor"], "controls.seeds": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    experiment = Experiment.open("smoke", "rooms", "", str(place / "runs"), TINY)
    for run in experiment.runs():
        execute(run, report=lambda line: None)
    return experiment, place / "figures", tables.collect(experiment, place / "figures")


def test_the_tables_hold_every_run(finished):
    experiment, figures, tables = finished
    assert len(experiment.runs()) == 3
    assert set(tables["prune_evaluations"]["criterion"]) == {"taylor"}
    assert len(tables["retrain_evaluations"]) == 1
    assert tables["prune_evaluations"]["target_level"].notna().sum() == 1
    stored = (figures / "smoke-custom/results/runs.jsonl").read_text()
    records = [json.loads(line) for line in stored.splitlines()]
    assert [record["name"] for record in records] == [run.name for run in experiment.runs()]
    assert all(record["files"]["provenance.json"]["commit"] for record in records)


def test_read_only_they_are_the_same_and_no_file_is_written(finished, tmp_path):
    experiment, _, known = finished
    found = tables.collect(experiment, tmp_path / "figures", write=False)
    assert found.keys() == known.keys() and not (tmp_path / "figures").exists()
    for name, table in known.items():
        pd.testing.assert_frame_equal(found[name], table)


def test_the_claims_notebook_opened_alone_writes_nothing_and_says_what_it_is_at(finished, tmp_path):
    experiment, figures, _ = finished

    def files():
        found = (*figures.rglob("*.*"), *PROJECT.glob("figures/**/*.*"))
        return {path: path.stat().st_mtime_ns for path in found}

    written = files()
    parameters = {"profile": "smoke", "runs": str(experiment.root), "overrides": TINY}
    executed = tmp_path / "alone.ipynb"
    notebook.execute(store.figure_notebooks()["fig5_claims"], executed, parameters)
    assert files() == written
    assert [path.name for path in tmp_path.iterdir()] == ["alone.ipynb"]
    outputs = [o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    for line in ("reading the tables of 3 runs", "judging every comparison", "drawing "):
        assert line in said
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2


def test_run_folders_laid_out_from_the_tables_are_those_that_were(finished, tmp_path):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    assert tables.restore(elsewhere, figures) == 3 and tables.restore(elsewhere, figures) == 0
    for run, again in zip(experiment.runs(), elsewhere.runs()):
        assert again.done and not again.path("model.safetensors").exists()
        for file in again.folder.iterdir():
            if file.name == "done.json":  # it knows of no weights
                all_files = read_json(run.path(file.name))["files"]
                assert read_json(file)["files"].items() <= all_files.items()
            else:
                assert file.read_bytes() == run.path(file.name).read_bytes()
    before = {file.name: file.read_bytes() for file in (figures / "smoke-custom/results").iterdir()}
    tables.collect(elsewhere, figures)
    after = {file.name: file.read_bytes() for file in (figures / "smoke-custom/results").iterdir()}
    assert after == before


def test_runs_that_the_profile_itself_has_in_its_tables_are_shared(finished, tmp_path):
    _, figures, _ = finished
    shutil.copytree(figures / "smoke-custom", tmp_path / "figures/smoke")
    more = TINY | {"criteria": ["taylor", "random"]}
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), more)
    assert elsewhere.label == "smoke-custom"
    assert tables.restore(elsewhere, tmp_path / "figures") == 3
    missing = [run for run in elsewhere.runs() if not run.done]
    assert {run.criterion for run in missing if run.stage != "score"} == {"random"}


def test_weights_that_lie_where_a_run_is_laid_out_again_are_not_taken_for_its_own(
    finished, tmp_path
):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    run, source = elsewhere.prune("taylor", 0), experiment.prune("taylor", 0).path(at_level(0))
    write_atomically(run.path(at_level(0)), source.read_bytes() + b" ")
    write_atomically(elsewhere.dense(0).path("checkpoints/step000000001-0.safetensors"), b"")
    tables.restore(elsewhere, figures)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    before = run.content
    restore_weights(elsewhere.retrain("taylor", 0, 0, "finetune"))
    assert run.content == before, "or all that was made from it would count as out of date"
    files = read_json(run.path("done.json"))["files"]
    assert files[at_level(0)] == checksum(source) == checksum(run.path(at_level(0)))
    assert not list((tmp_path / "runs" / "repeated").iterdir())


def test_a_run_whose_weights_are_gone_is_repeated_for_them(finished, tmp_path):
    experiment, figures, _ = finished
    elsewhere = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    tables.restore(elsewhere, figures)
    run = elsewhere.runs()[-1]
    marks = {file: file.stat().st_mtime_ns for file in run.source.folder.iterdir()}
    assert retrain.found_architecture(run) == retrain.found_architecture(experiment.runs()[-1])
    assert {file: file.stat().st_mtime_ns for file in marks} == marks


def test_rows_of_runs_that_are_not_of_the_grid_any_more_are_dropped(finished, tmp_path):
    figures = shutil.copytree(finished[1], tmp_path / "figures")
    other = Experiment.open(
        "smoke", "rooms", "", str(tmp_path / "runs"), TINY | {"retrain.lr": 0.5}
    )
    assert tables.restore(other, figures) == 2
    assert tables.collect(other, figures)["retrain_evaluations"].empty
    nothing = Experiment.open("smoke", "rooms", "", str(tmp_path / "nothing"), TINY)
    with pytest.raises(FileNotFoundError, match="make figures PROFILE=smoke"):
        tables.collect(nothing, tmp_path / "empty")
