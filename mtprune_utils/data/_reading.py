"""What the loaders of real data share: samples checked and decoded once into a memory-mapped cache, and file hashes.

A run starts from the cache, so no sample is decoded twice, and a machine that only trains needs no image library. Every
sample is looked at before any training starts; what is wrong with it is one line that names its file.
"""

import contextlib
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from mtprune_utils.data import Split
from mtprune_utils.files import PROJECT, source_digest, write_atomically
from mtprune_utils.tasks import IGNORE, MIN_DEPTH

_HEADERS = threading.Lock()  # numpy reads headers by `ast`, which Python 3.11 breaks where two threads do so at once
Sample = dict[str, np.ndarray]  # image (H, W, 3) uint8, and one target per task
MOST_BYTES = 2**28  # of one modality of one sample: an image of 4700 x 4700 as float32 RGB
MAX_METRES = 100.0  # no sensor of the layouts that are read here sees further
MAX_DISPARITY = 1.0  # MTAN's inverse depths reach 0.49; raw disparities, 126


def cache_folder() -> Path:
    """Raises FileNotFoundError where neither MTPRUNE_CACHE nor a home folder is there."""
    if named := os.environ.get("MTPRUNE_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "mtprune"
    except RuntimeError:
        raise FileNotFoundError(
            "there is no home folder for decoded data: name one in MTPRUNE_CACHE"
        ) from None


def folder_of(root: str) -> Path:
    """The folder that a user's `root` names: the same on the command line and in JupyterLab.

    "~" is the home folder; what is not found from the working folder starts at the repository.
    """
    try:
        folder = Path(root).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"root {root!r}: {error}") from None
    return folder if folder.is_absolute() or folder.exists() else PROJECT / folder


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
    """A hash of the files' contents and of their paths under root.

    Computed once while no file is written or replaced: times of change and inodes cannot be set.
    """
    files = sorted(files)
    if odd := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"{odd} is missing, or no ordinary file")
    states = ((file, file.stat()) for file in files)
    listing = "\n".join(
        f"{file} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for file, s in states
    )
    known = cache_folder() / "digests" / hashlib.sha256(os.fsencode(listing)).hexdigest()[:32]
    if known.exists() and re.fullmatch(rb"[0-9a-f]{16}", content := known.read_bytes()):
        return content.decode()
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(root)))
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
    written = cache.with_suffix(".checksum")
    if not cache.exists() or not written.exists() or written.read_bytes() != _checksum(cache):
        # Not decoded yet, or damaged. Two runs may decode at once: the last rename wins, all are equal.
        write_atomically(cache, save(decode()))
        write_atomically(written, _checksum(cache))
        for older in cache.parent.glob(f"{name}-{part}-{digest}-*"):
            if older not in (cache, written):
                older.unlink(missing_ok=True)
    tensors = load_file(cache)
    return Split(tensors.pop("image"), tensors)


def _checksum(file: Path) -> bytes:
    """CRC-32: it is looked at as each run begins, and finds damage, not malice."""
    value = 0
    with file.open("rb") as content:
        while block := content.read(2**24):
            value = zlib.crc32(block, value)
    return f"{value:08x}".encode()


def stacked(samples: Generator[Sample, None, None], files: Sequence[str], what: str) -> dict[str, torch.Tensor]:
    """Samples of equal size as tensors in the common form (see `mtprune_utils.data`).

    They are filled in one by one. files: where each sample's image lies, for messages. Raises
    ValueError if there is none, one of another size, or a target without a single valid pixel.
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
    for name, tensor in tensors.items():
        if name != "image" and not (tensor != (IGNORE if name == "segmentation" else 0)).any():
            raise ValueError(f"{what}: no pixel of any sample has valid {name}, from {files[0]} on")
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
        with file.open("rb") as content:
            if content.read(6) != b"\x93NUMPY":
                raise ValueError("it is no .npy file")
        with _HEADERS:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        if mapped.dtype.kind not in "uif" or not 0 < mapped.nbytes <= MOST_BYTES:
            raise ValueError(f"it holds {mapped.dtype} of shape {mapped.shape}")
        return np.array(mapped)

    return _read(file, what, read)


def read_image(file: Path, what: str) -> np.ndarray:
    """A PNG or JPEG file, as it is stored."""
    return _read(file, what, lambda: decoded_image(file))


def decoded_image(file) -> np.ndarray:
    """A PNG or JPEG, from a path or an open file: no other decoder is started, whatever it is called."""
    from PIL import Image  # only to decode

    with Image.open(file, formats=("PNG", "JPEG")) as image:
        if image.width * image.height * 12 > MOST_BYTES:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return np.asarray(image)


def _read(file: Path, what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: expected {what}")
    try:
        return read()
    except Exception as error:  # whatever a decoder says of broken bytes, in its first line
        reason = (str(error).splitlines() or [type(error).__name__])[0].split("loaded unsafely")[0]
        raise ValueError(
            f"{file} cannot be read ({reason[:200]}): expected {what}; fetch it again"
        ) from error


def checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    """(H, W, 3) uint8, from that or from floats in 0..1."""
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{file} has shape {image.shape}: expected an RGB image (H, W, 3)")
    if image.dtype == np.uint8:
        return image
    if not (np.issubdtype(image.dtype, np.floating) and np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{file}: expected RGB as uint8, or as floats from 0 to 1")
    return np.round(image * 255).astype(np.uint8)


def checked_labels(labels: np.ndarray, classes: int, size: tuple[int, int], file: Path) -> np.ndarray:
    """(H, W) uint8, with what is unlabelled (255 or -1) as 255."""
    labels = _plane(labels)
    _check_size(labels, size, file)
    whole = np.where(np.isfinite(labels), labels, 0.5).astype(np.int64)
    if not np.array_equal(whole, labels):
        raise ValueError(f"{file} has labels that are no whole numbers: expected 0 to {classes - 1}, 255 or -1")
    unknown = (whole == -1) | (whole == IGNORE)
    if whole[~unknown].size and not 0 <= whole[~unknown].min() <= whole[~unknown].max() < classes:
        wrong = next(value for value in np.unique(whole[~unknown]) if not 0 <= value < classes)
        raise ValueError(f"{file} has label {wrong}: expected 0 to {classes - 1}, 255 or -1")
    return np.where(unknown, IGNORE, whole).astype(np.uint8)


def checked_depth(
    depth: np.ndarray, size: tuple[int, int], file: Path, unit: str = "metres"
) -> np.ndarray:
    """(H, W, 1) float32, with what has no reading (0, not finite) as 0.

    unit: "metres", or "inverse depth" as MTAN scales it. Raises ValueError for what cannot be that.
    """
    depth = _plane(depth)
    _check_size(depth, size, file)
    most = MAX_METRES if unit == "metres" else MAX_DISPARITY
    largest = np.max(depth, where=np.isfinite(depth), initial=0)
    if depth.dtype.kind != "f" or largest > most:
        raise ValueError(
            f"{file} has depth as {depth.dtype} up to {largest:g}: expected {unit} as floats, at most "
            f"{most:g} (millimetres, bytes and raw disparities have to be converted)"
        )
    return np.where(np.isfinite(depth) & (depth > MIN_DEPTH), depth, 0).astype(np.float32)[..., None]


def checked_normals(
    normals: np.ndarray, size: tuple[int, int], file: Path, unit: bool = True
) -> np.ndarray:
    """(H, W, 3) float16 unit vectors; invalid are those far from unit length, or not finite.

    unit: refuse a file most of whose vectors are not of unit length. (White and grey pixels of
    decoded PNGs are not.)
    """
    if normals.ndim != 3 or normals.shape[2] != 3:
        raise ValueError(f"{file} has shape {normals.shape}: expected normals (H, W, 3)")
    _check_size(normals[..., 0], size, file)
    if normals.dtype.kind != "f":
        raise ValueError(f"{file} has normals as {normals.dtype}: expected unit vectors as floats")
    normals = normals.astype(np.float32)
    normals = np.where(np.isfinite(normals).all(-1, keepdims=True), normals, 0)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    if unit and ((length > 0.1) & (np.abs(length - 1) > 0.1)).sum() > (length > 0.1).sum() / 2:
        raise ValueError(
            f"{file} has normals that are not of unit length: expected components from -1 to 1 "
            "(normals stored from 0 to 1, or as bytes, have to be decoded)"
        )
    valid = np.abs(length - 1) < 0.5
    return np.where(valid, normals / np.where(valid, length, 1), 0).astype(np.float16)


def _plane(array: np.ndarray) -> np.ndarray:
    """(H, W) of (H, W, 1)."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _check_size(array: np.ndarray, size: tuple[int, int], file: Path) -> None:
    if array.shape != size:
        raise ValueError(f"{file} is {' x '.join(map(str, array.shape))}: expected {size[0]} x {size[1]}, as its image")
