"""The folders of MTAN (Liu et al., CVPR 2019) and LibMTL.

{train,val}/{image,label,depth,normal}/{i}.npy
"""

import itertools
from collections.abc import Collection
from pathlib import Path

from mtprune_utils.datasets import _reading


def is_mtan(root: Path) -> bool:
    return (root / "train" / "image").is_dir()


def mtan_files(root: Path) -> list[Path]:
    """Every file of both splits."""
    files = sorted(root.glob("train/*/*.npy")) + sorted(root.glob("val/*/*.npy"))
    return [file for file in files if not file.name.startswith(".")]  # as macOS leaves on shares


def mtan_split(
    root: Path, split: str, classes: int, label_folder: str, normals: bool, most_depth: float
) -> dict:
    """One split's tensors. Raises FileNotFoundError or ValueError, naming the file."""
    folder = root / split
    kinds = {"image": "image", "segmentation": label_folder, "depth": "depth"}
    kinds |= {"normals": "normal"} if normals else {}
    names = _names(folder, kinds.values())

    def read(i: int) -> _reading.Sample:
        files = {name: folder / kind / names[i] for name, kind in kinds.items()}
        arrays = {name: _reading.read_array(file, name) for name, file in files.items()}
        return _reading.checked(arrays, files, classes, most_depth)

    files = [str(folder / "image" / name) for name in names]
    return _reading.stacked(_reading.in_order(read, len(names)), files, str(folder))


def _names(folder: Path, kinds: Collection[str]) -> list[str]:
    """0.npy, 1.npy, ... of a split. Raises FileNotFoundError where a kind lacks one."""
    there = {kind: {file.name for file in (folder / kind).glob("[!.]*.npy")} for kind in kinds}
    names = [f"{i}.npy" for i in range(len(set().union(*there.values())))]
    if not names:
        raise ValueError(f"{folder}: the split is empty, expected image/0.npy, image/1.npy, ...")
    for kind, name in itertools.product(kinds, names):
        if name not in there[kind]:
            missing = folder / kind / name
            raise FileNotFoundError(f"{missing} is missing: expected {kind} 0.npy to {names[-1]}")
    return names
