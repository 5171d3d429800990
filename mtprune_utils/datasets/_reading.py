"""What the loaders of real data share: checked readers, a memory-mapped cache, file hashes.

A run starts from the cache, so no sample is decoded twice, and a machine that only trains needs no
image library. Every sample is looked at before any training starts; what is wrong with it is one
line that names its file.
"""

import contextlib
import gzip
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file, save

from mtprune_utils import registry
from mtprune_utils.core.data import Split
from mtprune_utils.core.targets import IGNORE, MIN_DEPTH
from mtprune_utils.files import source_digest, write_atomically

MAX_PIXELS = 2**24  # of one image: eight times Cityscapes' full size. Nothing larger is allocated.
MAX_DEPTH = 20.0  # metres: twice what a Kinect reads. Millimetres and bytes lie far beyond.

# numpy reads headers by `ast`, which Python 3.11 breaks where two threads do so at once.
_HEADERS = threading.Lock()
Sample = dict[str, np.ndarray]  # image (H, W, 3) uint8, and one target per task
Size = tuple[int, int]  # (H, W)
INVALID = {"segmentation": IGNORE, "image": (0, 1)}  # 0 elsewhere; floats cut to bytes are 0 and 1


def cache_folder() -> Path:
    """Where decoded data lies. Raises ValueError where neither it nor the home folder is known."""
    try:
        return Path(os.environ.get("MTPRUNE_CACHE") or "~/.cache/mtprune").expanduser()
    except RuntimeError as error:
        raise ValueError(f"no folder for decoded data ({error}): set MTPRUNE_CACHE") from error


def downloaded(fetch: Callable[[], object], what: str, instead: str):
    """What `fetch` returns.

    Raises FileNotFoundError in one line where it fails, or where MTPRUNE_OFFLINE is set.
    """
    try:
        if os.environ.get("MTPRUNE_OFFLINE"):
            raise ConnectionError("MTPRUNE_OFFLINE is set")
        return fetch()
    except Exception as error:  # no network, no such package, no space
        why = f"cannot be downloaded ({reason(error)})"
        raise FileNotFoundError(f"{what} {why}: {instead}") from error


def reason(error: Exception) -> str:
    """What a library says, on one line; numpy's further lines recommend what is unsafe."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """A hash of the files' contents and paths under root, computed once while they stay the same.

    Raises OSError where one is not there or no regular file.
    """
    files = sorted(files)
    listing = "\n".join(map(_state, files)).encode(errors="surrogateescape")
    known = cache_folder() / "digests" / hashlib.sha256(listing).hexdigest()[:32]
    if recorded := _recorded(known):
        return recorded
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode(errors="surrogateescape"))
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    write_atomically(known, digest.hexdigest()[:16].encode())
    return digest.hexdigest()[:16]


def _state(file: Path) -> str:
    """What changes when a file is written or replaced; ctime does, whatever mtime it is given."""
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):
        raise FileNotFoundError(f"{file} is no regular file")
    return f"{file} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _recorded(record: Path) -> str | None:
    """The hash that was written down; None if there is none, or something else in its place."""
    content = record.read_bytes() if record.is_file() else b""
    return content.decode() if re.fullmatch(rb"[0-9a-f]{16}", content) else None


def decoded(
    name: str, part: str, digest: str, decode: Callable[[], dict[str, torch.Tensor]]
) -> Split:
    """The part of the data set `name` that `decode` makes, {"image": ..., task: ...}.

    From the cache, if it was decoded before. digest: of the files. The cache goes by that of the
    loader's code, too; its own is kept beside.
    """
    code = source_digest(registry.sources(f"datasets.{name}", within="datasets"))
    cache = cache_folder() / f"{name}-{part}-{digest}-{code}.safetensors"
    record = cache_folder() / "digests" / cache.name
    if not cache.is_file() or files_digest(cache.parent, [cache]) != _recorded(record):
        # Two runs may decode at once; the last rename wins, all are equal.
        write_atomically(cache, save(decode()))
        write_atomically(record, files_digest(cache.parent, [cache]).encode())
        for older in cache.parent.glob(f"{name}-{part}-{digest}-*.safetensors"):
            if older != cache:
                older.unlink(missing_ok=True)
    tensors = load_file(cache)
    return Split(tensors.pop("image"), tensors)


def stacked(
    samples: Generator[Sample, None, None], files: Sequence[str], what: str
) -> dict[str, torch.Tensor]:
    """Samples of equal size as tensors in the common form (see `core.data`), filled in one by one.

    files: where each sample's image lies, for messages. Raises ValueError if there is none, one of
    another size, one twice, or a modality that is valid in no pixel of any.
    """
    if not files:
        raise ValueError(f"{what}: the split is empty, expected at least one sample")
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[bytes, int] = {}
    valid: dict[str, bool] = {}
    with contextlib.closing(samples):  # its threads end here, whatever is wrong with a sample
        for i, sample in enumerate(samples):
            content = hashlib.sha256()
            for name, array in sample.items():
                array = np.moveaxis(array, -1, 0) if array.ndim == 3 else array
                planes = torch.from_numpy(np.ascontiguousarray(array))
                if name not in tensors:
                    tensors[name] = torch.empty((len(files), *planes.shape), dtype=planes.dtype)
                if planes.shape != tensors[name].shape[1:]:
                    shapes = planes.shape, tensors[name].shape
                    size, first = (" x ".join(map(str, shape[-2:])) for shape in shapes)
                    raise ValueError(f"{files[i]} is {size}: expected {first}, as {files[0]}")
                tensors[name][i] = planes
                content.update(planes.numpy())
                valid[name] = valid.get(name) or not np.isin(array, INVALID.get(name, 0)).all()
            if (first := seen.setdefault(content.digest(), i)) != i:
                raise ValueError(f"{files[i]} is the same as {files[first]}: expected it once")
    if missing := [name for name in tensors if not valid[name]]:
        raise ValueError(f"{what}: no pixel of {len(seen)} samples has a valid {missing[0]}")
    return tensors


def in_order(read: Callable[[int], Sample], count: int) -> Generator[Sample, None, None]:
    """read(0), read(1), ... on a few threads, a few ahead.

    (Decoders and file reads let go of the interpreter.)
    """
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, count, 64):
            yield from pool.map(read, range(start, min(start + 64, count)))


# --- one reader for each format, which takes no more memory than an image may ---


def read_array(file: Path, what: str) -> np.ndarray:
    """A .npy file. Raises FileNotFoundError or ValueError in one line."""

    def read() -> np.ndarray:
        with _HEADERS:  # np.load would try to unpack whatever is no .npy
            return np.lib.format.open_memmap(file, mode="r")

    return _read(file, f"{what} in a .npy file", read)


def read_image(file: Path, what: str) -> np.ndarray:
    """A picture file, as it is stored. Raises FileNotFoundError or ValueError in one line."""
    return _read(file, what, lambda: opened_image(file))


def opened_image(source: Path | BinaryIO) -> np.ndarray:
    """A PNG's or JPEG's pixels. Other formats may start programs; Pillow itself refuses bombs."""
    from PIL import Image  # only to decode

    with Image.open(source, formats=("PNG", "JPEG")) as image:
        return np.asarray(image)


def read_gzip(file: Path, what: str) -> np.ndarray:
    """The bytes that a gzip file holds. Raises FileNotFoundError or ValueError in one line."""

    def read() -> np.ndarray:
        with gzip.open(file) as content:
            return np.frombuffer(content.read(3 * MAX_PIXELS + 1), np.uint8)

    return _read(file, what, read)


def _read(file: Path, what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: expected {what}")
    try:
        array = read()
        if array.size > 3 * MAX_PIXELS:
            raise ValueError(f"it holds {array.size} numbers or more")
        return np.array(array)
    except Exception as error:  # whatever a decoder says of broken bytes
        why = f"cannot be read ({reason(error)})"
        raise ValueError(f"{file} {why}: expected {what}; fetch it again") from error


def parquet_names(file: Path, columns: Sequence[str]) -> list[str]:
    """What the rows of a Parquet file go by in messages. Raises ValueError in one line."""
    with _parquet(file, columns) as table:
        return [f"row {i} of {file}" for i in range(table.metadata.num_rows)]


def parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[dict]:
    """The rows, {column: pyarrow scalar}. Raises ValueError in one line."""
    with _parquet(file, columns) as table:
        for batch in table.iter_batches(8, columns=columns):
            for i in range(len(batch)):
                yield {name: batch[name][i] for name in columns}


@contextlib.contextmanager
def _parquet(file: Path, columns: Sequence[str]) -> Iterator:
    """An open Parquet file that has these columns, and no larger cells than images need."""
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as content, pyarrow.parquet.ParquetFile(content) as table:
            if missing := sorted(set(columns) - set(table.schema_arrow.names)):
                raise ValueError(f"{file} has no {missing[0]}: expected {', '.join(columns)}")
            for group in table.metadata.to_dict()["row_groups"]:
                most = max(column["num_values"] for column in group["columns"])
                if most > 3 * MAX_PIXELS * group["num_rows"]:
                    raise ValueError(f"{file} has {most} numbers in {group['num_rows']} rows")
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        why = f"is not a readable Parquet file ({reason(error)})"
        raise ValueError(f"{file} {why}: fetch it again") from error


# --- what one sample holds ---


def checked(
    arrays: Sample, files: dict[str, Path], classes: int, most=MAX_DEPTH, exact=True
) -> Sample:
    """A sample in the common form, from its arrays as they were read; ValueError names the file.

    most, exact: see `checked_depth` and `checked_normals`.
    """
    image, labels = arrays["image"], arrays["segmentation"]
    size = image.shape[:2]
    sample = {
        "image": checked_image(image, files["image"]),
        "segmentation": checked_labels(labels, classes, size, files["segmentation"]),
        "depth": checked_depth(arrays["depth"], size, files["depth"], most),
    }
    if "normals" in arrays:
        sample["normals"] = checked_normals(arrays["normals"], size, files["normals"], exact)
    return sample


def checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    """(H, W, 3) uint8, from that or from floats in 0..1."""
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{file} has shape {image.shape}: expected an RGB image (H, W, 3)")
    if image.dtype == np.uint8:
        return image
    floats = np.issubdtype(image.dtype, np.floating) and np.isfinite(image).all()
    if not (floats and image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{file}: expected RGB as uint8, or as floats from 0 to 1")
    return np.round(image * 255).astype(np.uint8)


def checked_labels(labels: np.ndarray, classes: int, size: Size, file: Path) -> np.ndarray:
    """(H, W) uint8, with what is unlabelled (255 or -1) as 255."""
    labels = _plane(labels, size, file)
    if not np.array_equal(np.floor(labels), labels):
        found = "labels that are no whole numbers"
        raise ValueError(f"{file} has {found}: expected 0 to {classes - 1}, 255 or -1")
    unknown = (labels == -1) | (labels == IGNORE)
    if (wrong := labels[~unknown & ((labels < 0) | (labels >= classes))]).size:
        raise ValueError(f"{file} has label {wrong[0]:g}: expected 0 to {classes - 1}, 255 or -1")
    return np.where(unknown, IGNORE, labels).astype(np.uint8)


def checked_depth(depth: np.ndarray, size: Size, file: Path, most=MAX_DEPTH) -> np.ndarray:
    """(H, W, 1) float32, with what has no reading (0, -1, not finite) as 0.

    most: what the layout can hold.
    """
    depth = _plane(depth, size, file)
    readings = depth[np.isfinite(depth)]
    if depth.dtype.kind != "f" or ((readings < -1) | (readings > most)).any():
        what = "depth in metres" if most == MAX_DEPTH else "inverse depth"
        raise ValueError(f"{file} holds {_range(depth)}: expected {what}, floats up to {most:g}")
    there = np.isfinite(depth) & (depth > MIN_DEPTH)
    return np.where(there, depth, 0).astype(np.float32)[..., None]


def checked_normals(normals: np.ndarray, size: Size, file: Path, exact=True) -> np.ndarray:
    """(H, W, 3) float16 unit vectors; invalid are vectors with a NaN, or far from unit length.

    exact: most of the others have unit length, which (n + 1) / 2 has not. Vectors that come from
    bytes need not: white and grey pixels are no normals.
    """
    if normals.ndim != 3 or normals.shape[2] != 3:
        raise ValueError(f"{file} has shape {normals.shape}: expected normals (H, W, 3)")
    _plane(normals[..., 0], size, file)
    vectors = np.where(np.isfinite(normals).all(-1, keepdims=True), normals, 0)
    vectors = vectors.astype(np.float64).clip(-2, 2).astype(np.float32)  # 2 is refused
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    valid, unit = (np.abs(length - 1) < distance for distance in (0.5, 0.05))
    inexact = exact and 2 * unit.sum() < valid.sum()
    if normals.dtype.kind != "f" or np.abs(vectors).max() == 2 or inexact:
        raise ValueError(f"{file} holds {_range(normals)}: expected normals, float unit vectors")
    return np.where(valid, vectors / np.where(valid, length, 1), 0).astype(np.float16)


def _range(array: np.ndarray) -> str:
    return f"{array.dtype} from {np.nanmin(array):g} to {np.nanmax(array):g}"


def _plane(array: np.ndarray, size: Size, file: Path) -> np.ndarray:
    """Real numbers (H, W), from that or (H, W, 1). Raises ValueError for anything else."""
    plane = array[..., 0] if array.shape[2:] == (1,) else array
    if plane.shape != size:
        found = " x ".join(map(str, array.shape))
        raise ValueError(f"{file} is {found}: expected {size[0]} x {size[1]}, as its image")
    if plane.dtype.kind not in "iuf":
        raise ValueError(f"{file} holds {plane.dtype}: expected numbers")
    return plane
