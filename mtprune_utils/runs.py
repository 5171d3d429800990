"""Run folders: where a run's parameters, provenance and results lie, and how one is found again.

runs/<profile>/<stage>/<readable name>-<hash of every parameter that its results depend on>/
    params.json  provenance.json  *.csv  model.safetensors  timing.json  done.json (written last)

A run is finished if done.json is there, which holds the digest of its code and checksums of what it
wrote and of what it started from: times do not count. Files are written beside their place and
renamed, so none is ever half there.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path

from mtprune_utils.criteria import CRITERIA
from mtprune_utils.data import data_digest, data_tasks
from mtprune_utils.files import PACKAGE, PROJECT, checksum, csv_text, read_json, source_digest, write_atomically, write_json
from mtprune_utils.profiles import Profile, flat, get_profile, known
from mtprune_utils.pruning import check_sizes
from mtprune_utils.tasks import Task

TRAINING_MODULES = (
    "data/__init__.py", "data/_reading.py", "data/_mtan.py", "tasks.py", "models.py", "gradients.py", "checkpoints.py", "training.py", "stages.py",
)
PRUNING_MODULES = (*TRAINING_MODULES, "criteria.py", "pruning.py")
STAGE_MODULES = {  # what a stage's results depend on: editing plots.py redraws figures and re-trains nothing
    "dense": TRAINING_MODULES,
    "tune": PRUNING_MODULES,
    "prune": PRUNING_MODULES,
    "retrain": TRAINING_MODULES,
    "figure": ("stats.py", "claims.py", "results.py", "inference.py", "plots.py", "tasks.py", "models.py", "runs.py"),
}

SHARED_SETTINGS = (
    "train_images", "test_images", "validation_share", "image_height", "crop", "scale", "depth_follows_scale", "batch_size",
    "backbone", "widths", "stride", "head_width", "dropout", "precision",
)
STAGE_SETTINGS = {
    "dense": ("dense", "pretrained"),
    "tune": ("tuning", "prune", "retrain", "sizes"),
    "prune": ("prune", "sizes"),
    "retrain": ("retrain",),
}
TABLES = {  # stage: the tables that its run folder holds, which are collected beside the figures
    "dense": ("evaluations.csv", "curve.csv", "trivial.csv"),
    "tune": ("trials.csv",),
    "prune": ("evaluations.csv", "layers.csv"),
    "retrain": ("evaluations.csv", "curve.csv"),
}
UNIFORM = "uniform"  # stands in a criterion's place for equal shares of every layer, which nobody has to find


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

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return data_tasks(self.data, self.data_root)

    def check(self) -> None:
        """Whether its runs are possible, before the first one: the data is there, no size lies under the floor.

        Raises ValueError or FileNotFoundError.
        """
        self.data_digest  # looks for the files
        dense = self.profile.architecture({name: task.channels for name, task in self.tasks.items()})
        check_sizes(dense, self.profile.sizes, self.profile.prune.floor)

    @property
    def label(self) -> str:
        """The folder of its figures: the profile's name, with what is not the profile's own."""
        own = get_profile(self.profile.name) == self.profile
        # The paper's profile is about NYUv2: on rooms it says so.
        data = "" if self.data == "rooms" and self.profile.name != "paper" else f"-{self.data}"
        return self.profile.name + data + ("" if own else "-custom")

    @property
    def command(self) -> str:
        """What makes all of it, as one would type it."""
        if self.label == "study":  # from its committed tables
            return "make study"
        own, used = (flat(asdict(profile)) for profile in (get_profile(self.profile.name), self.profile))
        words = ["make figures", f"PROFILE={self.profile.name}"]
        words += [f"DATA={self.data}"] * (self.data != "rooms") + [f"ROOT={shlex.quote(self.data_root)}"] * bool(self.data_root)
        if changed := {key: value for key, value in used.items() if value != own[key]}:
            words.append(f"OVERRIDES={shlex.quote(json.dumps(changed))}")
        return " ".join(words)

    @classmethod
    def open(cls, profile: str, data: str, root: str, runs: str, overrides: dict | None = None) -> "Experiment":
        """From a notebook's parameters. A relative `runs` starts at the repository, wherever the notebook runs."""
        return cls(get_profile(profile, overrides), data, root, PROJECT / runs)

    # --- other code ---

    @property
    def vouched_file(self) -> Path:
        return PROJECT / "figures" / self.label / "results" / "vouched.json"

    def same_code(self, stage: str, code: str) -> set[str]:
        """The digests of the code that `make vouch` has found to give the numbers of `code`."""
        stamps = read_json(self.vouched_file) if self.vouched_file.exists() else []
        groups = [{*stamp["from"], stamp["to"]} for stamp in stamps if stamp["stage"] == stage]
        same = {code}
        for _ in groups:  # one leads to the next, in any order
            same = same.union(*(group for group in groups if group & same))
        return same

    @cached_property
    def _present(self) -> dict[str, set[str]]:
        return {stage: self.same_code(stage, code_digest(stage, self.data)) for stage in TABLES}

    def refusal(self, stage: str, code: str) -> str:
        """Why results of that code are not the present code's, and what to do; "" if they are."""
        if code in self._present[stage]:
            return ""
        now = code_digest(stage, self.data)
        data = f" DATA={self.data}" * (self.data != "rooms")
        return (f"of other code, {code}, not the present {now}: repeat it (delete its folder), or "
                f"see by `make vouch PROFILE={self.profile.name}{data}` if the numbers are equal")

    def check_codes(self, codes: Iterable[tuple[str, str]]) -> None:
        """Say which results, shown together, are of other code; each is given by stage and digest.

        Raises ValueError where those of one stage are of several codes.
        """
        of_stage: dict[str, list[str]] = {}
        for stage, code in sorted(set(codes)):
            of_stage.setdefault(stage, []).append(code)
        for stage, found in of_stage.items():
            refusal = next(filter(None, (self.refusal(stage, code) for code in found)), "")
            if not {*found} <= self.same_code(stage, found[0]):
                several = f"{stage} runs of several codes are not shown together"
                raise ValueError(f"{several}. Some are {refusal}")
            if refusal:
                print(f"{stage} runs are {refusal}", file=sys.stderr)

    # --- single runs: each raises ValueError for an unknown cell ---

    def dense(self, seed: int, arm: str = "multitask") -> "Run":
        """arm: "multitask", or the name of the one task of a single-task network."""
        return Run(self, "dense", seed, arm=known(arm, ("multitask", *self.tasks), "arm"))

    def tune(self, arm: str, criterion: str, rank: int) -> "Run":
        """arm: the phase that is tuned, "prune", "retrain" or "finetune", for one criterion and size."""
        arms = ("prune", "retrain", "finetune") if criterion != UNIFORM else ("retrain",)
        known(arm, arms, "arm")
        return Run(self, "tune", self.profile.tuning.seed, self._criterion(criterion), self._rank(rank), arm)

    def prune(self, criterion: str, seed: int, rank: int | None = None, arm: str = "iterative") -> "Run":
        """rank: the size that its optimizer is tuned for; the last one by default, whose run goes down to the floor.

        Without tuning one run serves all sizes. arm: the profile's own schedule ("iterative"), or one of `schedules`.
        """
        known(criterion, CRITERIA, "criterion")
        known(arm, ("iterative", *self.schedules), "arm")
        last = len(self.profile.sizes) - 1
        tuned_for = self._rank(last if rank is None else rank) if self.profile.tuning.trials else None
        return Run(self, "prune", seed, criterion, tuned_for, arm)

    def retrain(self, criterion: str, seed: int, rank: int, arm: str = "scratch") -> "Run":
        """arm: from random weights for the profile's steps ("scratch", Liu et al.'s Scratch-E) or for the compute that
        finding the architecture took ("scratch_longer", Scratch-B), or from the weights that pruning kept ("finetune").
        """
        known(arm, ("scratch", "scratch_longer", "finetune") if criterion != UNIFORM else ("scratch",), "arm")
        return Run(self, "retrain", seed, self._criterion(criterion), self._rank(rank), arm)

    def _criterion(self, name: str) -> str:
        return name if name == UNIFORM else known(name, CRITERIA, "criterion")

    def _rank(self, rank: int) -> int:
        if not 0 <= rank < len(self.profile.sizes):
            raise ValueError(f"rank must be from 0 to {len(self.profile.sizes) - 1}, got {rank}")
        return rank

    @property
    def schedules(self) -> dict[str, dict[str, str]]:
        """The schedules of pruning that the profile's own is held against: what of it each one replaces."""
        rate = "cosine" if self.profile.prune.schedule == "constant" else "constant"
        return {f"{rate}_rate": {"schedule": rate}, "geometric": {"removal": "geometric"}}

    # --- the grid ---

    def paper_runs(self) -> list["Run"]:
        """The paper's arms, which Figures 1 to 3 show: dense networks, iterative pruning, re-training from scratch."""
        seeds, ranks = range(self.profile.seeds), range(len(self.profile.sizes))
        pairs = [(criterion, seed) for seed in seeds for criterion in self.profile.criteria]
        pruned = [self.prune(*pair, rank) for pair in pairs for rank in ranks]  # one, or one a size
        return [
            *(self.dense(seed) for seed in seeds),
            *{run.folder: run for run in pruned}.values(),
            *(self.retrain(*pair, rank) for pair in pairs for rank in ranks),
        ]

    def runs(self) -> list["Run"]:
        """Every run, seed by seed, each after what it starts from."""
        found: dict[Path, Run] = {}

        def add(runs: Iterable[Run]) -> None:
            for run in runs:
                add(run.inputs)
                found.setdefault(run.folder, run)

        for seed in range(self.profile.seeds):
            add(run for run in self.paper_runs() if run.seed == seed)
            if seed < self.profile.controls.seeds:
                add(self.control_runs(seed))
        return list(found.values())

    def control_runs(self, seed: int) -> list["Run"]:
        """One seed of the arms that the paper's are held against."""
        profile, criteria, ranks = self.profile, self.profile.criteria, self.profile.controls.ranks
        return [
            *(self.dense(seed, task) for task in self.tasks),
            *(self.prune(c, seed, arm=schedule) for c in profile.controls.schedules_of for schedule in self.schedules),
            *(self.retrain(criterion, seed, rank) for criterion in (UNIFORM, "random") for rank in ranks),
            *(self.retrain(c, seed, rank, arm) for c in criteria for rank in ranks for arm in ("scratch_longer", "finetune")),
        ]


@dataclass(frozen=True)
class Run:
    """One cell of the grid. stage: "dense", "tune", "prune" or "retrain"; the other fields as in `Experiment`."""

    experiment: Experiment
    stage: str
    seed: int
    criterion: str | None = None
    rank: int | None = None
    arm: str = ""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def profile(self) -> Profile:
        return self.experiment.profile

    @property
    def cell(self) -> dict:
        """What names the run within its stage."""
        return {"criterion": self.criterion, "seed": self.seed, "rank": self.rank, "arm": self.arm}

    @property
    def source(self) -> "Run | None":
        """The run whose network this one starts from, if it is not a random one of known widths."""
        pruned_for = self.stage == "retrain" or self.stage == "tune" and self.arm != "prune"
        if pruned_for and self.criterion != UNIFORM:
            return self.experiment.prune(self.criterion, self.seed, self.rank)
        return self.experiment.dense(self.seed) if self.stage in ("prune", "tune") and not pruned_for else None

    @property
    def tuning(self) -> "Run | None":
        """The search whose best settings this run takes."""
        if not self.profile.tuning.trials or self.stage not in ("prune", "retrain"):
            return None
        phase = "finetune" if self.arm == "finetune" else self.stage
        return self.experiment.tune(phase, self.criterion, self.rank)

    @property
    def inputs(self) -> list["Run"]:
        """The runs whose results this one needs."""
        return [run for run in (self.source, self.tuning) if run]

    @cached_property
    def params(self) -> dict:
        """Every number that the results depend on, the upstream runs' names included, as plain JSON values."""
        profile = self.profile
        if self.stage == "prune":
            profile = replace(profile, prune=replace(profile.prune, **self.experiment.schedules.get(self.arm, {})))
        everything = asdict(profile)
        shared = {key: everything[key] for key in SHARED_SETTINGS}
        own = {key: everything[key] for key in STAGE_SETTINGS[self.stage]}
        if self.stage == "tune" and self.arm != "finetune":  # which takes pruning's optimizer for re-training's length
            del own["retrain" if self.arm == "prune" else "prune"]
        if self.criterion == UNIFORM:
            own["floor"] = profile.prune.floor
        if self.arm == "scratch_longer":
            own["budget"] = profile.controls.budget
        cell = {"seed": self.seed, "criterion": self.criterion, "arm": self.arm}
        cell["size"] = None if self.rank is None else profile.sizes[self.rank]
        tasks = {name: task.channels for name, task in self.experiment.tasks.items()}
        cell["tasks"] = {self.arm: tasks[self.arm]} if self.arm in tasks else tasks
        upstream = {"inputs": [run.name for run in self.inputs]}
        return {"stage": self.stage, "data": self.experiment.data_digest, **cell, **upstream, **own, **shared}

    @cached_property
    def name(self) -> str:
        return self._named(self.params)

    @cached_property
    def stream(self) -> str:
        """What a search draws its trials by: the name that it had when names had no tasks."""
        before = {key: value for key, value in self.params.items() if key != "tasks"}
        return self._named(before | {"inputs": [run.stream for run in self.inputs]})

    def _named(self, params: dict) -> str:
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]
        parts = [self.criterion, f"seed{self.seed}", None if self.rank is None else f"rank{self.rank}", self.arm, digest]
        return "-".join(part for part in parts if part)

    @property
    def folder(self) -> Path:
        return self.experiment.root / self.profile.name / self.stage / self.name

    @property
    def done(self) -> bool:
        return self.path("done.json").exists()

    @property
    def lock_file(self) -> Path:
        """Not in the folder: to delete that lets nobody else in."""
        return self.experiment.root / self.profile.name / ".locks" / f"{self.stage}-{self.name}"

    @property
    def marker(self) -> dict:
        """What `finish` wrote: the digest "code", contents of "inputs", checksums of "files"."""
        return read_json(self.path("done.json"))

    @property
    def content(self) -> str:
        """A hash of what a finished run has found, in tables; its weights can be made again."""
        sums = self.marker["files"]
        taken = [sums[file] for file in (*TABLES[self.stage], "best.json") if file in sums]
        return hashlib.sha256(" ".join(taken).encode()).hexdigest()[:16]

    def input_contents(self) -> dict[str, str]:
        """{name: content} of the finished runs that it starts from."""
        return {run.name: run.content for run in self.inputs if run.done}

    def outdated(self) -> str:
        """Why a finished run does not count as the present code's, in one line; "" if it does."""
        if refusal := self.experiment.refusal(self.stage, self.marker["code"]):
            return f"{self.stage} {self.name} is {refusal}"
        then, now = self.marker.get("inputs", {}), self.input_contents()
        if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
            return (f"{self.stage} {self.name} was made from other results of {', '.join(changed)} "
                    "than are here: delete its folder to repeat it")
        return next(filter(None, (run.outdated() for run in self.inputs if run.done)), "")

    def finish(self, code: str, inputs: dict[str, str] | None = None) -> None:
        """Write the marker, with a checksum of everything that other runs and figures read.

        code: the run's digest. inputs: `input_contents` as the run began; by default, as they are.
        """
        names = ("*.csv", "*.safetensors", "best.json", "provenance.json", "timing.json")
        files = {path.name: checksum(path) for name in names for path in sorted(self.folder.glob(name))}
        inputs = self.input_contents() if inputs is None else inputs
        self.write_json("done.json", {"code": code, "inputs": inputs, "files": files})

    def vouch_for(self, file: str) -> None:
        """Note the checksum of weights that a finished run has got again."""
        files = self.marker["files"] | {file: checksum(self.path(file))}
        self.write_json("done.json", self.marker | {"files": files})

    def reopen_if_damaged(self, report: Callable[[str], None]) -> None:
        """Take a finished run for unfinished if its tables are no longer what it wrote. (Weights: see `stages.network`.)"""
        if self.done and (damaged := self._damaged_tables()):
            report(f"{self.stage} {self.name}: {', '.join(damaged)} is damaged, the run is repeated")
            self.path("done.json").unlink()

    def intact(self, file: str) -> bool:
        """Whether a finished run's file is here, and what it wrote."""
        written = self.marker["files"].get(file)
        return self.path(file).exists() and checksum(self.path(file)) == written

    def _damaged_tables(self) -> list[str]:
        """Names of damaged files, those that are gone among them, of all but the weights, which can be made again."""
        try:
            record = self.marker
            tables = [name for name in record["files"] if not name.endswith(".safetensors")]
            if "code" in record and set(tables) >= {*TABLES[self.stage], "provenance.json"}:
                return [name for name in tables if not self.intact(name)]
        except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or not what `finish` writes
            pass
        return ["done.json"]

    def provenance(self) -> dict:
        return provenance(self.stage, self.experiment.data, params=self.params)

    def path(self, file: str) -> Path:
        return self.folder / file

    def write_table(self, file: str, rows: list[dict]) -> None:
        write_atomically(self.path(file), csv_text(rows).encode())

    def write_json(self, file: str, value) -> None:
        write_json(self.path(file), value)


def code_digest(stage: str, data: str = "rooms") -> str:
    """A hash of the modules that a stage's results on a data set depend on; comments and layout do not count."""
    return source_digest(PACKAGE / module for module in (*STAGE_MODULES[stage], *([] if stage == "figure" else [f"data/{data}.py"])))


def provenance(stage: str, data: str = "rooms", **more) -> dict:
    """Where results came from: code, versions, machine. Paths and host names are left out."""
    own = {"tune": ("optuna",), "figure": ("pandas", "scipy", "matplotlib", "seaborn", "onnxruntime")}.get(stage, ())
    packages = ("torch", "numpy", "torch-pruning", "safetensors", *own)
    changes = uncommitted("mtprune_utils", "notebooks")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "code": code_digest(stage, data),
        "data": data,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        **more,
    }


def uncommitted(*folders: str) -> str | None:
    """What has changed there since the last commit; None where there is no repository."""
    return git("status", "--porcelain", "--untracked-files=no", "--", *folders)


def git(*arguments: str) -> str | None:
    """What git says of the repository; None if there is none, or only one around the package."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=PACKAGE.parent, env=own,
            capture_output=True, text=True, check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
