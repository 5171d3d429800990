"""Pictures for the articles: what networks make of an image, how widths shrink, what is worth it.

Nothing is judged by them.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.io.formats.style import Styler
from torch import Tensor, nn

from mtprune_utils.core.data import Dataset, Split
from mtprune_utils.core.evaluation import evaluation_batches, forward, output_scale
from mtprune_utils.core.model import evaluation_mode, load_model
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.targets import Depth, ImageClass, Labels, Normals
from mtprune_utils.core.task import Task
from mtprune_utils.stages._training import device_of
from mtprune_utils.study.figures import grid_of_axes, legend_below, panels, picture, size_axis
from mtprune_utils.study.palette import GRAY, SEQUENTIAL, style_of

# What an error map shows as its darkest, and what that is.
ERRORS = {
    Labels: (1.0, "wrong class"),
    Depth: (0.5, "error, to 50 %"),
    Normals: (60.0, "error, to 60°"),
}


# --- what networks make of images ---


@dataclass(frozen=True)
class Seen:
    """What a network makes of the first test images, in the form of their targets.

    quality: the metric that figures show of each task, of each image alone.
    """

    predictions: dict[str, Tensor]
    quality: dict[str, list[float]]


def look(model: nn.Module, images: Split, tasks: dict[str, Task], profile: Profile) -> Seen:
    """Predictions for images, as they are evaluated: at crop x crop, depths at their true scale."""
    found: dict[str, list[Tensor]] = {name: [] for name in tasks}
    quality: dict[str, list[float]] = {name: [] for name in tasks}
    scale = output_scale(profile)
    with torch.no_grad(), evaluation_mode(model):
        for batch, targets in evaluation_batches(images, tasks, profile):
            outputs = forward(model, batch, profile)
            for name, task in tasks.items():
                output = task.target.unscaled(outputs[name], scale)
                height, width = batch.shape[-2:]
                output = task.target.resize_output(output, (height, width))
                found[name].append(as_target(output, task).cpu())
                for i, target in enumerate(targets[name]):
                    quality[name].append(_quality(task, output[i : i + 1], target[None]))
    return Seen({name: torch.cat(parts) for name, parts in found.items()}, quality)


def as_target(output: Tensor, task: Task) -> Tensor:
    """An output (B, channels, ...) in the form of the task's targets."""
    if isinstance(task.target, ImageClass):
        return task.meter().logits(output).argmax(1)  # type: ignore[attr-defined]
    if isinstance(task.target, Labels):
        return output.argmax(1)
    if isinstance(task.target, Normals):
        return torch.nn.functional.normalize(output, dim=1)
    return output


def _quality(task: Task, output: Tensor, target: Tensor) -> float:
    if not task.target.valid(target).any():
        return float("nan")
    meter = task.meter()
    meter.update(output, target)
    return float(meter.compute()[task.shown])


def limits_of(target: Tensor, task: Task) -> tuple[float, float] | None:
    """The range of colours that prediction and truth share, where the kind of target has none."""
    if not isinstance(task.target, Depth):
        return None
    valid = target[task.target.valid(target[None])]  # (1, H, W) both
    return (valid.min().item(), valid.max().item()) if len(valid) else (0.0, 1.0)


def pixels(target: Tensor, task: Task, limits: tuple[float, float] | None = None) -> np.ndarray:
    """One target, or a prediction in its form, as (H, W, 3 or 4) bytes; invalid is transparent."""
    shown = picture(target, task)
    values = shown["X"]
    if "cmap" not in shown:
        return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    low, high = limits or (shown["vmin"], shown["vmax"])
    colours = matplotlib.colormaps[shown["cmap"]]
    return colours(np.ma.clip((values - low) / ((high - low) or 1), 0, 1), bytes=True)


def film(
    images: Split,
    predictions: dict[str, dict[str, Tensor]],
    tasks: dict[str, Task],
    i: int,
    with_errors: bool = False,
) -> Figure:
    """The i-th image, each task's truth, and what networks of several sizes predict.

    predictions: {size: {task: of all images}}. with_errors: below each prediction, where it is
    wrong. Drawn for a page of any colour.
    """
    drawn = {name: task for name, task in tasks.items() if task.target.of_pixels}
    reds = matplotlib.colormaps["Reds"].with_extremes(bad=GRAY)
    columns = {"true": images.targets, **predictions}
    each = 1 + with_errors
    across, down = len(columns) + 1, max(each * len(drawn), 1)
    figure, axes = grid_of_axes(down, across, 1.35, 1.5)
    axes[0, 0].imshow(images.image[i].permute(1, 2, 0).numpy(), interpolation="nearest")
    axes[0, 0].set_title("image", fontsize=8)
    for axis, column in zip(axes[0, 1:], columns):
        axis.set_title(column, fontsize=8)
    for row, below, (name, task) in zip(axes[::each], axes[each - 1 :: each], drawn.items()):
        limits = limits_of(images.targets[name][i], task)
        row[1].set_ylabel(name, fontsize=8)
        for axis, of in zip(row[1:], columns.values()):
            axis.imshow(pixels(of[name][i], task, limits), interpolation="nearest")
        if not with_errors:
            continue
        worst, said = next(ERRORS[kind] for kind in ERRORS if isinstance(task.target, kind))
        below[2].set_ylabel(said, fontsize=8)
        for axis, of in zip(below[2:], predictions.values()):
            wrong = errors(of[name][i], images.targets[name][i], task)
            axis.imshow(wrong, cmap=reds, vmin=0, vmax=worst, interpolation="nearest")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    return figure


def errors(predicted: Tensor, target: Tensor, task: Task) -> np.ndarray:
    """How wrong a prediction is at each pixel, (H, W): NaN where there is no target.

    Both in the form of targets (C, H, W) or (H, W). Of classes 0 or 1, of depths the relative
    error, of normals the angle in degrees. Raises ValueError for targets of whole images.
    """
    if isinstance(task.target, Labels) and task.target.of_pixels:
        wrong = (predicted != target).float()
    elif isinstance(task.target, Depth):
        wrong = ((predicted - target).abs() / target)[0]
    elif isinstance(task.target, Normals):
        cosine = torch.nn.functional.cosine_similarity(predicted.float(), target.float(), dim=0)
        wrong = cosine.clamp(-1, 1).acos().rad2deg()
    else:
        raise ValueError(f"no error map of {task.name}: its target is one of whole images")
    valid = task.target.valid(target[None]).reshape(wrong.shape)
    return torch.where(valid, wrong, torch.nan).numpy()


def show_errors(
    networks: dict[str, Path], dataset: Dataset, profile: Profile, i: int = 0
) -> Figure:
    """The i-th test image by each network, as predictions, and where each is wrong below them.

    networks: {what it is: its weights}; the tasks are those that every one of them has. Dark
    pixels are wrong, pixels without a target are grey.
    """
    device = device_of(profile)
    models = {label: load_model(file).to(device) for label, file in networks.items()}
    tasks = {
        name: task
        for name, task in dataset.tasks.items()
        if all(name in model.heads for model in models.values())
    }
    size = (profile.crop, profile.crop)
    images = dataset.test[i : i + 1].resized(size, dataset.tasks).to(device)
    seen = {
        label: look(model, images, tasks, profile).predictions for label, model in models.items()
    }
    return film(images.to(torch.device("cpu")), seen, tasks, 0, with_errors=True)


# --- how widths shrink ---


def show_survival(layers: pd.DataFrame) -> Figure:
    """The filters of each layer as a ribbon, from the dense network to the last.

    layers: one pruning run's table. The first layer stands on top; numbers are filters.
    """
    widths = layers.pivot(index="removal", columns="layer", values="width")
    gap = 0.04 * widths.iloc[0].sum()  # room for a line of text
    top = (widths.sum(axis=1) + gap * (widths.shape[1] - 1)).to_numpy() / 2
    figure, ((axis,),) = grid_of_axes(1, 1, 8, 4.2)
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.05, 0.95, widths.shape[1]))
    for colour, (layer, left) in zip(colours, widths.items()):
        bottom = top - left.to_numpy()
        axis.fill_between(widths.index, bottom, top, color=colour, linewidth=0)
        for at, side, align in ((0, -0.6, "right"), (-1, 0.6, "left")):
            x, y = widths.index[at] + side, (top[at] + bottom[at]) / 2
            number = f"layer {layer + 1}: {left.iloc[at]}" if at == 0 else f"{left.iloc[at]}"
            axis.text(x, y, number, ha=align, va="center", fontsize=7)
        top = bottom - gap
    axis.set(xlabel="removals", yticks=[])
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# --- what is worth it ---


def styled(table: pd.DataFrame, digits: int = 3, missing: str = "") -> HTML:
    """A table for people: so many digits, thousands apart, and words where a number is missing."""
    style = Styler(table, uuid="styled", cell_ids=False)
    return HTML(style.format(precision=digits, na_rep=missing, thousands=",").to_html())


def front(cost: pd.Series, quality: pd.Series) -> pd.Series:
    """Which networks no other beats: none has both no more cost and more quality, or the reverse.

    quality: higher is better. Returns booleans, indexed as they are.
    """
    order = pd.DataFrame({"cost": cost, "quality": quality}).sort_values(
        ["cost", "quality"], ascending=[True, False]
    )
    before = order["quality"].astype(float).cummax().shift(fill_value=-np.inf)
    return (order["quality"] > before).reindex(cost.index)


def show_pareto(networks: pd.DataFrame, costs: dict[str, str], tasks: dict[str, Task]) -> Figure:
    """Each task's metric against each cost, and the line of the networks that no other beats.

    networks: a row each, with `criterion`, the columns of costs ({column: label}) and the tasks'
    metrics. Where a cost was not measured, its field is NaN.
    """
    shown = panels(tasks)
    figure, axes = grid_of_axes(len(shown), len(costs), 3.6, 2.6, sharey="row", sharex="col")
    for row, (metric, name), task in zip(axes, shown.items(), tasks.values()):
        sign = 1 if task.shown in task.higher_is_better else -1
        for axis, (cost, label) in zip(row, costs.items()):
            measured = networks[networks[cost].notna()]
            for criterion, points in measured.groupby("criterion", sort=False):
                colour, of, _ = style_of(criterion)
                axis.plot(points[cost], points[metric], ".", color=colour, label=of)
            best = measured[front(measured[cost], sign * measured[metric])].sort_values(cost)
            axis.plot(
                best[cost],
                best[metric],
                color=GRAY,
                linewidth=1,
                drawstyle="steps-post",
                label="no network is better and cheaper",
            )
            size_axis(axis, label)
        row[0].set_ylabel(name, fontsize="small")
    legend_below(figure, axes[0, 0])
    return figure
