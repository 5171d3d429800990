"""The grid: every run of an experiment, its name, and what it starts from."""

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

from mtprune_utils import registry
from mtprune_utils.core.iterative import check_sizes
from mtprune_utils.core.model import check_fits_imagenet
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.task import Task, channels
from mtprune_utils.datasets import data_digest, data_tasks
from mtprune_utils.files import PROJECT, read_json, source_digest
from mtprune_utils.registry import known
from mtprune_utils.stages import dense, get_stage, prune, retrain, tune
from mtprune_utils.stages._training import architecture
from mtprune_utils.study import store
from mtprune_utils.study._streams import stream_of
from mtprune_utils.study.profiles import flat, get_profile

UNIFORM, ALL_TASKS = retrain.UNIFORM, dense.ALL_TASKS
SHARED_SETTINGS = (
    "train_images",
    "test_images",
    "validation_share",
    "image_height",
    "crop",
    "scale",
    "depth_follows_scale",
    "batch_size",
    "backbone",
    "width",
    "least_width",
    "stride",
    "head_width",
    "dropout",
    "precision",
)


@dataclass(frozen=True)
class Experiment:
    """A profile on a data set, and the folder of its runs: the grid of all that is trained."""

    profile: Profile
    data: str = "rooms"
    data_root: str = ""  # where the data set lies; the embedded one needs none
    root: Path = Path("runs")
    plugin: str = ""  # where entries of the reader's own lie: `registry.load_plugin`

    @classmethod
    def open(
        cls, profile: str, data: str, root: str, runs: str, overrides: dict | None = None
    ) -> "Experiment":
        """From a notebook's parameters. A relative `runs` starts at the repository.

        Of the overrides, `registry.PLUGIN` is no number of the profile: it goes wherever they go,
        so that every job of a batch finds the same entries.
        """
        numbers = dict(overrides or {})
        if plugin := numbers.pop(registry.PLUGIN, ""):
            registry.load_plugin(plugin)
        return cls(get_profile(profile, numbers), data, root, PROJECT / runs, plugin)

    @cached_property
    def data_digest(self) -> str:
        """A hash of the data's files."""
        return data_digest(self.data, self.data_root)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """{name: task} of the data."""
        return data_tasks(self.data, self.data_root)

    @cached_property
    def numbers(self) -> dict:
        """The profile's, as nested dicts. For reading only: all runs share it."""
        return asdict(self.profile)

    @cached_property
    def criteria(self) -> tuple[str, ...]:
        """The names of all that there are."""
        return registry.names("criteria")

    @cached_property
    def run_names(self) -> dict[tuple, str]:
        """{stage and cell: name} of the runs named so far: each names those it starts from too."""
        return {}

    def check(self) -> None:
        """Whether its runs are possible: the data is there, and every size can be reached.

        Raises ValueError or FileNotFoundError.
        """
        self.data_digest  # noqa: B018  (looks for the files)
        network = architecture(self.profile, channels(self.tasks))
        if self.profile.pretrained:
            check_fits_imagenet(network)
        multiple = self.profile.prune.round_to
        if any(width % multiple for width in network.width_list):
            rule = "prune.round_to must divide every width of the dense network"
            raise ValueError(f"{rule}, got {(multiple, network.width_list)}")
        check_sizes(network, self.profile.sizes, self.profile.prune.min_filters)

    @property
    def label(self) -> str:
        """The folder of its figures: the profile's name, with what is not the profile's own."""
        own = get_profile(self.profile.name) == self.profile
        # The paper's profile is about NYUv2: on rooms it says so.
        usual = self.data == "rooms" and self.profile.name != "paper"
        data = "" if usual else f"-{self.data}"
        return self.profile.name + data + ("" if own else "-custom")

    @property
    def command(self) -> str:
        """What makes all of it, as one would type it."""
        if self.label == "study":  # from its committed tables
            return "make study"
        words = ["make figures", f"PROFILE={self.profile.name}"]
        if self.data != "rooms":
            words.append(f"DATA={self.data}")
        if self.data_root:
            words.append(f"ROOT={shlex.quote(self.data_root)}")
        if self.plugin:
            words.append(f"PLUGIN={shlex.quote(self.plugin)}")
        own, used = (flat(asdict(p)) for p in (get_profile(self.profile.name), self.profile))
        if changed := {key: value for key, value in used.items() if value != own[key]}:
            words.append(f"OVERRIDES={shlex.quote(json.dumps(changed))}")
        return " ".join(words)

    # --- code ---

    def entries(self) -> list[str]:
        """What every run of the experiment names in the registries."""
        p = self.profile
        return [f"datasets.{self.data}", f"backbones.{p.backbone}", f"weightings.{p.weighting}"]

    @property
    def vouched_file(self) -> Path:
        """Where `make vouch` notes what it has found."""
        return store.results_folder(self.label) / store.VOUCHED

    def stamps(self) -> list[dict]:
        """What `make vouch` has noted: that code "to" gives the numbers that code "from" gave."""
        return read_json(self.vouched_file) if self.vouched_file.exists() else []

    def same_code(self, code: str) -> set[str]:
        """The digests of the code that `make vouch` has found to give the numbers of `code`."""
        groups = [{*stamp["from"], stamp["to"]} for stamp in self.stamps()]
        same = {code}
        for _ in groups:  # one leads to the next, in any order
            same = same.union(*(group for group in groups if group & same))
        return same

    def refusal(self, run: "Run", code: str) -> str:
        """Why results of that code are not the present code's, and what to do; "" if they are."""
        if code in self.same_code(run.code):
            return ""
        data = f" DATA={self.data}" if self.data != "rooms" else ""
        return (
            f"of other code, {code}, not the present {run.code}: repeat it (delete its folder), or "
            f"see by `make vouch PROFILE={self.profile.name}{data}` if the numbers are equal"
        )

    def check_codes(
        self, codes: Iterable[tuple["Run", str]], report: Callable[[str], None] | None = None
    ) -> None:
        """Say which results, shown together, are of other code; each is given with its digest.

        report: takes a line for each stage; by default they go to standard error. Raises
        ValueError where some of a stage are of the present code and others are not.
        """
        refusals: dict[str, dict[bool, str]] = {}
        for run, code in codes:
            refusal = self.refusal(run, code)
            refusals.setdefault(run.stage, {})[bool(refusal)] = refusal
        for stage, found in refusals.items():
            if len(found) > 1:
                several = f"{stage} runs of several codes are not shown together"
                raise ValueError(f"{several}. Some are {found[True]}")
            if True in found:
                line = f"{stage} runs are {found[True]}"
                report(line) if report else print(line, file=sys.stderr)

    # --- single runs: each raises ValueError for an unknown cell ---

    def dense(self, seed: int, arm: str = ALL_TASKS) -> "Run":
        """arm: "multitask", or the name of the one task of a single-task network."""
        return Run(self, "dense", seed, arm=known(arm, (ALL_TASKS, *self.tasks), "arm"))

    def tune(self, arm: str, criterion: str, level: int) -> "Run":
        """arm: the phase that is tuned for one criterion and size, see `stages.tune`."""
        arms = tune.ARMS if criterion != UNIFORM else ("retrain",)
        known(arm, arms, "arm")
        seed = self.profile.tuning.seed
        return Run(self, "tune", seed, self._criterion(criterion), self._level(level), arm)

    def prune(
        self, criterion: str, seed: int, level: int | None = None, arm: str = "iterative"
    ) -> "Run":
        """level: of the size that its optimizer is tuned for; by default the last.

        The last one's run goes down to the floor. Without tuning one run serves all sizes. arm: the
        profile's own schedule ("iterative"), one of `schedules`, or "shuffled".
        """
        known(criterion, self.criteria, "criterion")
        known(arm, ("iterative", prune.SHUFFLED, *self.schedules), "arm")
        last = len(self.profile.sizes) - 1
        tuned_for = self._level(last if level is None else level)
        tuning = self.profile.tuning.trials
        return Run(self, "prune", seed, criterion, tuned_for if tuning else None, arm)

    def retrain(self, criterion: str, seed: int, level: int, arm: str = "scratch") -> "Run":
        """arm: see `stages.retrain`."""
        known(arm, retrain.ARMS if criterion != UNIFORM else ("scratch",), "arm")
        return Run(self, "retrain", seed, self._criterion(criterion), self._level(level), arm)

    def score(self, seed: int) -> "Run":
        """All criteria on the seed's dense network."""
        return Run(self, "score", seed)

    def _criterion(self, name: str) -> str:
        return name if name == UNIFORM else known(name, self.criteria, "criterion")

    def _level(self, level: int) -> int:
        if not 0 <= level < len(self.profile.sizes):
            last = len(self.profile.sizes) - 1
            raise ValueError(f"level must be from 0 to {last}, got {level}")
        return level

    @property
    def schedules(self) -> dict[str, dict[str, str]]:
        """The schedules that the profile's own is held against: what each one replaces of it."""
        own = self.profile.prune
        rate = "cosine" if own.lr_schedule == "constant" else "constant"
        named = self.profile.controls.schedules
        others = [name for name in named if name != own.pruning_schedule]
        return {
            f"{rate}_rate": {"lr_schedule": rate},
            **{name: {"pruning_schedule": name} for name in others},
        }

    # --- the grid ---

    def paper_runs(self) -> list["Run"]:
        """The paper's arms: dense networks, iterative pruning, re-training from scratch."""
        seeds, levels = range(self.profile.seeds), range(len(self.profile.sizes))
        pairs = [(criterion, seed) for seed in seeds for criterion in self.profile.criteria]
        pruned = [self.prune(*pair, level) for pair in pairs for level in levels]
        return [
            *(self.dense(seed) for seed in seeds),
            *{run.folder: run for run in pruned}.values(),  # one, or one a size
            *(self.retrain(*pair, level) for pair in pairs for level in levels),
        ]

    def runs(self) -> list["Run"]:
        """Every run, seed by seed, each after what it starts from."""
        found: dict[Path, Run] = {}

        def add(runs: Iterable[Run]) -> None:
            for run in runs:
                add(run.inputs)
                found.setdefault(run.folder, run)

        paper = self.paper_runs()
        for seed in range(self.profile.seeds):
            add(run for run in paper if run.seed == seed)
            if self.profile.agreement_batches and len(self.profile.criteria) > 1:
                add([self.score(seed)])
            if seed < self.profile.controls.seeds:
                add(self.control_runs(seed))
        return list(found.values())

    def needed(self, which: str) -> list["Run"]:
        """The runs that a figure shows, as its notebook's metadata name them: "all" or, of the
        paper's arms, "paper", "pruned" (re-training left out), "first pruned" (the first seed's).
        """
        known(which, ("all", "paper", "pruned", "first pruned"), "selection of runs")
        if which == "all":
            return self.runs()
        paper = self.paper_runs()
        if which == "paper":
            return paper
        if which == "pruned":
            return [run for run in paper if run.stage != "retrain"]
        return [run for run in paper if run.stage == "prune" and run.seed == 0]

    def draws(self, about: dict) -> bool:
        """Whether the figures of a notebook with these metadata are drawn of the profile."""
        return about.get("question", "paper") in self.profile.questions

    def control_runs(self, seed: int) -> list["Run"]:
        """One seed of the arms that the paper's are held against."""
        controls, criteria = self.profile.controls, self.profile.criteria
        levels = controls.levels
        return [
            *(self.dense(seed, task) for task in self.tasks if controls.single_task),
            *(
                self.prune(c, seed, arm=arm)
                for c in controls.schedules_of
                for arm in self.schedules
            ),
            *(self.retrain(c, seed, level) for c in (UNIFORM, "random") for level in levels),
            *(
                self.retrain(criterion, seed, level, arm)
                for criterion in criteria
                for level in levels
                for arm in controls.arms
            ),
            *(
                self.retrain(criterion, seed, level, retrain.FINETUNE_SHUFFLED)
                for criterion in controls.shuffled_of
                for level in levels
            ),
        ]


_record = cache(get_stage)  # which looks into the folder each time


@cache
def _code(*modules: str) -> str:
    """A hash of modules and of what they import. Read once: a process goes on with what it has."""
    return source_digest(registry.sources(*modules))


@dataclass(frozen=True)
class Run(store.RunFolder):
    """One cell of the grid; the fields as in `Experiment`'s methods."""

    experiment: Experiment
    stage: str
    seed: int
    criterion: str | None = None
    level: int | None = None
    arm: str = ""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def profile(self) -> Profile:
        """The numbers of its experiment."""
        return self.experiment.profile

    @property
    def place(self) -> Path:
        """The folder of all runs of its profile."""
        return self.experiment.root / self.profile.name

    @property
    def record(self) -> ModuleType:
        """What there is to know of its stage."""
        return _record(self.stage)

    @property
    def cell(self) -> dict:
        """What names the run within its stage."""
        names = ("criterion", "seed", "level", "arm")
        return {name: getattr(self, name) for name in names}

    @property
    def random_seed(self) -> int:
        """One stream per stage and seed. Criterion and arm are left out: their runs are paired."""
        return tune.stream(f"{self.stage} {self.seed}")

    @property
    def source(self) -> "Run | None":
        """The run whose network this one starts from, if that is not a random one."""
        return self.record.source(self)

    @property
    def search(self) -> "Run | None":
        """The search whose best settings this run takes."""
        return self.record.search(self)

    @property
    def replayed(self) -> "Run | None":
        """The pruning run whose removals this one repeats with other filters, if it does."""
        shuffled = self.stage == "prune" and self.arm == prune.SHUFFLED
        return replace(self, arm="iterative") if shuffled else None

    @property
    def inputs(self) -> list["Run"]:
        """The runs whose results this one needs."""
        return [run for run in (self.source, self.search, self.replayed) if run]

    @cached_property
    def code(self) -> str:
        """A hash of the modules that its results depend on; comments and layout do not count."""
        named = [*self.experiment.entries(), *self.record.entries(self)]
        return _code(f"stages.{self.stage}", *named)

    @cached_property
    def params(self) -> dict:
        """Every number that the results depend on, upstream runs' names too, as JSON values."""
        profile = self.profile
        pruning = dict(self.experiment.numbers["prune"])
        if self.stage == "prune":
            pruning |= self.experiment.schedules.get(self.arm, {})
        if profile.prune.ranking == "global":  # left out, as before there was a choice: names stay
            del pruning["ranking"]
        everything = self.experiment.numbers | {"prune": pruning}
        shared = {key: everything[key] for key in SHARED_SETTINGS}
        if profile.weighting != "equal":  # left out, as before there was a choice: names stay
            shared["weighting"] = profile.weighting
        own = {key: everything[key] for key in self.record.SETTINGS}
        if self.stage == "tune" and self.arm != "finetune":
            # Which takes pruning's optimizer for re-training's length.
            del own["retrain" if self.arm == "prune" else "prune"]
        if self.criterion == UNIFORM:
            own["min_filters"] = profile.prune.min_filters
        if self.arm == "scratch_longer":
            own["budget"] = profile.controls.budget
        tasks = channels(self.experiment.tasks)
        cell = {
            "seed": self.seed,
            "criterion": self.criterion,
            "arm": self.arm,
            "size": None if self.level is None else profile.sizes[self.level],
            "tasks": {self.arm: tasks[self.arm]} if self.arm in tasks else tasks,
        }
        upstream = {"inputs": [run.name for run in self.inputs]}
        where = {"stage": self.stage, "data": self.experiment.data_digest}
        return {**where, **cell, **upstream, **own, **shared}

    @cached_property
    def name(self) -> str:
        """What it is, for people, and the hash of everything that its results depend on."""
        known_names, key = self.experiment.run_names, (self.stage, *self.cell.values())
        if key not in known_names:
            known_names[key] = self._hashed()
        return known_names[key]

    def _hashed(self) -> str:
        digest = hashlib.sha256(json.dumps(self.params, sort_keys=True).encode()).hexdigest()[:10]
        level = None if self.level is None else f"level{self.level}"
        parts = [self.criterion, f"seed{self.seed}", level, self.arm, digest]
        return "-".join(part for part in parts if part)

    @cached_property
    def stream(self) -> str:
        """What a search draws its trials by."""
        return stream_of(self)
