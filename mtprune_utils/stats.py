"""Curves over seeds from result tables: pure functions over tidy data frames, one row per evaluation."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from mtprune_utils.runs import Run


def gather(runs: Iterable[Run], file: str) -> pd.DataFrame:
    """One table of the given file of every run, with columns stage, criterion, seed and rank in front."""
    tables = []
    for run in runs:
        table = pd.read_csv(run.path(file))
        cell = {"stage": run.stage, "criterion": run.criterion, "seed": run.seed, "rank": run.rank}
        tables.append(pd.concat([pd.DataFrame([cell] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def mean_and_sd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over axis 0 (seeds); the latter is NaN for a single seed."""
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), sd


def curve_over_seeds(table: pd.DataFrame, x: str, y: str, points: int = 40) -> pd.DataFrame:
    """Mean and standard deviation over seeds of y as a function of x: columns x, mean, sd, seeds.

    Seeds reach different sizes, so each seed's curve is interpolated linearly in log x at common sizes, evenly spaced in
    log x over the range that every seed covers.
    """
    curves = [seed.sort_values(x) for _, seed in table.groupby("seed")]
    low, high = max(c[x].iloc[0] for c in curves), min(c[x].iloc[-1] for c in curves)
    grid = np.geomspace(low, high, points)
    mean, sd = mean_and_sd(np.stack([np.interp(np.log(grid), np.log(c[x]), c[y]) for c in curves]))
    return pd.DataFrame({"x": grid, "mean": mean, "sd": sd, "seeds": len(curves)})


def points_over_seeds(table: pd.DataFrame, x: str, y: str, by: str) -> pd.DataFrame:
    """Mean over seeds of x, and mean and standard deviation of y, for each value of `by`: columns x, mean, sd, seeds."""
    rows = []
    for _, group in table.groupby(by):
        mean, sd = mean_and_sd(group[y].to_numpy())
        rows.append({"x": group[x].mean(), "mean": mean, "sd": sd, "seeds": group["seed"].nunique()})
    return pd.DataFrame(rows)


def with_share(table: pd.DataFrame) -> pd.DataFrame:
    """Layer rows (criterion, seed, removal, layer, width, ...) with `share`: the width relative to the dense network's."""
    dense = table[table["removal"] == 0][["criterion", "seed", "layer", "width"]]
    merged = table.merge(dense, on=["criterion", "seed", "layer"], suffixes=("", "_dense"))
    return merged.assign(share=merged["width"] / merged["width_dense"])
