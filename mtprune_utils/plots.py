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
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullLocator

from mtprune_utils import stats
from mtprune_utils.criteria import CRITERIA
from mtprune_utils.data import Dataset, Split
from mtprune_utils.execution import FIGURE_NOTEBOOKS, notebook_digest
from mtprune_utils.files import PROJECT, csv_text, write_atomically, write_json
from mtprune_utils.profiles import Profile
from mtprune_utils.runs import Experiment, provenance
from mtprune_utils.tasks import IGNORE, MIN_DEPTH, Task

STYLES = {  # colour and label; a criterion that is not named here gets the next free colour and its own name
    "taylor": ("tab:orange", "Taylor"), "cosprune": ("tab:blue", "CosPrune"), "magnitude": ("tab:green", "L1 magnitude"),
    "random": ("tab:gray", "random"), "uniform": ("tab:brown", "uniform"),
}
SIZES = {
    "parameters": "parameters", "filters": "backbone filters", "backbone_parameters": "backbone parameters",
    "macs": "multiply-accumulates of one image",
}
PUBLISHED = pd.DataFrame(  # read off the paper's Figures 1 and 3, approximately
    [
        ("full model, published", "black", 84.13e6, 0.468, 0.27, 18.35),
        ("Taylor, iterative, published", "tab:orange", 14.2e6, 0.36, 0.39, 18.65),
        ("Taylor, from scratch, published", "tab:orange", 14.4e6, 0.42, 0.34, 18.1),
        ("CosPrune, from scratch, published", "tab:blue", 14.4e6, 0.44, 0.31, 18.1),
    ],
    columns=["label", "colour", "parameters", "segmentation.pixel_accuracy", "depth.relative_error", "normals.mean_angle"],
)


def panels(tasks: dict[str, Task]) -> dict[str, str]:
    """The metric that a figure shows of each task, with its title."""
    return {f"{task.name}.{task.shown}": title(f"{task.name}.{task.shown}") for task in tasks.values()}


def title(metric: str) -> str:
    """"depth.relative_error" as a person would write it."""
    task, name = metric.split(".")
    degrees = " (degrees)" if name.endswith("angle") else ""
    return f"{task.replace('_', ' ').capitalize()}: {name.replace('_', ' ')}{degrees}"


def style_of(criterion: str) -> tuple[str, str]:
    """Colour and label of a criterion, the paper's for the paper's."""
    extra = [name for name in CRITERIA if name not in STYLES]
    spare = ("tab:purple", "tab:pink", "tab:olive", "tab:cyan")
    return STYLES.get(criterion) or (spare[extra.index(criterion) % len(spare)], criterion)


def save_figure(
    figure: Figure, name: str, data: pd.DataFrame, experiment: Experiment, origins: dict[str, dict], folder: Path
) -> None:
    """Write <folder>/<label>/<name>.png, .pdf, .csv (the plotted data) and .json (where it came from).

    origins: the provenance of every run that the figure shows.
    """
    place = Path(folder) / experiment.label
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
    notebook = PROJECT / FIGURE_NOTEBOOKS[name]
    drawn_by = {"notebook": notebook_digest(notebook)} if notebook.exists() else {}
    codes = {label.split("/")[0]: run["code"] for label, run in used.items()}
    drawn_by["other_code"] = {s: code for s, code in codes.items() if experiment.refusal(s, code)}
    settings = {"profile": asdict(experiment.profile), "seeds": seeds, **drawn_by}
    write_json(place / f"{name}.json", provenance("figure", experiment.data, **settings, runs=used))


def show_samples(split: Split, dataset: Dataset, count: int = 4) -> Figure:
    """The first images of a split over their targets; what is invalid is white. Classes of whole images stand above."""
    whole = [name for name, task in dataset.tasks.items() if task.geometry == "image"]
    rows = ["image", *(name for name in dataset.tasks if name not in whole)]
    shape = split.image.shape[2] / split.image.shape[3]
    figure, axes = plt.subplots(
        len(rows), count, figsize=(2.2 * count, 2.2 * len(rows) * shape + 0.3), layout="constrained", squeeze=False
    )
    for i, column in enumerate(axes.T):
        column[0].set_title(" / ".join(dataset.classes[split.targets[name][i]] for name in whole), fontsize="small")
        for axis, name in zip(column, rows):
            shown = {"X": split.image[i].permute(1, 2, 0).numpy()}
            picture = shown if name == "image" else _picture(split.targets[name][i], name, dataset)
            axis.imshow(**picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_ylabel(name)
    return figure


def _picture(target: torch.Tensor, name: str, dataset: Dataset) -> dict:
    """What imshow needs to show one target, whose kind its task's geometry tells."""
    geometry = dataset.tasks[name].geometry
    if geometry == "labels":
        colours = "tab20" if len(dataset.classes) <= 20 else "nipy_spectral"
        return {"X": np.ma.masked_equal(target.numpy(), IGNORE), "cmap": colours, "vmin": 0, "vmax": len(dataset.classes)}
    if geometry == "normals":
        normals = target.float().permute(1, 2, 0)
        return {"X": torch.where(normals.square().sum(2, keepdim=True) > 0, (normals + 1) / 2, 1.0).numpy()}
    return {"X": np.ma.masked_less_equal(target[0].numpy(), MIN_DEPTH), "cmap": "viridis"}


def show_statistics(split: Split, dataset: Dataset, images: int = 200) -> Figure:
    """How the targets of a split's first images are distributed: classes, depths, and the directions of normals."""
    figure, axes = _grid(1, len(dataset.tasks), 5, 3.6)
    for axis, (name, task) in zip(axes[0], dataset.tasks.items()):
        target = split.targets[name][:images].float()
        if task.geometry in ("labels", "image"):
            counts = torch.bincount(target[target != IGNORE].long(), minlength=len(dataset.classes))
            axis.barh(range(len(counts)), (counts / counts.sum()).numpy())
            axis.set_yticks(range(len(counts)), dataset.classes, fontsize=8 if len(counts) <= 20 else 5)
            axis.invert_yaxis()
            axis.set(title=name, xlabel="share")
        elif task.geometry == "normals":
            valid = target.square().sum(1) > 0
            x, y = (target[:, i][valid].numpy() for i in (0, 1))
            axis.hist2d(x, y, bins=60, range=((-1, 1), (-1, 1)), norm="log")
            axis.set(title=name, xlabel="x (right)", ylabel="y (up)", aspect="equal")
        else:
            axis.hist(target[target > MIN_DEPTH].numpy(), bins=80)
            axis.set(title=name, xlabel=task.geometry, yticks=[])
    return figure


def show_curve(curve: pd.DataFrame) -> Figure:
    """Training and validation loss of each task over a run's steps; a circle marks the weights that were kept."""
    tasks = [column.split(".")[1] for column in curve if column.startswith("train.")]
    figure, axes = _grid(1, len(tasks), 3.4, 2.8)
    kept = curve[curve["selected"] == 1]
    for axis, task in zip(axes[0], tasks):
        axis.plot(curve["step"], curve[f"train.{task}.loss"], "--", color="tab:gray", label="training")
        axis.plot(curve["step"], curve[f"{task}.loss"], color="tab:blue", label="validation")
        axis.plot(kept["step"], kept[f"{task}.loss"], "o", color="tab:blue", fillstyle="none", label="kept")
        axis.set(title=task, xlabel="step", ylabel="loss")
    axes[0, 0].legend()
    return figure


def show_recovery(evaluations: pd.DataFrame, tasks: dict[str, Task]) -> Figure:
    """One pruning run: each metric right after every removal and after its recovery, against the steps trained."""
    figure, axes = _grid(1, len(tasks), 4, 3)
    for axis, (metric, name) in zip(axes[0], panels(tasks).items()):
        axis.plot(evaluations["step"], evaluations[metric], color="tab:gray", linewidth=0.8)
        for phase, marker in (("removed", "v"), ("recovered", "o")):
            rows = evaluations[evaluations["phase"] == phase]
            axis.plot(rows["step"], rows[metric], marker, markersize=3, label=phase)
        axis.set(title=name, xlabel="step")
    axes[0, 0].legend()
    return figure


def _grid(rows: int, columns: int, width: float, height: float, **more) -> tuple[Figure, np.ndarray]:
    """A figure of so many panels, each of that size in inches, and their axes as a table."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False, **more)


def _size_axis(axis, label: str) -> None:
    """Logarithmic, pruning goes to the right, with ticks such as 500k at 1, 2 and 5."""
    axis.set(xlabel=label, xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.invert_xaxis()


def _legend_below(figure: Figure, axis) -> None:
    """One legend for all panels, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")


def _draw_curves(axis, size: str, metric: str, pruned: pd.DataFrame, retrained: pd.DataFrame | None) -> Iterator[pd.DataFrame]:
    """Draws each criterion's curve, and its re-trained networks if given. Yields the data with the columns that name it."""
    for criterion, table in pruned[pruned["phase"] != "removed"].groupby("criterion", sort=False):
        colour, label = style_of(criterion)
        curve = stats.curve_over_seeds(table, size, metric)
        dashed = {} if retrained is None else {"linestyle": "--"}
        axis.plot(curve["x"], curve["mean"], color=colour, label=f"{label}, iterative" if dashed else label, **dashed)
        if curve["sd"].notna().all():
            axis.fill_between(curve["x"], curve["mean"] - curve["sd"], curve["mean"] + curve["sd"], color=colour, alpha=0.2)
        if retrained is None:
            yield curve.assign(criterion=criterion)
            continue
        points = stats.points_over_seeds(retrained[retrained["criterion"] == criterion], size, metric, by="rank")
        style = {"color": colour, "marker": "o", "capsize": 3, "label": f"{label}, from scratch"}
        axis.errorbar(points["x"], points["mean"], points["sd"], **style)
        yield curve.assign(arm="iterative", criterion=criterion)
        yield points.assign(arm="from scratch", criterion=criterion)


def _draw_published(axis, metric: str, scratch: bool) -> None:
    """The paper's own points, as open marks: of NYUv2, with normals that it left encoded, so angles are not comparable."""
    for _, point in PUBLISHED.iterrows():
        retrained = "scratch" in point["label"]
        if metric in point and (scratch or not retrained):
            mark = {"marker": "o" if retrained else "s", "color": point["colour"], "fillstyle": "none", "linestyle": ""}
            axis.plot(point["parameters"], point[metric], label=point["label"], **mark)


def _panels_by_size(
    pruned: pd.DataFrame, retrained: pd.DataFrame | None, dense: pd.DataFrame, trivial: pd.DataFrame, tasks: dict[str, Task],
    published: bool,
) -> tuple[Figure, pd.DataFrame]:
    """One row of panels for each kind of size, one column for each task, with the levels between which networks lie.

    The paper's x-axis (all parameters) above; below, sizes that the heads' parameters do not hide: filters, parameters of
    the backbone, multiply-accumulates. Curves of pruning runs after recovery, dashed where points of re-trained networks
    stand beside them. published: add the paper's points. Returns the figure and the plotted data.
    """
    prior = trivial[trivial["predictor"] == "position prior"]
    figure, axes = _grid(len(SIZES), len(tasks), 4, 3.2)
    data = []
    for row, (size, size_label) in zip(axes, SIZES.items()):
        for axis, (metric, name) in zip(row, panels(tasks).items()):
            levels = {"dense_network": dense[metric].mean(), "position_prior": prior[metric].mean()}
            curves = _draw_curves(axis, size, metric, pruned, retrained)
            data += [curve.assign(size=size, metric=metric, **levels) for curve in curves]
            for (level, value), colour in zip(levels.items(), ("black", "tab:red")):
                axis.axhline(value, color=colour, linewidth=0.8, linestyle=":", label=level.replace("_", " "))
            if published and size == "parameters":
                _draw_published(axis, metric, scratch=retrained is not None)
            axis.set(title=name)
            _size_axis(axis, size_label)
    _legend_below(figure, axes[0, 0])
    table = pd.concat(data, ignore_index=True)
    names = [name for name in ("size", "arm", "metric", "criterion") if name in table]
    return figure, table[[*names, "x", "mean", "sd", "seeds", "dense_network", "position_prior"]]


def fig1_iterative_pruning(
    pruned: pd.DataFrame, dense: pd.DataFrame, trivial: pd.DataFrame, tasks: dict[str, Task], published: bool = False
) -> tuple[Figure, pd.DataFrame]:
    """Figure 1: metrics after recovery against size, mean line and standard-deviation band over seeds.

    published: add the paper's points. Returns the figure and the plotted data.
    """
    return _panels_by_size(pruned, None, dense, trivial, tasks, published)


def fig2_layer_widths(layers: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Figure 2: what each criterion leaves of each layer as filters go, and the layer's mean cosine similarity.

    Means over seeds, at the numbers of filters that every seed passed through: it lands on a size at one of its own.
    Returns the figure and the plotted data.
    """
    import seaborn as sns  # a second of import that only this figure needs

    dense = layers.groupby(["criterion", "seed", "layer"])["width"].transform("max")
    filters = layers.groupby(["criterion", "seed", "removal"])["width"].transform("sum")
    table = layers.assign(share=layers["width"] / dense, filters=filters)
    there = table.groupby(["criterion", "filters"])["seed"].transform("nunique")
    table = table[there == table.groupby("criterion")["seed"].transform("nunique")]
    means = table.groupby(["criterion", "filters", "layer"], sort=False)[["share", "cosine", "dead_share"]].mean().reset_index()
    criteria = list(dict.fromkeys(means["criterion"]))
    figure, axes = _grid(2, len(criteria), 6, 3.5)
    limit = means["cosine"].abs().max()
    styles = {
        ("share", "share of the layer's filters left"): {"cmap": "viridis", "vmin": 0, "vmax": 1},
        ("cosine", "mean cosine similarity of task gradients"): {"cmap": "RdBu", "vmin": -limit, "vmax": limit},
    }
    for row, ((value, label), style) in zip(axes, styles.items()):
        for axis, criterion in zip(row, criteria):
            grid = means[means["criterion"] == criterion].pivot(index="layer", columns="filters", values=value)
            grid = grid.sort_index(axis=1, ascending=False).rename(index=lambda layer: layer + 1)
            sns.heatmap(grid, ax=axis, cbar_kws={"label": label}, **style)
            axis.set(title=style_of(criterion)[1], xlabel="backbone filters left", ylabel="convolution")
            axis.tick_params(axis="x", rotation=90)  # of many sizes, labels side by side would touch
            axis.tick_params(axis="y", rotation=0)
    return figure, means


def fig3_retrained_from_scratch(
    pruned: pd.DataFrame, retrained: pd.DataFrame, dense: pd.DataFrame, trivial: pd.DataFrame, tasks: dict[str, Task],
    published: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: found architectures re-trained from random weights (solid) against the iterative run (dashed).

    Mean and standard deviation over seeds, on Figure 1's axes. published: add the paper's points. Returns the figure and the
    plotted data.
    """
    return _panels_by_size(pruned, retrained, dense, trivial, tasks, published)


def fig4_speedup(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What pruning buys at inference: measured against theoretical speed-up (dense MACs / MACs), and the memory that it saves.

    table: `inference.speedups`. One row of panels per batch; filled marks are the networks as pruning left them, open ones
    have their widths rounded up. The diagonal is where a network costs what its MACs say. Returns the figure and the table.
    """
    shown = [(device, runtime, "speedup") for device, runtime in table.groupby(["device", "runtime"], sort=False).groups]
    shown += [(device, "PyTorch", "memory_ratio") for device in dict.fromkeys(table["device"])]
    names = {"cpu": "CPU", "cuda": "GPU"}
    batches = list(dict.fromkeys(table["batch"]))
    figure, axes = _grid(len(batches), len(shown), 3.8, 3.2, sharex=True, sharey=True)
    for row, batch in zip(axes, batches):
        for axis, (device, runtime, value) in zip(row, shown):
            panel = table[(table["device"] == device) & (table["runtime"] == runtime) & (table["batch"] == batch)]
            ends = [1, table["theoretical"].max()]
            axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":", label="in proportion to MACs")
            for (criterion, network), line in panel.groupby(["criterion", "network"], sort=False):
                colour, label = style_of(criterion)
                found = network == "found"
                style = {"marker": "o", "linestyle": "-"} if found else {"marker": "s", "linestyle": "", "fillstyle": "none"}
                line = line.sort_values("theoretical")
                x, y = line["theoretical"], line[value]
                if found:  # the dense network, where every run starts
                    x, y = [1, *x], [1, *y]
                axis.plot(x, y, color=colour, markersize=5, label=label if found else f"{label}, {network}", **style)
            memory = value == "memory_ratio"
            threads = f" (threads: {panel['threads'].iloc[0]})" if device == "cpu" else ""
            what = f"{names[device]}, peak memory" if memory else f"{names[device]}{threads}, {runtime}"
            axis.set(title=f"{what}, batch {batch}", ylabel="dense peak / peak" if memory else "measured speed-up")
            axis.set(xscale="log", yscale="log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(FormatStrFormatter("%g×"))
                scale.set_minor_locator(NullLocator())
    for axis in axes[-1]:
        axis.set(xlabel="theoretical speed-up (dense MACs / MACs)")
    _legend_below(figure, axes[0, 0])
    return figure, table.assign(widths=[" ".join(map(str, widths)) for widths in table["widths"]])


VERDICTS = {"supported": "tab:green", "refuted": "tab:red", "undecided": "tab:gray"}


def fig5_claims(table: pd.DataFrame, margin: float) -> tuple[Figure, pd.DataFrame]:
    """Every claim's estimate and interval, the claim as a whole (diamond) and task by task, coloured by verdict.

    table: `claims.verdict_table`. Where a claim compares with a threshold, a tick marks it; the grey band is the margin, in
    which equality needs the thick interval (TOST's) to lie.
    """
    rows = table[table["estimate"].notna()].reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(11, 0.24 * len(rows) + 1), layout="constrained")
    axis.axvspan(-margin, margin, color="tab:gray", alpha=0.15, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    for i, row in rows.iterrows():
        whole = row["task"] == "all"
        style = {"color": VERDICTS[row["verdict"]], "marker": "D" if whole else "o", "markersize": 6 if whole else 4}
        if np.isfinite([row["low"], row["high"]]).all():
            axis.plot([row["low"], row["high"]], [i, i], color=style["color"], linewidth=1)
            axis.plot([row["tost_low"], row["tost_high"]], [i, i], color=style["color"], linewidth=3)
        axis.plot(row["estimate"], i, **style)
        if row["rule"] != "equal":
            axis.plot(row["threshold"], i, "|", color="tab:blue", markersize=9, markeredgewidth=1.5)
    names = [f"{row['claim']}: {row['statement']}" if row["task"] == "all" else row["task"] for _, row in rows.iterrows()]
    axis.set_yticks(range(len(rows)), [textwrap.fill(name, 60) for name in names], fontsize=8)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel="shares of the gap between position prior and dense network: "
             "what is kept (claim 3), or how far the first named is ahead")
    handles = [axis.plot([], [], "o", color=colour, label=verdict)[0] for verdict, colour in VERDICTS.items()]
    handles += axis.plot([], [], "|", color="tab:blue", markersize=9, markeredgewidth=1.5, label="threshold")
    axis.legend(handles=handles, loc="upper right", fontsize="small")
    return figure, rows


def fig6_training_curves(curves: pd.DataFrame, sizes: tuple[float, ...]) -> tuple[Figure, pd.DataFrame]:
    """Re-training, arm by arm: the validation endpoint of each task, as the share of the gap, mean over seeds and criteria.

    curves: columns arm, rank, progress (share of the run's own steps), task, kept; sizes: shares of the dense network's
    parameters, by rank. Returns the figure and the plotted data.
    """
    means = curves.groupby(["task", "rank", "arm", "progress"])["kept"].agg(["mean", "std", "count"]).reset_index()
    tasks, ranks = list(dict.fromkeys(curves["task"])), sorted(set(means["rank"]))
    figure, axes = _grid(len(ranks), len(tasks), 4, 2.8, sharey=True)
    runs = means.groupby("arm")["count"].max()
    for row, rank in zip(axes, ranks):
        for axis, task in zip(row, tasks):
            for colour, arm in enumerate(runs.index):
                line = means[(means["rank"] == rank) & (means["task"] == task) & (means["arm"] == arm)]
                axis.plot(line["progress"], line["mean"], ".-", color=f"C{colour}", label=f"{arm} ({runs[arm]} runs)")
            axis.set(title=f"{task}, {sizes[int(rank)]:.0%} of the parameters")
            axis.set(xlabel="share of the arm's steps", ylabel="share of the gap kept")
    _legend_below(figure, axes[0, 0])
    return figure, means


def fig7_tuning(trials: pd.DataFrame, profile: Profile) -> tuple[Figure, pd.DataFrame]:
    """Every search of a profile, by phase and size: the validation loss of each trial over its learning rate.

    A star is the best, crosses at the lower edge are trials that were given up. trials: `results.collect`'s. Returns the
    figure and the trials.
    """
    arms, ranks = list(dict.fromkeys(trials["arm"])), sorted(set(trials["rank"]))
    figure, axes = _grid(len(arms), len(ranks), 5, 2.8, sharex=True)
    for row, arm in zip(axes, arms):
        for axis, rank in zip(row, ranks):
            cell = trials[(trials["arm"] == arm) & (trials["rank"] == rank)]
            for criterion, search in cell.groupby("criterion", sort=False):
                colour, label = style_of(criterion)
                finished, given_up = search[search["loss"].notna()], search[search["loss"].isna()]
                axis.plot(finished["lr"], finished["loss"], ".", color=colour, label=label)
                best = finished.loc[finished["loss"].idxmin()]
                axis.plot(best["lr"], best["loss"], "*", color=colour, markersize=12)
                axis.plot(given_up["lr"], [0.03] * len(given_up), "x", color=colour, transform=axis.get_xaxis_transform())
            axis.set(title=f"{arm}, {profile.sizes[int(rank)]:.0%} of the parameters", ylabel="validation loss")
            axis.set(xlabel="learning rate", xscale="log", xlim=profile.tuning.lr)
    _legend_below(figure, max(axes[:, 0], key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure, trials


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
