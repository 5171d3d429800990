"""Depth in metres, or the inverse (disparity) that Cityscapes has: L1; errors and delta shares."""

import torch
from torch import Tensor

from mtprune_utils.core.targets import MIN_DEPTH, Depth, InverseDepth
from mtprune_utils.core.task import Meter, Task, masked_mean


def depth(inverse: bool = False, name: str = "depth") -> Task:
    """Depth of each pixel in metres, or one over it; L1 on valid pixels."""
    return Task(
        name,
        1,
        InverseDepth() if inverse else Depth(),
        depth_l1,
        DepthMeter,
        prior=median_depth,
        endpoint="relative_error",
        shown="relative_error",
        higher_is_better=frozenset({"delta1", "delta2", "delta3"}),
    )


def depth_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in metres over pixels with a reading. Both (B, 1, h, w)."""
    return masked_mean((output - target).abs(), target > MIN_DEPTH)


def median_depth(target: Tensor) -> Tensor:
    """Of every pixel position; where one never has a reading, of all."""
    readings = torch.where(target > MIN_DEPTH, target, torch.nan)
    median = readings.nanmedian(0, keepdim=True).values
    return torch.where(median.isnan(), readings.nanmedian(), median)


class DepthMeter(Meter):
    """Absolute and relative error, and the shares of pixels with max(p/t, t/p) < 1.25, ^2, ^3.

    A prediction <= 0 has no ratio and fails every share.
    """

    def __init__(self):
        self.sums: Tensor | int = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = target > MIN_DEPTH
        safe = torch.where(valid, target, 1.0).double()
        error = (output.double() - safe).abs()
        ratio = torch.where(output > 0, torch.maximum(output / safe, safe / output), torch.inf)
        shares = (ratio < 1.25**k for k in (1, 2, 3))
        values = [torch.ones_like(error), error, error / safe, *shares]
        sums = torch.stack([torch.where(valid, value, 0).sum() for value in values])
        self.sums = self.sums + sums

    def compute(self) -> dict[str, Tensor]:
        names = ("absolute_error", "relative_error", "delta1", "delta2", "delta3")
        return dict(zip(names, self.sums[1:] / self.sums[0]))
