"""MultiFashion: two garments in one picture, one task for each.

Lin et al., Pareto Multi-Task Learning, NeurIPS 2019. Two FashionMNIST images (28 x 28, ten classes)
lie over each other at opposite corners of a 36 x 36 canvas, the brighter pixel shows; the tasks are
to name the garment at the upper left and the one at the lower right. Image i is paired with image
p(i), p a fixed permutation. `root` is where torchvision's FashionMNIST lies, or a folder with its
four .gz files, such as Debian's package `dataset-fashion-mnist` installs; without one, that
package's or a download is taken.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch

from mtprune_utils.core.data import Source
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import _reading
from mtprune_utils.tasks.classification import classification

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CANVAS, GARMENT = 36, 28  # pixels


def tasks(root: str = "") -> list[Task]:
    return [
        classification("upper_left", CLASSES, (0, 0, 0.5, 0.5)),
        classification("lower_right", CLASSES, (0.5, 0.5, 1, 1)),
    ]


def digest(root: str = "") -> str:
    folder = _folder(root)
    return _reading.files_digest(folder, [folder / name for name in FILES])


def load(root: str = "") -> Source:
    """60000 training and 10000 test pairs. Raises FileNotFoundError or ValueError in one line."""
    folder, content = _folder(root), digest(root)
    train, test = (
        _reading.decoded(
            "multifashion", part, content, lambda part=part: _pairs(folder, part == "train")
        )
        for part in ("train", "test")
    )
    return Source(train, test, mirror=False)  # a mirrored garment lies in the other corner


def _folder(root: str) -> Path:
    """Where the four files lie.

    In root; without one, in the cache or where Debian has them, else torchvision fetches them.
    """
    place = Path(root) if root else _reading.cache_folder()
    for folder in (place, place / "FashionMNIST" / "raw", *([] if root else [DEBIAN])):
        if all((folder / name).exists() for name in FILES):
            return folder
    if root:
        raise FileNotFoundError(
            f"{place} holds no FashionMNIST: set root to where {', '.join(FILES)} lie, or to '' to "
            "download it"
        )

    def fetch() -> None:
        from torchvision.datasets import FashionMNIST  # only where something is decoded

        FashionMNIST(place, download=True)

    _reading.downloaded(fetch, "FashionMNIST", f"set root to where {', '.join(FILES)} lie")
    return place / "FashionMNIST" / "raw"


def _pairs(folder: Path, train: bool) -> dict[str, torch.Tensor]:
    image_file, label_file = (folder / name for name in (FILES[:2] if train else FILES[2:]))
    images, labels = _idx(image_file, (GARMENT, GARMENT)), _idx(label_file, ())
    if len(images) != len(labels) or labels.max() >= len(CLASSES):
        found = f"{len(labels)} labels up to {labels.max()}"
        raise ValueError(f"{label_file} has {found}: expected {len(images)} from 0 to 9")
    other = np.random.default_rng(0).permutation(len(images))
    canvas = np.zeros((len(images), CANVAS, CANVAS), np.uint8)
    canvas[:, :GARMENT, :GARMENT] = images
    corner = canvas[:, -GARMENT:, -GARMENT:]
    np.maximum(corner, images[other], out=corner)
    return {
        "image": torch.from_numpy(canvas)[:, None].expand(-1, 3, -1, -1).contiguous(),
        "upper_left": torch.from_numpy(labels),
        "lower_right": torch.from_numpy(labels[other]),
    }


def _idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A packed IDX file of bytes, (N, *shape). Raises ValueError in one line for anything else."""
    content, start = _reading.read_gzip(file, "FashionMNIST's"), 8 + 4 * len(shape)
    sizes = (max(0, len(content) - start) // math.prod(shape), *shape)
    header = struct.pack(f">HBB{len(sizes)}i", 0, 8, len(sizes), *sizes)  # 8: unsigned bytes
    whole = len(content) == start + math.prod(sizes) > start
    if not whole or content[:start].tobytes() != header:
        raise ValueError(f"{file} holds no IDX of {sizes} bytes: expected FashionMNIST's")
    return content[start:].reshape(sizes)
