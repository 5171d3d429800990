"""Data sets. Each is one file with `TASKS`, `load(root) -> Source` and `digest(root)`, entered below.

All samples have the same form, whatever the source: image uint8 RGB; segmentation uint8, 255 = ignore; depth float32
metres, 0 = invalid; normals float16 unit vectors (x right, y up, z towards the camera), 0 = invalid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.tasks import IGNORE, Task

IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
DATASETS = {"rooms": "mtprune_utils.data.rooms"}


@dataclass(frozen=True)
class Split:
    """Decoded images and targets in memory, on one device: image (N, 3, H, W), and one target per task."""

    image: Tensor
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index) -> "Split":
        return Split(self.image[index], {task: target[index] for task, target in self.targets.items()})

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.image.to(device), {task: target.to(device) for task, target in self.targets.items()})

    def batches(self, size: int) -> Iterator["Split"]:
        """Consecutive batches over the whole split, for evaluation."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class Dataset:
    """Train, validation (held out of train) and test images, the tasks on them, and a hash of the content."""

    name: str
    tasks: dict[str, Task]
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str

    def to(self, device: torch.device | str) -> "Dataset":
        return self._map(lambda split: split.to(device))

    def only(self, task: str) -> "Dataset":
        """The same images with one task: what a single-task network is trained on."""
        single = self._map(lambda split: Split(split.image, {task: split.targets[task]}))
        return replace(single, tasks={task: self.tasks[task]})

    def _map(self, change: Callable[[Split], Split]) -> "Dataset":
        return replace(self, **{name: change(getattr(self, name)) for name in ("train", "validation", "test")})


def data_digest(name: str, root: str = "") -> str:
    """A hash of a data set's files. Raises ValueError for an unknown name, FileNotFoundError where one is missing."""
    return _module(name).digest(root)


def data_tasks(name: str) -> dict[str, Task]:
    """The tasks of a data set, without loading it. Raises ValueError for an unknown name."""
    return _module(name).TASKS


def _module(name: str):
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return import_module(DATASETS[name])


def load_dataset(
    name: str, root: str = "", train_images: int | None = None, test_images: int | None = None,
    validation_share: float = 0.125,
) -> Dataset:
    """Load a data set, hold out the last `validation_share` of its training images, and keep the first so many.

    Raises ValueError for an unknown name or more images than there are, FileNotFoundError where data is missing.
    """
    source = _module(name).load(root)
    train, test = _first(source.train, train_images, "training"), _first(source.test, test_images, "test")
    held_out = max(1, round(validation_share * len(train)))
    return Dataset(
        name, data_tasks(name), source.classes, train[: len(train) - held_out], train[len(train) - held_out :], test,
        data_digest(name, root),
    )


@dataclass(frozen=True)
class Source:
    """What a data set's `load` returns: all its training and test images."""

    classes: tuple[str, ...]
    train: Split
    test: Split


def _first(split: Split, count: int | None, kind: str) -> Split:
    if count is not None and count > len(split):
        raise ValueError(f"asked for {count} {kind} images, but there are only {len(split)}")
    return split[:count]


def image_to_float(image: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) to float, normalised as ImageNet's networks expect it; 0 is the mean colour."""
    mean, sd = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_SD))
    return (image.float() / 255 - mean) / sd


def random_batches(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Endless batches without replacement within an epoch; the last, smaller one of an epoch is dropped."""
    if size > len(split):
        raise ValueError(f"a batch of {size} needs at least as many training images, and there are {len(split)}")
    while True:
        order = torch.randperm(len(split), generator=generator)
        for start in range(0, len(split) - size + 1, size):
            yield split[order[start : start + size].to(split.image.device)]


def augment(
    batch: Split, image_height: int, crop: int, scale: tuple[float, float], depth_follows_scale: bool,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random scale (of images `image_height` high), crop and mirror of a batch, in one resampling, targets alike.

    Returns float images (B, 3, crop, crop), bilinear, and targets, nearest neighbour; what falls outside the image has
    the mean colour and is invalid. Mirroring negates the normals' x. Scaling by s divides depth by s if
    `depth_follows_scale` (as if the camera had come nearer; Liu et al., CVPR 2019), else leaves it, as the paper's code.
    """
    count, _, height, width = batch.image.shape
    device = batch.image.device
    draw = torch.rand(4, count, generator=generator).to(device)
    factor = scale[0] + (scale[1] - scale[0]) * draw[0]
    mirror = (draw[1] < 0.5).float() * 2 - 1  # -1: mirrored
    # affine_grid's coordinates run from -1 to 1 over the image, of which the crop covers so much:
    extent_y = crop / (factor * image_height)
    extent_x = extent_y * height / width
    centre_x, centre_y = ((2 * u - 1) * (1 - e).clamp(min=0) for u, e in ((draw[2], extent_x), (draw[3], extent_y)))
    zero = torch.zeros_like(factor)
    rows = [torch.stack([mirror * extent_x, zero, centre_x], 1), torch.stack([zero, extent_y, centre_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, crop, crop], align_corners=False)

    images = F.grid_sample(image_to_float(batch.image), grid, mode="bilinear", align_corners=False)
    targets = {}
    for task, target in batch.targets.items():
        # Zero is what grid_sample puts outside, and what depth and normals call invalid; shift labels so that it serves.
        planes = (target.float() - IGNORE).unsqueeze(1) if task == "segmentation" else target.float()
        sampled = F.grid_sample(planes, grid, mode="nearest", align_corners=False)
        if task == "segmentation":
            sampled = (sampled.squeeze(1) + IGNORE).round().long()
        elif task == "normals":
            sampled = torch.cat([sampled[:, :1] * mirror.view(-1, 1, 1, 1), sampled[:, 1:]], 1)
        elif task == "depth" and depth_follows_scale:
            sampled = sampled / factor.view(-1, 1, 1, 1)
        targets[task] = sampled
    return images, targets
