"""MultiFashion (Lin et al., Pareto Multi-Task Learning, NeurIPS 2019): two garments in one picture, one task for each.

Two FashionMNIST images (28 x 28, ten classes) lie over each other at opposite corners of a 36 x 36 canvas, the brighter
pixel shows; the tasks are to name the garment at the upper left and the one at the lower right. Image i is paired with
image p(i), p a fixed permutation. `root` is where torchvision's FashionMNIST lies, or a folder with its four
.gz files, such as Debian's package `dataset-fashion-mnist` installs; without one, that package's or a download is taken.
"""

import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch

from mtprune_utils import tasks as task_set
from mtprune_utils.data import Source, _reading
from mtprune_utils.tasks import Task

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CANVAS, GARMENT = 36, 28
MOST_BYTES = 60_000 * GARMENT**2 + 16  # of an unpacked file: the training images and a header


def tasks(root: str = "") -> dict[str, Task]:
    corners = {"upper_left": (0, 0, 0.5, 0.5), "lower_right": (0.5, 0.5, 1, 1)}
    return {name: task_set.classification(name, len(CLASSES), corner) for name, corner in corners.items()}


def digest(root: str = "") -> str:
    folder = _folder(root)
    return _reading.files_digest(folder, [folder / name for name in FILES])


def load(root: str = "") -> Source:
    """60000 training and 10000 test pairs. Raises FileNotFoundError or ValueError in one line."""
    folder, content = _folder(root), digest(root)
    train, test = (
        _reading.decoded("multifashion", part, content, lambda part=part: _pairs(folder, part == "train"))
        for part in ("train", "test")
    )
    return Source(CLASSES, train, test, mirror=False)  # a mirrored garment would lie in the other corner


def _folder(root: str) -> Path:
    """Where the four files lie: in root; without one, in the cache or where Debian has them, else torchvision fetches them."""
    place = _reading.folder_of(root) if root else _reading.cache_folder()
    for folder in (place, place / "FashionMNIST" / "raw", *([] if root else [DEBIAN])):
        if all((folder / name).exists() for name in FILES):
            return folder
    if root:
        raise FileNotFoundError(f"{place} holds no FashionMNIST: set root to where {', '.join(FILES)} lie, or to '' to download it")

    def fetch() -> None:
        from torchvision.datasets import FashionMNIST  # only where something is decoded

        FashionMNIST(place, download=True)

    _reading.downloaded(fetch, "FashionMNIST", f"set root to where {', '.join(FILES)} lie")
    return place / "FashionMNIST" / "raw"


def _pairs(folder: Path, train: bool) -> dict[str, torch.Tensor]:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as scratch:  # unpacked as torchvision reads them, whoever has packed them
        raw = Path(scratch, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        try:
            for name in FILES:
                with gzip.open(folder / name) as packed:
                    content = packed.read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    raise ValueError(f"more than {MOST_BYTES} bytes come out of it")
                (raw / name).with_suffix("").write_bytes(content)
            garments = FashionMNIST(scratch, train=train)
        except Exception as error:  # gzip's and torchvision's for broken bytes
            raise ValueError(f"{folder / name} cannot be read ({error}): expected FashionMNIST's; fetch it again") from error
    images, labels = garments.data.numpy(), garments.targets.numpy().astype(np.uint8)
    if images.shape[1:] != (GARMENT, GARMENT) or len(images) != len(labels) or labels.max() >= len(CLASSES):
        raise ValueError(f"{folder} holds {images.shape} images and {labels.shape} labels: expected FashionMNIST's")
    other = np.random.default_rng(0).permutation(len(images))
    canvas = np.zeros((len(images), CANVAS, CANVAS), np.uint8)
    canvas[:, :GARMENT, :GARMENT] = images
    corner = canvas[:, -GARMENT:, -GARMENT:]
    np.maximum(corner, images[other], out=corner)
    return {
        "image": torch.from_numpy(canvas)[:, None].expand(-1, 3, -1, -1).contiguous(),
        "upper_left": torch.from_numpy(labels), "lower_right": torch.from_numpy(labels[other]),
    }
