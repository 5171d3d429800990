"""Profiles: the same code with different numbers, all in one place.

smoke   every notebook in under a minute on two cores: CI and a first look
quick   the default main job: every figure on the embedded data, and one seed of each control
study   a small network, eight seeds, every arm, tuned: for the paper's claims; hours, resumable
fashion for multifashion, two classification tasks on small images
zoo     every criterion on the embedded data: VGG-16; zoo_resnet18 and zoo_fashion are its fellows
paper   the paper's protocol, for a GPU

What each number means, and its unit, stands in `core.settings`.
"""

import dataclasses
import math
import typing

from mtprune_utils import registry
from mtprune_utils.core.settings import Controls, Optimization, Profile, Pruning, Tuning, check
from mtprune_utils.files import KINDS
from mtprune_utils.registry import known
from mtprune_utils.stages import retrain

LARGEST = 10**9  # whole number that a setting may be

# All criteria by one protocol, in a grid of hundreds of short runs.
ZOO = Profile(
    "zoo",
    image_height=64,
    crop=48,
    scale=(0.75, 1.0),
    batch_size=8,
    backbone="vgg16_bn",
    width=1 / 8,
    stride=8,
    head_width=16,
    dropout=0.0,
    dense=Optimization(lr=2e-3, steps=3000, evaluations=6),
    prune=Pruning(lr=5e-4, lr_schedule="constant", prune_interval=25, filters_per_step=40),
    retrain=Optimization(lr=2e-3, steps=400, evaluations=2),
    sizes=(0.5, 0.3, 0.15),
    seeds=3,
    criteria=registry.names("criteria"),
    questions=("criteria",),
    agreement_batches=50,
    controls=Controls(
        seeds=3,
        levels=(0, 1, 2),
        single_task=False,
        arms=("finetune",),
        schedules_of=(),
        shuffled_of=("taylor", "cosprune", "l1", "mt_taylor_max"),
    ),
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            train_images=64,
            test_images=16,
            image_height=64,
            crop=48,
            scale=(0.75, 1.0),
            batch_size=8,
            backbone="vgg16_bn",
            width=1 / 16,
            stride=8,
            head_width=16,
            dropout=0.0,
            dense=Optimization(lr=2e-3, steps=24, evaluations=2),
            prune=Pruning(
                lr=5e-4,
                lr_schedule="constant",
                prune_interval=4,
                filters_per_step=110,
                cosine_batches=1,
            ),
            retrain=Optimization(lr=2e-3, steps=24, evaluations=2),
            sizes=(0.4,),
            controls=Controls(budget=1.5, shuffled_of=("taylor",)),
            tuning=Tuning(trials=2),
            seeds=2,
            questions=("paper", "criteria"),
            agreement_batches=2,
        ),
        Profile(
            # Batch norm, unlike the paper's network: without it a thousand steps do not teach
            # thirteen narrow layers to see.
            "quick",
            image_height=128,
            crop=96,
            scale=(0.75, 1.0),
            batch_size=8,
            backbone="vgg16_bn",
            width=1 / 8,
            stride=8,
            head_width=48,
            dropout=0.0,
            dense=Optimization(lr=2e-3, steps=1300, evaluations=7),
            prune=Pruning(lr=5e-4, lr_schedule="constant", prune_interval=20, filters_per_step=34),
            retrain=Optimization(lr=2e-3, steps=750, evaluations=5),
            sizes=(0.3, 0.15),
            seeds=3,
            controls=Controls(levels=(1,), schedules_of=("taylor",), budget=1.5),
        ),
        Profile(
            "study",
            image_height=96,
            crop=64,
            scale=(2 / 3, 1.0),
            batch_size=8,
            backbone="vgg16_bn",
            width=1 / 8,
            stride=8,
            head_width=16,
            dropout=0.0,
            dense=Optimization(lr=2e-3, steps=1000, evaluations=5),
            prune=Pruning(lr=5e-4, prune_interval=20, filters_per_step=17),
            retrain=Optimization(lr=2e-3, steps=1000, evaluations=8),
            sizes=(0.3, 0.1),
            controls=Controls(seeds=8, levels=(0, 1), budget=2.0),
            seeds=8,
            # Up to 1e-2, the best rates lay at the upper end.
            tuning=Tuning(trials=16, lr=(5e-4, 5e-2)),
        ),
        Profile(
            # Two classifications on 36 x 36 pixels that may be neither cropped nor mirrored.
            "fashion",
            train_images=12_000,
            test_images=2_000,
            image_height=36,
            crop=36,
            scale=(1.0, 1.0),
            batch_size=32,
            backbone="vgg16_bn",
            width=1 / 16,
            stride=8,
            head_width=16,
            dropout=0.0,
            dense=Optimization(lr=2e-3, steps=800, evaluations=5),
            prune=Pruning(lr=5e-4, prune_interval=20, filters_per_step=13),
            retrain=Optimization(lr=2e-3, steps=800, evaluations=5),
            sizes=(0.4, 0.2),
            controls=Controls(levels=(0, 1)),
            seeds=3,
        ),
        ZOO,
        dataclasses.replace(
            ZOO,
            name="zoo_resnet18",
            backbone="resnet18",
            prune=dataclasses.replace(ZOO.prune, filters_per_step=27),
        ),
        dataclasses.replace(
            ZOO,
            name="zoo_fashion",
            train_images=12_000,
            test_images=1_000,
            image_height=36,
            crop=36,
            scale=(1.0, 1.0),
            batch_size=16,
        ),
        Profile(
            "paper",
            depth_follows_scale=False,
            pretrained=True,
            precision="bf16",
            checkpoint_seconds=300.0,  # a checkpoint is 1.3 GB
            dense=Optimization(lr=1e-4, steps=25_000, evaluations=50),
            retrain=Optimization(lr=1e-3, steps=15_000, evaluations=30),
            sizes=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.17),
            controls=Controls(seeds=6, levels=(5, 9)),
            seeds=6,
        ),
    )
}


def get_profile(name: str, overrides: dict[str, object] | None = None) -> Profile:
    """The named profile, with single numbers replaced, e.g. {"dense.steps": 200, "crop": 64}.

    Raises ValueError, with the nearest known name, for an unknown profile, setting or entry, a
    wrong type, or values that are out of range or do not go together.
    """
    profile = PROFILES[known(name, PROFILES, "profile")]
    # "" holds the profile's own settings; all are replaced at once, whatever their order.
    groups: dict[str, dict] = {}
    for key, value in (overrides or {}).items():
        group, _, setting = key.rpartition(".")
        record = (
            getattr(profile, known(group, _settings(profile), "setting", shown=key))
            if group
            else profile
        )
        names = _settings(record) if dataclasses.is_dataclass(record) else {}
        old = getattr(record, known(setting, names, "setting", shown=key))
        if dataclasses.is_dataclass(old):
            raise ValueError(f"{key!r} is a group of settings: name one of them, e.g. '{key}.lr'")
        hint = typing.get_type_hints(type(record))[setting]
        groups.setdefault(group, {})[setting] = _checked(key, value, hint)
    own = groups.pop("", {})
    parts = {
        group: dataclasses.replace(getattr(profile, group), **changes)
        for group, changes in groups.items()
    }
    profile = dataclasses.replace(profile, **own, **parts)
    for key, value in flat(dataclasses.asdict(profile)).items():
        values = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in values if isinstance(number, float))
        check(finite, f"{key} must be finite", value)
    rule = "sizes must name at least one share of the dense network's parameters"
    check(bool(profile.sizes), rule, profile.sizes)
    of_controls = *profile.controls.schedules_of, *profile.controls.shuffled_of
    for criterion in (*profile.criteria, *of_controls):
        known(criterion, registry.names("criteria"), "criterion")
    known(profile.backbone, registry.names("backbones"), "backbone")
    known(profile.weighting, registry.names("weightings"), "weighting")
    for schedule in (profile.prune.pruning_schedule, *profile.controls.schedules):
        known(schedule, registry.names("schedules"), "pruning schedule")
    known(profile.prune.ranking, registry.names("rankings"), "ranking")
    for arm in profile.controls.arms:
        known(arm, retrain.ARMS, "arm")
    return profile


def flat(record: dict, prefix: str = "") -> dict:
    """{"dense.steps": 500, ...} of a profile's settings as nested dictionaries."""
    flattened = {}
    for key, value in record.items():
        flattened |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flattened


def _settings(record) -> list[str]:
    return [field.name for field in dataclasses.fields(record) if field.name != "name"]


def _checked(key: str, value, hint):
    """The value in the declared type: whole numbers count as floats, lists as tuples.

    Raises ValueError for another type.
    """
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        any_length = kinds[-1] is ...
        if not isinstance(value, (list, tuple)) or not any_length and len(value) != len(kinds):
            length = "" if any_length else f"{len(kinds)} "
            raise ValueError(f"{key!r} takes a list of {length}{kinds[0].__name__}s, got {value!r}")
        return tuple(_checked(key, item, kinds[0]) for item in value)
    allowed = typing.get_args(hint) or (hint,)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key!r} takes whole numbers up to {LARGEST}, got a larger one")
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        raise ValueError(f"{key!r} takes {KINDS[allowed[0]]}, got {value!r}")
    return value
