"""NYUv2 (Silberman et al., ECCV 2012): segmentation, depth, normals, in the layouts people have.

- AdaShare's, the paper's: `nyu_v2_3task.json`,
  {split: [[image, segmentation, normal, depth], ...]}, 40 classes, 480 x 640;
- MTAN's and LibMTL's: {train,val}/{image,label,depth,normal}/{i}.npy, 13 classes, 288 x 384;
- the Parquet files of the Hugging Face data set `tanganke/nyuv2`, which hold the same as the
  latter.

`root` names the folder, and its content tells the layout. Without one, the Hugging Face data set is
downloaded. Normals of the first layout are turned into our axes, in which they agree with the
depth; those of the other two are left as they are.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import numpy as np

from mtprune_utils.core.data import Source
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import _mtan, _reading, plain
from mtprune_utils.files import read_json
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.normals import normals
from mtprune_utils.tasks.segmentation import segmentation

HUGGING_FACE = "tanganke/nyuv2"
REVISION = "b367b8b53c4dcefbcb4d9310b74976a63cc7f306"  # eight shards of train, six of val
COLUMNS = ("image", "segmentation", "depth", "normal")  # of the Parquet files
INDEX = "nyu_v2_3task.json"
ROW = {"image": "an RGB image", "segmentation": "labels", "normals": "RGB", "depth": "metres"}
CLASSES_40 = (
    "wall",
    "floor",
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "blinds",
    "desk",
    "shelves",
    "curtain",
    "dresser",
    "pillow",
    "mirror",
    "floor mat",
    "clothes",
    "ceiling",
    "books",
    "refrigerator",
    "television",
    "paper",
    "towel",
    "shower curtain",
    "box",
    "whiteboard",
    "person",
    "night stand",
    "toilet",
    "sink",
    "lamp",
    "bathtub",
    "bag",
    "other structure",
    "other furniture",
    "other prop",
)
CLASSES_13 = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "television",
    "wall",
    "window",
)


def tasks(root: str = "") -> list[Task]:
    return [segmentation(_classes(*_layout(root))), depth(), normals()]


def digest(root: str = "") -> str:
    folder, layout = _layout(root)
    return _reading.files_digest(folder, _files(folder, layout))


def load(root: str = "") -> Source:
    """Both splits. Raises FileNotFoundError or ValueError in one line that names the file."""
    folder, layout = _layout(root)
    content = digest(root)
    read = {"adashare": _adashare, "mtan": _mtan_layout, "parquet": _parquet}[layout]
    train, test = (
        _reading.decoded("nyuv2", split, content, lambda split=split: read(folder, split))
        for split in ("train", "test")
    )
    return Source(train, test)


def _layout(root: str) -> tuple[Path, str]:
    folder = Path(root) if root else _download()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: set root to where NYUv2 lies, or to '' to download "
            f"{HUGGING_FACE}"
        )
    if (folder / INDEX).exists():
        return folder, "adashare"
    if _mtan.is_mtan(folder):
        return folder, "mtan"
    if _shards(folder, "train"):
        return folder, "parquet"
    raise FileNotFoundError(
        f"{folder} holds no NYUv2: expected {INDEX} (AdaShare), train/image/0.npy (MTAN) or "
        "train*.parquet (Hugging Face)"
    )


def _download() -> Path:
    def fetch() -> str:
        from huggingface_hub import snapshot_download

        kind = {"repo_type": "dataset", "allow_patterns": "*.parquet"}
        return snapshot_download(  # type: ignore[call-overload]
            HUGGING_FACE, revision=REVISION, **kind
        )

    return Path(_reading.downloaded(fetch, HUGGING_FACE, "set root to a folder with NYUv2"))


def _classes(folder: Path, layout: str) -> tuple[str, ...]:
    return CLASSES_40 if layout == "adashare" else CLASSES_13


def _files(folder: Path, layout: str) -> list[Path]:
    if layout == "adashare":
        listed = [folder / name for rows in _index(folder).values() for row in rows for name in row]
        for file in listed:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing or no regular file: {INDEX} lists it")
        return [folder / INDEX, *dict.fromkeys(listed)]
    if layout == "mtan":
        return _mtan.mtan_files(folder)
    return [file for split in ("train", "test") for file in _shards_of(folder, split)]


# --- AdaShare ---


def _index(folder: Path) -> dict[str, list[list[str]]]:
    """{"train": rows, "test": rows}; the second split is called test or val."""
    try:
        index = read_json(folder / INDEX)
        test = index["test"] if "test" in index else index["val"]
        splits = {"train": index["train"], "test": test}
        if not all(len(row) == 4 for rows in splits.values() for row in rows):
            raise ValueError("a row has not four files")
        splits = {split: [[*map(_inside, row)] for row in rows] for split, rows in splits.items()}
        for rows in splits.values():
            counts = Counter(name for row in rows for name in row)
            if counts and max(counts.values()) > 1:
                raise ValueError(f"{counts.most_common(1)[0][0]} is listed twice")
        return splits
    except (ValueError, KeyError, TypeError) as error:
        form = "{train, test: [[image, segmentation, normal, depth], ...]}"
        raise ValueError(f"{folder / INDEX} ({error}): expected {form}") from error


def _inside(name: str) -> str:
    """A file's path under the folder of the index, which may be written as in Windows."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or not path.parts or not plain(name):
        raise ValueError(f"{name!a:.100} is no file's path under its folder")
    return path.as_posix()


def _adashare(folder: Path, split: str) -> dict:
    rows = _index(folder)[split]

    def read(i: int) -> _reading.Sample:
        files = dict(zip(ROW, map(folder.joinpath, rows[i])))
        arrays = {
            name: _reading.read_array(file, ROW[name])
            if name == "depth"
            else _reading.read_image(file, ROW[name])
            for name, file in files.items()
        }
        encoded = _reading.checked_image(arrays["normals"], files["normals"])
        normals = encoded[..., [0, 2, 1]] / np.float32(127.5) - 1  # stored: right, inwards, up
        normals[..., 2] *= -1
        arrays["normals"] = normals
        return _reading.checked(arrays, files, len(CLASSES_40), exact=False)

    samples, files = _reading.in_order(read, len(rows)), [str(folder / row[0]) for row in rows]
    return _reading.stacked(samples, files, f"{folder / INDEX}, {split}")


# --- MTAN and Hugging Face ---


def _mtan_layout(folder: Path, split: str) -> dict:
    part = {"train": "train", "test": "val"}[split]
    return _mtan.mtan_split(
        folder, part, len(CLASSES_13), "label", normals=True, most_depth=_reading.MAX_DEPTH
    )


def _shards(folder: Path, prefix: str) -> list[Path]:
    """The Parquet files that begin so, up to three folders down, through links too.

    Raises FileNotFoundError where they are not as many as their names say.
    """
    patterns = [f"{'*/' * depth}{prefix}*.parquet" for depth in (3, 2, 1, 0)]
    found = {file.resolve(): file for pattern in patterns for file in folder.glob(pattern)}
    numbers = [re.search(r"-\d{5}-of-(\d{5})", file.name) for file in found.values()]
    if first := next(filter(None, numbers), None):
        there = sorted(number[0] if number else "" for number in numbers)
        expected = [f"-{i:05}-of-{first[1]}" for i in range(int(first[1]))]
        if there != expected:
            missing = [f"{prefix}{number}" for number in expected if number not in there]
            said = f"{len(there)} of {len(expected)} files {prefix}*.parquet"
            raise FileNotFoundError(f"{folder} has {said}; missing: {', '.join(missing) or 'none'}")
    return sorted(found.values())


def _shards_of(folder: Path, split: str) -> list[Path]:
    files = _shards(folder, split) or split == "test" and _shards(folder, "val")
    if not files:
        missing = folder / "val*.parquet"
        raise FileNotFoundError(f"{missing} is missing: expected the files of {HUGGING_FACE}")
    return files


def _parquet(folder: Path, split: str) -> dict:
    files = _shards_of(folder, split)

    def rows() -> Iterator[_reading.Sample]:
        for file in files:
            for row in _reading.parquet_rows(file, COLUMNS):
                arrays = {name: _nested(cell, name, file) for name, cell in row.items()}
                arrays["normals"] = arrays.pop("normal")
                yield _reading.checked(arrays, dict.fromkeys(arrays, file), len(CLASSES_13))

    names = [name for file in files for name in _reading.parquet_names(file, COLUMNS)]
    return _reading.stacked(rows(), names, f"{folder}, {split}")


def _nested(cell, name: str, file: Path) -> np.ndarray:
    """Lists in lists, as Arrow stores them, as one array (H, W), or (H, W, C) from (C, H, W)."""
    from pyarrow.compute import list_value_length

    try:
        values, shape = cell.values, [len(cell.values)]
        while str(values.type).startswith(("list", "large_list", "fixed_size_list")):
            lengths = list_value_length(values).unique().to_pylist()
            if len(lengths) != 1:
                raise ValueError(f"lists of {len(lengths)} lengths")
            shape.append(lengths[0])
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=False).reshape(shape)
        return np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    except (AttributeError, TypeError, ValueError) as error:  # an empty cell, unequal lengths
        why = f"has a row whose {name} is no array of numbers ({error})"
        raise ValueError(f"{file} {why}; fetch it again") from error
