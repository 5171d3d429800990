"""A data set of your own to start from: images, a mask and a depth map for each, as PNG files.

Copy this file to where you like. Its name becomes that of the data set. Change what is in capitals;
then, without touching the repository,

    make figures PROFILE=smoke PLUGIN=my_dataset.py DATA=my_dataset ROOT=where/the/files/lie

trains, prunes and draws on it. ROOT holds two folders, whose files go together by their names:

    train/image/a.png          RGB, PNG or JPEG (a.jpg); all images have one size
    train/segmentation/a.png   one number per pixel: 0, 1, ... as in CLASSES; 255 is not counted
    train/depth/a.png          16 bits per pixel, UNITS to the metre; 0 where nothing was measured
    test/...                   the same

Files are read and checked once, then kept decoded in a cache. What is wrong with one is said in a
line that names it. For other kinds of targets see mtprune_utils/tasks; for fewer tasks, delete one
in `tasks` and where it is read. CosPrune needs at least two.
"""

from pathlib import Path

import numpy as np

from mtprune_utils.core.data import Source
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import _reading
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.segmentation import segmentation

CLASSES = ("background", "thing")  # of 0, 1, ... in the masks
UNITS = 1000  # millimetres
MIRROR = True  # whether a mirrored image is one of its kind (a written word is not)
IMAGES = (".png", ".jpg", ".jpeg")


def tasks(root: str = "") -> list[Task]:
    """What is learnt from each image; the names are those of the targets that `load` gives."""
    return [segmentation(CLASSES), depth()]


def digest(root: str = "") -> str:
    """A hash of all files: runs on others have other names."""
    return _reading.files_digest(Path(root), [*_files(root, "train"), *_files(root, "test")])


def load(root: str = "") -> Source:
    """All images and targets. Raises FileNotFoundError or ValueError, naming the file."""
    content, name = digest(root), Path(__file__).stem
    train, test = (
        _reading.decoded(name, part, content, lambda part=part: _decode(root, part))
        for part in ("train", "test")
    )
    return Source(train, test, MIRROR)


def _files(root: str, part: str) -> list[Path]:
    files = sorted(file for file in Path(root, part).glob("*/[!.]*") if file.is_file())
    if not files:
        raise FileNotFoundError(f"there are no images in {Path(root, part, 'image')}: set root")
    return files


def _decode(root: str, part: str) -> dict:
    """{"image": (N, 3, H, W) uint8, "segmentation": (N, H, W) uint8, "depth": (N, 1, H, W)}."""
    files = _files(root, part)
    images = [f for f in files if f.parent.name == "image" and f.suffix.lower() in IMAGES]
    samples = _reading.in_order(lambda i: _sample(images[i]), len(images))
    return _reading.stacked(samples, [str(file) for file in images], str(Path(root, part)))


def _sample(image_file: Path) -> _reading.Sample:
    """One image (H, W, 3) and its targets, (H, W) and (H, W, 1) in metres."""
    beside = image_file.parents[1]
    mask_file, depth_file = (
        beside / kind / f"{image_file.stem}.png" for kind in ("segmentation", "depth")
    )
    image = _reading.checked_image(_reading.read_image(image_file, "an image"), image_file)
    mask = _reading.read_image(mask_file, "its mask")
    distance = _reading.read_image(depth_file, "its depth")
    if distance.dtype == np.uint8:
        raise ValueError(f"{depth_file} has 8 bits per pixel: expected 16, {UNITS} to the metre")
    size = image.shape[:2]
    return {
        "image": image,
        "segmentation": _reading.checked_labels(mask, len(CLASSES), size, mask_file),
        "depth": _reading.checked_depth(distance / np.float32(UNITS), size, depth_file),
    }
