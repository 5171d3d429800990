"""What the loaders of real data share: samples checked and decoded once into a memory-mapped cache, and file hashes.

A run starts from the cache, so no sample is decoded twice, and a machine that only trains needs no image library. Every
sample is looked at before any training starts; what is wrong with it is one line that names its file.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mtprune_utils.data import Split
from mtprune_utils.files import source_digest, write_atomically
from mtprune_utils.tasks import IGNORE, MIN_DEPTH

_HEADERS = threading.Lock()  # numpy reads headers by `ast`, which Python 3.11 breaks where two threads do so at once
Sample = dict[str, np.ndarray]  # image (H, W, 3) uint8, and one target per task


def cache_folder() -> Path:
    return Path(os.environ.get("MTPRUNE_CACHE", Path.home() / ".cache" / "mtprune"))


def downloaded(fetch: Callable[[], object], what: str, instead: str):
    """What `fetch` returns. Raises FileNotFoundError in one line where it fails, or where MTPRUNE_OFFLINE is set."""
    try:
        if os.environ.get("MTPRUNE_OFFLINE"):
            raise ConnectionError("MTPRUNE_OFFLINE is set")
        return fetch()
    except Exception as error:  # no network, no such package, no space
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{what} cannot be downloaded ({reason}): {instead}") from error


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """A hash of the files' contents and of their paths under root. Computed once while size and time stay the same."""
    files = sorted(files)
    listing = "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    known = cache_folder() / "digests" / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if known.exists():
        return known.read_text()
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    write_atomically(known, digest.hexdigest()[:16].encode())
    return known.read_text()


def decoded(name: str, part: str, digest: str, decode: Callable[[], dict[str, torch.Tensor]]) -> Split:
    """The part of the data set `name` that `decode` makes, {"image": ..., task: ...}: from the cache if it was decoded before.

    digest: of the files. The cache goes by that of the loader's code, too.
    """
    here = Path(__file__).parent
    code = source_digest(here / module for module in (f"{name}.py", "_reading.py", "_mtan.py", "../tasks.py"))
    cache = cache_folder() / f"{name}-{part}-{digest}-{code}.safetensors"
    try:
        tensors = load_file(cache)
    except (FileNotFoundError, SafetensorError):  # not decoded yet, or broken off
        write_atomically(cache, save(decode()))  # two runs may decode at once; the last rename wins, all are equal
        tensors = load_file(cache)
        for older in cache.parent.glob(f"{name}-{part}-{digest}-*.safetensors"):
            if older != cache:
                older.unlink(missing_ok=True)
    return Split(tensors.pop("image"), tensors)


def stacked(samples: Generator[Sample, None, None], files: Sequence[str], what: str) -> dict[str, torch.Tensor]:
    """Samples of equal size as tensors in the common form (see `mtprune_utils.data`), filled in one by one.

    files: where each sample's image lies, for messages. Raises ValueError if there is none, or one of another size.
    """
    if not files:
        raise ValueError(f"{what}: the split is empty, expected at least one sample")
    tensors: dict[str, torch.Tensor] = {}
    with contextlib.closing(samples):  # its threads end here, whatever is wrong with a sample
        for i, sample in enumerate(samples):
            for name, array in sample.items():
                planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0) if array.ndim == 3 else array))
                if name not in tensors:
                    tensors[name] = torch.empty((len(files), *planes.shape), dtype=planes.dtype)
                if planes.shape != tensors[name].shape[1:]:
                    size, first = (" x ".join(map(str, shape[-2:])) for shape in (planes.shape, tensors[name].shape))
                    raise ValueError(f"{files[i]} is {size}: expected {first}, as {files[0]}")
                tensors[name][i] = planes
    return tensors


def in_order(read: Callable[[int], Sample], count: int) -> Generator[Sample, None, None]:
    """read(0), read(1), ... on a few threads (decoders and file reads let go of the interpreter), a few ahead."""
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, count, 64):
            yield from pool.map(read, range(start, min(start + 64, count)))


# --- one modality of one sample ---

def read_array(file: Path, what: str) -> np.ndarray:
    """A .npy file. Raises FileNotFoundError or ValueError in one line."""
    def read() -> np.ndarray:
        with _HEADERS:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        return np.array(mapped)

    return _read(file, what, read)


def read_image(file: Path, what: str) -> np.ndarray:
    """A picture file, as it is stored."""
    from PIL import Image  # only to decode

    return _read(file, what, lambda: np.asarray(Image.open(file)))


def _read(file: Path, what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: expected {what}")
    try:
        return read()
    except Exception as error:  # whatever a decoder says of broken bytes
        raise ValueError(f"{file} cannot be read ({error}): expected {what}; fetch it again") from error


def checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    """(H, W, 3) uint8, from that or from floats in 0..1."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{file} has shape {image.shape}: expected an RGB image (H, W, 3)")
    if image.dtype == np.uint8:
        return image
    if not (np.issubdtype(image.dtype, np.floating) and np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{file}: expected RGB as uint8, or as floats from 0 to 1")
    return np.round(image * 255).astype(np.uint8)


def checked_labels(labels: np.ndarray, classes: int, size: tuple[int, int], file: Path) -> np.ndarray:
    """(H, W) uint8, with what is unlabelled (255 or -1) as 255."""
    _check_size(labels, size, file)
    whole = labels.astype(np.int64)
    if not np.array_equal(whole, labels):
        raise ValueError(f"{file} has labels that are no whole numbers: expected 0 to {classes - 1}, 255 or -1")
    unknown = (whole == -1) | (whole == IGNORE)
    if whole[~unknown].size and not 0 <= whole[~unknown].min() <= whole[~unknown].max() < classes:
        wrong = next(value for value in np.unique(whole[~unknown]) if not 0 <= value < classes)
        raise ValueError(f"{file} has label {wrong}: expected 0 to {classes - 1}, 255 or -1")
    return np.where(unknown, IGNORE, whole).astype(np.uint8)


def checked_depth(depth: np.ndarray, size: tuple[int, int], file: Path) -> np.ndarray:
    """(H, W, 1) float32, with what has no reading (0, not finite) as 0."""
    depth = depth.reshape(depth.shape[:2]) if depth.ndim == 3 and depth.shape[2] == 1 else depth
    _check_size(depth, size, file)
    return np.where(np.isfinite(depth) & (depth > MIN_DEPTH), depth, 0).astype(np.float32)[..., None]


def checked_normals(normals: np.ndarray, size: tuple[int, int], file: Path) -> np.ndarray:
    """(H, W, 3) float16 unit vectors; invalid are vectors far from unit length, as white and grey pixels of PNGs become."""
    if normals.ndim != 3 or normals.shape[2] != 3:
        raise ValueError(f"{file} has shape {normals.shape}: expected normals (H, W, 3)")
    _check_size(normals[..., 0], size, file)
    normals = np.nan_to_num(normals.astype(np.float32), posinf=0, neginf=0)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    valid = np.abs(length - 1) < 0.5
    return np.where(valid, normals / np.where(valid, length, 1), 0).astype(np.float16)


def _check_size(array: np.ndarray, size: tuple[int, int], file: Path) -> None:
    if array.shape != size:
        raise ValueError(f"{file} is {' x '.join(map(str, array.shape))}: expected {size[0]} x {size[1]}, as its image")
