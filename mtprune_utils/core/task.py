"""What a task of a multi-task network is: a head's channels, a loss, metrics and what is better."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune_utils.core.targets import Target


class Meter:
    """Accumulates metrics over every pixel of a data set. Nothing leaves the device."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take one batch, at the image's size."""
        raise TypeError("a Meter needs update(); subclass it")

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar tensor}."""
        raise TypeError("a Meter needs compute(); subclass it")


@dataclass(frozen=True)
class Task:
    """One task of a multi-task network.

    loss(output, target): tensors of equal height and width (of pixels) to the mean over valid
    pixels, a scalar; 0 where no pixel is valid. prior(targets (N, ...)): the one output
    (1, C, H, W) that fits them best on the whole. endpoint: the metric that stands for the task
    where one number is wanted; shown: the metric that figures show, as the paper's do. Metrics that
    are not in higher_is_better are errors. classes: the names of a class's numbers, if it has such.
    """

    name: str
    channels: int
    target: Target
    loss: Callable[[Tensor, Tensor], Tensor]
    meter: Callable[[], Meter]
    prior: Callable[[Tensor], Tensor]
    endpoint: str
    shown: str
    higher_is_better: frozenset[str]
    classes: tuple[str, ...] = ()


def channels(tasks: dict[str, Task]) -> dict[str, int]:
    """{task: output channels}."""
    return {name: task.channels for name, task in tasks.items()}


def numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars from a device, in one transfer."""
    values = torch.stack([scalar.double() for scalar in scalars.values()])
    return dict(zip(scalars, values.tolist()))


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values that are valid; 0 if none is."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def task_losses(
    tasks: dict[str, Task], outputs: dict[str, Tensor], targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One scalar loss per task, at the network's output resolution, as the paper computes it."""
    return {
        name: task.loss(outputs[name], task.target.resize(targets[name], outputs[name].shape[-2:]))
        for name, task in tasks.items()
    }


def delta_m(
    tasks: dict[str, Task], metrics: dict[str, float], reference: dict[str, float]
) -> float:
    """Mean over tasks of the endpoint's signed relative change; positive is better.

    Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019. Keys: "task.metric".
    """
    changes = []
    for name, task in tasks.items():
        key = f"{name}.{task.endpoint}"
        sign = 1 if task.endpoint in task.higher_is_better else -1
        changes.append(sign * (metrics[key] - reference[key]) / reference[key])
    return sum(changes) / len(changes)
