"""Whether the criterion matters: every criterion of a profile under one protocol.

Networks of one size and one kind of training are compared task by task, on the scale of
`claims.Evidence`: the share of the gap from position prior to dense network that they keep.
"""

import time

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mtprune_utils.core.data import Dataset
from mtprune_utils.core.model import build
from mtprune_utils.core.scoring import ACTIVATIONS, GRADIENT, TASK_GRADIENTS, WEIGHTS, Scores
from mtprune_utils.core.task import channels
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.stages._training import architecture
from mtprune_utils.stages.retrain import FINETUNE_SHUFFLED
from mtprune_utils.study import statistics as stats
from mtprune_utils.study.claims import Evidence
from mtprune_utils.study.figures import grid_of_axes, legend_below
from mtprune_utils.study.grid import UNIFORM, Experiment
from mtprune_utils.study.palette import BLUE, COLOURS, GRAY, GREEN, INK, ORANGE

# Arms that get the same training, whose networks are held against each other.
FAMILIES = {"finetune": ("finetune", FINETUNE_SHUFFLED), "scratch": ("scratch",)}
CELL = ["family", "level", "task"]
ARM = ["arm", "criterion"]
MARKS = {  # arm: marker, filled, colour, what it is
    "finetune": ("o", True, BLUE, "fine-tuned"),
    FINETUNE_SHUFFLED: ("X", True, ORANGE, "its widths, other filters, fine-tuned"),
    "scratch": ("s", False, GREEN, "its widths, from random weights"),
}
AGREEMENT = {
    "spearman": "Spearman, all filters",
    "within_layers": "Spearman within layers",
    "overlap": "overlap of the lower halves",
}


def in_order(criteria: list[str]) -> list[str]:
    """By what they read, then by name: no order of merit. Uniform widths come last."""
    kinds = (WEIGHTS, ACTIVATIONS, GRADIENT, TASK_GRADIENTS)
    named = sorted(set(criteria) - {UNIFORM})
    ordered = sorted(named, key=lambda name: kinds.index(get_criterion(name).needs))
    return [*ordered, *({*criteria} & {UNIFORM})]


def kept_shares(evidence: Evidence) -> pd.DataFrame:
    """One row per network and task: family, arm, criterion, level, seed, task, kept."""
    families = {arm: family for family, arms in FAMILIES.items() for arm in arms}
    points = evidence.points.assign(family=evidence.points["arm"].map(families))
    points = points.dropna(subset="family").astype({"level": int, "seed": int})
    names = ["family", *ARM, "level", "seed"]
    return points.melt(names, [*evidence.endpoints], "task", "kept")


def compare(evidence: Evidence) -> pd.DataFrame:
    """Mean, spread and interval of every arm's kept shares, cell by cell.

    Two of a cell (one family, size and task) are told apart, at 5 % for all pairs of the cell
    together, where their intervals low to high do not overlap: `stats.tukey_intervals`. NaN where
    there is one seed, and for an arm that lacks a seed which others have.
    """
    parts = []
    for cell, rows in kept_shares(evidence).groupby(CELL, sort=False):
        values = rows.pivot(index="seed", columns=ARM, values="kept")
        found = values.agg(["mean", "std", "count"]).T.join(stats.tukey_intervals(values))
        parts.append(found.reset_index().assign(**dict(zip(CELL, cell))))
    table = pd.concat(parts, ignore_index=True).rename(columns={"std": "sd", "count": "seeds"})
    return table[[*CELL, *ARM, "mean", "sd", "low", "high", "seeds"]]


def against(table: pd.DataFrame, arm: str, other: str, criterion: str = "") -> pd.DataFrame:
    """In how many cells each criterion's arm is told apart from another's, of `compare`.

    other: the arm that it is held against, of the named criterion, else of its own. Columns ahead,
    behind, cells; one row per criterion that has both.
    """
    one, two = (table[table["arm"] == name] for name in (arm, other))
    keys = ["level", "task"]
    if criterion:
        two = two[two["criterion"] == criterion].drop(columns="criterion")
        one = one[one["criterion"] != criterion]
    else:
        keys = [*keys, "criterion"]
    pairs = one.merge(two, on=keys, suffixes=("", "_other"))
    pairs = pairs.dropna(subset=["low", "low_other"])
    pairs["ahead"] = pairs["low"] > pairs["high_other"]
    pairs["behind"] = pairs["high"] < pairs["low_other"]
    counts = pairs.groupby("criterion")[["ahead", "behind"]].sum()
    return counts.assign(cells=pairs.groupby("criterion").size())


SUMMARY = {  # what each criterion is held against: its arm, the other arm, of which criterion
    "fine-tuned, random filters": ("finetune", "finetune", "random"),
    "its choice of filters": ("finetune", FINETUNE_SHUFFLED, ""),
    "re-trained, random's widths": ("scratch", "scratch", "random"),
    "re-trained, uniform widths": ("scratch", "scratch", UNIFORM),
}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By criterion, in how many cells it is told apart from each of `SUMMARY`: "2 +, 1 -, of 9".

    Empty where nothing was compared. table: `compare`'s.
    """
    columns = {
        name: against(table, *sides).apply(
            lambda row: f"{row['ahead']} +, {row['behind']} −, of {row['cells']}", axis=1
        )
        for name, sides in SUMMARY.items()
    }
    names = [name for name in in_order(list(table["criterion"])) if name != UNIFORM]
    return pd.DataFrame(columns).reindex(names).fillna("").rename_axis("criterion")


def balance(evidence: Evidence) -> pd.DataFrame:
    """Which tasks pay: of every arm at every size the worst task, and how unequal they are.

    Columns: worst (the task that keeps least, by its mean over seeds), kept (its share), spread
    (the best task's share less the worst's, by seed, then the mean), and the seeds' deviations.
    """
    wide = kept_shares(evidence).pivot(
        index=["family", *ARM, "level", "seed"], columns="task", values="kept"
    )
    networks = [*ARM, "level"]
    spread = (wide.max(axis=1) - wide.min(axis=1)).groupby(networks).agg(["mean", "std"])
    means, deviations = wide.groupby(networks).mean(), wide.groupby(networks).std()
    worst = means.idxmin(axis=1)
    return pd.DataFrame(
        {
            "worst": worst,
            "kept": means.min(axis=1),
            "kept_sd": [deviations.loc[network, task] for network, task in worst.items()],
            "spread": spread["mean"],
            "spread_sd": spread["std"],
        }
    ).reset_index()


def cost_per_step(experiment: Experiment, dataset: Dataset, rounds: int = 15) -> pd.DataFrame:
    """A training step with a criterion's scoring, over one without: median, 10 % and 90 %.

    Measured in turns on the dense network; columns criterion, needs, ratio, low, high.
    """
    profile = experiment.profile
    dataset = dataset.resized_for_evaluation(profile.crop)
    model = build(architecture(profile, channels(experiment.tasks)), 0).train()
    trainer = Trainer(model, dataset, profile, profile.prune, rounds * 1000, 0)
    rows = []
    for name in in_order(profile.criteria):
        scores = Scores(get_criterion(name), model.groups, model)
        ratios = []
        for _ in range(rounds + 2):
            begun = time.perf_counter()
            trainer.step()
            between = time.perf_counter()
            trainer.step([scores])
            ratios.append((time.perf_counter() - between) / (between - begun))
        scores.close()
        low, ratio, high = np.quantile(ratios[2:], [0.1, 0.5, 0.9])
        needs = scores.criterion.needs
        rows.append({"criterion": name, "needs": needs, "ratio": ratio, "low": low, "high": high})
    return pd.DataFrame(rows)


def fig8_criteria(table: pd.DataFrame, sizes: tuple[float, ...]) -> tuple[Figure, pd.DataFrame]:
    """Every criterion: what its networks keep of each task, fine-tuned and from random weights.

    table: `compare`'s. sizes: shares of the dense network's parameters, by level. Criteria stand in
    the order of what they read. Returns the figure and the table.
    """
    tasks, levels = (list(dict.fromkeys(table[name])) for name in ("task", "level"))
    names = in_order(list(table["criterion"]))
    figure, axes = grid_of_axes(
        len(tasks), len(levels), 4, 0.9 + 0.22 * len(names), sharey=True, sharex="row"
    )
    places = {"finetune": -0.22, FINETUNE_SHUFFLED: 0.0, "scratch": 0.22}
    for row, task in zip(axes, tasks):
        for axis, level in zip(row, sorted(levels)):
            cell = table[(table["task"] == task) & (table["level"] == level)]
            for arm, (marker, filled, colour, label) in MARKS.items():
                rows = cell[cell["arm"] == arm]
                y = np.array([names.index(name) for name in rows["criterion"]]) + places[arm]
                errors = np.stack([rows["mean"] - rows["low"], rows["high"] - rows["mean"]])
                face = colour if filled else "none"
                axis.errorbar(
                    rows["mean"],
                    y,
                    xerr=np.nan_to_num(errors),
                    fmt=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=4,
                    linewidth=1,
                    label=label,
                )
            for x in (0, 1):
                axis.axvline(x, color=INK, linewidth=0.8, linestyle=":")
            axis.set_yticks(range(len(names)), names, fontsize=7)
            axis.set(title=f"{task}, {sizes[level]:.0%} of the parameters")
            axis.grid(axis="y", linewidth=0.3)
    for axis in axes[-1]:
        axis.set(xlabel="share of the gap kept (0: position prior, 1: dense)")
    axes[0, 0].invert_yaxis()  # all share it
    legend_below(figure, axes[0, 0])
    return figure, table


def fig8_task_balance(table: pd.DataFrame, sizes: tuple[float, ...]) -> tuple[Figure, pd.DataFrame]:
    """Which tasks pay for each criterion: the tasks' kept shares side by side, fine-tuned.

    table: `compare`'s. Returns the figure and what it shows of the table.
    """
    shown = table[table["arm"] == "finetune"]
    levels, tasks = sorted(set(shown["level"])), list(dict.fromkeys(shown["task"]))
    names = in_order(list(shown["criterion"]))
    figure, axes = grid_of_axes(1, len(levels), 4, 1.2 + 0.2 * len(names), sharey=True, sharex=True)
    colours = dict(zip(tasks, COLOURS))  # six tasks at most
    for axis, level in zip(axes[0], levels):
        cell = (
            shown[shown["level"] == level]
            .pivot(index="criterion", columns="task", values="mean")
            .reindex(names)
        )
        axis.hlines(range(len(names)), cell.min(axis=1), cell.max(axis=1), color=GRAY, linewidth=1)
        for task, colour in colours.items():
            axis.plot(cell[task], range(len(names)), "o", color=colour, markersize=4, label=task)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set(title=f"{sizes[level]:.0%} of the parameters, fine-tuned")
        axis.set(xlabel="share of the gap kept")
    axes[0, 0].invert_yaxis()
    legend_below(figure, axes[0, 0])
    return figure, shown


def fig8_agreement(agreement: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How far each two criteria agree on the dense network, mean over seeds.

    agreement: `stages.score`'s tables. Returns the figure and the plotted data, with spreads.
    """
    import seaborn as sns  # a second of import

    pair = ["first", "second"]
    means = agreement.groupby(pair, sort=False)[[*AGREEMENT]].agg(["mean", "std", "count"])
    names = in_order([*agreement["first"], *agreement["second"]])
    side = max(3.2, 1.6 + 0.28 * len(names))
    figure, axes = grid_of_axes(1, len(AGREEMENT), side, side)
    for axis, (measure, title) in zip(axes[0], AGREEMENT.items()):
        half = means[measure, "mean"].unstack().reindex(index=names, columns=names)
        both = half.fillna(half.T)
        sns.heatmap(
            both,
            ax=axis,
            square=True,
            cmap="RdBu",
            vmin=-1,
            vmax=1,
            cbar=False,
            annot=True,
            fmt=".1f",
            annot_kws={"fontsize": 6},
        )
        axis.set(xlabel="", ylabel="")
        axis.set_title(title, fontsize="medium")
        axis.tick_params(labelsize=7)
    means.columns = [f"{measure}_{what}" for measure, what in means.columns]
    return figure, means.reset_index()
