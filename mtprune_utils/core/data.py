"""Images and targets in memory, and the minibatches that training and evaluation take from them.

All samples have one form, whatever their source: image uint8 RGB; labels uint8, 255 = ignore; depth
float32 metres, 0 = invalid; normals float16 unit vectors (x right, y up, z towards the camera), 0 =
invalid; classes of whole images uint8.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.core.targets import nearest
from mtprune_utils.core.task import Task

IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
CALIBRATION_IMAGES = 64
SPLITS = ("train", "validation", "test", "calibration")  # of a Dataset


@dataclass(frozen=True)
class Split:
    """Decoded images and targets: image (N, 3, H, W), and one target per task.

    They lie in the memory of the device that computes, or, where that is too small, in (mapped)
    main memory, from which workers gather the next batches and bring them to `device`.
    """

    image: Tensor
    targets: dict[str, Tensor]
    device: torch.device | None = None  # where batches go, if they have to be brought there

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index) -> "Split":
        targets = {task: target[index] for task, target in self.targets.items()}
        return Split(self.image[index], targets, self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Split":
        """The same images and targets on a device."""
        image, targets = self.image, self.targets.items()
        moved = {task: t.to(device, non_blocking=non_blocking) for task, t in targets}
        return Split(image.to(device, non_blocking=non_blocking), moved)

    def pin_memory(self) -> "Split":
        """A copy in pinned memory, from which minibatches reach a GPU beside its work."""
        pinned = {task: target.pin_memory() for task, target in self.targets.items()}
        return Split(self.image.pin_memory(), pinned, self.device)

    def resized(self, size: tuple[int, int], tasks: dict[str, Task]) -> "Split":
        """Whole images (bilinear, uint8) and targets (nearest neighbour) at (h, w) = size."""
        if self.image.shape[-2:] == size:
            return self
        images = [
            F.interpolate(part.float(), size, mode="bilinear", antialias=True)
            for part in self.image.split(64)
        ]
        targets = {
            name: tasks[name].target.resize(target, size, centred=True)
            for name, target in self.targets.items()
        }
        image = torch.cat([part.round().to(torch.uint8) for part in images])
        return Split(image, targets, self.device)

    @property
    def bytes(self) -> int:
        """How much memory images and targets take."""
        tensors = (self.image, *self.targets.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def batches(self, size: int) -> Iterator["Split"]:
        """Consecutive batches over the whole split, for evaluation."""
        return self.gather([slice(start, start + size) for start in range(0, len(self), size)])

    def gather(self, indices: list[slice] | list[Tensor]) -> Iterator["Split"]:
        """One batch for each slice or tensor of indices, on the device that computes."""
        if self.device is None:
            here = self.image.device
            for index in indices:
                whole = isinstance(index, slice)
                yield self[index if whole else index.to(here, non_blocking=True)]
        else:
            loader = torch.utils.data.DataLoader(
                self,
                batch_size=None,
                sampler=indices,
                num_workers=2,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # or it would draw from dropout's random numbers
            )
            for batch in loader:
                yield batch.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Source:
    """What a data set's `load` returns: all its training and test images.

    mirror: whether a mirrored image is one of its kind.
    """

    train: Split
    test: Split
    mirror: bool = True


@dataclass(frozen=True)
class Dataset:
    """Training, validation (held out of training) and test images, and the tasks on them.

    calibration: the first training images once more, without targets: what an evaluation takes
    batch statistics from. digest: a hash of the content. mirror: as in `Source`.
    """

    name: str
    tasks: dict[str, Task]
    train: Split
    validation: Split
    test: Split
    calibration: Split
    digest: str
    mirror: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        tasks: dict[str, Task],
        source: Source,
        digest: str,
        train_images: int | None = None,
        test_images: int | None = None,
        validation_share: float = 0.125,
    ) -> "Dataset":
        """Keep the first so many images, and hold the last of the training images out.

        Raises ValueError for more images than there are.
        """
        images = _first(source.train, train_images, "training")
        test = _first(source.test, test_images, "test")
        kept = len(images) - max(1, round(validation_share * len(images)))
        train, validation = images[:kept], images[kept:]
        calibration = replace(train[:CALIBRATION_IMAGES], targets={})
        return cls(name, tasks, train, validation, test, calibration, digest, source.mirror)

    def to(self, device: torch.device | str) -> "Dataset":
        """On the device if it takes no more than half of its free memory, else batch by batch."""
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
        size = (side, side)
        resized = {name: getattr(self, name).resized(size, self.tasks) for name in SPLITS[1:]}
        return replace(self, **resized)

    def only(self, task: str) -> "Dataset":
        """The same images with one task: what a single-task network is trained on."""
        single = self._map(
            lambda split: replace(
                split, targets={task: split.targets[task]} if split.targets else {}
            )
        )
        return replace(single, tasks={task: self.tasks[task]})

    def _map(self, change: Callable[[Split], Split]) -> "Dataset":
        return replace(self, **{name: change(getattr(self, name)) for name in SPLITS})


def _first(split: Split, count: int | None, kind: str) -> Split:
    if count is not None and count > len(split):
        raise ValueError(f"asked for {count} {kind} images, but there are only {len(split)}")
    return split[:count]


def image_to_float(image: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) to float, normalised as ImageNet's networks expect it."""
    mean, sd = _imagenet_statistics(image.device)
    return (image.float() / 255 - mean) / sd


@lru_cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Brought to a device once: each copy from the host would wait for it."""
    statistics = (IMAGENET_MEAN, IMAGENET_SD)
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)


class RandomBatches:
    """Endless batches without replacement within an epoch, whose last, smaller one is dropped.

    The order is drawn from `generator` as each epoch begins. Raises ValueError if a batch is larger
    than the split.
    """

    def __init__(self, split: Split, size: int, generator: torch.Generator):
        if size > len(split):
            raise ValueError(
                f"a batch of {size} needs at least as many training images, and there are "
                f"{len(split)}"
            )
        self.split, self.size, self.generator = split, size, generator
        self.order = torch.empty(0, dtype=torch.long)  # of this epoch
        self.position = 0  # where the next batch starts in it
        self._coming: Iterator[Split] = iter(())

    def __next__(self) -> Split:
        if self.position + self.size > len(self.order):
            order = torch.randperm(len(self.split), generator=self.generator)
            self.restore({"order": order, "position": 0})
        self.position += self.size
        return next(self._coming)

    def state(self) -> dict:
        """What `restore` needs to go on with the same minibatches."""
        return {"order": self.order, "position": self.position}

    def restore(self, state: dict) -> None:
        """Go on from a `state`, within its epoch."""
        self.order, self.position = state["order"], state["position"]
        starts = range(self.position, len(self.order) - self.size + 1, self.size)
        self._coming = self.split.gather([self.order[s : s + self.size] for s in starts])


def augment(
    batch: Split,
    tasks: dict[str, Task],
    image_height: int,
    crop: int,
    scale: tuple[float, float],
    depth_follows_scale: bool,
    generator: torch.Generator,
    mirror: bool = True,
    stride: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random scale (of images `image_height` high), crop and mirror, in one resampling.

    Returns float images (B, 3, crop, crop), bilinear, and targets, nearest neighbour, only of the
    pixels that the loss of a network with that stride looks at: (crop // stride) on a side. What
    falls outside the image has the mean colour and is invalid. Scaling by s divides depth by s if
    `depth_follows_scale` (as if the camera had come nearer; Liu et al., CVPR 2019), else leaves it,
    as the paper's code. mirror: whether a mirrored image is one of the data set's kind.

    (torchvision's transforms would do this image by image, on the CPU; here a batch is resampled at
    once where it lies.)
    """
    count, _, height, width = batch.image.shape
    device = batch.image.device
    draw = torch.rand(4, count, generator=generator).to(device, non_blocking=True)
    factor = scale[0] + (scale[1] - scale[0]) * draw[0]
    side = (draw[1] < 0.5).float() * 2 - 1 if mirror else torch.ones_like(factor)  # -1: mirrored
    # affine_grid's coordinates run from -1 to 1 over the image, of which the crop covers so much:
    extent_y = crop / (factor * image_height)
    extent_x = extent_y * height / width
    centre_x, centre_y = (
        (2 * u - 1) * (1 - e).clamp(min=0) for u, e in ((draw[2], extent_x), (draw[3], extent_y))
    )
    zero = torch.zeros_like(factor)
    across = torch.stack([side * extent_x, zero, centre_x], 1)
    down = torch.stack([zero, extent_y, centre_y], 1)
    grid = F.affine_grid(
        torch.stack([across, down], 1), [count, 3, crop, crop], align_corners=False
    )
    images = F.grid_sample(image_to_float(batch.image), grid, mode="bilinear", align_corners=False)
    looked_at = nearest(crop, crop // stride, device=device)
    grid = grid[:, looked_at.unsqueeze(1), looked_at]
    follows = factor if depth_follows_scale else None
    targets = {
        name: tasks[name].target.sample(target, grid, side, follows)
        for name, target in batch.targets.items()
    }
    return images, targets
