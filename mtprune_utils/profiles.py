"""Profiles: the same code with different numbers, all in one place.

smoke   every notebook in under a minute on two cores: CI and a first look
quick   the default main job: every figure on the embedded data in about 17 minutes on two cores
paper   the paper's protocol, for a GPU

Lengths are in optimizer steps, images in pixels, learning rates in their optimizer's units.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field

from mtprune_utils.criteria import CRITERIA
from mtprune_utils.models import VGG16_WIDTHS, Architecture


def _check(fine: bool, rule: str, value) -> None:
    if not fine:
        raise ValueError(f"{rule}, got {value!r}")


def _check_optimizer(settings: "Optimization | Pruning") -> None:
    _check(settings.optimizer in ("adam", "adamw"), "optimizer must be adam or adamw", settings.optimizer)
    _check(settings.schedule in ("constant", "cosine"), "schedule must be constant or cosine", settings.schedule)
    _check(0 < settings.lr < 1e3, "lr must be positive", settings.lr)


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
    cosine_batches: int = 5  # minibatches before each removal over which the layer-wise cosine is observed

    def __post_init__(self):
        _check_optimizer(self)
        _check(1 <= self.cosine_batches <= self.every, "cosine_batches must be from 1 to every", self.cosine_batches)
        _check(self.filters >= 1, "filters must be at least 1", self.filters)
        _check(self.floor >= 1, "floor must be at least 1", self.floor)


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
    retrain_filters: tuple[int, ...] = ()  # sizes at which found architectures are re-trained; rank r is the r-th
    criteria: tuple[str, ...] = ("taylor", "cosprune")
    seeds: int = 3

    def __post_init__(self):
        _check(self.seeds >= 1, "seeds must be at least 1", self.seeds)
        _check(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        _check(0 < self.validation_share < 1, "validation_share must lie between 0 and 1", self.validation_share)
        _check(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "scale must be (low, high)", self.scale)
        whole = all(type(filters) is int for filters in self.retrain_filters)
        _check(whole, "retrain_filters must be whole numbers", self.retrain_filters)

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
            prune=Pruning(lr=5e-4, schedule="constant", every=4, filters=70, cosine_batches=1),
            retrain=Optimization(lr=2e-3, steps=24, evaluations=2),
            retrain_filters=(132,), seeds=2,
        ),
        Profile(
            # Batch norm, unlike the paper's network: without it a thousand steps do not teach thirteen narrow layers to see.
            "quick",
            image_height=128, crop=96, scale=(0.75, 1.0), batch_size=8,
            backbone="vgg16_bn", widths=_narrow(8), stride=8, head_width=48, dropout=0.0,
            dense=Optimization(lr=2e-3, steps=1400, evaluations=7),
            prune=Pruning(lr=5e-4, schedule="constant", every=20, filters=22, cosine_batches=5),
            retrain=Optimization(lr=2e-3, steps=800, evaluations=5),
            retrain_filters=(132, 88), seeds=3,
        ),
        Profile(
            "paper",
            depth_follows_scale=False, pretrained=True,
            dense=Optimization(lr=1e-4, steps=25_000, evaluations=50),
            retrain=Optimization(lr=1e-3, steps=15_000, evaluations=30),
            retrain_filters=(3724, 3224, 2724, 2224, 1724, 1224, 824, 424, 224, 124), seeds=6,
        ),
    )
}


def get_profile(name: str, overrides: dict[str, object] | None = None) -> Profile:
    """The named profile, with single numbers replaced, e.g. {"dense.steps": 200, "crop": 64}.

    Raises ValueError, naming the nearest known name, for an unknown profile, setting or criterion or a wrong type.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}{_nearest(name, PROFILES)}")
    profile = PROFILES[name]
    for key, value in (overrides or {}).items():
        profile = _replace(profile, key, key.split("."), value)
    for criterion in profile.criteria:
        check_criterion(criterion)
    return profile


def check_criterion(name: str) -> None:
    """Raises ValueError, naming the nearest known one, if there is no such criterion."""
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}{_nearest(name, CRITERIA)}")


def _replace(record, key: str, path: list[str], value):
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "name"}
    if path[0] not in fields:
        raise ValueError(f"unknown setting {key!r}{_nearest(path[0], fields)}")
    old = fields[path[0]]
    if dataclasses.is_dataclass(old):
        if len(path) == 1:
            raise ValueError(f"{key!r} is a group of settings: name one of them, e.g. '{key}.lr'")
        return dataclasses.replace(record, **{path[0]: _replace(old, key, path[1:], value)})
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    count = record.__dataclass_fields__[path[0]].type == int | None
    if type(value) is not type(old) and not (count and (value is None or type(value) is int)):
        raise ValueError(f"{key!r} takes a {type(old).__name__}, got {value!r}")
    return dataclasses.replace(record, **{path[0]: value})


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose one of {', '.join(known)}"
