"""Data sets. Each is one file here with `tasks(root)`, `load(root) -> Source` and `digest(root)`, and goes by its name.

All samples have the same form, whatever the source: image uint8 RGB; segmentation uint8, 255 = ignore; depth float32
metres, 0 = invalid; normals float16 unit vectors (x right, y up, z towards the camera), 0 = invalid; classes of whole
images uint8. (Files that begin with an underscore are no data sets.)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.files import PROJECT
from mtprune_utils.tasks import IGNORE, Task, nearest

IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
CALIBRATION_IMAGES = 64
DATASETS = tuple(sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py")))


@dataclass(frozen=True)
class Split:
    """Decoded images and targets: image (N, 3, H, W), and one target per task.

    They lie in the memory of the device that computes, or, where that is too small, in (mapped) main memory, from which
    batches are brought to `device` by workers that gather the next ones meanwhile.
    """

    image: Tensor
    targets: dict[str, Tensor]
    device: torch.device | None = None  # where batches go, if they have to be brought there

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index) -> "Split":
        return Split(self.image[index], {task: target[index] for task, target in self.targets.items()}, self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Split":
        targets = {task: target.to(device, non_blocking=non_blocking) for task, target in self.targets.items()}
        return Split(self.image.to(device, non_blocking=non_blocking), targets)

    def pin_memory(self) -> "Split":
        pinned = {task: target.pin_memory() for task, target in self.targets.items()}
        return Split(self.image.pin_memory(), pinned, self.device)

    def resized(self, size: tuple[int, int], tasks: dict[str, Task]) -> "Split":
        """Whole images (bilinear, still uint8) and their targets (nearest neighbour) at (h, w) = size, as evaluation sees them."""
        if self.image.shape[-2:] == size:
            return self
        images = [F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in self.image.split(64)]
        targets = {name: tasks[name].target_at(target, size, centred=True) for name, target in self.targets.items()}
        return Split(torch.cat([part.round().to(torch.uint8) for part in images]), targets, self.device)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.image, *self.targets.values()))

    def batches(self, size: int) -> Iterator["Split"]:
        """Consecutive batches over the whole split, for evaluation."""
        return self.gather([slice(start, start + size) for start in range(0, len(self), size)])

    def gather(self, indices: list[slice] | list[Tensor]) -> Iterator["Split"]:
        """One batch for each slice or tensor of indices, on the device that computes."""
        if self.device is None:
            for index in indices:
                yield self[index if isinstance(index, slice) else index.to(self.image.device, non_blocking=True)]
        else:
            loader = torch.utils.data.DataLoader(
                self, batch_size=None, sampler=indices, num_workers=2, pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # or it would draw from dropout's random numbers
            )
            for batch in loader:
                yield batch.to(self.device, non_blocking=True)


SPLITS = ("train", "validation", "test", "calibration")  # of a Dataset


@dataclass(frozen=True)
class Dataset:
    """Train, validation (held out of train) and test images, the tasks on them, and a hash of the content.

    calibration: the first training images once more, without targets: what an evaluation takes batch statistics from.
    """

    name: str
    tasks: dict[str, Task]
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    calibration: Split
    digest: str
    mirror: bool = True  # whether a mirrored image is one of its kind

    def to(self, device: torch.device | str) -> "Dataset":
        """On the device if it takes no more than half of its free memory, else in main memory and batch by batch."""
        device = torch.device(device)
        size = sum(getattr(self, name).bytes for name in SPLITS)
        if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
            return self.streamed(device)
        return self._map(lambda split: split.to(device))

    def streamed(self, device: torch.device | str) -> "Dataset":
        """Left where it is, its batches brought to the device by a DataLoader."""
        return self._map(lambda split: replace(split, device=torch.device(device)))

    def resized_for_evaluation(self, side: int) -> "Dataset":
        """With all but the training images at side x side: once, not in every evaluation."""
        return replace(self, **{name: getattr(self, name).resized((side, side), self.tasks) for name in SPLITS[1:]})

    def only(self, task: str) -> "Dataset":
        """The same images with one task: what a single-task network is trained on."""
        single = self._map(lambda split: replace(split, targets={task: split.targets[task]} if split.targets else {}))
        return replace(single, tasks={task: self.tasks[task]})

    def _map(self, change: Callable[[Split], Split]) -> "Dataset":
        return replace(self, **{name: change(getattr(self, name)) for name in SPLITS})


def data_digest(name: str, root: str = "") -> str:
    """A hash of a data set's files. Raises ValueError for an unknown name, FileNotFoundError where one is missing."""
    return _module(name).digest(data_root(root))


def data_tasks(name: str, root: str = "") -> dict[str, Task]:
    """The tasks of a data set, without loading it. Raises ValueError for an unknown name, FileNotFoundError without data."""
    return _module(name).tasks(data_root(root))


def data_root(root: str) -> str:
    """The folder that `root` means, in a notebook as on the command line. ~ is the home folder.

    A relative one starts in the working folder or, where it is not there, at the repository.
    Raises ValueError for a name that no message can hold, or without a home folder.
    """
    if not plain(root):
        raise ValueError(f"{root!a} has a character that is no UTF-8, or ends a line: rename it")
    try:
        folder = Path(root).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no {root} ({error}): write the whole path") from error
    elsewhere = not folder.exists() and (PROJECT / folder).exists()
    return root and str(PROJECT / folder if elsewhere else folder)


def plain(name: str) -> bool:
    """Whether a file's name is UTF-8, on one line, and of a usual length."""
    return len(name) < 1000 and not re.search(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name)


def _module(name: str):
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return import_module(f"mtprune_utils.data.{name}")


def load_dataset(
    name: str, root: str = "", train_images: int | None = None, test_images: int | None = None,
    validation_share: float = 0.125,
) -> Dataset:
    """Load a data set, hold out the last `validation_share` of its training images, and keep the first so many.

    Raises ValueError for an unknown name, broken data or more images than there are, FileNotFoundError where data is
    missing.
    """
    source = _module(name).load(data_root(root))
    images, test = _first(source.train, train_images, "training"), _first(source.test, test_images, "test")
    held_out = max(1, round(validation_share * len(images)))
    train, validation = images[: len(images) - held_out], images[len(images) - held_out :]
    calibration = replace(train[:CALIBRATION_IMAGES], targets={})
    return Dataset(
        name, data_tasks(name, root), source.classes, train, validation, test, calibration, data_digest(name, root), source.mirror
    )


@dataclass(frozen=True)
class Source:
    """What a data set's `load` returns: all its training and test images."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    mirror: bool = True


def _first(split: Split, count: int | None, kind: str) -> Split:
    if count is not None and count > len(split):
        raise ValueError(f"asked for {count} {kind} images, but there are only {len(split)}")
    return split[:count]


def image_to_float(image: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) to float, normalised as ImageNet's networks expect it; 0 is the mean colour."""
    mean, sd = _imagenet_statistics(image.device)
    return (image.float() / 255 - mean) / sd


@lru_cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Brought to a device once: each copy from the host would wait for it."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_SD))


class RandomBatches:
    """Endless batches without replacement within an epoch; the last, smaller one of an epoch is dropped.

    The order is drawn from `generator` as each epoch begins. Raises ValueError if a batch is larger than the split.
    """

    def __init__(self, split: Split, size: int, generator: torch.Generator):
        if size > len(split):
            raise ValueError(f"a batch of {size} needs at least as many training images, and there are {len(split)}")
        self.split, self.size, self.generator = split, size, generator
        self.order, self.position = torch.empty(0, dtype=torch.long), 0  # of this epoch; where the next batch starts in it
        self._coming: Iterator[Split] = iter(())

    def __next__(self) -> Split:
        if self.position + self.size > len(self.order):
            self.restore({"order": torch.randperm(len(self.split), generator=self.generator), "position": 0})
        self.position += self.size
        return next(self._coming)

    def state(self) -> dict:
        return {"order": self.order, "position": self.position}

    def restore(self, state: dict) -> None:
        self.order, self.position = state["order"], state["position"]
        starts = range(self.position, len(self.order) - self.size + 1, self.size)
        self._coming = self.split.gather([self.order[start : start + self.size] for start in starts])


def augment(
    batch: Split, tasks: dict[str, Task], image_height: int, crop: int, scale: tuple[float, float],
    depth_follows_scale: bool, generator: torch.Generator, mirror: bool = True, stride: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random scale (of images `image_height` high), crop and mirror of a batch, in one resampling, targets alike.

    Returns float images (B, 3, crop, crop), bilinear, and targets, nearest neighbour, only of the pixels that the loss of a
    network with that stride looks at: (crop // stride) on a side. What falls outside the image has the mean colour and is
    invalid. Mirroring negates the normals' x. Scaling by s divides depth by s if
    `depth_follows_scale` (as if the camera had come nearer; Liu et al., CVPR 2019), else leaves it, as the paper's code.
    mirror: whether a mirrored image is one of the data set's kind.

    (torchvision's transforms would do this image by image, on the CPU; here a batch is resampled at once where it lies.)
    """
    count, _, height, width = batch.image.shape
    device = batch.image.device
    draw = torch.rand(4, count, generator=generator).to(device, non_blocking=True)
    factor = scale[0] + (scale[1] - scale[0]) * draw[0]
    side = (draw[1] < 0.5).float() * 2 - 1 if mirror else torch.ones_like(factor)  # -1: mirrored
    # affine_grid's coordinates run from -1 to 1 over the image, of which the crop covers so much:
    extent_y = crop / (factor * image_height)
    extent_x = extent_y * height / width
    centre_x, centre_y = ((2 * u - 1) * (1 - e).clamp(min=0) for u, e in ((draw[2], extent_x), (draw[3], extent_y)))
    zero = torch.zeros_like(factor)
    rows = [torch.stack([side * extent_x, zero, centre_x], 1), torch.stack([zero, extent_y, centre_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, crop, crop], align_corners=False)

    images = F.grid_sample(image_to_float(batch.image), grid, mode="bilinear", align_corners=False)
    looked_at = nearest(crop, crop // stride, device=device)
    grid = grid[:, looked_at.unsqueeze(1), looked_at]
    targets = {}
    for name, target in batch.targets.items():
        geometry = tasks[name].geometry
        if geometry == "image":
            targets[name] = target
            continue
        # Zero is what grid_sample puts outside, and what depth and normals call invalid; shift labels so that it serves.
        planes = (target.float() - IGNORE).unsqueeze(1) if geometry == "labels" else target.float()
        sampled = F.grid_sample(planes, grid, mode="nearest", align_corners=False)
        if geometry == "labels":
            sampled = (sampled.squeeze(1) + IGNORE).round().long()
        elif geometry == "normals":
            sampled = torch.cat([sampled[:, :1] * side.view(-1, 1, 1, 1), sampled[:, 1:]], 1)
        elif depth_follows_scale:
            sampled = sampled / (factor if geometry == "depth" else 1 / factor).view(-1, 1, 1, 1)
        targets[name] = sampled
    return images, targets
