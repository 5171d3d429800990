"""The embedded data set: path-traced rooms with exact segmentation, depth and normals.

See rooms_v1/README.md. The images lie encoded in Parquet. They are decoded once into a
memory-mapped cache, so that a run starts at once and a machine that only trains needs neither a
Parquet nor an image library.
"""

import io
from pathlib import Path

import numpy as np
import torch

from mtprune_utils.core.data import Source
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import _reading
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.normals import normals
from mtprune_utils.tasks.segmentation import segmentation

FOLDER = Path(__file__).parent / "rooms_v1"
CLASSES = (
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "bed",
    "sofa",
    "chair",
    "table",
    "cabinet",
    "lamp",
    "picture",
    "curtain",
    "rug",
    "plant",
    "clutter",
)
ENCODED = ("image", "segmentation", "depth", "normals")  # columns of the Parquet files


def tasks(root: str = "") -> list[Task]:
    return [segmentation(CLASSES), depth(), normals()]


def load(root: str = "") -> Source:
    """All of rooms, from `root` or the package. Raises FileNotFoundError for a missing file."""
    content = digest(root)
    train, test = (
        _reading.decoded("rooms", file.stem, content, lambda file=file: _decode(file))
        for file in _files(root)
    )
    return Source(train, test)


def digest(root: str = "") -> str:
    """A hash of both files."""
    files = _files(root)
    return _reading.files_digest(files[0].parent, files)


def _files(root: str) -> list[Path]:
    files = [(Path(root) if root else FOLDER) / f"{split}.parquet" for split in ("train", "test")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"rooms needs {file}, which is not there: set root to its folder, or to '' for the "
                "embedded one"
            )
    return files


def _decode(file: Path) -> dict[str, torch.Tensor]:
    """Parquet with encoded images to tensors in the common form (mtprune_utils.core.data)."""
    samples = (_sample(row, file) for row in _reading.parquet_rows(file, ENCODED))
    return _reading.stacked(samples, _reading.parquet_names(file, ENCODED), str(file))


def _sample(row: dict, file: Path) -> _reading.Sample:
    try:
        arrays = decode({name: cell.as_py()["bytes"] for name, cell in row.items()})
    except Exception as error:  # whatever a decoder says of broken bytes
        why = f"has a row that cannot be read ({_reading.reason(error)})"
        raise ValueError(f"{file} {why}: fetch it again") from error
    sample = _reading.checked(arrays, dict.fromkeys(arrays, file), len(CLASSES))
    return sample | {"normals": arrays["normals"].astype(np.float16)}  # have their length by now


def decode(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """One image and its labels, (128, 128) or (128, 128, 3), from PNG and JPEG.

    The inverse of the renderer's `encode`.
    """
    arrays = {name: _reading.opened_image(io.BytesIO(content)) for name, content in files.items()}
    if arrays["depth"].dtype != np.uint16:
        raise ValueError(f"depth is {arrays['depth'].dtype}, expected millimetres in 16 bits")
    invalid = (arrays["normals"] == 255).all(-1, keepdims=True)
    normals = arrays["normals"] / np.float32(127.5) - 1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    metres = arrays["depth"].astype(np.float32) / 1000
    return arrays | {"depth": metres, "normals": np.where(invalid, np.float32(0), normals)}
