"""Cityscapes (Cordts et al., CVPR 2016) as MTAN and LibMTL distribute it.

7 classes and inverse depth, 128 x 256: {train,val}/{image,label or label_7,depth}/{i}.npy. Depth is
a disparity, 0 where there is none: it grows with the picture.
"""

from pathlib import Path

from mtprune_utils.core.data import Source
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import _mtan, _reading
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.segmentation import segmentation

MAX_DISPARITY = 1.0  # 0.49 occurs; 1 is what the 16 bits hold that Cityscapes stores it in
CLASSES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")


def tasks(root: str = "") -> list[Task]:
    return [segmentation(CLASSES), depth(inverse=True)]


def digest(root: str = "") -> str:
    folder = _folder(root)
    return _reading.files_digest(folder, _mtan.mtan_files(folder))


def load(root: str = "") -> Source:
    """Both splits. Raises FileNotFoundError or ValueError in one line that names the file."""
    folder, content = _folder(root), digest(root)
    labels = "label_7" if (folder / "train" / "label_7").is_dir() else "label"
    train, test = (
        _reading.decoded(
            "cityscapes",
            split,
            content,
            lambda split=split: _mtan.mtan_split(
                folder, split, len(CLASSES), labels, normals=False, most_depth=MAX_DISPARITY
            ),
        )
        for split in ("train", "val")
    )
    return Source(train, test)


def _folder(root: str) -> Path:
    if not root or not _mtan.is_mtan(Path(root)):
        raise FileNotFoundError(
            f"{Path(root)} holds no Cityscapes: set root to its folder, expected "
            "train/image/0.npy (MTAN)"
        )
    return Path(root)
