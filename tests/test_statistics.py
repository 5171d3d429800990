"""Curves over seeds against values worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mtprune_utils.study import statistics


def test_curve_over_seeds_interpolates_in_log_size_over_the_common_range():
    table = pd.DataFrame(
        {"seed": [0, 0, 0, 1, 1], "size": [1, 10, 100, 100, 1], "y": [0.0, 1.0, 2.0, 4.0, 2.0]}
    )
    curve = statistics.curve_over_seeds(table, "size", "y", points=5)
    assert curve["x"].tolist() == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    # Seed 0 is log10(size), seed 1 is 2 + log10(size): the mean lies 1 above the first, 2 apart is
    # an sd of sqrt(2).
    assert curve["mean"].tolist() == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert curve["sd"].tolist() == pytest.approx([2**0.5] * 5)
    assert (curve["seeds"] == 2).all()
    table.loc[4, "size"] = 50  # seed 1 now starts later
    assert statistics.curve_over_seeds(table, "size", "y")["x"].min() == pytest.approx(50)


def test_one_seed_has_no_spread():
    table = pd.DataFrame({"seed": [0, 0], "size": [1, 10], "y": [0.0, 1.0]})
    assert statistics.curve_over_seeds(table, "size", "y")["sd"].isna().all()


def test_points_over_seeds_average_both_axes_and_have_students_interval():
    columns = {
        "seed": [0, 1, 0, 1],
        "level": [0, 0, 1, 1],
        "size": [10, 20, 1, 3],
        "y": [1.0, 3, 5, 5],
    }
    points = statistics.points_over_seeds(pd.DataFrame(columns), "size", "y", by="level")
    half = scipy.stats.t.ppf(0.975, 1) * 1.0  # sd sqrt(2) over sqrt(2) seeds
    expected = [[0, 15, 2, np.sqrt(2), 2 - half, 2 + half, 2], [1, 2, 5, 0, 5, 5, 2]]
    assert points.to_numpy().tolist() == [pytest.approx(row) for row in expected]
    one = statistics.points_over_seeds(pd.DataFrame(columns)[::2], "size", "y", by="level")
    assert one[["sd", "low", "high"]].isna().all(axis=None)


# --- matching by size ---


def test_values_at_a_size_are_the_nearest_rows_or_interpolated_in_log_size():
    rows = pd.DataFrame({"parameters": [1000, 100, 10_000], "y": [2.0, 1.0, 4.0]})
    assert statistics.value_at(rows, 1020, "y") == 2.0, "within 3 %"
    assert statistics.value_at(rows, 10**3.5, "y") == pytest.approx(3.0)
    assert statistics.value_at(rows, 10**2.25, "y") == pytest.approx(1.25)
    assert np.isnan(statistics.value_at(rows, 50, "y"))
    assert np.isnan(statistics.value_at(rows, 20_000, "y"))


def test_points_at_sizes_are_of_the_run_that_was_tuned_for_them():
    def run(level, y, target_level):
        return {
            "criterion": "a",
            "seed": 0,
            "arm": "iterative",
            "level": level,
            "target_level": target_level,
            "parameters": [1000, 300, 100],
            "widths": ["dense", "mid", "small"],
            "y": y,
        }

    tuned = pd.concat(
        [
            pd.DataFrame(run(0, [1.0, 2.0, 3.0], [np.nan, 0, np.nan])),
            pd.DataFrame(run(1, [1.0, 5.0, 6.0], [np.nan, 0, 1])),
        ]
    )
    points = statistics.at_sizes(tuned, {0: 300, 1: 100}, ["y", "parameters"])
    assert points[["level", "y", "widths"]].values.tolist() == [[0, 2.0, "mid"], [1, 6.0, "small"]]
    serves_all = pd.DataFrame(run(np.nan, [1.0, 2.0, 3.0], np.nan))
    points = statistics.at_sizes(serves_all, {0: 1000 * 10**-0.25, 1: 10}, ["y"])
    share = np.log(10**0.25) / np.log(1000 / 300)
    assert points["y"].tolist() == [pytest.approx(1 + share), pytest.approx(np.nan, nan_ok=True)]


def test_collapse_is_where_less_than_half_stays_less_than_half_and_censored_if_it_does_not():
    table = pd.DataFrame(
        {
            "seed": [0, 0, 0, 1, 1, 1],
            "parameters": [10, 100, 50, 100, 50, 10],
            "a": [0.3, 0.9, 0.4, 0.9, 0.8, 0.6],
            "b": [0.6, 0.4, 0.6, 0.9, 0.5, 0.1],
        }
    )
    sizes = statistics.collapse_sizes(table, ["a", "b"])
    assert sizes["a"].tolist()[0] == 50 and np.isnan(sizes.loc[1, "a"])
    assert np.isnan(sizes.loc[0, "b"]), "a dip it came back from"
    assert sizes.loc[1, "b"] == 10
    nothing = statistics.collapse_sizes(table.assign(a=0.1), ["a"])
    assert nothing["a"].tolist() == [100, 100]


def test_collapses_are_ordered_by_seed_and_censored_ones_come_last():
    one = pd.Series({0: 100.0, 1: 50, 2: 50, 3: np.nan, 4: np.nan, 5: 80, 9: 1})
    other = pd.Series({0: 60.0, 1: 50.5, 2: np.nan, 3: 20, 4: np.nan, 5: 40, 8: 1})
    order = statistics.collapse_order(one, other)
    assert (order["earlier"], order["later"], order["tied"]) == (3, 1, 2), (
        "seeds 8 and 9 have no partner"
    )
    assert order["p_sign"] == pytest.approx(scipy.stats.binomtest(3, 4).pvalue)
    assert statistics.collapse_order(other, one)["later"] == 3
    ahead = statistics.collapse_order(pd.Series(np.full(8, 2.0)), pd.Series(np.full(8, 1.0)))
    assert ahead["p_sign"] == pytest.approx(2 / 2**8)
    assert statistics.collapse_order(one, one)["p_sign"] == 1.0


# --- intervals and tests against SciPy ---

VALUES = np.array([0.3, -0.1, 0.4, 0.2, 0.5, 0.1])


def spread(values):
    return values.mean(-1), values.std(-1, ddof=1), values.shape[-1]


@pytest.mark.parametrize("seeds", [2, 3, 8, 10, 12, 20])
def test_intervals_are_students_whatever_the_number_of_seeds(seeds):
    values = np.random.default_rng(seeds).normal(0.2, 1, seeds)
    reference = scipy.stats.ttest_1samp(values, 0)
    assert statistics.p_value(*spread(values)) == pytest.approx(reference.pvalue)
    for level in (0.05, 0.1, 0.05 / 12):
        interval = reference.confidence_interval(1 - level)
        expected = pytest.approx((interval.low, interval.high))
        assert statistics.interval(*spread(values), level) == expected
    shifted = scipy.stats.ttest_1samp(values, 0.2).pvalue
    assert statistics.p_value(*spread(values), null=0.2) == pytest.approx(shifted)


def test_one_seed_says_nothing_and_equal_values_say_all():
    assert statistics.interval(0.3, np.nan, 1, 0.05) == (-np.inf, np.inf)
    assert statistics.p_value(0.3, np.nan, 1) == 1
    assert statistics.interval(0.25, 0.0, 4, 0.05) == (0.25, 0.25)
    assert statistics.p_value(0.25, 0.0, 4) == 0
    assert statistics.p_value(0.25, 0.0, 4, null=0.25) == 1


def test_holm_levels_are_those_of_the_step_down_procedure():
    levels = statistics.holm_levels(
        np.array([[0.03, 0.001, 0.04], [0.02, 0.001, 0.04], [0.3, 0.2, 0.1]])
    )
    # In the first row 0.03 is not rejected, so 0.04 is judged like it.
    expected = [[0.05 / 2, 0.05 / 3, 0.05 / 2], [0.025, 0.05 / 3, 0.05], [0.05 / 3] * 3]
    assert levels.tolist() == [pytest.approx(row) for row in expected]


# --- outcomes ---

NARROW = np.array([-0.01, 0.0, 0.01, 0.0])
WIDE = NARROW * 30


def judged(rule, *cells):
    found = statistics.judge_cells(*spread(np.array(cells)), rule, 0.1)
    return found["outcome"].tolist(), statistics.judge_all(found["outcome"], rule)


@pytest.mark.parametrize(
    "rule, cells, outcomes, whole",
    [
        (
            "two-sided",
            [NARROW, NARROW + 0.02],
            ["equivalent"] * 2,
            "equivalent",
        ),  # differs, within it
        ("two-sided", [NARROW, NARROW + 0.2], ["equivalent", "different"], "different"),
        ("two-sided", [NARROW + 0.2, NARROW - 0.2], ["different"] * 2, "different"),  # no average
        (
            "two-sided",
            [NARROW, NARROW + 0.1],
            ["equivalent", "differ, size open"],
            "differ, size open",
        ),
        ("two-sided", [NARROW, WIDE], ["equivalent", "inconclusive"], "inconclusive"),
        ("zero", [NARROW, NARROW + 0.03], ["not told apart", "differs"], "differs"),
        ("zero", [NARROW, WIDE], ["not told apart"] * 2, "not told apart"),
        ("ahead", [NARROW + 0.1, NARROW + 0.2], ["better"] * 2, "better"),
        ("ahead", [NARROW + 0.1, NARROW], ["better", "no worse"], "no worse"),
        (
            "ahead",
            [NARROW + 0.1, NARROW - 0.05],
            ["better", "no worse"],
            "no worse",
        ),  # within margin
        ("ahead", [NARROW + 0.1, NARROW - 0.2], ["better", "worse"], "mixed"),
        ("ahead", [NARROW, NARROW - 0.2], ["no worse", "worse"], "worse"),
        ("ahead", [NARROW + 0.1, WIDE], ["better", "inconclusive"], "inconclusive"),
        ("half", [NARROW + 0.1, NARROW - 0.2], ["below half"] * 2, "below half"),
        ("half", [NARROW + 0.1, NARROW + 0.9], ["below half", "above half"], "above half"),
        ("half", [NARROW + 0.1, WIDE + 0.5], ["below half", "inconclusive"], "inconclusive"),
    ],
)
def test_rules(rule, cells, outcomes, whole):
    assert judged(rule, *cells) == (outcomes, whole)


REPETITIONS = 2000
SD = 0.08  # of a cell's paired differences: between those of the committed study, 0.03 and 0.17


def simulated(rule, means, seeds, margin=0.1):
    """Outcomes of made-up studies: (repetitions, cells); a seed's cells hang together."""
    generator = np.random.default_rng(seeds)
    common, own = (generator.normal(size=(REPETITIONS, c, seeds)) for c in (1, len(means)))
    values = np.array(means)[:, None] + SD * (0.6 * common + 0.8 * own)
    return statistics.judge_cells(*spread(values), rule, margin)["outcome"]


@pytest.mark.parametrize("seeds", [3, 8, 10, 12, 20])
def test_type_1_error_is_5_percent_with_any_number_of_seeds(seeds):
    assert 0.035 <= (simulated("zero", [0.0], seeds) == "differs").mean() <= 0.065
    above = simulated("ahead", [0.0], seeds) == "better"
    assert 0.0175 <= above.mean() <= 0.0325, "half of 5 % on one side"
    # Of six cells, any: Holm keeps 5 % for all together, and cells that hang together err less.
    assert 0.02 <= (simulated("zero", [0.0] * 6, seeds) == "differs").any(axis=1).mean() <= 0.065


@pytest.mark.parametrize("seeds", [3, 8, 12, 20])
def test_equivalence_at_the_margin_is_found_in_5_percent_at_most(seeds):
    for at in (0.1, -0.1):
        assert (simulated("two-sided", [at], seeds) == "equivalent").mean() <= 0.065
    if seeds >= 12:
        assert (simulated("two-sided", [0.0] * 6, seeds) == "equivalent").mean() >= 0.95


@pytest.mark.parametrize("seeds", [3, 8, 12])
def test_different_means_beyond_the_margin(seeds):
    inside = simulated("two-sided", [0.05] * 6, seeds)
    assert (inside == "different").any(axis=1).mean() < 0.01, "a true difference of half a margin"
    at = simulated("two-sided", [0.1] * 6, seeds)
    assert (at == "different").any(axis=1).mean() <= 0.05
    if seeds >= 8:
        beyond = simulated("two-sided", [0.2] * 6, seeds)
        assert (beyond == "different").any(axis=1).mean() > 0.95


def test_opposite_effects_are_called_different_never_even():
    found = simulated("two-sided", [0.2, 0.2, 0.2, -0.2, -0.2, -0.2], 8)
    wholes = [statistics.judge_all(study, "two-sided") for study in found]
    assert "equivalent" not in wholes and wholes.count("different") > 0.95 * REPETITIONS


def test_the_seeds_that_would_decide():
    mean, sd = np.array([0.02, -0.01]), np.array([0.2, 0.1])
    enough = statistics.seeds_to_decide(mean, sd, [6, 6], "two-sided", 0.1, {"equivalent"})
    for seeds, expected in ((enough - 1, "inconclusive"), (enough, "equivalent")):
        cells = statistics.judge_cells(mean, sd, seeds, "two-sided", 0.1)["outcome"]
        assert statistics.judge_all(cells, "two-sided") == expected
    assert (
        statistics.seeds_to_decide(np.zeros(1), np.ones(1), [6], "ahead", 0.1, {"better"}) is None
    )
