"""Criteria under one protocol: when two are told apart, what is held against what; agreement."""

import json

import numpy as np
import pandas as pd
import pytest
import readme
import torch

from mtprune_utils import registry
from mtprune_utils.core.iterative import Removal, _repeated
from mtprune_utils.stages.retrain import FINETUNE_SHUFFLED
from mtprune_utils.stages.score import agreement
from mtprune_utils.study import comparison
from mtprune_utils.study import statistics as stats
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES, get_profile


def values(means, seeds=3, sd=0.05, seed=0):
    """One column per arm; each seed has a level of its own, as networks of one seed have."""
    random = np.random.default_rng(seed)
    levels = random.normal(0, 1, (seeds, 1))
    return pd.DataFrame(levels + means + random.normal(0, sd, (seeds, len(means))))


# --- Tukey's intervals ---


def test_intervals_of_a_table_in_a_textbook():
    """q(0.05; 3 means, 12) is 3.77, in any table of the studentized range."""
    table = values([0.0, 0.1, 0.2], seeds=7)
    residuals = table.sub(table.mean(axis=1), axis=0) - (table.mean() - table.to_numpy().mean())
    sd = np.sqrt((residuals.to_numpy() ** 2).sum() / 12)
    found = stats.tukey_intervals(table)
    half = 3.77 * sd / np.sqrt(7) / 2
    np.testing.assert_allclose(found["high"] - table.mean(), half, rtol=2e-3)
    np.testing.assert_allclose(table.mean() - found["low"], half, rtol=2e-3)


def test_without_differences_one_comparison_in_twenty_finds_any():
    wrong = 0
    for seed in range(400):
        found = stats.tukey_intervals(values(np.zeros(6), seed=seed))
        wrong += found["low"].max() > found["high"].min()
    assert 0.02 < wrong / 400 < 0.09


def test_a_seeds_own_level_makes_no_interval_wider():
    table = values([0.0, 0.5, 1.0])
    shifted = table.add(np.array([0.0, 10.0, -20.0]), axis=0)
    widths = [
        (found["high"] - found["low"]).to_numpy()
        for found in map(stats.tukey_intervals, (table, shifted))
    ]
    np.testing.assert_allclose(*widths)


def test_an_arm_that_lacks_a_seed_has_no_interval_and_leaves_the_others_theirs():
    table = values([0.0, 0.5, 1.0, 2.0])
    whole = stats.tukey_intervals(table[[0, 1, 3]])
    table.loc[1, 2] = np.nan
    found = stats.tukey_intervals(table)
    assert found.loc[2].isna().all()
    pd.testing.assert_frame_equal(found.drop(2), whole)
    assert stats.tukey_intervals(table[:1]).isna().all(axis=None), "of one seed"


# --- what is held against what ---


def row(arm, criterion, level, task, low, high, family="finetune"):
    return {
        "family": family,
        "level": level,
        "task": task,
        "arm": arm,
        "criterion": criterion,
        "mean": (low + high) / 2,
        "sd": 0.1,
        "low": low,
        "high": high,
        "seeds": 3,
    }


TABLE = pd.DataFrame(
    [
        *(row("finetune", "random", level, "depth", 0.4, 0.5) for level in range(3)),
        row("finetune", "taylor", 0, "depth", 0.6, 0.7),
        row("finetune", "taylor", 1, "depth", 0.3, 0.35),
        row("finetune", "taylor", 2, "depth", 0.5, 0.6),
        row(FINETUNE_SHUFFLED, "taylor", 0, "depth", 0.65, 0.75),
        row(FINETUNE_SHUFFLED, "taylor", 1, "depth", 0.1, 0.2),
        row("scratch", "uniform", 0, "depth", 0.1, 0.2, "scratch"),
        row("scratch", "random", 0, "depth", 0.3, 0.4, "scratch"),
    ]
)


def test_cells_that_are_told_apart_are_counted_by_intervals_that_do_not_overlap():
    found = comparison.against(TABLE, "finetune", "finetune", "random")
    assert found.to_dict("index") == {"taylor": {"ahead": 1, "behind": 1, "cells": 3}}
    found = comparison.against(TABLE, "finetune", FINETUNE_SHUFFLED)
    assert found.to_dict("index") == {"taylor": {"ahead": 1, "behind": 0, "cells": 2}}
    found = comparison.against(TABLE, "scratch", "scratch", "uniform")
    assert found.to_dict("index") == {"random": {"ahead": 1, "behind": 0, "cells": 1}}


def test_the_summary_has_every_criterion_and_is_empty_where_nothing_was_compared():
    found = comparison.summary(TABLE)
    assert list(found.index) == ["random", "taylor"], "by what they read, uniform widths left out"
    assert found.loc["taylor", "fine-tuned, random filters"] == "1 +, 1 −, of 3"
    assert found.loc["taylor", "re-trained, uniform widths"] == ""


def test_the_readme_says_what_is_told_apart_and_what_is_not(tmp_path):
    place = tmp_path / "zoo"
    place.mkdir()
    TABLE.to_csv(place / "fig8_criteria.csv", index=False)
    about = {"profile": {"sizes": [0.5, 0.3, 0.15], "criteria": ["random", "taylor"]}, "seeds": [0]}
    (place / "fig8_criteria.json").write_text(json.dumps(about))
    *_, row = readme.zoo_table(tmp_path).splitlines()
    cells = row.strip("| ").split(" | ")
    assert cells[1:3] == ["1 both (taylor)", "1 ahead (random)"]
    assert cells[3] == "of 2 cells, 1 ahead and 0 behind (taylor)"
    only = TABLE[TABLE["level"] == 0].assign(low=lambda rows: rows["low"].where(rows.index < 0))
    only.to_csv(place / "fig8_criteria.csv", index=False)
    assert readme.zoo_table(tmp_path) == "", "one seed tells nothing apart"


def test_criteria_stand_in_the_order_of_what_they_read():
    found = comparison.in_order([*registry.names("criteria"), "uniform", "taylor"])
    assert found[-1] == "uniform" and len(found) == len(set(found))
    places = [found.index(name) for name in ("l1", "apoz", "taylor", "cosprune")]
    assert places == sorted(places)


# --- agreement ---


def test_agreement_is_the_rank_correlation_over_all_filters_and_within_layers():
    one = [torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0, 7.0])]
    same = agreement(one, [of.exp() for of in one])
    assert same == pytest.approx({"spearman": 1.0, "within_layers": 1.0, "overlap": 1.0})
    other = [one[0] + 10, one[1] - 10]  # the same filters of each layer, other widths
    swapped = agreement(one, other)
    ranks = np.corrcoef(np.arange(8), [4, 5, 6, 7, 0, 1, 2, 3])[0, 1]
    assert swapped == pytest.approx({"spearman": ranks, "within_layers": 1.0, "overlap": 0.0})
    inverse = agreement(one, [-of for of in one])
    assert inverse == pytest.approx({"spearman": -1.0, "within_layers": -1.0, "overlap": 0.0})


def test_scores_that_are_all_equal_agree_with_nothing():
    one = [torch.rand(4), torch.zeros(3)]
    assert agreement(one, [torch.ones(4), torch.ones(3)])["spearman"] is None
    assert agreement(one, one)["within_layers"] == pytest.approx(1), "of the first layer alone"


# --- the grid ---


def test_shuffled_filters_go_as_many_of_each_layer():
    scores = [torch.tensor([0.3, 0.1, 0.2]), torch.tensor([5.0, 4.0])]
    chosen, level = _repeated(Removal([2, 0], 1), scores)
    assert [units.tolist() for units in chosen] == [[1, 2], []] and level == 1


def test_the_zoo_has_every_criterion_and_each_control(tmp_path):
    experiment = Experiment(get_profile("zoo"), root=tmp_path)
    runs = experiment.runs()
    cells = {(run.stage, run.criterion, run.level, run.arm) for run in runs if run.seed == 2}
    for criterion in registry.names("criteria"):
        assert ("prune", criterion, None, "iterative") in cells
        for level in range(len(experiment.profile.sizes)):
            assert {("retrain", criterion, level, arm) for arm in ("scratch", "finetune")} <= cells
    assert ("retrain", "taylor", 2, FINETUNE_SHUFFLED) in cells
    assert ("retrain", "uniform", 2, "scratch") in cells and ("score", None, None, "") in cells
    assert len(runs) == len({run.folder for run in runs})
    about = {"question": "criteria"}
    assert experiment.draws(about) and not experiment.draws({})
    assert not Experiment(PROFILES["quick"]).draws(about)


def test_a_shuffled_run_starts_from_the_dense_network_and_repeats_the_criterions_own(tmp_path):
    experiment = Experiment(get_profile("zoo"), root=tmp_path)
    tuned = experiment.retrain("taylor", 1, 0, FINETUNE_SHUFFLED)
    shuffled = tuned.source
    assert shuffled.arm == "shuffled" and shuffled.inputs == [
        experiment.dense(1),
        experiment.prune("taylor", 1),
    ]
    assert experiment.prune("taylor", 1).replayed is None
