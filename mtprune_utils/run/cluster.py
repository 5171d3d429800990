"""A batch on other machines: its profile, its queue, and what its jobs tell the launcher.

cluster/<name>/config.yaml is a profile of Snakemake's own, which a user edits. What a user need not
know is added here: the jobs' common name, by which those of a driver that was killed are found; how
the queue is asked; how many short jobs go together.
"""

import hashlib
import math
import os
import queue
import re
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mtprune_utils import events
from mtprune_utils.files import PROJECT
from mtprune_utils.registry import known
from mtprune_utils.study.store import KEPT

# A job of the queue shall take this long at least: starting one costs about ten.
GROUP_SECONDS = 600
CANCEL_SECONDS = 300  # within which jobs write their checkpoints and end
POLL = 1.0  # seconds between looks into the folder of what jobs tell


def names() -> list[str]:
    return sorted(path.parent.name for path in (PROJECT / "cluster").glob("*/config.yaml"))


class Cluster:
    """What cluster/<name>/config.yaml describes, for the batch whose runs lie in `runs`."""

    def __init__(self, name: str, runs: Path):
        import yaml  # comes with Snakemake

        self.name, self.runs = known(name, names(), "cluster"), runs.resolve()
        self.folder = PROJECT / "cluster" / name
        path = self.folder / "config.yaml"
        try:
            self.settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            self.executor = self.settings["executor"]
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no profile with an executor: {error}") from None
        unedited = {"IMAGE", "BUCKET"} & {*re.findall(r"[A-Z]{4,}", str(self.settings))}
        if unedited:
            raise ValueError(f"{path}: put your own in place of {', '.join(sorted(unedited))}")
        # The same whenever the same batch is started, and of this batch alone.
        place = hashlib.sha256(str(self.runs).encode()).hexdigest()[:8]
        self.prefix = f"mtprune_{self.runs.name}_{place}"
        self.events, self.logs = self.runs / "events", self.runs / "cluster_logs"

    @property
    def retries(self) -> int:
        return int(self.settings.get("retries", 0))

    def arguments(self, stage_seconds: dict[str, float]) -> list[str]:
        """Snakemake's. stage_seconds: of a job of each stage, as far as that is known."""
        given = ["--profile", str(self.folder)]
        if self.executor == "slurm":
            given += ["--slurm-jobname-prefix", self.prefix, "--slurm-logdir", str(self.logs)]
            if "slurm-status-command" not in self.settings and not _accounting():
                given += ["--slurm-status-command", "squeue"]
        counts = {} if "groups" in self.settings else group_sizes(stage_seconds)
        if counts:
            given += ["--groups", *(f"{stage}={stage}" for stage in counts)]
            given += ["--group-components", *(f"{stage}={n}" for stage, n in counts.items())]
        return given

    @property
    def most(self) -> float:
        """How many jobs it is given at a time."""
        number = self.settings.get("jobs", 1)
        return math.inf if number == "unlimited" else number

    @property
    def shares_files(self) -> bool:
        """Whether its machines see this folder, as a shared disk's."""
        return self.settings.get("shared-fs-usage") != "none"

    @property
    def environment(self) -> dict[str, str]:
        """Of the driver; a cluster that shares files hands it on to the jobs."""
        found = {events.FOLDER: str(self.events)}
        if self.executor == "kubernetes":  # see KUBERNETES in Makefile
            paths = [str(PROJECT / ".venv" / "kubernetes"), os.environ.get("PYTHONPATH", "")]
            found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return found

    def cancel(self) -> int:
        """End this batch's jobs, of whichever driver, and wait until they have; returns how many.

        They get SIGTERM, and write checkpoints. (On SLURM: Kubernetes' jobs have no common name.)
        """
        if self.executor != "slurm":
            return 0
        jobs = self._queued()
        if jobs:
            _slurm("scancel", *jobs)
        since = time.monotonic()
        while left := self._queued():
            if time.monotonic() - since > CANCEL_SECONDS:
                rest = f"SLURM does not end the jobs {', '.join(left)}"
                raise OSError(f"{rest}: see `squeue`, and start again when they are gone")
            time.sleep(POLL)
        return len(jobs)

    def _queued(self) -> list[str]:
        lines = _slurm("squeue", "--me", "--noheader", "--format", "%A %j")
        rows = [line.split(" ", 1) for line in lines.splitlines()]
        return sorted({job for job, name in rows if name.startswith(f"{self.prefix}_")})


def group_sizes(stage_seconds: dict[str, float]) -> dict[str, int]:
    """{stage: how many of its jobs go together}, of stages whose jobs are short."""
    counts = {
        stage: int(GROUP_SECONDS // max(seconds, 1)) for stage, seconds in stage_seconds.items()
    }
    return {stage: count for stage, count in counts.items() if count > 1}


def _accounting() -> bool:
    """Whether SLURM's `sacct` knows of jobs."""
    said = _slurm("scontrol", "show", "config")
    kind = re.search(r"^AccountingStorageType\s*=\s*(\S+)", said, re.MULTILINE)
    return kind is not None and kind[1] not in ("(null)", "accounting_storage/none")


def _slurm(*command: str) -> str:
    """What a command of SLURM's says. Raises OSError in one line where it does not work."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        what = f"there is no `{command[0]}` here"
        raise OSError(f"{what}: start the batch where SLURM's commands are") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"`{command[0]}` fails: {error.stderr.strip()}") from None


# --- what travels where no disk is shared ---

PACKED = "kept.tar"


def pack(tars: list[str]) -> None:
    """Make tar files of what others read of the runs in whose folders they shall lie."""
    for tar in map(Path, tars):
        kept = sorted({path for kind in (*KEPT, "params.json") for path in tar.parent.glob(kind)})
        with tarfile.open(tar, "w") as file:
            for path in kept:
                file.add(path, path.name)


def unpack(inputs: list[str]) -> None:
    """Lay what has been packed beside its tar file."""
    for tar in (Path(file) for file in inputs if Path(file).name == PACKED):
        with tarfile.open(tar) as file:
            file.extractall(tar.parent, filter="data")


# --- what jobs tell ---


def take_events(folder: Path) -> Iterator[str]:
    """The lines that have been left there, in their order, each once."""
    for path in sorted(folder.glob("*.event")):
        yield path.read_text(encoding="utf-8")
        path.unlink()


def with_events(said: Iterator[str], folder: Path) -> Iterator[str]:
    """Snakemake's lines as they come, and between them the jobs'."""
    lines: queue.SimpleQueue = queue.SimpleQueue()

    def pass_on() -> None:
        for line in said:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pass_on, daemon=True).start()
    line: str | None = ""
    looked = time.monotonic()
    while line is not None:
        try:
            line = lines.get(timeout=POLL)
        except queue.Empty:
            line = ""
        if line:
            yield line
        if not line or time.monotonic() - looked > POLL:  # Snakemake may talk without a pause
            yield from take_events(folder)
            looked = time.monotonic()
