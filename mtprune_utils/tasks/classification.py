"""One class per image, from the head's output averaged over a region of the image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.core.targets import ImageClass
from mtprune_utils.core.task import Meter, Task


def classification(
    name: str, classes: tuple[str, ...], region: tuple[float, ...] = (0, 0, 1, 1)
) -> Task:
    """region: (top, left, bottom, right) in shares of the image; several such tasks go by name.

    (Averaged over the whole image, a convolutional network can hardly tell where something lies.)
    """
    count = len(classes)

    def logits(output: Tensor) -> Tensor:
        sides = output.shape[2:] * 2
        top, left, bottom, right = (round(share * side) for share, side in zip(region, sides))
        rows, columns = slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))
        return output[:, :, rows, columns].mean((2, 3))

    return Task(
        name,
        count,
        ImageClass(),
        loss=lambda output, target: F.cross_entropy(logits(output), target.long()),
        meter=lambda: AccuracyMeter(logits),
        prior=lambda target: _frequencies(target, count),
        endpoint="accuracy",
        shown="accuracy",
        higher_is_better=frozenset({"accuracy"}),
        classes=tuple(classes),
    )


def _frequencies(target: Tensor, classes: int) -> Tensor:
    return torch.bincount(target.long(), minlength=classes).float().view(1, -1, 1, 1)


class AccuracyMeter(Meter):
    """The share of images whose most probable class is right. logits: output to (B, classes)."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        self.logits = logits
        self.sums: Tensor | int = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        right = self.logits(output).max(1).indices == target
        self.sums = self.sums + torch.stack([right.sum(), torch.ones_like(right).sum()])

    def compute(self) -> dict[str, Tensor]:
        return {"accuracy": self.sums[0] / self.sums[1]}
