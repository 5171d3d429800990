"""Figures, each with the plotted data and its provenance beside it."""

import io
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from mtprune_utils.core.data import Dataset, Split
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.targets import IGNORE, MIN_DEPTH, ImageClass, Labels, Normals
from mtprune_utils.core.task import Task
from mtprune_utils.files import csv_text, write_atomically, write_json
from mtprune_utils.study import statistics as stats, store
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.palette import (
    BLUE,
    COLOURS,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    RED,
    STYLE,
    style_of,
)

plt.rcParams.update(STYLE)
PACKAGES = ("pandas", "scipy", "matplotlib", "seaborn", "onnxruntime")
DASHES = ("--", ":", "-.")  # of the runs that were tuned for each size, the largest first
SIZES = {
    "parameters": "parameters",
    "filters": "backbone filters",
    "backbone_parameters": "backbone parameters",
    "macs": "multiply-accumulates of one image",
}
PUBLISHED = pd.DataFrame(  # read off the paper's Figures 1 and 3, approximately
    [
        ("full model, published", INK, 84.13e6, 0.468, 0.27, 18.35),
        ("Taylor, iterative, published", ORANGE, 14.2e6, 0.36, 0.39, 18.65),
        ("Taylor, from scratch, published", ORANGE, 14.4e6, 0.42, 0.34, 18.1),
        ("CosPrune, from scratch, published", BLUE, 14.4e6, 0.44, 0.31, 18.1),
    ],
    columns=[
        "label",
        "colour",
        "parameters",
        "segmentation.pixel_accuracy",
        "depth.relative_error",
        "normals.mean_angle",
    ],
)


def panels(tasks: dict[str, Task]) -> dict[str, str]:
    """The metric that a figure shows of each task, with its title."""
    metrics = (f"{task.name}.{task.shown}" for task in tasks.values())
    return {metric: title(metric) for metric in metrics}


def title(metric: str) -> str:
    """ "depth.relative_error" as a person would write it."""
    task, name = metric.split(".")
    degrees = " (degrees)" if name.endswith("angle") else ""
    return f"{task.replace('_', ' ').capitalize()}: {name.replace('_', ' ')}{degrees}"


def save_figure(
    figure: Figure,
    name: str,
    data: pd.DataFrame,
    experiment: Experiment,
    origins: dict[str, dict],
    folder: Path,
) -> None:
    """Write a figure as .png and .pdf, with the plotted data (.csv) and where it came from (.json).

    origins: the provenance of every run that the figure shows. folder: that of all figures.
    """
    place = store.figures_folder(experiment.label, folder)
    for kind in ("png", "pdf"):
        image = io.BytesIO()
        # Without dates the same data gives the same bytes.
        metadata = {"Software": None} if kind == "png" else {"CreationDate": None, "Producer": None}
        figure.savefig(image, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
        write_atomically(place / f"{name}.{kind}", image.getvalue())
    write_atomically(place / f"{name}.csv", csv_text(data.to_dict("records")).encode())
    kept = ("commit", "dirty", "code", "content", "data_digest", "device", "threads", "packages")
    used = {
        label: {key: origin[key] for key in kept if key in origin}
        for label, origin in origins.items()
    }
    seeds = sorted({origin["params"]["seed"] for origin in origins.values()})
    present = {f"{run.stage}/{run.name}": run for run in experiment.runs()}
    other = {
        label: run["code"]
        for label, run in used.items()
        if label in present and experiment.refusal(present[label], run["code"])
    }
    about = {
        "data": experiment.data,
        "profile": asdict(experiment.profile),
        "seeds": seeds,
        "notebook": store.notebook_digest(name),
        "other_code": other,
        "runs": used,
    }
    write_json(place / f"{name}.json", store.provenance(store.figure_code(), PACKAGES, **about))


def show_samples(split: Split, dataset: Dataset, count: int = 4) -> Figure:
    """The first images of a split over their targets; what is invalid is white.

    Classes of whole images stand above.
    """
    whole = [name for name, task in dataset.tasks.items() if not task.target.of_pixels]
    rows = ["image", *(name for name in dataset.tasks if name not in whole)]
    shape = split.image.shape[2] / split.image.shape[3]
    figure, axes = grid_of_axes(len(rows), count, 2.2, 2.2 * shape + 0.3 / len(rows))
    for i, column in enumerate(axes.T):
        named = (dataset.tasks[name].classes[split.targets[name][i]] for name in whole)
        column[0].set_title(" / ".join(named), fontsize="small")
        for axis, name in zip(column, rows):
            shown = {"X": split.image[i].permute(1, 2, 0).numpy()}
            if name != "image":
                shown = picture(split.targets[name][i], dataset.tasks[name])
            axis.imshow(**shown, interpolation="nearest")
            axis.set(xticks=[], yticks=[], facecolor="white")  # of what is invalid
            if i == 0:
                axis.set_ylabel(name)
    return figure


def picture(target: torch.Tensor, task: Task) -> dict:
    """What imshow needs to show one target."""
    if isinstance(task.target, Labels):
        count = task.channels
        colours = "tab20" if count <= 20 else "nipy_spectral"
        labels = np.ma.masked_equal(target.numpy(), IGNORE)
        return {"X": labels, "cmap": colours, "vmin": 0, "vmax": count}
    if isinstance(task.target, Normals):
        normals = target.float().permute(1, 2, 0)
        valid = normals.square().sum(2, keepdim=True) > 0
        return {"X": torch.where(valid, (normals + 1) / 2, 1.0).numpy()}
    return {"X": np.ma.masked_less_equal(target[0].numpy(), MIN_DEPTH), "cmap": "viridis"}


def show_statistics(split: Split, dataset: Dataset, images: int = 200) -> Figure:
    """How the targets of a split's first images are distributed."""
    figure, axes = grid_of_axes(1, len(dataset.tasks), 5, 3.6)
    for axis, (name, task) in zip(axes[0], dataset.tasks.items()):
        target = split.targets[name][:images].float()
        if isinstance(task.target, (Labels, ImageClass)):
            counts = torch.bincount(target[target != IGNORE].long(), minlength=task.channels)
            axis.barh(range(len(counts)), (counts / counts.sum()).numpy())
            small = 8 if len(counts) <= 20 else 5
            axis.set_yticks(range(len(counts)), task.classes, fontsize=small)
            axis.invert_yaxis()
            axis.set(title=name, xlabel="share")
        elif isinstance(task.target, Normals):
            valid = target.square().sum(1) > 0
            x, y = (target[:, i][valid].numpy() for i in (0, 1))
            axis.hist2d(x, y, bins=60, range=((-1, 1), (-1, 1)), norm="log")
            axis.set(title=name, xlabel="x (right)", ylabel="y (up)", aspect="equal")
        else:
            axis.hist(target[target > MIN_DEPTH].numpy(), bins=80)
            axis.set(title=name, xlabel=task.target.name, yticks=[])
    return figure


def target_ranges(dataset: Dataset, images: int = 200) -> pd.DataFrame:
    """What the targets of each split's first images hold: unit, smallest and largest, valid share.

    For a person to notice what no check can: another unit within its bounds, a shifted class.
    """
    rows = []
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        for task in dataset.tasks.values():
            target = split.targets[task.name][:images].float()
            valid = task.target.valid(target)
            values = target.movedim(1, -1)[valid] if target.dim() == 4 else target[valid]
            rows.append(
                {
                    "split": name,
                    "target": task.name,
                    "unit": task.target.unit,
                    "smallest": values.min().item(),
                    "median": values.median().item(),
                    "largest": values.max().item(),
                    "valid": valid.float().mean().item(),
                }
            )
    return pd.DataFrame(rows)


def show_curve(curve: pd.DataFrame) -> Figure:
    """Each task's training and validation loss over a run's steps.

    A circle marks the weights that were kept.
    """
    tasks = [column.split(".")[1] for column in curve if column.startswith("train.")]
    figure, axes = grid_of_axes(1, len(tasks), 3.4, 2.8)
    kept = curve[curve["selected"] == 1]
    for axis, task in zip(axes[0], tasks):
        loss, trained = f"{task}.loss", f"train.{task}.loss"
        blue = {"color": BLUE}
        axis.plot(curve["step"], curve[trained], "--", color=GRAY, label="training")
        axis.plot(curve["step"], curve[loss], **blue, label="validation")
        axis.plot(kept["step"], kept[loss], "o", **blue, fillstyle="none", label="kept")
        axis.set(title=task, ylabel="loss")
        _count_axis(axis, "step")
    axes[0, 0].legend()
    return figure


def show_recovery(evaluations: pd.DataFrame, tasks: dict[str, Task]) -> Figure:
    """One pruning run: each metric after every removal and its recovery, over the steps."""
    figure, axes = grid_of_axes(1, len(tasks), 4, 3)
    for axis, (metric, name) in zip(axes[0], panels(tasks).items()):
        axis.plot(evaluations["step"], evaluations[metric], color=GRAY, linewidth=0.8)
        for phase, marker in (("removed", "v"), ("recovered", "o")):
            rows = evaluations[evaluations["phase"] == phase]
            axis.plot(rows["step"], rows[metric], marker, markersize=3, label=phase)
        axis.set(title=name)
        _count_axis(axis, "step")
    axes[0, 0].legend()
    return figure


def grid_of_axes(
    rows: int, columns: int, width: float, height: float, **more
) -> tuple[Figure, np.ndarray]:
    """A figure of so many panels, each of that size in inches, and their axes as a table.

    The page is seen behind it, light or dark. It has no frame rather than a transparent one, which
    a notebook would put into a white box.
    """
    size = (width * columns, height * rows)
    more |= {"layout": "constrained", "squeeze": False, "frameon": False}
    return plt.subplots(rows, columns, figsize=size, **more)


def _count_axis(axis, label: str) -> None:
    """Of steps and the like: ticks at whole numbers."""
    axis.set(xlabel=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def size_axis(axis, label: str) -> None:
    """Logarithmic, pruning goes to the right, with ticks such as 500k at 1, 2 and 5."""
    axis.set(xlabel=label, xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.invert_xaxis()


def legend_below(figure: Figure, axis) -> None:
    """One legend for all panels, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = -(-len(labels) // -(-len(labels) // 6))  # rows of at most six, as equal as can be
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def _draw_criterion(
    axis, size: str, metric: str, runs: pd.DataFrame, points: pd.DataFrame, sizes: tuple[float, ...]
) -> Iterator[pd.DataFrame]:
    """One criterion's pruning runs as curves, and the networks at the profile's sizes as points.

    A run that serves all sizes has its band of standard deviations; where each size has a run that
    was tuned for it, thin curves show each run. Points have 95 % intervals over seeds. Yields the
    data with the columns that name it.
    """
    colour, label, _ = style_of(runs["criterion"].iloc[0])
    arms = list(dict.fromkeys(points["arm"]))
    for tuned_for, run in runs.groupby("level", dropna=False):
        one = pd.isna(tuned_for)
        curve = stats.curve_over_seeds(run, size, metric)
        share = "" if one else f"{sizes[int(tuned_for)]:.0%}"
        style = {"linewidth": 1.5 if one else 0.7, "linestyle": "--" if len(arms) > 1 else "-"}
        if not one:
            style["linestyle"] = DASHES[int(tuned_for) % len(DASHES)]
        words = f"{label}, iterative" if one else f"{label}, run tuned for {share}"
        axis.plot(curve["x"], curve["mean"], color=colour, label=words, **style)
        if one and curve["sd"].notna().all():
            low, high = curve["mean"] - curve["sd"], curve["mean"] + curve["sd"]
            axis.fill_between(curve["x"], low, high, color=colour, alpha=0.2)
        yield curve.assign(kind="curve", arm="iterative", tuned_for=share)
    for arm in arms:
        at = stats.points_over_seeds(points[points["arm"] == arm], size, metric, by="level")
        share = [f"{sizes[int(level)]:.0%}" for level in at.pop("level")]
        bars = np.abs(at[["low", "high"]].to_numpy().T - at["mean"].to_numpy())
        name = "from scratch" if arm == "scratch" else "iterative, at the sizes"
        face = {"fillstyle": "full" if arm == "scratch" or len(arms) == 1 else "none"}
        style = {"color": colour, "marker": "o", "capsize": 3, "markersize": 5, **face}
        style["linestyle"] = "-" if arm == "scratch" else ""
        axis.errorbar(at["x"], at["mean"], np.nan_to_num(bars), label=f"{label}, {name}", **style)
        yield at.assign(kind="point", arm=arm, tuned_for=share)


def _draw_published(axis, metric: str, scratch: bool) -> None:
    """The paper's own points, as open marks.

    They are of NYUv2, with normals that it left encoded, so angles are not comparable.
    """
    for _, point in PUBLISHED.iterrows():
        retrained = "scratch" in point["label"]
        if metric in point and (scratch or not retrained):
            mark = {
                "marker": "o" if retrained else "s",
                "color": point["colour"],
                "fillstyle": "none",
                "linestyle": "",
            }
            axis.plot(point["parameters"], point[metric], label=point["label"], **mark)


def _panels_by_size(
    pruned: pd.DataFrame,
    retrained: pd.DataFrame | None,
    dense: pd.DataFrame,
    trivial: pd.DataFrame,
    tasks: dict[str, Task],
    sizes: tuple[float, ...],
    published: bool,
) -> tuple[Figure, pd.DataFrame]:
    """One row of panels for each kind of size, one column for each task, with two levels.

    The paper's x-axis (all parameters) above; below, sizes that the heads' parameters do not hide:
    filters, parameters of the backbone, multiply-accumulates. The levels are the dense network and
    the position prior. published: add the paper's points. Returns the figure and the plotted data.
    """
    prior = trivial[trivial["predictor"] == "position prior"]
    pruned = pruned[pruned["phase"] != "removed"]
    targets = {level: round(size * dense["parameters"].iloc[0]) for level, size in enumerate(sizes)}
    points = stats.at_sizes(pruned, targets, [*SIZES, *panels(tasks)])
    if retrained is not None:  # as in Table 1, without those that landed beside their size
        right = stats.same_size(retrained["parameters"], retrained["level"].map(targets))
        points = pd.concat([points, retrained.loc[right, points.columns]])
    figure, axes = grid_of_axes(len(SIZES), len(tasks), 4, 3.2)
    data = []
    for row, (size, size_label) in zip(axes, SIZES.items()):
        for axis, (metric, name) in zip(row, panels(tasks).items()):
            levels = {"dense_network": dense[metric].mean(), "position_prior": prior[metric].mean()}
            for criterion, runs in pruned.groupby("criterion", sort=False):
                of_criterion = points[points["criterion"] == criterion]
                drawn = _draw_criterion(axis, size, metric, runs, of_criterion, sizes)
                names = {"size": size, "metric": metric, "criterion": criterion}
                data += [part.assign(**names, **levels) for part in drawn]
            for (level, value), colour in zip(levels.items(), (INK, RED)):
                label = level.replace("_", " ")
                axis.axhline(value, color=colour, linewidth=0.8, linestyle=":", label=label)
            if published and size == "parameters":
                _draw_published(axis, metric, scratch=retrained is not None)
            axis.set(title=name)
            size_axis(axis, size_label)
    legend_below(figure, axes[0, 0])
    names = ["size", "metric", "criterion", "arm", "kind", "tuned_for"]
    numbers = ["x", "mean", "sd", "low", "high", "seeds", "dense_network", "position_prior"]
    return figure, pd.concat(data, ignore_index=True)[[*names, *numbers]]


def fig1_iterative_pruning(
    pruned: pd.DataFrame,
    dense: pd.DataFrame,
    trivial: pd.DataFrame,
    tasks: dict[str, Task],
    sizes: tuple[float, ...],
    published: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """Figure 1: metrics after recovery against size; at each of the sizes, what Table 1 judges.

    sizes: the profile's, shares of the dense network's parameters. published: add the paper's
    points. Returns the figure and the plotted data.
    """
    return _panels_by_size(pruned, None, dense, trivial, tasks, sizes, published)


def fig2_layer_widths(layers: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Figure 2: what each criterion leaves of each layer as filters go, and its cosine similarity.

    Means over seeds, at the numbers of filters that every seed passed through: it lands on a size
    at one of its own. Returns the figure and the plotted data.
    """
    import seaborn as sns  # a second of import that only this figure needs

    dense = layers.groupby(["criterion", "seed", "layer"])["width"].transform("max")
    filters = layers.groupby(["criterion", "seed", "removal"])["width"].transform("sum")
    table = layers.assign(share=layers["width"] / dense, filters=filters)
    there = table.groupby(["criterion", "filters"])["seed"].transform("nunique")
    table = table[there == table.groupby("criterion")["seed"].transform("nunique")]
    means = (
        table.groupby(["criterion", "filters", "layer"], sort=False)[
            ["share", "cosine", "dead_share"]
        ]
        .mean()
        .reset_index()
    )
    criteria = list(dict.fromkeys(means["criterion"]))
    figure, axes = grid_of_axes(2, len(criteria), 6, 3.5)
    limit = means["cosine"].abs().max()
    styles = {
        ("share", "share of the layer's filters left"): {"cmap": "viridis", "vmin": 0, "vmax": 1},
        ("cosine", "mean cosine similarity of task gradients"): {
            "cmap": "RdBu",
            "vmin": -limit,
            "vmax": limit,
        },
    }
    for row, ((value, label), style) in zip(axes, styles.items()):
        for axis, criterion in zip(row, criteria):
            grid = means[means["criterion"] == criterion].pivot(
                index="layer", columns="filters", values=value
            )
            grid = grid.sort_index(axis=1, ascending=False).rename(index=lambda layer: layer + 1)
            sns.heatmap(grid, ax=axis, cbar_kws={"label": label}, **style)
            axis.set(
                title=style_of(criterion)[1], xlabel="backbone filters left", ylabel="convolution"
            )
            axis.tick_params(axis="x", rotation=90)  # side by side, many labels would touch
            axis.tick_params(axis="y", rotation=0)
    return figure, means


def fig3_retrained_from_scratch(
    pruned: pd.DataFrame,
    retrained: pd.DataFrame,
    dense: pd.DataFrame,
    trivial: pd.DataFrame,
    tasks: dict[str, Task],
    sizes: tuple[float, ...],
    published: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: found architectures from random weights (solid) against the iterative run.

    On Figure 1's axes and with its points. Returns the figure and the plotted data.
    """
    return _panels_by_size(pruned, retrained, dense, trivial, tasks, sizes, published)


def fig4_speedup(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What pruning buys at inference: measured against theoretical speed-up, and memory saved.

    table: `latency.speedups`. The theoretical speed-up is dense MACs / MACs. One row of panels per
    batch; filled marks are the networks as pruning left them, open ones have their widths rounded
    up. The diagonal is where a network costs what its MACs say. Returns the figure and the table.
    """
    shown = [
        (device, runtime, "speedup")
        for device, runtime in table.groupby(["device", "runtime"], sort=False).groups
    ]
    shown += [(device, "PyTorch", "memory_ratio") for device in dict.fromkeys(table["device"])]
    names = {"cpu": "CPU", "cuda": "GPU"}
    batches = list(dict.fromkeys(table["batch"]))
    figure, axes = grid_of_axes(len(batches), len(shown), 3.8, 3.2, sharex=True, sharey=True)
    for row, batch in zip(axes, batches):
        for axis, (device, runtime, value) in zip(row, shown):
            panel = table[
                (table["device"] == device)
                & (table["runtime"] == runtime)
                & (table["batch"] == batch)
            ]
            ends = [1, table["theoretical"].max()]
            axis.plot(
                ends, ends, color=INK, linewidth=0.8, linestyle=":", label="in proportion to MACs"
            )
            for (criterion, network), line in panel.groupby(["criterion", "network"], sort=False):
                colour, label, _ = style_of(criterion)
                found = network == "found"
                style = (
                    {"marker": "o", "linestyle": "-"}
                    if found
                    else {"marker": "s", "linestyle": "", "fillstyle": "none"}
                )
                line = line.sort_values("theoretical")
                x, y = line["theoretical"], line[value]
                if found:  # the dense network, where every run starts
                    x, y = [1, *x], [1, *y]
                axis.plot(
                    x,
                    y,
                    color=colour,
                    markersize=5,
                    label=label if found else f"{label}, {network}",
                    **style,
                )
            memory = value == "memory_ratio"
            threads = f" (threads: {panel['threads'].iloc[0]})" if device == "cpu" else ""
            what = (
                f"{names[device]}, peak memory"
                if memory
                else f"{names[device]}{threads}, {runtime}"
            )
            axis.set(
                title=f"{what}, batch {batch}",
                ylabel="dense peak / peak" if memory else "measured speed-up",
            )
            axis.set(xscale="log", yscale="log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(FormatStrFormatter("%g×"))
                scale.set_minor_locator(NullLocator())
    for axis in axes[-1]:
        axis.set(xlabel="theoretical speed-up (dense MACs / MACs)")
    legend_below(figure, axes[0, 0])
    return figure, table.assign(widths=[" ".join(map(str, widths)) for widths in table["widths"]])


OUTCOMES = {
    "equivalent": BLUE,
    "better": BLUE,
    "below half": BLUE,
    "no worse": GREEN,
    "different": RED,
    "differs": RED,
    "worse": RED,
    "above half": RED,
    "differ, size open": ORANGE,
    "inconclusive": GRAY,
    "not told apart": GRAY,
}


def fig5_claims(
    table: pd.DataFrame, cells: pd.DataFrame, margin: float
) -> tuple[Figure, pd.DataFrame]:
    """Every cell of every comparison in Table 1: its estimate and interval, coloured by outcome.

    table, cells: `claims.judge`. One panel per comparison; the grey
    band is the margin, in which equivalence needs the thick interval (TOST's) to lie. Returns the
    figure and the cells.
    """
    shown = [name for name in table["claim"] if name in set(cells["claim"])]
    columns, most = 4, cells.groupby("claim").size().max()
    rows = -(-len(shown) // columns)
    figure, axes = grid_of_axes(rows, columns, 4.2, 0.9 + 0.17 * most)
    for axis, claim in zip(axes.flat, shown):
        about = table[table["claim"] == claim].iloc[0]
        _draw_cells(axis, cells[cells["claim"] == claim].iloc[::-1], about["rule"], margin)
        means = f"{about['outcome']} | the paper: {about['paper']}"
        words = textwrap.fill(f"{claim}: {about['statement']}", 52)
        axis.set_title(f"{words}\n{means}", fontsize=7.5, loc="left")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    handles = [
        axes[0, 0].plot([], [], "o", color=colour, label=outcome)[0]
        for outcome, colour in OUTCOMES.items()
        if outcome in set(cells["outcome"])
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize="small")
    figure.supxlabel(
        "shares of the gap between position prior and dense network: how far the first named is "
        "ahead, or what is kept (claim 3)",
        fontsize=9,
    )
    return figure, cells


def _draw_cells(axis, cells: pd.DataFrame, rule: str, margin: float) -> None:
    null = 0.5 if rule == "half" else 0.0
    if rule != "half":
        axis.axvspan(-margin, margin, color=GRAY, alpha=0.15, linewidth=0)
    axis.axvline(null, color=INK, linewidth=0.8)
    for i, (_, cell) in enumerate(cells.iterrows()):
        colour = OUTCOMES[cell["outcome"]]
        axis.plot([cell["low"], cell["high"]], [i, i], color=colour, linewidth=1)
        axis.plot([cell["tost_low"], cell["tost_high"]], [i, i], color=colour, linewidth=3)
        axis.plot(cell["estimate"], i, "o", color=colour, markersize=4)
    names = [" ".join(filter(None, cell)) for cell in cells[["criterion", "size", "task"]].values]
    axis.set_yticks(range(len(names)), names, fontsize=6.5)
    axis.tick_params(axis="x", labelsize=7)


def fig6_training_curves(
    curves: pd.DataFrame, sizes: tuple[float, ...]
) -> tuple[Figure, pd.DataFrame]:
    """Re-training, arm by arm: the validation endpoint of each task, mean over seeds.

    curves: columns criterion, arm, level, progress (share of the run's own steps), task, kept
    (share of the gap); sizes: shares of the dense network's parameters, by level. Returns the
    figure and the plotted data.
    """
    cell = ["criterion", "task", "level", "arm"]
    means = curves.groupby([*cell, "progress"])["kept"].agg(["mean", "std", "count"]).reset_index()
    tasks = list(dict.fromkeys(curves["task"]))
    rows = list(dict.fromkeys(zip(means["criterion"], means["level"])))
    figure, axes = grid_of_axes(len(rows), len(tasks), 4, 2.8, sharey=True)
    runs = means.groupby("arm")["count"].max()
    for row, (criterion, level) in zip(axes, rows):
        for axis, task in zip(row, tasks):
            where = (means["criterion"] == criterion) & (means["level"] == level)
            panel = means[where & (means["task"] == task)]
            for colour, arm in zip(COLOURS, runs.index):  # seven arms at most
                line = panel[panel["arm"] == arm]
                many = "1 seed" if runs[arm] == 1 else f"{runs[arm]} seeds"
                label = f"{arm.replace('_', ' ')} ({many})"
                axis.plot(line["progress"], line["mean"], ".-", color=colour, label=label)
            axis.set(title=f"{style_of(criterion)[1]}, {task}, {sizes[int(level)]:.0%}")
            axis.set(xlabel="share of the arm's steps", ylabel="share of the gap kept")
    legend_below(figure, axes[0, 0])
    return figure, means


def fig7_tuning(trials: pd.DataFrame, profile: Profile) -> tuple[Figure, pd.DataFrame]:
    """Every search of a profile, by phase and size: validation losses over learning rates.

    A star is the best trial, crosses at the lower edge are trials that were given up. trials:
    `tables.collect`'s. Returns the figure and the trials.
    """
    arms, levels = list(dict.fromkeys(trials["arm"])), sorted(set(trials["level"]))
    figure, axes = grid_of_axes(len(arms), len(levels), 5, 2.8, sharex=True)
    for row, arm in zip(axes, arms):
        for axis, level in zip(row, levels):
            cell = trials[(trials["arm"] == arm) & (trials["level"] == level)]
            for criterion, search in cell.groupby("criterion", sort=False):
                colour, label, _ = style_of(criterion)
                finished, given_up = search[search["loss"].notna()], search[search["loss"].isna()]
                axis.plot(finished["lr"], finished["loss"], ".", color=colour, label=label)
                best = finished.loc[finished["loss"].idxmin()]
                axis.plot(best["lr"], best["loss"], "*", color=colour, markersize=12)
                axis.plot(
                    given_up["lr"],
                    [0.03] * len(given_up),
                    "x",
                    color=colour,
                    transform=axis.get_xaxis_transform(),
                )
            axis.set(
                title=f"{arm}, {profile.sizes[int(level)]:.0%} of the parameters",
                ylabel="validation loss",
            )
            axis.set(xlabel="learning rate", xscale="log", xlim=profile.tuning.lr)
    legend_below(figure, max(axes[:, 0], key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure, trials


def show_trials(trials: pd.DataFrame) -> Figure:
    """A search: the loss of every trial in its order, and over learning rate and weight decay."""
    figure, (axes,) = grid_of_axes(1, 2, 4.5, 3.2)
    finished = trials[trials["state"] == "complete"]
    axes[0].plot(finished["trial"], finished["loss"], "o")
    axes[0].plot(finished["trial"], finished["loss"].cummin(), color=GRAY, label="best so far")
    axes[0].set(ylabel="validation loss")
    _count_axis(axes[0], "trial")
    axes[0].legend()
    marks = axes[1].scatter(
        finished["lr"], finished["weight_decay"], c=finished["loss"], cmap="viridis_r"
    )
    given_up = trials[trials["state"] != "complete"]
    axes[1].plot(given_up["lr"], given_up["weight_decay"], "x", color=GRAY, label="given up early")
    axes[1].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
    figure.colorbar(marks, label="validation loss")
    return figure
