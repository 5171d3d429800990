"""Figures, each with the plotted data and its provenance beside it."""

import io
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from mtprune_utils import stats
from mtprune_utils.criteria import CRITERIA
from mtprune_utils.data import Dataset, Split
from mtprune_utils.runs import Experiment, Run, csv_text, provenance, read_json, write_atomically, write_json

STYLES = {  # colour and label; a criterion that is not named here gets the next free colour and its own name
    "taylor": ("tab:orange", "Taylor"), "cosprune": ("tab:blue", "CosPrune"), "magnitude": ("tab:green", "L1 magnitude"),
    "random": ("tab:gray", "random"), "uniform": ("tab:brown", "uniform"),
}
PANELS = {  # the paper's three metrics
    "segmentation.pixel_accuracy": "Segmentation: pixel accuracy",
    "depth.relative_error": "Depth: relative error",
    "normals.mean_angle": "Normals: mean angle (degrees)",
}
SIZES = {
    "parameters": "parameters", "filters": "backbone filters", "backbone_parameters": "backbone parameters",
    "macs": "multiply-accumulates of one image",
}
PUBLISHED = {  # read off the paper's Figures 1 and 3, approximately: parameters, then the three metrics in PANELS' order
    "full model, published": ("black", (84.13e6, 0.468, 0.27, 18.35)),
    "Taylor, iterative, published": ("tab:orange", (14.2e6, 0.36, 0.39, 18.65)),
    "Taylor, from scratch, published": ("tab:orange", (14.4e6, 0.42, 0.34, 18.1)),
    "CosPrune, from scratch, published": ("tab:blue", (14.4e6, 0.44, 0.31, 18.1)),
}


def style_of(criterion: str) -> tuple[str, str]:
    """Colour and label of a criterion, the paper's for the paper's."""
    extra = [name for name in CRITERIA if name not in STYLES]
    spare = ("tab:purple", "tab:pink", "tab:olive", "tab:cyan")
    return STYLES.get(criterion) or (spare[extra.index(criterion) % len(spare)], criterion)


def save_figure(figure: Figure, name: str, data: pd.DataFrame, experiment: Experiment, runs: list[Run], folder: Path) -> None:
    """Write <folder>/<profile>/<name>.png, .pdf, .csv (the plotted data) and .json (where it came from)."""
    place = Path(folder) / experiment.profile.name
    for kind in ("png", "pdf"):
        image = io.BytesIO()
        # Without dates the same data gives the same bytes.
        metadata = {"Software": None} if kind == "png" else {"CreationDate": None, "Producer": None}
        figure.savefig(image, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
        write_atomically(place / f"{name}.{kind}", image.getvalue())
    write_atomically(place / f"{name}.csv", csv_text(data.to_dict("records")).encode())
    origins = {f"{run.stage}/{run.name}": read_json(run.path("provenance.json")) for run in runs}
    used = {
        label: {key: origin[key] for key in ("commit", "dirty", "code", "data_digest", "device", "threads", "packages")}
        for label, origin in origins.items()
    }
    settings = {"profile": asdict(experiment.profile), "data": experiment.data, "seeds": sorted({run.seed for run in runs})}
    write_json(place / f"{name}.json", provenance("figure", **settings, runs=used))


def show_samples(split: Split, dataset: Dataset, count: int = 4) -> Figure:
    """The first images of a split over their targets: segmentation, depth, normals."""
    figure, axes = plt.subplots(4, count, figsize=(2.2 * count, 8.8), layout="constrained")
    for i, column in enumerate(axes.T):
        normals = split.targets["normals"][i].float().permute(1, 2, 0)
        pictures = {
            "image": {"X": split.image[i].permute(1, 2, 0)},
            "segmentation": {"X": split.targets["segmentation"][i], "cmap": "tab20", "vmin": 0, "vmax": len(dataset.classes)},
            "depth (m)": {"X": split.targets["depth"][i, 0], "cmap": "viridis"},
            "normals": {"X": (normals + 1) / 2},
        }
        for axis, (title, picture) in zip(column, pictures.items()):
            axis.imshow(**picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_ylabel(title)
    return figure


def show_curve(curve: pd.DataFrame) -> Figure:
    """Training and validation loss of each task over a run's steps; a circle marks the weights that were kept."""
    tasks = [column.split(".")[1] for column in curve if column.startswith("train.")]
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 2.8), layout="constrained", squeeze=False)
    kept = curve[curve["selected"] == 1]
    for axis, task in zip(axes[0], tasks):
        axis.plot(curve["step"], curve[f"train.{task}.loss"], "--", color="tab:gray", label="training")
        axis.plot(curve["step"], curve[f"{task}.loss"], color="tab:blue", label="validation")
        axis.plot(kept["step"], kept[f"{task}.loss"], "o", color="tab:blue", fillstyle="none", label="kept")
        axis.set(title=task, xlabel="step", ylabel="loss")
    axes[0, 0].legend()
    return figure


def show_recovery(evaluations: pd.DataFrame) -> Figure:
    """One pruning run: each metric right after every removal and after its recovery, against the steps trained."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items()):
        axis.plot(evaluations["step"], evaluations[metric], color="tab:gray", linewidth=0.8)
        for phase, marker in (("removed", "v"), ("recovered", "o")):
            rows = evaluations[evaluations["phase"] == phase]
            axis.plot(rows["step"], rows[metric], marker, markersize=3, label=phase)
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    return figure


def _size_axis(axis, label: str) -> None:
    """Logarithmic, pruning goes to the right, with ticks such as 500k at 1, 2 and 5."""
    axis.set(xlabel=label, xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.invert_xaxis()


def _levels(dense: pd.DataFrame, trivial: pd.DataFrame) -> Callable[[str], dict[str, float]]:
    """Where a metric's curve starts, and what a predictor reaches that never looks at the image."""
    prior = trivial[trivial["predictor"] == "position prior"].mean(numeric_only=True)
    return lambda metric: {"dense_network": dense[metric].mean(), "position_prior": prior[metric]}


def _draw_levels(axis, dense_network: float, position_prior: float) -> None:
    axis.axhline(dense_network, color="black", linewidth=0.8, linestyle=":", label="dense network")
    axis.axhline(position_prior, color="tab:red", linewidth=0.8, linestyle=":", label="position prior")


def _curve(axis, data: pd.DataFrame, **style) -> None:
    axis.plot(data["x"], data["mean"], **style)
    if data["sd"].notna().all():
        axis.fill_between(data["x"], data["mean"] - data["sd"], data["mean"] + data["sd"], color=style["color"], alpha=0.2)


def _draw_published(axis, metric: str, names: tuple[str, ...]) -> None:
    """The paper's own points, as open marks: of NYUv2, with normals that it left encoded, so angles are not comparable."""
    for name in names:
        colour, (parameters, *values) = PUBLISHED[name]
        value = values[list(PANELS).index(metric)]
        axis.plot(parameters, value, "o" if "scratch" in name else "s", color=colour, fillstyle="none", label=name)


def fig1_iterative_pruning(
    pruned: pd.DataFrame, dense: pd.DataFrame, trivial: pd.DataFrame, published: bool = False
) -> tuple[Figure, pd.DataFrame]:
    """Figure 1: metrics after recovery against size, mean line and standard-deviation band over seeds.

    The paper's x-axis (all parameters) above; below, sizes that the heads' parameters do not hide: filters, parameters of
    the backbone, multiply-accumulates. published: add the paper's points. Returns the figure and the plotted data.
    """
    recovered = pruned[pruned["phase"] != "removed"]
    levels = _levels(dense, trivial)
    figure, axes = plt.subplots(len(SIZES), 3, figsize=(12, 3.2 * len(SIZES)), layout="constrained")
    data = []
    for row, (size, size_label) in zip(axes, SIZES.items()):
        for axis, (metric, title) in zip(row, PANELS.items()):
            for criterion, table in recovered.groupby("criterion", sort=False):
                curve = stats.curve_over_seeds(table, size, metric)
                colour, label = style_of(criterion)
                _curve(axis, curve, color=colour, label=label)
                data.append(curve.assign(size=size, metric=metric, criterion=criterion, **levels(metric)))
            _draw_levels(axis, **levels(metric))
            if published and size == "parameters":
                _draw_published(axis, metric, ("full model, published", "Taylor, iterative, published"))
            axis.set(title=title)
            _size_axis(axis, size_label)
    axes[0, 0].legend()
    return figure, _tidy(data)


def fig2_layer_widths(layers: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Figure 2: what each criterion leaves of each layer as filters go, and the layer's mean cosine similarity.

    Means over seeds. Returns the figure and the plotted data.
    """
    import seaborn as sns  # a second of import that only this figure needs

    table = stats.with_share(layers)
    table["filters"] = table.groupby(["criterion", "seed", "removal"])["width"].transform("sum")
    means = table.groupby(["criterion", "filters", "layer"], sort=False)[["share", "cosine", "dead_share"]].mean().reset_index()
    criteria = list(dict.fromkeys(means["criterion"]))
    figure, axes = plt.subplots(2, len(criteria), figsize=(6 * len(criteria), 7), layout="constrained", squeeze=False)
    limit = means["cosine"].abs().max()
    styles = {
        "share": {"label": "share of the layer's filters left", "cmap": "viridis", "vmin": 0, "vmax": 1},
        "cosine": {"label": "mean cosine similarity of task gradients", "cmap": "RdBu", "vmin": -limit, "vmax": limit},
    }
    for row, (value, style) in zip(axes, styles.items()):
        for axis, criterion in zip(row, criteria):
            grid = means[means["criterion"] == criterion].pivot(index="layer", columns="filters", values=value)
            grid = grid[sorted(grid.columns, reverse=True)]
            grid.index = grid.index + 1
            colours = {key: style[key] for key in ("cmap", "vmin", "vmax")}
            sns.heatmap(grid, ax=axis, cbar_kws={"label": style["label"]}, **colours)
            axis.set(title=style_of(criterion)[1], xlabel="backbone filters left", ylabel="convolution")
            axis.tick_params(axis="y", rotation=0)
    return figure, means


def fig3_retrained_from_scratch(
    pruned: pd.DataFrame, retrained: pd.DataFrame, dense: pd.DataFrame, trivial: pd.DataFrame, published: bool = False
) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: found architectures re-trained from random weights (solid) against the iterative run (dashed).

    Mean and standard deviation over seeds. published: add the paper's points. Returns the figure and the plotted data.
    """
    recovered = pruned[pruned["phase"] != "removed"]
    levels = _levels(dense, trivial)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    data = []
    for axis, (metric, title) in zip(axes, PANELS.items()):
        for criterion, table in recovered.groupby("criterion", sort=False):
            colour, label = style_of(criterion)
            iterative = stats.curve_over_seeds(table, "parameters", metric)
            _curve(axis, iterative, color=colour, linestyle="--", label=f"{label}, iterative")
            scratch = retrained[retrained["criterion"] == criterion]
            points = stats.points_over_seeds(scratch, "parameters", metric, by="rank")
            style = {"color": colour, "marker": "o", "capsize": 3, "label": f"{label}, from scratch"}
            axis.errorbar(points["x"], points["mean"], points["sd"], **style)
            for arm, curve in (("iterative", iterative), ("from scratch", points)):
                data.append(curve.assign(arm=arm, metric=metric, criterion=criterion, **levels(metric)))
        _draw_levels(axis, **levels(metric))
        if published:
            _draw_published(axis, metric, tuple(PUBLISHED))
        axis.set(title=title)
        _size_axis(axis, "parameters")
    axes[0].legend(fontsize="small")
    return figure, _tidy(data)


VERDICTS = {"supported": "tab:green", "refuted": "tab:red", "undecided": "tab:gray"}


def fig4_claims(table: pd.DataFrame, margin: float) -> tuple[Figure, pd.DataFrame]:
    """Every claim's estimate and interval, the claim as a whole (diamond) and task by task, coloured by verdict.

    table: `claims.verdict_table`. Where a claim compares with a threshold, a tick marks it; the grey band is the margin.
    """
    rows = table[table["estimate"].notna()].reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(11, 0.24 * len(rows) + 1), layout="constrained")
    axis.axvspan(-margin, margin, color="tab:gray", alpha=0.15, linewidth=0, label="margin")
    axis.axvline(0, color="black", linewidth=0.8)
    for i, row in rows.iterrows():
        whole = row["task"] == "all"
        style = {"color": VERDICTS[row["verdict"]], "marker": "D" if whole else "o", "markersize": 6 if whole else 4}
        if np.isfinite([row["low"], row["high"]]).all():
            axis.plot([row["low"], row["high"]], [i, i], color=style["color"], linewidth=2 if whole else 1)
        axis.plot(row["estimate"], i, **style)
        if row["rule"] != "equal":
            axis.plot(row["threshold"], i, "|", color="black", markersize=9)
    names = [f"{row['claim']}: {row['statement']}" if row["task"] == "all" else row["task"] for _, row in rows.iterrows()]
    axis.set_yticks(range(len(rows)), [textwrap.fill(name, 60) for name in names], fontsize=8)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel="share of the gap between position prior (0) and dense network (1)")
    handles = [axis.plot([], [], "o", color=colour, label=verdict)[0] for verdict, colour in VERDICTS.items()]
    axis.legend(handles=handles, loc="upper right", fontsize="small")
    return figure, rows


def fig5_training_curves(curves: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Re-training, arm by arm: the validation endpoint of each task, as the share of the gap, mean over seeds and criteria.

    curves: columns arm, rank, step, task, kept. Returns the figure and the plotted data.
    """
    means = curves.groupby(["task", "rank", "arm", "step"])["kept"].agg(["mean", "std", "count"]).reset_index()
    tasks, ranks = list(dict.fromkeys(curves["task"])), sorted(set(means["rank"]))
    figure, axes = plt.subplots(len(ranks), len(tasks), figsize=(4 * len(tasks), 2.8 * len(ranks)), layout="constrained",
                                squeeze=False, sharey=True)
    for row, rank in zip(axes, ranks):
        for axis, task in zip(row, tasks):
            for arm, line in means[(means["rank"] == rank) & (means["task"] == task)].groupby("arm"):
                axis.plot(line["step"], line["mean"], ".-", label=arm)
            axis.set(title=f"{task}, size {int(rank)}", xlabel="step", ylabel="share of the gap kept")
    axes[0, 0].legend(fontsize="small")
    return figure, means


def show_trials(trials: pd.DataFrame) -> Figure:
    """A search: the loss of every trial in its order, and over learning rate and weight decay."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    finished = trials[trials["state"] == "complete"]
    axes[0].plot(finished["trial"], finished["loss"], "o")
    axes[0].plot(finished["trial"], finished["loss"].cummin(), color="tab:gray", label="best so far")
    axes[0].set(xlabel="trial", ylabel="validation loss")
    axes[0].legend()
    marks = axes[1].scatter(finished["lr"], finished["weight_decay"], c=finished["loss"], cmap="viridis_r")
    given_up = trials[trials["state"] != "complete"]
    axes[1].plot(given_up["lr"], given_up["weight_decay"], "x", color="tab:gray", label="given up early")
    axes[1].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
    figure.colorbar(marks, label="validation loss")
    return figure


def _tidy(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One table, the columns that name a curve in front of the numbers."""
    table = pd.concat(parts, ignore_index=True)
    numbers = ["x", "mean", "sd", "seeds", "dense_network", "position_prior"]
    return table[[*(column for column in table if column not in numbers), *numbers]]
