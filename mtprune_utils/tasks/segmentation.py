"""Semantic segmentation: one class per pixel, by cross-entropy; pixel accuracy and mIoU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.core.targets import IGNORE, Labels
from mtprune_utils.core.task import Meter, Task


def segmentation(classes: tuple[str, ...], name: str = "segmentation") -> Task:
    """classes: the names of classes 0, 1, ...; 255 is ignored."""
    count = len(classes)
    return Task(
        name,
        count,
        Labels(),
        cross_entropy,
        lambda: SegmentationMeter(count),
        prior=lambda target: class_counts(target, count).float().unsqueeze(0),
        endpoint="miou",
        shown="pixel_accuracy",
        higher_is_better=frozenset({"pixel_accuracy", "miou"}),
        classes=tuple(classes),
    )


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over pixels not labelled 255. output (B, C, h, w), target (B, h, w)."""
    target = target.long()
    total = F.cross_entropy(output, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def class_counts(target: Tensor, classes: int) -> Tensor:
    """How often each class occurs at each pixel position: (N, H, W) to (classes, H, W)."""
    true = target.long().clamp(max=classes)  # one more for the ignored pixels
    counts = true.new_zeros(classes + 1, *target.shape[1:])
    return counts.scatter_add_(0, true, true.new_ones(()).expand_as(true))[:classes]


class SegmentationMeter(Meter):
    """Pixel accuracy, and mIoU over the classes that occur in prediction or target anywhere."""

    def __init__(self, classes: int):
        self.classes = classes
        self.confusion: Tensor | int = 0  # (true class, predicted class)

    def update(self, output: Tensor, target: Tensor) -> None:
        # One bin more than classes takes the ignored pixels: no boolean index waits for the device.
        true = target.long().clamp(max=self.classes)
        predicted = output.max(1).indices  # on the CPU three times as fast as argmax
        pairs = true * self.classes + predicted
        bins = (self.classes + 1) * self.classes
        counts = torch.bincount(pairs.flatten(), minlength=bins)
        self.confusion = self.confusion + counts.view(-1, self.classes)[: self.classes]

    def compute(self) -> dict[str, Tensor]:
        confusion = self.confusion.double()
        hit = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hit
        iou = (hit / union)[union > 0]
        return {"pixel_accuracy": hit.sum() / confusion.sum(), "miou": iou.mean()}
