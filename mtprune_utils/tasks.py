"""Tasks: what a head predicts, its loss, its metrics and which way is better. The one place to add a task.

Every head gives B maps (B, channels, h, w) for images of H x W pixels, with h <= H. What the target is, and what happens
to it when the picture is scaled, cropped or mirrored, is the task's `geometry`:

===============  ====================  =================  ==============================================================
geometry         target                invalid            when the picture is enlarged by s, or mirrored
===============  ====================  =================  ==============================================================
"labels"         (B, H, W) integer     255                moves with the pixels
"depth"          (B, 1, H, W) metres   <= 3e-5            moves; divided by s, where the profile says so
"inverse depth"  (B, 1, H, W)          <= 3e-5            moves; multiplied by s, where the profile says so
"normals"        (B, 3, H, W) unit     the zero vector    moves; x is negated by a mirror
"image"          (B,) integer          -                  stays: it is about the image as a whole
===============  ====================  =================  ==============================================================
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GEOMETRIES = ("labels", "depth", "inverse depth", "normals", "image")
IGNORE = 255
MIN_DEPTH = 3e-5  # metres; what NYUv2's loaders treat as "no reading"


@dataclass(frozen=True)
class Task:
    """One task of a multi-task network.

    loss(output, target) takes tensors of equal height and width (but for "image") and returns the mean over valid pixels
    (a scalar; 0 where no pixel is valid). meter() makes a `Meter`.
    """

    name: str
    channels: int
    geometry: str
    loss: Callable[[Tensor, Tensor], Tensor]
    meter: Callable[[], "Meter"]
    prior: Callable[[Tensor], Tensor]  # targets (N, ...) to the one output (1, C, H, W) that fits them best on the whole
    endpoint: str  # the metric that stands for the task where one number is wanted
    shown: str  # the metric that figures show, as the paper's do
    higher_is_better: frozenset[str]  # metrics not named here are errors: lower is better

    def __post_init__(self):
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"unknown geometry {self.geometry!r} of the task {self.name!r}: choose one of {', '.join(GEOMETRIES)}")

    def target_at(self, target: Tensor, size: tuple[int, int], centred: bool = False) -> Tensor:
        """The target at (h, w) = size: see `resize_target`."""
        return target if self.geometry == "image" else resize_target(target, size, centred)

    def output_at(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The head's output at the image's size: see `resize_output`."""
        return output if self.geometry == "image" else resize_output(output, size)

    def valid(self, target: Tensor) -> Tensor:
        """Which pixels of targets (B, ...) count, (B, H, W) boolean; of geometry "image", (B,)."""
        if self.geometry == "normals":
            return target.square().sum(1) > 0
        return target[:, 0] > MIN_DEPTH if "depth" in self.geometry else target != IGNORE

    def unscaled(self, output: Tensor, scale: float) -> Tensor:
        """The output for an image that was made `scale` times as large, for the image as it was."""
        factor = {"depth": scale, "inverse depth": 1 / scale}.get(self.geometry, 1.0)
        return output if factor == 1.0 else output * factor


class Meter:
    """Accumulates metrics over every pixel of a data set: update(output, target), then compute() -> {metric: scalar tensor}.

    Nothing leaves the device.
    """

    def update(self, output: Tensor, target: Tensor) -> None:
        raise TypeError("a Meter needs update(); subclass it")

    def compute(self) -> dict[str, Tensor]:
        raise TypeError("a Meter needs compute(); subclass it")


def numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars from a device, in one transfer."""
    return dict(zip(scalars, torch.stack([scalar.double() for scalar in scalars.values()]).tolist()))


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    return (values * valid).sum() / valid.sum().clamp(min=1)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over pixels not labelled 255. output (B, C, h, w), target (B, h, w)."""
    target = target.long()
    total = F.cross_entropy(output, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def depth_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in metres over pixels with a reading. Both (B, 1, h, w)."""
    return _masked_mean((output - target).abs(), target > MIN_DEPTH)


def normal_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity over pixels with a normal. Both (B, 3, h, w)."""
    valid = target.square().sum(1) > 0
    return _masked_mean(1 - F.cosine_similarity(output, target, dim=1), valid)


class SegmentationMeter(Meter):
    """Pixel accuracy, and mIoU averaged over the classes that occur in prediction or target anywhere in the set."""

    def __init__(self, classes: int):
        self.classes = classes
        self.confusion: Tensor | int = 0  # (true class, predicted class)

    def update(self, output: Tensor, target: Tensor) -> None:
        # One bin more than there are classes takes the ignored pixels, so that no boolean index waits for the device.
        true = target.long().clamp(max=self.classes)
        pairs = true * self.classes + output.max(1).indices  # on the CPU three times as fast as argmax
        counts = torch.bincount(pairs.flatten(), minlength=(self.classes + 1) * self.classes)
        self.confusion = self.confusion + counts.view(-1, self.classes)[: self.classes]

    def compute(self) -> dict[str, Tensor]:
        confusion = self.confusion.double()
        hit = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hit
        return {"pixel_accuracy": hit.sum() / confusion.sum(), "miou": (hit / union)[union > 0].mean()}


class DepthMeter(Meter):
    """Absolute and relative error, and the shares of pixels with max(p/t, t/p) < 1.25, 1.25^2, 1.25^3.

    A prediction <= 0 has no ratio and fails every share.
    """

    def __init__(self):
        self.sums: Tensor | int = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = target > MIN_DEPTH
        safe = torch.where(valid, target, 1.0).double()
        error = (output.double() - safe).abs()
        ratio = torch.where(output > 0, torch.maximum(output / safe, safe / output), torch.inf)
        values = [torch.ones_like(error), error, error / safe, *(ratio < 1.25**k for k in (1, 2, 3))]
        self.sums = self.sums + torch.stack([torch.where(valid, value, 0).sum() for value in values])

    def compute(self) -> dict[str, Tensor]:
        names = ("absolute_error", "relative_error", "delta1", "delta2", "delta3")
        return dict(zip(names, self.sums[1:] / self.sums[0]))


class NormalMeter(Meter):
    """Mean and median angle in degrees, and the shares of pixels under 11.25, 22.5 and 30 degrees."""

    def __init__(self):
        self.angles: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        # F.cosine_similarity takes norms over a strided dimension, which is slow on the CPU.
        squares = output.square().sum(1), target.square().sum(1)
        cosine = (output * target).sum(1) * (squares[0] * squares[1]).clamp(min=1e-30).rsqrt()
        angle = cosine.clamp(-1, 1).acos().rad2deg()
        self.angles.append(torch.where(squares[1] > 0, angle, -1.0).flatten())  # -1: no normal there

    def compute(self) -> dict[str, Tensor]:
        angles = torch.cat(self.angles)
        angles = angles[angles != -1]
        shares = {f"within_{limit}": (angles < limit).sum().double() / len(angles) for limit in (11.25, 22.5, 30)}
        mean = median = angles.mean(dtype=torch.double)  # NaN without a normal
        if len(angles):
            # kthvalue selects without sorting; torch.quantile refuses more than 16 million values.
            middle = {(len(angles) + 1) // 2, len(angles) // 2 + 1}  # one, or two
            median = torch.stack([angles.kthvalue(k).values for k in middle]).mean(dtype=torch.double)
        return {"mean_angle": mean, "median_angle": median, **shares}


class AccuracyMeter(Meter):
    """The share of images whose most probable class is right. logits: a head's output to (B, classes)."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        self.logits = logits
        self.sums: Tensor | int = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        right = self.logits(output).max(1).indices == target
        self.sums = self.sums + torch.stack([right.sum(), torch.ones_like(right).sum()])

    def compute(self) -> dict[str, Tensor]:
        return {"accuracy": self.sums[0] / self.sums[1]}


def classification(name: str, classes: int, region: tuple[float, float, float, float] = (0, 0, 1, 1)) -> Task:
    """One class per image, from the head's output averaged over a region (top, left, bottom, right) in shares of the image.

    Several such tasks go by their names. (Averaged over the whole image, a convolutional network can hardly tell where
    something lies.)
    """
    def logits(output: Tensor) -> Tensor:
        height, width = output.shape[2:]
        top, left, bottom, right = (round(share * side) for share, side in zip(region, (height, width) * 2))
        return output[:, :, top : max(bottom, top + 1), left : max(right, left + 1)].mean((2, 3))

    return Task(
        name, classes, "image", loss=lambda output, target: F.cross_entropy(logits(output), target.long()),
        meter=lambda: AccuracyMeter(logits),
        prior=lambda target: torch.bincount(target.long(), minlength=classes).float().view(1, -1, 1, 1),
        endpoint="accuracy", shown="accuracy", higher_is_better=frozenset({"accuracy"}),
    )


def segmentation(classes: int) -> Task:
    return Task(
        "segmentation", classes, "labels", cross_entropy, lambda: SegmentationMeter(classes),
        prior=lambda target: _class_counts(target, classes).float().unsqueeze(0),
        endpoint="miou", shown="pixel_accuracy", higher_is_better=frozenset({"pixel_accuracy", "miou"}),
    )


def _class_counts(target: Tensor, classes: int) -> Tensor:
    """How often each class occurs at each pixel position: (N, H, W) to (classes, H, W)."""
    true = target.long().clamp(max=classes)  # one more for the ignored pixels
    counts = true.new_zeros(classes + 1, *target.shape[1:])
    return counts.scatter_add_(0, true, true.new_ones(()).expand_as(true))[:classes]


def _median_depth(target: Tensor) -> Tensor:
    """Of every pixel position; where one never has a reading, of all."""
    readings = torch.where(target > MIN_DEPTH, target, torch.nan)
    median = readings.nanmedian(0, keepdim=True).values
    return torch.where(median.isnan(), readings.nanmedian(), median)


def depth(inverse: bool = False) -> Task:
    """Depth in metres, or the inverse (disparity) that Cityscapes has."""
    return Task(
        "depth", 1, "inverse depth" if inverse else "depth", depth_l1, DepthMeter,
        prior=_median_depth,
        endpoint="relative_error", shown="relative_error", higher_is_better=frozenset({"delta1", "delta2", "delta3"}),
    )


def normals() -> Task:
    return Task(
        "normals", 3, "normals", normal_cosine, NormalMeter, prior=lambda target: target.sum(0, keepdim=True),
        endpoint="mean_angle", shown="mean_angle", higher_is_better=frozenset({"within_11.25", "within_22.5", "within_30"}),
    )


def resize_target(target: Tensor, size: tuple[int, int], centred: bool = False) -> Tensor:
    """Nearest-neighbour resize of a dense target (B, H, W) or (B, c, H, W) to (h, w) = size.

    Takes the pixel under the first corner of each cell, as the paper's losses do, or under its centre.
    """
    if target.shape[-2:] == size:
        return target
    rows, columns = (nearest(old, new, centred, target.device) for old, new in zip(target.shape[-2:], size))
    return target[..., rows.unsqueeze(1), columns]


def nearest(old: int, new: int, centred: bool = False, device: torch.device | None = None) -> Tensor:
    """The indices (new,) of the pixels that stay when `old` pixels in a line become `new`."""
    return (2 * torch.arange(new, device=device) + centred) * old // (2 * new)


def resize_output(output: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of an output (B, C, h, w) to the image, each cell where it was trained: at its first corner.

    (F.interpolate alone would put it at the cell's centre, half a stride away from the pixel that the loss compared.)
    """
    height, width = size
    padded = F.pad(output, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(padded, (height + 1, width + 1), mode="bilinear", align_corners=True)[..., :height, :width]


def task_losses(tasks: dict[str, Task], outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """One scalar loss per task, at the network's output resolution, as the paper computes it."""
    return {
        name: task.loss(outputs[name], task.target_at(targets[name], outputs[name].shape[-2:]))
        for name, task in tasks.items()
    }


def delta_m(tasks: dict[str, Task], metrics: dict[str, float], reference: dict[str, float]) -> float:
    """Mean over tasks of the signed relative change of the endpoint against a reference, positive is better.

    Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019. Keys are "task.metric".
    """
    changes = []
    for name, task in tasks.items():
        key = f"{name}.{task.endpoint}"
        sign = 1 if task.endpoint in task.higher_is_better else -1
        changes.append(sign * (metrics[key] - reference[key]) / reference[key])
    return sum(changes) / len(changes)
