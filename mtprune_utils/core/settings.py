"""Settings: what a run's results depend on, each number checked where it is declared.

Lengths are in optimizer steps, images in pixels, learning rates in their optimizer's units. The
numbers themselves are in `study.profiles`.
"""

import itertools
import math
from dataclasses import dataclass, field

OPTIMIZERS = ("adam", "adamw")
LR_SCHEDULES = ("constant", "cosine")
QUESTIONS = ("paper", "criteria")  # do the paper's claims hold; does the criterion matter
WIDEST = 2**14  # layer, in filters, and image, in pixels


def check(fine: bool, rule: str, value) -> None:
    """Raises ValueError, with the rule, for a value that is not fine."""
    if not fine:
        raise ValueError(f"{rule}, got {value!r}")


def _check_optimizer(settings: "Optimization | Pruning") -> None:
    s = settings
    check(s.optimizer in OPTIMIZERS, "optimizer must be adam or adamw", s.optimizer)
    known = s.lr_schedule in LR_SCHEDULES
    check(known, "lr_schedule must be constant or cosine", s.lr_schedule)
    check(0 < s.lr < 1e3, "lr must be positive", s.lr)
    check(s.weight_decay >= 0, "weight_decay must not be negative", s.weight_decay)
    within = all(0 <= beta < 1 for beta in s.betas)
    check(within, "betas must lie between 0 and 1", s.betas)


@dataclass(frozen=True)
class Optimization:
    """One training phase. lr_schedule: "cosine" falls to zero over the phase, "constant" not."""

    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    lr_schedule: str = "cosine"
    steps: int = 500
    evaluations: int = 5  # on validation images, evenly spaced; the best one's weights are kept

    def __post_init__(self):
        _check_optimizer(self)
        rule = "evaluations must be from 1 to steps"
        check(1 <= self.evaluations <= self.steps, rule, self.evaluations)


@dataclass(frozen=True)
class Pruning:
    """The iterative strategy: train `prune_interval` steps, score, remove, go on.

    Down to `min_filters` in every group.
    """

    optimizer: str = "adamw"
    lr: float = 5e-5
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    lr_schedule: str = "cosine"
    prune_interval: int = 500
    filters_per_step: int = 100
    min_filters: int = 5
    pruning_schedule: str = "fixed"  # an entry of `schedules`
    ranking: str = "global"  # an entry of `rankings`: how scores of different layers compare
    round_to: int = 1  # kept widths are rounded up to a multiple, e.g. 8 for a GPU's matrix units
    score_every: int = 1  # criteria that need task gradients score every so-many-th minibatch
    cosine_batches: int = 5  # the last of those before each removal, whose cosine is observed

    def __post_init__(self):
        _check_optimizer(self)
        rule = "score_every must be from 1 to prune_interval"
        check(1 <= self.score_every <= self.prune_interval, rule, self.score_every)
        check(self.cosine_batches >= 1, "cosine_batches must be at least 1", self.cosine_batches)
        fits = self.round_to >= 1 and self.min_filters % self.round_to == 0
        rule = "round_to must be at least 1 and divide min_filters"
        check(fits, rule, (self.round_to, self.min_filters))
        for name in ("filters_per_step", "min_filters"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))


@dataclass(frozen=True)
class Controls:
    """The arms beside the paper's two: which seeds get them, and at which levels."""

    seeds: int = 1
    levels: tuple[int, ...] = (0,)
    single_task: bool = True  # one network per task
    arms: tuple[str, ...] = ("scratch_longer", "finetune")  # of re-training, beside "scratch"
    shuffled_of: tuple[str, ...] = ()  # criteria whose widths are repeated with other filters
    schedules_of: tuple[str, ...] = ("taylor", "cosprune")  # also pruned with other schedules:
    schedules: tuple[str, ...] = ("fixed", "geometric")  # these, less the profile's own
    budget: float = 3.0  # "scratch_longer" takes at most so many times the steps of "scratch"

    def __post_init__(self):
        check(self.seeds >= 0, "controls.seeds must not be negative", self.seeds)
        check(self.budget >= 1, "controls.budget must be at least 1", self.budget)


@dataclass(frozen=True)
class Tuning:
    """Optuna's search over learning rate and weight decay; 0 trials: none.

    One study per criterion, level and phase.
    """

    trials: int = 0
    lr: tuple[float, float] = (1e-4, 1e-2)
    weight_decay: tuple[float, float] = (1e-6, 1e-1)
    seed: int = 1000  # of the runs it tries things on: no seed of the evaluation

    def __post_init__(self):
        check(self.trials >= 0, "tuning.trials must not be negative", self.trials)
        for name in ("lr", "weight_decay"):
            low, high = getattr(self, name)
            check(0 < low < high < math.inf, f"tuning.{name} must be (low, high)", (low, high))


@dataclass(frozen=True)
class Profile:
    """All numbers of an experiment."""

    name: str
    train_images: int | None = None  # None: all there are
    test_images: int | None = None
    validation_share: float = 0.125  # of the training images, held out for model selection
    image_height: int = 480  # what images are resized to before anything else
    crop: int = 321  # the side of training's random crops, and of whole images in evaluation
    scale: tuple[float, float] = (0.5, 1.5)
    depth_follows_scale: bool = True  # divide depth by the scale (MTAN); False: the paper's code
    batch_size: int = 16
    backbone: str = "vgg16"
    width: float = 1.0  # the share of the backbone's filters that every group has
    least_width: int = 8  # but at least so many, where it has as many
    stride: int = 32  # input pixels per output pixel
    head_width: int = 1024
    dropout: float = 0.5
    pretrained: bool = False  # start the dense trunk from ImageNet (torchvision's weights)
    dense: Optimization = field(default_factory=Optimization)
    prune: Pruning = field(default_factory=Pruning)
    retrain: Optimization = field(default_factory=Optimization)
    sizes: tuple[float, ...] = ()  # shares of the dense parameters, falling; level r is the r-th
    controls: Controls = field(default_factory=Controls)
    tuning: Tuning = field(default_factory=Tuning)
    margin: float = 0.1  # of the gap from position prior to dense network: no difference
    questions: tuple[str, ...] = ("paper",)  # whose figures are drawn: "paper", "criteria" or both
    agreement_batches: int = 0  # on which all criteria score the dense network; 0: they do not
    criteria: tuple[str, ...] = ("taylor", "cosprune")
    seeds: int = 3
    precision: str = "float32"  # or "bf16": autocast; weights and scores stay float32
    weighting: str = "equal"  # an entry of `weightings`: of the tasks' losses, in every training
    # How a run is done, which its name leaves out:
    device: str = field(default="auto", compare=False)  # a GPU if there is one; or "cpu", "cuda"
    deterministic: bool = field(default=False, compare=False)  # on a GPU: repeats to the bit
    checkpoint_seconds: float = field(default=30.0, compare=False)  # lost at most, if killed

    def __post_init__(self):
        check(
            self.precision in ("float32", "bf16"),
            "precision must be float32 or bf16",
            self.precision,
        )
        check(
            self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda", self.device
        )
        for name in ("seeds", "batch_size", "head_width", "image_height", "least_width"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("validation_share", "margin"):
            value = getattr(self, name)
            check(0 < value < 1, f"{name} must lie between 0 and 1", value)
        seconds = self.checkpoint_seconds
        check(seconds >= 0, "checkpoint_seconds must not be negative", seconds)
        check(0 < self.width <= 1, "width must lie above 0 and be at most 1", self.width)
        check(0 <= self.dropout < 1, "dropout must lie between 0 and 1", self.dropout)
        scales = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 100
        check(scales, "scale must be (low, high)", self.scale)
        pairs = itertools.pairwise((1, *self.sizes, 0))
        falling = all(larger > smaller for larger, smaller in pairs)
        check(falling, "sizes must be falling shares between 0 and 1", self.sizes)
        there = all(0 <= level < len(self.sizes) for level in self.controls.levels)
        rule = f"controls.levels must be from 0 to {len(self.sizes) - 1}"
        check(there or not self.sizes, rule, self.controls.levels)
        check(self.seeds <= self.tuning.seed, "seeds must leave out tuning.seed", self.seeds)
        rule = f"crop must be at least the stride, {self.stride} pixels"
        check(self.crop >= self.stride, rule, self.crop)
        if self.train_images is not None:
            left = self.train_images - max(1, round(self.validation_share * self.train_images))
            rule = f"of train_images, a batch of {self.batch_size} must be left after validation"
            check(left >= self.batch_size, rule, left)
        asked = {*self.questions} <= {*QUESTIONS} and self.questions
        check(bool(asked), f"questions must be of {', '.join(QUESTIONS)}", self.questions)
        none = self.agreement_batches >= 0
        check(none, "agreement_batches must not be negative", self.agreement_batches)
        once = 0 < len(self.criteria) == len(set(self.criteria))
        check(once, "criteria must name at least one, and each once", self.criteria)
        some = self.test_images is None or self.test_images >= 1
        check(some, "test_images must be at least 1", self.test_images)
        widest = max(self.head_width, self.image_height, self.crop)
        rule = f"head_width, image_height and crop must be at most {WIDEST}"
        check(widest <= WIDEST, rule, widest)
