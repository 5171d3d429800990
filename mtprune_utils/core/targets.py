"""Kinds of targets: what happens to one where a picture is resized, scaled, cropped or mirrored.

Every head gives maps (B, channels, h, w) for images of H x W pixels, with h <= H.

| kind | target | invalid | where the picture is enlarged or mirrored |
|---|---|---|---|
| labels | (B, H, W) integer | 255 | moves with the pixels |
| depth | (B, 1, H, W) metres | <= 3e-5 | moves; divided by the scale, if it follows |
| inverse depth | (B, 1, H, W) | <= 3e-5 | moves; multiplied by it, if it follows |
| normals | (B, 3, H, W) unit | the zero vector | moves; a mirror negates x |
| image | (B,) integer | - | stays: it is about the whole image |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
MIN_DEPTH = 3e-5  # metres; what NYUv2's loaders treat as "no reading"
Size = tuple[int, int]  # (H, W)


class Target:
    """What all targets made of pixels have in common."""

    name = ""
    unit = ""
    of_pixels = True

    def resize(self, target: Tensor, size: Size, centred: bool = False) -> Tensor:
        """At (h, w) = size: see `resize_target`."""
        return resize_target(target, size, centred)

    def resize_output(self, output: Tensor, size: Size) -> Tensor:
        """A head's output at the image's size: see the function of that name."""
        return resize_output(output, size)

    def valid(self, target: Tensor) -> Tensor:
        """Which pixels count: (B, H, W) boolean."""
        raise TypeError("a Target needs valid(); subclass it")

    def unscaled(self, output: Tensor, scale: float) -> Tensor:
        """The output for an image made `scale` times as large, for the image as it was."""
        return output

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        """The target where a crop looks, by nearest neighbour; zero, or invalid, outside.

        grid: (B, h, w, 2), see `F.grid_sample`; side: (B,), -1 where mirrored; factor: (B,), by how
        much the picture was enlarged, where depth follows it.
        """
        return F.grid_sample(target.float(), grid, mode="nearest", align_corners=False)


class Labels(Target):
    """A class for each pixel, (B, H, W) integers; IGNORE where there is none."""

    name, unit = "labels", "class"

    def valid(self, target: Tensor) -> Tensor:
        return target != IGNORE

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        # Zero is what lies outside: labels are shifted so that it says "ignore".
        planes = (target.float() - IGNORE).unsqueeze(1)
        sampled = super().sample(planes, grid, side, factor)
        return (sampled.squeeze(1) + IGNORE).round().long()


class Depth(Target):
    """Metres for each pixel, (B, 1, H, W); up to MIN_DEPTH there is none."""

    name, unit = "depth", "metres"

    def valid(self, target: Tensor) -> Tensor:
        return target[:, 0] > MIN_DEPTH

    def unscaled(self, output: Tensor, scale: float) -> Tensor:
        return output if scale == 1.0 else output * scale

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        sampled = super().sample(target, grid, side, factor)
        return sampled if factor is None else sampled / factor.view(-1, 1, 1, 1)


class InverseDepth(Depth):
    """One over the depth for each pixel, (B, 1, H, W)."""

    name, unit = "inverse depth", "1 / depth"

    def unscaled(self, output: Tensor, scale: float) -> Tensor:
        return super().unscaled(output, 1 / scale)

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        return super().sample(target, grid, side, None if factor is None else 1 / factor)


class Normals(Target):
    """A unit vector for each pixel, (B, 3, H, W), x to the right; zero where there is none."""

    name, unit = "normals", "unit vectors"

    def valid(self, target: Tensor) -> Tensor:
        return target.square().sum(1) > 0

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        sampled = super().sample(target, grid, side, factor)
        return torch.cat([sampled[:, :1] * side.view(-1, 1, 1, 1), sampled[:, 1:]], 1)


class ImageClass(Target):
    """One class for each image, (B,): no pixel has one of its own."""

    name, unit = "image", "class"
    of_pixels = False

    def resize(self, target: Tensor, size: Size, centred: bool = False) -> Tensor:
        return target

    def resize_output(self, output: Tensor, size: Size) -> Tensor:
        return output

    def valid(self, target: Tensor) -> Tensor:
        """(B,) boolean."""
        return target != IGNORE

    def sample(self, target: Tensor, grid: Tensor, side: Tensor, factor: Tensor | None) -> Tensor:
        return target


def resize_target(target: Tensor, size: Size, centred: bool = False) -> Tensor:
    """Nearest-neighbour resize of a dense target (B, H, W) or (B, c, H, W) to (h, w) = size.

    Takes the pixel under the first corner of each cell, as the paper's losses do, or under its
    centre.
    """
    if target.shape[-2:] == size:
        return target
    rows, columns = (
        nearest(old, new, centred, target.device) for old, new in zip(target.shape[-2:], size)
    )
    return target[..., rows.unsqueeze(1), columns]


def nearest(
    old: int, new: int, centred: bool = False, device: torch.device | None = None
) -> Tensor:
    """The indices (new,) of the pixels that stay when `old` pixels in a line become `new`."""
    return (2 * torch.arange(new, device=device) + centred) * old // (2 * new)


def resize_output(output: Tensor, size: Size) -> Tensor:
    """Bilinear resize of an output (B, C, h, w) to the image, each cell where it was trained.

    That is at its first corner. (F.interpolate alone would put it at the cell's centre, half a
    stride away from the pixel that the loss compared.)
    """
    height, width = size
    padded = F.pad(output, (0, 1, 0, 1), mode="replicate")
    larger = F.interpolate(padded, (height + 1, width + 1), mode="bilinear", align_corners=True)
    return larger[..., :height, :width]
