"""Run folders: where a run's parameters, provenance and results lie, and how one is found again.

runs/<profile>/<stage>/<readable name>-<hash of every parameter that its results depend on>/
    params.json  provenance.json  *.csv  model.safetensors  timing.json  done.json (written last)

A run is finished if done.json is there. Files are written beside their place and renamed, so none is ever half there.
"""

import ast
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from mtprune_utils.data import data_digest
from mtprune_utils.profiles import Profile, check_criterion, get_profile

PACKAGE = Path(__file__).parent
TRAINING_MODULES = ("data/__init__.py", "data/rooms.py", "tasks.py", "models.py", "gradients.py", "training.py", "stages.py")
STAGE_MODULES = {  # what a stage's results depend on: editing plots.py redraws figures and re-trains nothing
    "dense": TRAINING_MODULES,
    "prune": (*TRAINING_MODULES, "criteria.py", "pruning.py"),
    "retrain": TRAINING_MODULES,
    "figure": ("stats.py", "plots.py", "tasks.py", "runs.py"),
}
PROJECT = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path()  # where relative folders start

SHARED_SETTINGS = (
    "train_images", "test_images", "validation_share", "image_height", "crop", "scale", "depth_follows_scale", "batch_size",
    "backbone", "widths", "stride", "head_width", "dropout",
)
STAGE_SETTINGS = {
    "dense": ("dense", "pretrained"),
    "prune": ("prune",),
    "retrain": ("retrain",),
}


@dataclass(frozen=True)
class Experiment:
    """A profile on a data set, and the folder of its runs: the grid of everything that is trained."""

    profile: Profile
    data: str = "rooms"
    data_root: str = ""  # where the data set lies; the embedded one needs none
    root: Path = Path("runs")

    @cached_property
    def data_digest(self) -> str:
        return data_digest(self.data, self.data_root)

    @classmethod
    def open(cls, profile: str, data: str, root: str, runs: str, overrides: dict | None = None) -> "Experiment":
        """From a notebook's parameters. A relative `runs` starts at the repository, wherever the notebook runs."""
        return cls(get_profile(profile, overrides), data, root, PROJECT / runs)

    def dense(self, seed: int) -> "Run":
        return Run(self, "dense", seed)

    def prune(self, criterion: str, seed: int) -> "Run":
        check_criterion(criterion)
        return Run(self, "prune", seed, criterion)

    def retrain(self, criterion: str, seed: int, rank: int) -> "Run":
        check_criterion(criterion)
        if not 0 <= rank < len(self.profile.retrain_filters):
            raise ValueError(f"rank must be from 0 to {len(self.profile.retrain_filters) - 1}, got {rank}")
        return Run(self, "retrain", seed, criterion, rank)

    def runs(self) -> list["Run"]:
        """Every run, upstream runs first."""
        seeds = range(self.profile.seeds)
        pairs = [(criterion, seed) for seed in seeds for criterion in self.profile.criteria]
        ranks = range(len(self.profile.retrain_filters))
        return [
            *(self.dense(seed) for seed in seeds),
            *(self.prune(*pair) for pair in pairs),
            *(self.retrain(*pair, rank) for pair in pairs for rank in ranks),
        ]


@dataclass(frozen=True)
class Run:
    """One cell of the grid. stage: "dense", "prune" or "retrain"."""

    experiment: Experiment
    stage: str
    seed: int
    criterion: str | None = None  # prune and retrain
    rank: int | None = None  # retrain: index into profile.retrain_filters

    @property
    def profile(self) -> Profile:
        return self.experiment.profile

    @property
    def inputs(self) -> list["Run"]:
        """The runs whose results this one starts from."""
        if self.stage == "prune":
            return [self.experiment.dense(self.seed)]
        if self.stage == "retrain":
            return [self.experiment.prune(self.criterion, self.seed)]
        return []

    @cached_property
    def params(self) -> dict:
        """Every number that the results depend on, the upstream runs' names included, as plain JSON values."""
        everything = asdict(self.profile)
        shared = {key: everything[key] for key in SHARED_SETTINGS}
        own = {key: everything[key] for key in STAGE_SETTINGS[self.stage]}
        filters = None if self.rank is None else self.profile.retrain_filters[self.rank]
        cell = {"seed": self.seed, "criterion": self.criterion, "filters": filters}
        upstream = {"inputs": [run.name for run in self.inputs]}
        return {"stage": self.stage, "data": self.experiment.data_digest, **cell, **upstream, **own, **shared}

    @cached_property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.params, sort_keys=True).encode()).hexdigest()[:10]
        parts = [self.criterion, f"seed{self.seed}", None if self.rank is None else f"rank{self.rank}", digest]
        return "-".join(part for part in parts if part)

    @property
    def folder(self) -> Path:
        return self.experiment.root / self.profile.name / self.stage / self.name

    @property
    def done(self) -> bool:
        return self.path("done.json").exists()

    def path(self, file: str) -> Path:
        return self.folder / file

    def write_table(self, file: str, rows: list[dict]) -> None:
        write_atomically(self.path(file), csv_text(rows).encode())

    def write_json(self, file: str, value) -> None:
        write_json(self.path(file), value)


def csv_text(rows: list[dict]) -> str:
    """A CSV whose columns are those of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: Path):
    return json.loads(Path(path).read_text())


def write_json(path: Path, value) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV. (The figure notebooks read the same files with pandas.)"""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the place, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def code_digest(stage: str) -> str:
    """A hash of the modules that a stage's results depend on; comments and layout do not count."""
    digest = hashlib.sha256()
    for module in STAGE_MODULES[stage]:
        digest.update(ast.dump(ast.parse((PACKAGE / module).read_text())).encode())
    return digest.hexdigest()[:16]


def provenance(stage: str, **more) -> dict:
    """Where results came from: code, versions, machine. Paths and host names are left out."""
    packages = ("torch", "numpy", "torch-pruning", "safetensors")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "mtprune_utils", "notebooks")),
        "code": code_digest(stage),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        **more,
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no history
    return result.stdout.strip()
