"""Profiles: the same code with different numbers, all in one place.

smoke   every notebook in under a minute on two cores: CI and a first look
quick   the default main job: every figure on the embedded data, and one seed of each control
study   a small network, eight seeds, every arm, tuned: for the paper's claims; hours on two cores, resumable
fashion for multifashion, two classification tasks on small images
paper   the paper's protocol, for a GPU

Lengths are in optimizer steps, images in pixels, learning rates in their optimizer's units.
"""

import dataclasses
import difflib
import itertools
import math
import typing
from dataclasses import dataclass, field

from mtprune_utils.criteria import CRITERIA
from mtprune_utils.models import VGG16_WIDTHS, Architecture


LARGEST = 10**9  # whole number that a setting may be
WIDEST = 2**14  # layer, in filters, and image, in pixels


def _check(fine: bool, rule: str, value) -> None:
    if not fine:
        raise ValueError(f"{rule}, got {value!r}")


def _check_optimizer(settings: "Optimization | Pruning") -> None:
    _check(settings.optimizer in ("adam", "adamw"), "optimizer must be adam or adamw", settings.optimizer)
    _check(settings.schedule in ("constant", "cosine"), "schedule must be constant or cosine", settings.schedule)
    _check(0 < settings.lr < 1e3, "lr must be positive", settings.lr)
    _check(settings.weight_decay >= 0, "weight_decay must not be negative", settings.weight_decay)
    _check(all(0 <= beta < 1 for beta in settings.betas), "betas must lie between 0 and 1", settings.betas)


@dataclass(frozen=True)
class Optimization:
    """One training phase. schedule: "cosine" falls to zero over the phase, "constant" does not."""

    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    schedule: str = "cosine"
    steps: int = 500
    evaluations: int = 5  # on the validation images, evenly spaced; the best one's weights are kept

    def __post_init__(self):
        _check_optimizer(self)
        _check(1 <= self.evaluations <= self.steps, "evaluations must be from 1 to steps", self.evaluations)


@dataclass(frozen=True)
class Pruning:
    """The iterative strategy: train `every` steps, score, remove `filters`, go on down to `floor` filters per layer."""

    optimizer: str = "adamw"
    lr: float = 5e-5
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    every: int = 500
    filters: int = 100
    floor: int = 5
    removal: str = "fixed"  # or "geometric": as many removals, each taking an equal share of what is left
    multiple: int = 1  # round the widths that are kept up to a multiple of this, e.g. 8 for a GPU's matrix units
    score_every: int = 1  # criteria that need a gradient per task score every so-many-th minibatch
    cosine_batches: int = 5  # the last of those before each removal, on which the layer-wise cosine is observed

    def __post_init__(self):
        _check_optimizer(self)
        _check(1 <= self.score_every <= self.every, "score_every must be from 1 to every", self.score_every)
        _check(self.cosine_batches >= 1, "cosine_batches must be at least 1", self.cosine_batches)
        fits = self.multiple >= 1 and self.floor % self.multiple == 0
        _check(fits, "multiple must be at least 1 and divide the floor", (self.multiple, self.floor))
        _check(self.filters >= 1, "filters must be at least 1", self.filters)
        _check(self.floor >= 1, "floor must be at least 1", self.floor)
        _check(self.removal in ("fixed", "geometric"), "removal must be fixed or geometric", self.removal)


@dataclass(frozen=True)
class Controls:
    """The arms beside the paper's two: which seeds get them, and at which of the profile's sizes (by rank)."""

    seeds: int = 1
    ranks: tuple[int, ...] = (0,)
    schedules_of: tuple[str, ...] = ("taylor", "cosprune")  # criteria that are also pruned with the other schedules
    budget: float = 3.0  # "scratch_longer" takes at most so many times the steps of "scratch"

    def __post_init__(self):
        _check(self.seeds >= 0, "controls.seeds must not be negative", self.seeds)
        _check(self.budget >= 1, "controls.budget must be at least 1", self.budget)


@dataclass(frozen=True)
class Tuning:
    """Optuna's search over learning rate and weight decay, one study per criterion, size and phase. 0 trials: none."""

    trials: int = 0
    lr: tuple[float, float] = (1e-4, 1e-2)
    weight_decay: tuple[float, float] = (1e-6, 1e-1)
    seed: int = 1000  # of the runs it tries things on: no seed of the evaluation

    def __post_init__(self):
        _check(self.trials >= 0, "tuning.trials must not be negative", self.trials)
        for name in ("lr", "weight_decay"):
            low, high = getattr(self, name)
            _check(0 < low < high < math.inf, f"tuning.{name} must be (low, high)", (low, high))


@dataclass(frozen=True)
class Profile:
    name: str
    train_images: int | None = None  # None: all there are
    test_images: int | None = None
    validation_share: float = 0.125  # of the training images, held out for model selection
    image_height: int = 480  # what images are resized to before anything else
    crop: int = 321  # training sees random crops of this side; evaluation, whole images resized to it
    scale: tuple[float, float] = (0.5, 1.5)
    depth_follows_scale: bool = True  # divide depth by the scale (MTAN); False leaves it (the paper's code)
    batch_size: int = 16
    backbone: str = "vgg16"
    widths: tuple[int, ...] = VGG16_WIDTHS
    stride: int = 32
    head_width: int = 1024
    dropout: float = 0.5
    pretrained: bool = False  # start the dense backbone from ImageNet (torchvision's weights)
    dense: Optimization = field(default_factory=Optimization)
    prune: Pruning = field(default_factory=Pruning)
    retrain: Optimization = field(default_factory=Optimization)
    sizes: tuple[float, ...] = ()  # shares of the dense network's parameters, falling; rank r is the r-th
    controls: Controls = field(default_factory=Controls)
    tuning: Tuning = field(default_factory=Tuning)
    margin: float = 0.1  # of the gap between dense network and position prior: what counts as no difference
    criteria: tuple[str, ...] = ("taylor", "cosprune")
    seeds: int = 3
    precision: str = "float32"  # or "bf16": forward and backward passes under autocast; weights and scores stay float32
    # How a run is done, which its name leaves out:
    device: str = field(default="auto", compare=False)  # a GPU if there is one; or "cpu", "cuda"
    deterministic: bool = field(default=False, compare=False)  # on a GPU: operations that repeat to the bit, where there are any
    checkpoint_seconds: float = field(default=30.0, compare=False)  # of a run's work are lost at most when it is killed

    def __post_init__(self):
        _check(self.precision in ("float32", "bf16"), "precision must be float32 or bf16", self.precision)
        _check(self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda", self.device)
        _check(self.checkpoint_seconds >= 0, "checkpoint_seconds must not be negative", self.checkpoint_seconds)
        _check(self.seeds >= 1, "seeds must be at least 1", self.seeds)
        _check(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        _check(0 < self.validation_share < 1, "validation_share must lie between 0 and 1", self.validation_share)
        scales = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 100
        _check(scales, "scale must be (low, high)", self.scale)
        falling = all(larger > smaller for larger, smaller in itertools.pairwise((1, *self.sizes, 0)))
        _check(falling, "sizes must be falling shares between 0 and 1", self.sizes)
        there = all(0 <= rank < len(self.sizes) for rank in self.controls.ranks)
        _check(there or not self.sizes, f"controls.ranks must be from 0 to {len(self.sizes) - 1}", self.controls.ranks)
        whole = all(width % self.prune.multiple == 0 for width in self.widths)
        _check(whole, "prune.multiple must divide every width of the dense network", (self.prune.multiple, self.widths))
        _check(self.seeds <= self.tuning.seed, "seeds must leave out tuning.seed", self.seeds)
        _check(0 < self.margin < 1, "margin must lie between 0 and 1", self.margin)
        _check(0 <= self.dropout < 1, "dropout must lie between 0 and 1", self.dropout)
        _check(self.head_width >= 1, "head_width must be at least 1", self.head_width)
        _check(self.crop >= self.stride, f"crop must be at least the stride, {self.stride} pixels", self.crop)
        _check(self.image_height >= 1, "image_height must be at least 1", self.image_height)
        if self.train_images is not None:
            left = self.train_images - max(1, round(self.validation_share * self.train_images))
            _check(left >= self.batch_size, f"of train_images, a batch of {self.batch_size} must be left after validation", left)
        _check(0 < len(self.criteria) == len(set(self.criteria)), "criteria must name at least one, and each once", self.criteria)
        _check(self.test_images is None or self.test_images >= 1, "test_images must be at least 1", self.test_images)
        self.architecture({})  # it checks backbone, widths and stride
        widest = max(*self.widths, self.head_width, self.image_height, self.crop)
        rule = f"widths, head_width, image_height and crop must be at most {WIDEST}"
        _check(widest <= WIDEST, rule, widest)
        imagenet = self.backbone == "vgg16" and self.widths == VGG16_WIDTHS
        _check(not self.pretrained or imagenet, "pretrained weights are those of a full-width vgg16", (self.backbone, self.widths))


    def architecture(self, tasks: dict[str, int]) -> Architecture:
        """The dense network of this profile, for {task: output channels}."""
        return Architecture(tasks, self.backbone, self.widths, self.stride, self.head_width, self.dropout)


def _narrow(divisor: int) -> tuple[int, ...]:
    return tuple(max(8, width // divisor) for width in VGG16_WIDTHS)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            train_images=64, test_images=16, image_height=64, crop=48, scale=(0.75, 1.0), batch_size=8,
            backbone="vgg16_bn", widths=_narrow(16), stride=8, head_width=16, dropout=0.0,
            dense=Optimization(lr=2e-3, steps=24, evaluations=2),
            prune=Pruning(lr=5e-4, schedule="constant", every=4, filters=110, cosine_batches=1),
            retrain=Optimization(lr=2e-3, steps=24, evaluations=2),
            sizes=(0.4,), controls=Controls(budget=1.5), tuning=Tuning(trials=2), seeds=2,
        ),
        Profile(
            # Batch norm, unlike the paper's network: without it a thousand steps do not teach thirteen narrow layers to see.
            "quick",
            image_height=128, crop=96, scale=(0.75, 1.0), batch_size=8,
            backbone="vgg16_bn", widths=_narrow(8), stride=8, head_width=48, dropout=0.0,
            dense=Optimization(lr=2e-3, steps=1300, evaluations=7),
            prune=Pruning(lr=5e-4, schedule="constant", every=20, filters=34),
            retrain=Optimization(lr=2e-3, steps=750, evaluations=5),
            sizes=(0.3, 0.15), controls=Controls(ranks=(1,), schedules_of=("taylor",), budget=1.5), seeds=3,
        ),
        Profile(
            "study",
            image_height=96, crop=64, scale=(2 / 3, 1.0), batch_size=8,
            backbone="vgg16_bn", widths=_narrow(8), stride=8, head_width=16, dropout=0.0,
            dense=Optimization(lr=2e-3, steps=1000, evaluations=5),
            prune=Pruning(lr=5e-4, every=20, filters=17),
            retrain=Optimization(lr=2e-3, steps=1000, evaluations=8),
            sizes=(0.3, 0.1), controls=Controls(seeds=8, ranks=(0, 1), budget=2.0), seeds=8,
            tuning=Tuning(trials=16, lr=(5e-4, 5e-2)),  # up to 1e-2, the best rates lay at the upper end
        ),
        Profile(
            # Two classifications on 36 x 36 pixels that may be neither cropped nor mirrored: for multifashion.
            "fashion",
            train_images=12_000, test_images=2_000, image_height=36, crop=36, scale=(1.0, 1.0), batch_size=32,
            backbone="vgg16_bn", widths=_narrow(16), stride=8, head_width=16, dropout=0.0,
            dense=Optimization(lr=2e-3, steps=800, evaluations=5),
            prune=Pruning(lr=5e-4, every=20, filters=13),
            retrain=Optimization(lr=2e-3, steps=800, evaluations=5),
            sizes=(0.4, 0.2), controls=Controls(ranks=(0, 1)), seeds=3,
        ),
        Profile(
            "paper",
            depth_follows_scale=False, pretrained=True, precision="bf16", checkpoint_seconds=300.0,  # a checkpoint is 1.3 GB
            dense=Optimization(lr=1e-4, steps=25_000, evaluations=50),
            retrain=Optimization(lr=1e-3, steps=15_000, evaluations=30),
            sizes=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.17), controls=Controls(seeds=6, ranks=(5, 9)), seeds=6,
        ),
    )
}


def get_profile(name: str, overrides: dict[str, object] | None = None) -> Profile:
    """The named profile, with single numbers replaced, e.g. {"dense.steps": 200, "crop": 64}.

    Raises ValueError, naming the nearest known name, for an unknown profile, setting or criterion, a wrong type, or values
    that are out of range or do not go together.
    """
    profile = PROFILES[known(name, PROFILES, "profile")]
    groups: dict[str, dict] = {}  # "" holds the profile's own settings; all are replaced at once, whatever their order
    for key, value in (overrides or {}).items():
        group, _, setting = key.rpartition(".")
        record = getattr(profile, known(group, _settings(profile), "setting", shown=key)) if group else profile
        names = _settings(record) if dataclasses.is_dataclass(record) else {}
        old = getattr(record, known(setting, names, "setting", shown=key))
        if dataclasses.is_dataclass(old):
            raise ValueError(f"{key!r} is a group of settings: name one of them, e.g. '{key}.lr'")
        groups.setdefault(group, {})[setting] = _checked(key, value, typing.get_type_hints(type(record))[setting])
    own = groups.pop("", {})
    parts = {group: dataclasses.replace(getattr(profile, group), **changes) for group, changes in groups.items()}
    profile = dataclasses.replace(profile, **own, **parts)
    for key, value in flat(dataclasses.asdict(profile)).items():
        values = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in values if isinstance(number, float))
        _check(finite, f"{key} must be finite", value)
    _check(bool(profile.sizes), "sizes must name at least one share of the dense network's parameters", profile.sizes)
    for criterion in (*profile.criteria, *profile.controls.schedules_of):
        known(criterion, CRITERIA, "criterion")
    return profile


def flat(record: dict, prefix: str = "") -> dict:
    """{"dense.steps": 500, ...} of a profile's settings as nested dictionaries."""
    flattened = {}
    for key, value in record.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


def _settings(record) -> list[str]:
    return [field.name for field in dataclasses.fields(record) if field.name != "name"]


def _checked(key: str, value, hint):
    """The value in the declared type: whole numbers count as floats, lists as tuples. Raises ValueError for another type."""
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (kinds[-1] is not ... and len(value) != len(kinds)):
            length = "" if kinds[-1] is ... else f"{len(kinds)} "
            raise ValueError(f"{key!r} takes a list of {length}{kinds[0].__name__}s, got {value!r}")
        return tuple(_checked(key, item, kinds[0]) for item in value)
    allowed = typing.get_args(hint) or (hint,)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key!r} takes whole numbers up to {LARGEST}, got a larger one")
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        raise ValueError(f"{key!r} takes a {allowed[0].__name__}, got {value!r}")
    return value


def known(name: str, names, kind: str, shown: str = "") -> str:
    """The name itself. Raises ValueError, naming the nearest of `names`, if it is none of them.

    shown: what to call it there, if it is a part of something longer.
    """
    if name not in names:
        close = difflib.get_close_matches(name, list(names), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names)}"
        raise ValueError(f"unknown {kind} {(shown or name)!r}: {hint}")
    return name
