"""Curves over seeds against values worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from mtprune_utils import stats


def test_curve_over_seeds_interpolates_in_log_size_over_the_common_range():
    table = pd.DataFrame({"seed": [0, 0, 0, 1, 1], "size": [1, 10, 100, 100, 1], "y": [0.0, 1.0, 2.0, 4.0, 2.0]})
    curve = stats.curve_over_seeds(table, "size", "y", points=5)
    assert curve["x"].tolist() == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    # Seed 0 is log10(size), seed 1 is 2 + log10(size): the mean lies 1 above the first, 2 apart is an sd of sqrt(2).
    assert curve["mean"].tolist() == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert curve["sd"].tolist() == pytest.approx([2**0.5] * 5)
    assert (curve["seeds"] == 2).all()
    table.loc[4, "size"] = 50  # seed 1 now starts later
    assert stats.curve_over_seeds(table, "size", "y")["x"].min() == pytest.approx(50)


def test_one_seed_has_no_spread():
    table = pd.DataFrame({"seed": [0, 0], "size": [1, 10], "y": [0.0, 1.0]})
    assert stats.curve_over_seeds(table, "size", "y")["sd"].isna().all()


def test_points_over_seeds_average_both_axes():
    table = pd.DataFrame({"seed": [0, 1, 0, 1], "rank": [0, 0, 1, 1], "size": [10, 20, 1, 3], "y": [1.0, 3.0, 5.0, 5.0]})
    points = stats.points_over_seeds(table, "size", "y", by="rank")
    assert points.to_numpy().tolist() == [pytest.approx([15, 2, np.sqrt(2), 2]), pytest.approx([2, 5, 0, 2])]


def test_shares_are_relative_to_the_dense_network_of_the_same_run():
    table = pd.DataFrame({
        "criterion": ["a"] * 4, "seed": [0, 0, 1, 1], "removal": [0, 1, 0, 1], "layer": 0, "width": [8, 4, 10, 1],
    })
    assert stats.with_share(table)["share"].tolist() == [1, 0.5, 1, 0.1]
