"""Curves over seeds, intervals and verdicts: pure functions over tidy data frames, one row per evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit  # scipy.stats would take every kernel most of a second to import


def curve_over_seeds(table: pd.DataFrame, x: str, y: str, points: int = 40) -> pd.DataFrame:
    """Mean and standard deviation (NaN for a single seed) over seeds of y as a function of x: columns x, mean, sd, seeds.

    Seeds reach different sizes, so each seed's curve is interpolated linearly in log x at common sizes, evenly spaced in
    log x over the range that every seed covers.
    """
    curves = [seed.sort_values(x) for _, seed in table.groupby("seed")]
    low, high = max(c[x].iloc[0] for c in curves), min(c[x].iloc[-1] for c in curves)
    grid = np.geomspace(low, high, points)
    values = pd.DataFrame([np.interp(np.log(grid), np.log(c[x]), c[y]) for c in curves])
    return pd.DataFrame({"x": grid, "mean": values.mean(), "sd": values.std(), "seeds": len(curves)})


def points_over_seeds(table: pd.DataFrame, x: str, y: str, by: str) -> pd.DataFrame:
    """Mean over seeds of x, and mean and standard deviation of y, for each value of `by`: columns x, mean, sd, seeds."""
    groups = table.groupby(by)
    return groups.agg(x=(x, "mean"), mean=(y, "mean"), sd=(y, "std"), seeds=("seed", "nunique")).reset_index(drop=True)


# --- differences between arms, and what they allow to say ---

SIZE_TOLERANCE = 0.03  # parameter counts within 3 % count as equal
ALPHA = 0.05
BOOTSTRAP_FROM = 10  # seeds; with fewer, percentile bootstraps cover far less than they claim
RESAMPLES = 10_000


def same_size(parameters, target):
    return abs(parameters - target) <= SIZE_TOLERANCE * target


def value_at(rows: pd.DataFrame, parameters: float, column: str) -> float:
    """A column of one run's rows at a parameter count: the nearest row's if within 3 %, else interpolated.

    Interpolation is linear in log(parameters). NaN outside the recorded range.
    """
    ordered = rows.sort_values("parameters")
    sizes = ordered["parameters"].to_numpy()
    nearest = np.abs(sizes - parameters).argmin()
    if same_size(sizes[nearest], parameters):
        return float(ordered[column].iloc[nearest])
    return float(np.interp(np.log(parameters), np.log(sizes), ordered[column], left=np.nan, right=np.nan))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its two-sided confidence interval at any level: interval(alpha) -> (low, high)."""

    mean: float
    seeds: int
    interval: Callable[[float], tuple[float, float]]
    p: Callable[[float], float]  # two-sided, against a given mean


def student(mean: float, sd: float, seeds: int) -> Estimate:
    """Student's t on (paired differences of) so many seeds. With one seed nothing is known: the interval is infinite."""
    if seeds < 2:
        return Estimate(mean, seeds, lambda alpha: (-math.inf, math.inf), lambda null: 1.0)
    error = sd / math.sqrt(seeds)

    def interval(alpha: float) -> tuple[float, float]:
        half = error * stdtrit(seeds - 1, 1 - alpha / 2)
        return mean - half, mean + half

    def p(null: float) -> float:
        if error == 0:
            return float(mean == null)
        return float(2 * stdtr(seeds - 1, -abs(mean - null) / error))

    return Estimate(mean, seeds, interval, p)


def bootstrap(values: np.ndarray) -> Estimate:
    """Percentile bootstrap over seeds. Equal numbers of seeds are resampled alike: a seed's tasks and sizes stay together."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.sort(values[drawn].mean(axis=1))

    def p(null: float) -> float:
        least = min((means <= null).sum(), (means >= null).sum())
        return min(1.0, 2 * (least + 1) / (RESAMPLES + 1))

    return Estimate(values.mean(), len(values), lambda alpha: tuple(np.quantile(means, [alpha / 2, 1 - alpha / 2])), p)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of one value per seed: paired t under ten seeds, a bootstrap from there on."""
    values = np.asarray(values, dtype=float)
    if len(values) >= BOOTSTRAP_FROM:
        return bootstrap(values)
    return student(values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan, len(values))


def holm_levels(p_values: dict[str, float], alpha: float = ALPHA) -> dict[str, float]:
    """The level at which each of several tests is judged together with the others (Holm, 1979).

    The smallest p gets alpha / m, the next alpha / (m - 1) if the first was rejected, and so on; what comes after a test
    that was not rejected is judged at that test's level.
    """
    levels, level, rejecting = {}, alpha / max(len(p_values), 1), True
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if rejecting:
            level = alpha / (len(p_values) - i)
            rejecting = p <= level
        levels[name] = level
    return levels


def judge(estimates: dict[str, Estimate], kind: str, threshold: float) -> tuple[str, pd.DataFrame]:
    """The verdict on a claim about the mean of every task: "supported", "refuted" or "undecided".

    kind "equal": supported if every mean lies within +-threshold by two one-sided tests (TOST: its 90 % interval does);
    refuted if, failing that, any Holm-adjusted 95 % interval excludes zero, even of a task that lies within the margin (a
    note says so). kind "above" ("below"): supported if every Holm-adjusted interval lies above (below) the threshold,
    refuted if any lies wholly on the other side. Returns one row per task besides: estimate, low, high (the Holm-adjusted
    interval), tost_low, tost_high (TOST's, of kind "equal"), p, seeds, the task's own verdict and the note.
    """
    null = 0.0 if kind == "equal" else threshold
    levels = holm_levels({task: estimate.p(null) for task, estimate in estimates.items()})
    rows, fine, against = [], [], []
    for task, one in estimates.items():
        low, high = one.interval(levels[task])
        inner = (math.nan, math.nan)
        if kind == "equal":
            inner = one.interval(2 * ALPHA)
            yes, no = -threshold < inner[0] and inner[1] < threshold, low > 0 or high < 0
        else:
            yes, no = (low > null, high < null) if kind == "above" else (high < null, low > null)
        verdict = "supported" if yes else "refuted" if no else "undecided"
        differs = "differs, within the margin" if kind == "equal" and yes and no else ""
        fine.append(yes)
        against.append(no)
        rows.append({"task": task, "estimate": one.mean, "low": low, "high": high, "tost_low": inner[0], "tost_high": inner[1],
                     "p": one.p(null), "seeds": one.seeds, "verdict": verdict, "note": differs})
    return "supported" if all(fine) else "refuted" if any(against) else "undecided", pd.DataFrame(rows)


def seeds_to_decide(values: pd.DataFrame, kind: str, threshold: float, most: int = 1000) -> int | None:
    """The smallest number of seeds at which the claim would be decided if means and spreads stayed as they are.

    values: one row per seed, one column per task. None if that takes more than `most` seeds, or there is only one.
    """
    if len(values) < 2:
        return None
    for seeds in range(len(values), most + 1):
        estimates = {task: student(column.mean(), column.std(ddof=1), seeds) for task, column in values.items()}
        if judge(estimates, kind, threshold)[0] != "undecided":
            return seeds
    return None


def sign_flip_p(values: np.ndarray) -> float:
    """Exact two-sided p of the sign-flip test that the mean of one paired difference per seed is zero.

    It assumes nothing but symmetry, and cannot go under 2^(1 - seeds): with few seeds it cannot reject at all, which is
    no support for equality.
    """
    values = np.asarray(values, dtype=float)
    if len(values) > 20:
        return math.nan  # a million sign patterns are enough
    signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
    means = np.abs(signs @ values)
    return float((means >= np.abs(values.sum()) * (1 - 1e-12)).mean())


def collapse_sizes(table: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """The parameter count from which on each seed's run keeps less than half of a task, all the way down.

    A dip that it recovers from, as after a first removal at a high learning rate, is no collapse. table: one row per size
    with columns seed, parameters and one per task, the share that is kept. Returns one row per seed, one column per task;
    NaN where a seed still keeps half at its end (censored).
    """
    sizes = {}
    for task in tasks:
        last_kept = table[table[task] >= 0.5].groupby("seed")["parameters"].min()
        below = table[table["parameters"] < table["seed"].map(last_kept).fillna(np.inf)]
        sizes[task] = below.groupby("seed")["parameters"].max()
    return pd.DataFrame(sizes, index=pd.Index(sorted(table["seed"].unique()), name="seed"))


def collapse_order(sizes: pd.Series, others: pd.Series) -> dict[str, float]:
    """Which of two runs of a seed collapses first, over the seeds that both have: counts, and an exact two-sided sign test.

    sizes, others: columns of `collapse_sizes`. A censored run collapses after any that is not; two censored ones, and sizes
    within 3 %, are ties, which the test leaves out. Columns earlier, later, tied, p_sign.
    """
    first, second = (column.fillna(0.0) for column in sizes.align(others, join="inner"))
    tied = same_size(first, second)
    earlier, later = int(((first > second) & ~tied).sum()), int(((first < second) & ~tied).sum())
    untied = earlier + later
    tail = sum(math.comb(untied, k) for k in range(min(earlier, later) + 1)) / 2**untied
    return {"earlier": earlier, "later": later, "tied": int(tied.sum()), "p_sign": min(1.0, 2 * tail)}
