"""The state of an unfinished run on disk, from which it goes on as if nothing had happened.

It ends with the same bits. A checkpoint is one safetensors file: tensors by number, all else as
JSON in its header, so that nothing is ever unpickled. Its name holds the step and a checksum of its
content. The last two are kept; a damaged one gives way to the one before it.
"""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mtprune_utils.files import checksum, write_atomically

KEPT = 2


class Interrupted(RuntimeError):
    """The run stopped, as it was asked to.

    By Ctrl-C, Jupyter's stop button or a batch system's time limit.
    """


class Checkpoints:
    """Those of one run, in a folder of their own.

    seconds: how long to go on before the next one. origin: the run's name, and the code, device,
    threads and so on that its bits depend on.
    report: told which checkpoint is gone on from, and which are not fit for that. A run of several
    parts (a search of its trials) says in `part` which one it is at. Checkpoints of another origin
    or part are not gone on from.
    """

    def __init__(
        self, folder: Path, seconds: float, origin: str, report: Callable[[str], None] = print
    ):
        self.folder, self.seconds, self.origin, self.report = folder, seconds, origin, report
        self.part = ""
        self.step = 0  # of the last one
        self.loaded: Path | None = None  # what is being gone on from, up to the next step
        self.stop = False
        self._earlier, self._started = 0.0, time.monotonic()
        self._written = self._started

    @property
    def elapsed(self) -> float:
        """Seconds spent on the run, with those before an interruption."""
        return self._earlier + time.monotonic() - self._started

    def load(self) -> dict | None:
        """The state of the last intact checkpoint, None if there is none."""
        for path in sorted(self.folder.glob("step*.safetensors"), reverse=True):
            if not (name := re.fullmatch(r"step(\d+)-(\w+)", path.stem)):
                continue
            step, digest = name.groups()
            if checksum(path)[: len(digest)] != digest:
                self.report(f"{path.name} is damaged: going back to the checkpoint before it")
            else:
                self.loaded = path
                if (saved := unpack(path))["of"] == [self.origin, self.part]:
                    self.step, self._earlier = int(step), saved["elapsed"]
                    self.report(f"going on after step {self.step}")
                    return saved["state"]
                left_by = "other code, another kind of machine or another part of the run"
                self.report(f"{path.name} was left by {left_by}, or by another run: not used")
            path.unlink()
        self.loaded = None
        return None

    def keep(self, step: int, state: Callable[[], dict]) -> None:
        """Write `state()` down if it is time for that; between steps only.

        Raises Interrupted if a stop was asked for.
        """
        self.loaded = None
        if not self.stop and time.monotonic() - self._written < self.seconds:
            return
        content = pack({"of": [self.origin, self.part], "elapsed": self.elapsed, "state": state()})
        digest = hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self.folder / f"step{step:09}-{digest}.safetensors", content)
        # All are of this part, which began by dropping another's.
        for path in sorted(self.folder.glob("step*.safetensors"))[:-KEPT]:
            path.unlink()
        self.step, self._written = step, time.monotonic()
        if self.stop:
            raise Interrupted(
                f"stopped after step {step}, whose state is kept: run it again to go on"
            )

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """SIGINT and SIGTERM no longer break a step off.

        They ask for a checkpoint before the next one, and then for the end. A second SIGINT breaks
        off at once. (Jupyter sends SIGTERM after SIGINT when it waits for a kernel's end.)
        """
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return

        def ask(signum: int, frame) -> None:
            if self.stop and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = True

        before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def clear(self) -> None:
        """Remove them all: the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def random_state() -> list[Tensor]:
    """Of the global generators: the CPU's and every GPU's."""
    return [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []),
    ]


def set_random_state(state: list[Tensor]) -> None:
    """Put torch's generators back into a state that `random_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def pack(state) -> bytes:
    """A tree of dictionaries, lists, tensors, numbers, strings and None as a safetensors file."""
    tensors: dict[str, Tensor] = {}

    def plain(value):
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            # Sums over other strides could differ in their last bit.
            channels_last = not value.is_contiguous() and value.is_contiguous(
                memory_format=torch.channels_last
            )
            return {"tensor": name, "channels_last": channels_last}
        if isinstance(value, dict):
            # Keys may be numbers.
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    header = json.dumps(plain(state))
    return save(tensors, metadata={"state": header})


def unpack(path: Path) -> dict:
    """The inverse of `pack`, from a file; tuples come back as lists, tensors on the CPU."""
    with safe_open(path, framework="pt") as file:

        def restored(value):
            if isinstance(value, list):
                return [restored(item) for item in value]
            if not isinstance(value, dict):
                return value
            if "items" in value:
                return {key: restored(item) for key, item in value["items"]}
            tensor = file.get_tensor(value["tensor"])
            return (
                tensor.contiguous(memory_format=torch.channels_last)
                if value["channels_last"]
                else tensor
            )

        return restored(json.loads(file.metadata()["state"]))
