"""NYUv2 (Silberman et al., ECCV 2012): segmentation, depth and surface normals, in the three layouts people have.

- AdaShare's, the paper's: `nyu_v2_3task.json`, {split: [[image, segmentation, normal, depth], ...]}, 40 classes, 480 x 640;
- MTAN's and LibMTL's: {train,val}/{image,label,depth,normal}/{i}.npy, 13 classes, 288 x 384;
- the Parquet files of the Hugging Face data set `tanganke/nyuv2`, which hold the same as the latter.

`root` names the folder, and its content tells the layout. Without one, the Hugging Face data set is downloaded. Normals of
the first layout are turned into our axes, in which they agree with the depth; those of the other two are left as they are.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtprune_utils import tasks as task_set
from mtprune_utils.data import Source, _mtan, _reading
from mtprune_utils.tasks import Task

HUGGING_FACE = "tanganke/nyuv2"
# A branch, tag or commit. What it holds is part of a run's name: another upload is never mixed in.
REVISION = os.environ.get("MTPRUNE_NYUV2_REVISION") or "main"
INDEX = "nyu_v2_3task.json"
CLASSES_40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "blinds",
    "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books", "refrigerator",
    "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "other structure", "other furniture", "other prop",
)
CLASSES_13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "television", "wall", "window",
)


def tasks(root: str = "") -> dict[str, Task]:
    classes = _classes(*_layout(root))
    return {task.name: task for task in (task_set.segmentation(len(classes)), task_set.depth(), task_set.normals())}


def digest(root: str = "") -> str:
    folder, layout = _layout(root)
    return _reading.files_digest(folder, _files(folder, layout))


def load(root: str = "") -> Source:
    """Both splits. Raises FileNotFoundError or ValueError in one line that names the file and what was expected."""
    folder, layout = _layout(root)
    content = digest(root)
    read = {"adashare": _adashare, "mtan": _mtan_layout, "parquet": _parquet}[layout]
    train, test = (
        _reading.decoded("nyuv2", split, content, lambda split=split: read(folder, split)) for split in ("train", "test")
    )
    return Source(_classes(folder, layout), train, test)


def _layout(root: str) -> tuple[Path, str]:
    folder = _reading.folder_of(root) if root else _download()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: set root to where NYUv2 lies, or to '' to download {HUGGING_FACE}")
    if (folder / INDEX).exists():
        return folder, "adashare"
    if _mtan.is_mtan(folder):
        return folder, "mtan"
    if _shards(folder, "train*.parquet"):
        return folder, "parquet"
    raise FileNotFoundError(
        f"{folder} holds no NYUv2: expected {INDEX} (AdaShare), train/image/0.npy (MTAN) or train*.parquet (Hugging Face)"
    )


def _download() -> Path:
    def fetch() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            HUGGING_FACE, repo_type="dataset", revision=REVISION, allow_patterns="*.parquet"
        )

    return Path(_reading.downloaded(fetch, HUGGING_FACE, "set root to a folder with NYUv2"))


def _classes(folder: Path, layout: str) -> tuple[str, ...]:
    return CLASSES_40 if layout == "adashare" else CLASSES_13


def _files(folder: Path, layout: str) -> list[Path]:
    if layout == "adashare":
        listed = [folder / name for rows in _index(folder).values() for row in rows for name in row]
        for file in listed:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, or no ordinary file: {INDEX} lists it")
        return [folder / INDEX, *dict.fromkeys(listed)]
    return _mtan.mtan_files(folder) if layout == "mtan" else _shards(folder, "*.parquet")


def _shards(folder: Path, pattern: str) -> list[Path]:
    """Parquet files there or up to two folders deeper (linked ones too), with none missing.

    Raises FileNotFoundError: a name such as train-00000-of-00002.parquet says how many there are.
    """
    found = sorted(file for deeper in ("", "*/", "*/*/") for file in folder.glob(deeper + pattern))
    for file in found:
        if sharded := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(.*)\.parquet", file.name):
            start, count, end = sharded.groups()
            for shard in range(int(count)):
                other = file.with_name(f"{start}{shard:05}-of-{count}{end}.parquet")
                if not other.exists():
                    raise FileNotFoundError(f"{other} is missing: {file.name} says that it is there")
    return found


# --- AdaShare ---

def _index(folder: Path) -> dict[str, list[list[str]]]:
    """{"train": rows, "test": rows}; the second split is called test or val."""
    try:
        index = json.loads((folder / INDEX).read_bytes().decode("utf-8-sig"))
        second = "test" if "test" in index else "val"
        splits = {"train": index["train"], "test": index[second]}
        splits = {split: [_checked_row(row) for row in rows] for split, rows in splits.items()}
        for split, rows in splits.items():
            images = [row[0] for row in rows]
            if twice := next((name for name in images if images.count(name) > 1), None):
                raise ValueError(f"{split} lists {twice} twice")
        return splits
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    raise ValueError(f"{folder / INDEX} ({problem}): expected {{train, test: [[image, segmentation, normal, depth], ...]}}")


def _checked_row(row: list[str]) -> list[str]:
    """Four names under the root, with slashes. Raises ValueError."""
    if type(row) is not list or len(row) != 4 or not all(type(n) is str and n for n in row):
        raise ValueError(f"a row has not four files: {str(row)[:80]}")
    names = [name.replace("\\", "/") for name in row]  # as Windows writes them
    for name in names:
        leaves = os.path.normpath(name).startswith("..") or os.path.isabs(name) or "\0" in name
        if leaves or re.match("[A-Za-z]:", name) or any(len(part) > 255 for part in name.split("/")):
            raise ValueError(f"{name[:80]!r} is no name of a file under its folder")
    return names


def _adashare(folder: Path, split: str) -> dict:
    rows = _index(folder)[split]

    def read(i: int) -> _reading.Sample:
        image_file, label_file, normal_file, depth_file = (folder / name for name in rows[i])
        image = _reading.checked_image(_reading.read_image(image_file, "an RGB image"), image_file)
        size = image.shape[:2]
        labels = _reading.read_image(label_file, "class labels")
        depth = _reading.read_array(depth_file, "depth in metres")
        normals = _reading.read_image(normal_file, "encoded surface normals")
        if normals.ndim != 3 or normals.shape[2] != 3 or normals.dtype != np.uint8:
            raise ValueError(f"{normal_file} is {normals.dtype} {normals.shape}: expected 8-bit RGB")
        normals = normals[..., [0, 2, 1]] / np.float32(127.5) - 1  # (right, into the scene, up)
        normals[..., 2] *= -1
        return {
            "image": image,
            "segmentation": _reading.checked_labels(labels, len(CLASSES_40), size, label_file),
            "depth": _reading.checked_depth(depth, size, depth_file),
            "normals": _reading.checked_normals(normals, size, normal_file, unit=False),
        }

    return _reading.stacked(
        _reading.in_order(read, len(rows)), [str(folder / row[0]) for row in rows], f"{folder / INDEX}, {split}"
    )


# --- MTAN and Hugging Face ---

def _mtan_layout(folder: Path, split: str) -> dict:
    return _mtan.mtan_split(folder, {"train": "train", "test": "val"}[split], len(CLASSES_13), "label", normals=True)


def _parquet(folder: Path, split: str) -> dict:
    import pyarrow
    import pyarrow.parquet

    columns = ["image", "segmentation", "depth", "normal"]
    patterns = {"train": ("train*.parquet",), "test": ("val*.parquet", "test*.parquet")}[split]
    files = [file for pattern in patterns for file in _shards(folder, pattern)]
    if not files:
        raise FileNotFoundError(f"{folder / patterns[0]} is missing: expected the Parquet files of {HUGGING_FACE}")

    def rows() -> Iterator[_reading.Sample]:
        for file in files:
            try:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(8, columns=columns):
                    for i in range(len(batch)):
                        yield _parquet_sample({name: _nested(batch[name][i], name, file) for name in batch.schema.names}, file)
            except (pyarrow.ArrowException, OSError, KeyError) as error:
                raise ValueError(
                    f"{file} cannot be read ({error}): expected image, segmentation, depth and normal; fetch it again"
                ) from error

    try:
        names = [f"row {i} of {file}" for file in files for i in range(pyarrow.parquet.ParquetFile(file).metadata.num_rows)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{folder} has a Parquet file that cannot be read ({error}): fetch it again") from error
    return _reading.stacked(rows(), names, f"{folder}, {split}")


def _parquet_sample(arrays: dict[str, np.ndarray], file: Path) -> _reading.Sample:
    image, depth, normals = (np.moveaxis(arrays[name], 0, -1) for name in ("image", "depth", "normal"))
    size = image.shape[:2]
    return {
        "image": _reading.checked_image(image, file),
        "segmentation": _reading.checked_labels(arrays["segmentation"], len(CLASSES_13), size, file),
        "depth": _reading.checked_depth(depth, size, file),
        "normals": _reading.checked_normals(normals, size, file),
    }


def _nested(cell, name: str, file: Path) -> np.ndarray:
    """Lists in lists, as Arrow stores them, as one array."""
    try:
        values, shape, lists = cell.values, [], 1
        while str(values.type).startswith(("list", "large_list", "fixed_size_list")):
            if len(values.value_lengths().unique()) != 1:
                raise ValueError("its rows are of unequal length")
            shape.append(len(values) // lists)
            lists, values = len(values), values.flatten()
        return values.to_numpy(zero_copy_only=False).reshape(*shape, -1)
    except (AttributeError, ValueError) as error:  # an empty cell, rows of unequal length
        raise ValueError(f"{file} has a row whose {name} is no array of numbers ({error}); fetch it again") from error
