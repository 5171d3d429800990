"""What several tests share: a small network on synthetic images that need no file."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mtprune_utils.core.data import Dataset, Split
from mtprune_utils.core.model import Architecture, MultiTaskModel, build
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.signals import task_backward
from mtprune_utils.core.task import channels
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import PROJECT
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.normals import normals
from mtprune_utils.tasks.segmentation import segmentation

sys.path.insert(0, str(PROJECT / "tools"))  # which are no part of the package
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results repeat to the bit on the CPU only

LAUNCH = [sys.executable, "-m", "mtprune_utils.run.launch"]  # as jobs of a batch are started
CLASSES = ("a", "b", "c", "d", "e")
TASKS = {task.name: task for task in (segmentation(CLASSES), depth(), normals())}
WIDTHS = (8, 8, 8, 8, 10, 10, 10, 12, 12, 12, 12, 12, 12)  # of VGG-16's layers


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Commands set variables for what they start: in a test, not those of the next one."""
    with mock.patch.dict(os.environ):
        yield


def random_split(images: int, size: int = 32, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(images, 3, size, size, generator=generator)

    def integers(most: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)

    return Split(
        integers(256, (images, 3, size, size)),
        {
            "segmentation": integers(5, (images, size, size)),
            "depth": torch.rand(images, 1, size, size, generator=generator) * 4 + 0.5,
            "normals": torch.nn.functional.normalize(vectors, dim=1).half(),
        },
    )


def narrow(architecture: Architecture, widths=WIDTHS, **changed) -> Architecture:
    """A VGG-16 of these widths, whichever its backbone and stride are."""
    full = replace(architecture, widths={}, **changed)
    return full.with_widths(list(widths))


def convs(model: MultiTaskModel) -> list[torch.nn.Module]:
    """The layer that each of the trunk's groups begins with."""
    return [model.get_submodule(group.root) for group in model.groups]


def gated(model: MultiTaskModel) -> list[torch.nn.Module]:
    """What stands last before each activation: a norm, or the convolution itself."""
    return [model.get_submodule(name) for group in model.groups for name in group.gates]


def scores_of(name: str, model: MultiTaskModel, generator=None) -> Scores:
    return Scores(get_criterion(name), model.groups, model, generator)


def backward_by_task(losses, model: MultiTaskModel):
    return task_backward(losses, model, model.trunk.parameters())


@pytest.fixture
def dataset() -> Dataset:
    train = random_split(24)
    splits = train, random_split(8, seed=1), random_split(8, seed=2), replace(train, targets={})
    return Dataset("random", TASKS, *splits, "0")


@pytest.fixture
def architecture() -> Architecture:
    return narrow(Architecture(channels(TASKS), stride=8, head_width=8, dropout=0.0))


@pytest.fixture
def model(architecture):
    return build(architecture, seed=0)
