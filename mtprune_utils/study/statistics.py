"""Curves over seeds, intervals and outcomes: pure functions over tidy data frames and arrays."""

import math
from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit  # scipy.stats takes most of a second to import


def curve_over_seeds(table: pd.DataFrame, x: str, y: str, points: int = 40) -> pd.DataFrame:
    """Mean and standard deviation over seeds of y as a function of x: columns x, mean, sd, seeds.

    Seeds reach different sizes, so each seed's curve is interpolated linearly in log x at common
    sizes, evenly spaced in log x over the range that every seed covers. sd: NaN for a single seed.
    """
    curves = [seed.sort_values(x) for _, seed in table.groupby("seed")]
    low, high = max(c[x].iloc[0] for c in curves), min(c[x].iloc[-1] for c in curves)
    grid = np.geomspace(low, high, points)
    values = pd.DataFrame([np.interp(np.log(grid), np.log(c[x]), c[y]) for c in curves])
    columns = {"x": grid, "mean": values.mean(), "sd": values.std(), "seeds": len(curves)}
    return pd.DataFrame(columns)


def points_over_seeds(table: pd.DataFrame, x: str, y: str, by: str) -> pd.DataFrame:
    """Means over seeds of x and y for each value of `by`, and y's spread and 95 % interval.

    Columns: by, x, mean, sd, low, high, seeds. Of a single seed there is no spread: NaN.
    """
    groups = table.groupby(by)
    points = groups.agg(
        x=(x, "mean"), mean=(y, "mean"), sd=(y, "std"), seeds=("seed", "nunique")
    ).reset_index()
    low, high = interval(points["mean"], points["sd"], points["seeds"], ALPHA)
    points.insert(4, "low", low.where(points["sd"].notna()))
    points.insert(5, "high", high.where(points["sd"].notna()))
    return points


# --- differences between arms, and what they allow to say ---

SIZE_TOLERANCE = 0.03  # parameter counts within 3 % count as equal
ALPHA = 0.05


def same_size(parameters, target):
    """Whether parameter counts are within SIZE_TOLERANCE of a target; arrays give arrays."""
    return abs(parameters - target) <= SIZE_TOLERANCE * target


def value_at(rows: pd.DataFrame, size: float, column: str, by: str = "parameters") -> float:
    """A column of one run's rows at a size: the nearest row's if within 3 %, else interpolated.

    Interpolation is linear in log(size). NaN outside the recorded range. by: the column of sizes.
    """
    ordered = rows.sort_values(by)
    sizes = ordered[by].to_numpy(float)
    nearest = np.abs(sizes - size).argmin()
    if same_size(sizes[nearest], size):
        return float(ordered[column].iloc[nearest])
    values = ordered[column].to_numpy(float)
    return float(np.interp(np.log(size), np.log(sizes), values, left=np.nan, right=np.nan))


def at_sizes(pruned: pd.DataFrame, targets: dict[int, float], columns: list[str]) -> pd.DataFrame:
    """Pruning runs at each size, of the run that was tuned for it or the one that serves all.

    pruned: recovered networks; columns criterion, seed, arm, level (NaN: serves all) and
    target_level. targets: parameter counts by level. It is the very network whose architecture is
    re-trained, where its size is right; else `value_at`. One row per criterion, seed, arm and
    level.
    """
    cell = ["criterion", "seed", "arm"]
    points = []
    for names, rows in pruned.groupby(cell, sort=False):
        for level, size in targets.items():
            run = rows[rows["level"].isna() | (rows["level"] == level)]
            landed = run[(run["target_level"] == level) & same_size(run["parameters"], size)]
            run = landed if len(landed) else run
            if len(run):
                widths = run.loc[(run["parameters"] - size).abs().idxmin(), "widths"]
                values = {column: value_at(run, size, column) for column in columns}
                points.append(
                    {**dict(zip(cell, names)), "level": level, "widths": widths, **values}
                )
    return pd.DataFrame(points, columns=[*cell, "level", "widths", *columns])


def interval(mean, sd, seeds, level):
    """Student's two-sided interval of a mean over seeds, at 1 - level: (low, high).

    Infinite for one seed. mean, sd, seeds, level: numbers, or arrays that broadcast.
    """
    with np.errstate(invalid="ignore"):
        half = stdtrit(np.subtract(seeds, 1.0), 1 - np.divide(level, 2)) * sd / np.sqrt(seeds)
    half = np.where(np.less(seeds, 2), np.inf, half)
    return mean - half, mean + half


def p_value(mean, sd, seeds, null=0.0):
    """Student's two-sided p of a mean over seeds being `null`; 1 for one seed.

    Arrays as in `interval`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.abs(np.subtract(mean, null)) / (sd / np.sqrt(seeds))
        p = 2 * stdtr(np.subtract(seeds, 1.0), -t)
    return np.where(np.less(seeds, 2) | (np.equal(mean, null) & np.equal(sd, 0)), 1.0, p)


def holm_levels(p: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """The level at which each of several tests is judged together with the others (Holm, 1979).

    The smallest p gets alpha / m, the next alpha / (m - 1) if the first was rejected, and so on;
    what comes after a test that was not rejected is judged at that test's level. p: (..., tests).
    """
    count = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    steps = alpha / (count - np.arange(count))
    rejected = np.take_along_axis(p, order, axis=-1) <= steps
    # How many are rejected before the first that is not: it and all after it keep its level.
    reached = np.cumprod(rejected, axis=-1).sum(axis=-1, keepdims=True)
    in_order = steps[np.minimum(np.arange(count), reached)]
    levels = np.empty_like(in_order)
    np.put_along_axis(levels, order, in_order, axis=-1)
    return levels


OUTCOMES = (  # of a cell, the strongest words first
    "different",
    "differs",
    "differ, size open",
    "better",
    "worse",
    "below half",
    "above half",
    "equivalent",
    "no worse",
    "not told apart",
    "inconclusive",
)


def judge_cells(mean, sd, seeds, rule: str, margin: float) -> dict[str, np.ndarray]:
    """What the numbers say of each cell of a comparison, in Lakens's (2017) words.

    mean, sd, seeds: (..., cells), of one number per seed. Intervals `low` to `high` are Student's
    at the level at which Holm's method judges the cell together with the others; `tost_low` to
    `tost_high` is that of two one-sided tests at 5 %, the 90 % interval, NaN where the rule does
    not ask for it. `outcome` is, by rule:

    two-sided  (mean: a difference) "equivalent" if TOST's interval lies within the margin; else
               "different" if the Holm interval lies wholly beyond it; else "differ, size open" if
               it excludes zero; else "inconclusive"
    zero       (mean: a difference) "differs" if the Holm interval excludes zero; else "not told
               apart"
    ahead      (mean: how far the first is ahead) "better" if the Holm interval lies above zero;
               "no worse" if it lies above -margin; "worse" if it lies below zero; else
               "inconclusive"
    half       (mean: a share that is kept) "below half" or "above half" if the Holm interval lies
               on one side of 0.5; else "inconclusive"
    """
    mean, sd, seeds = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (mean, sd, seeds)))
    null = 0.5 if rule == "half" else 0.0
    p = p_value(mean, sd, seeds, null)
    low, high = interval(mean, sd, seeds, holm_levels(p))
    tost_low, tost_high = interval(mean, sd, seeds, 2 * ALPHA)
    words = {
        "two-sided": [
            ((tost_low > -margin) & (tost_high < margin), "equivalent"),
            ((low > margin) | (high < -margin), "different"),
            ((low > 0) | (high < 0), "differ, size open"),
        ],
        "zero": [((low > 0) | (high < 0), "differs")],
        "ahead": [(low > 0, "better"), (low > -margin, "no worse"), (high < 0, "worse")],
        "half": [(high < null, "below half"), (low > null, "above half")],
    }[rule]
    otherwise = "not told apart" if rule == "zero" else "inconclusive"
    outcome = np.select(*map(list, zip(*words)), default=otherwise)  # type: ignore[call-overload]
    if rule != "two-sided":
        tost_low, tost_high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    cells = {"low": low, "high": high, "p": p, "outcome": outcome}
    return cells | {"tost_low": tost_low, "tost_high": tost_high}


def judge_all(outcomes: Iterable[str], rule: str) -> str:
    """What the numbers say of a comparison as a whole, from its cells' outcomes; never an average.

    two-sided  "equivalent" only if every cell is; else the worst that any cell is
    zero       "differs" if any cell does, else "not told apart"
    ahead      "better" if every cell is, "no worse" if every cell is that or better; "mixed" if
               some are better and some worse; "worse" if some are worse and none better
    half       "below half" if every cell is; "above half" if any is

    Everything else is "inconclusive".
    """
    found = set(outcomes)
    if len(found) == 1:
        return found.pop()
    for word in {
        "two-sided": ("different", "differ, size open"),
        "zero": ("differs",),
        "ahead": ("worse",),
        "half": ("above half",),
    }[rule]:
        if word in found:
            return "mixed" if word == "worse" and "better" in found else word
    return "no worse" if found == {"better", "no worse"} else "inconclusive"


def tukey_intervals(values: pd.DataFrame) -> pd.DataFrame:
    """Intervals of means that do not overlap exactly where Tukey's test tells two means apart.

    values: one row per seed, one column per arm. Seeds are blocks: their own level is taken out,
    and the rest of the variance is pooled over the arms, which supposes that it is alike. All pairs
    together err with a chance of 5 %. Columns low and high, indexed as the arms; NaN for arms
    without all seeds, and for all where there are fewer than two of either.
    """
    from scipy.stats import studentized_range  # a second of import

    whole = values.loc[:, values.notna().all()]
    seeds, arms = whole.shape
    table = pd.DataFrame({"low": np.nan, "high": np.nan}, index=values.columns)
    if min(seeds, arms) < 2:
        return table
    means = whole.mean()
    rest = whole.sub(whole.mean(axis=1), axis=0) - means + whole.to_numpy().mean()
    freedom = (seeds - 1) * (arms - 1)
    sd = np.sqrt((rest**2).to_numpy().sum() / freedom)
    half = studentized_range.ppf(1 - ALPHA, arms, freedom) * sd / np.sqrt(seeds) / 2
    return table.assign(low=means - half, high=means + half)


def seeds_to_decide(
    mean, sd, seeds, rule: str, margin: float, decided: Collection[str], most: int = 200
) -> int | None:
    """The smallest number of seeds at which `judge_all` would say one of `decided`.

    It takes means and spreads as they are. None if that takes more than `most` seeds.
    """
    for count in range(int(np.min(seeds)), most + 1):
        if judge_all(judge_cells(mean, sd, count, rule, margin)["outcome"], rule) in decided:
            return count
    return None


def collapse_sizes(table: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """The parameter count from which on each seed's run keeps less than half of a task.

    A dip that it recovers from, as after a first removal at a high learning rate, is no collapse.
    table: one row per size with columns seed, parameters and one per task, the share that is kept.
    Returns one row per seed, one column per task; NaN where a seed still keeps half at its end
    (censored).
    """
    sizes = {}
    for task in tasks:
        last_kept = table[table[task] >= 0.5].groupby("seed")["parameters"].min()
        below = table[table["parameters"] < table["seed"].map(last_kept).fillna(np.inf)]
        sizes[task] = below.groupby("seed")["parameters"].max()
    return pd.DataFrame(sizes, index=pd.Index(sorted(table["seed"].unique()), name="seed"))


def collapse_order(sizes: pd.Series, others: pd.Series) -> dict[str, float]:
    """Which of two runs of a seed collapses first: counts, and an exact two-sided sign test.

    sizes, others: columns of `collapse_sizes`; the seeds that both have count. A censored run
    collapses after any that is not; two censored ones, and sizes within 3 %, are ties, which the
    test leaves out. Columns earlier, later, tied, p_sign.
    """
    first, second = (column.fillna(0.0) for column in sizes.align(others, join="inner"))
    tied = same_size(first, second)
    earlier, later = int(((first > second) & ~tied).sum()), int(((first < second) & ~tied).sum())
    untied = earlier + later
    tail = sum(math.comb(untied, k) for k in range(min(earlier, later) + 1)) / 2**untied
    p = min(1.0, 2 * tail)
    return {"earlier": earlier, "later": later, "tied": int(tied.sum()), "p_sign": p}
