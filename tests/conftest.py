"""What several tests share: a small network on synthetic images that need no file."""

import os
from dataclasses import replace

import pytest
import torch

from mtprune_utils import tasks
from mtprune_utils.data import Dataset, Split
from mtprune_utils.models import Architecture, build

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results repeat to the bit on the CPU only

TASKS = {task.name: task for task in (tasks.segmentation(5), tasks.depth(), tasks.normals())}
WIDTHS = (8, 8, 8, 8, 10, 10, 10, 12, 12, 12, 12, 12, 12)


def random_split(images: int, size: int = 32, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    normals = torch.nn.functional.normalize(torch.randn(images, 3, size, size, generator=generator), dim=1)
    return Split(
        torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8),
        {
            "segmentation": torch.randint(0, 5, (images, size, size), generator=generator, dtype=torch.uint8),
            "depth": torch.rand(images, 1, size, size, generator=generator) * 4 + 0.5,
            "normals": normals.half(),
        },
    )


@pytest.fixture
def dataset() -> Dataset:
    train = random_split(24)
    splits = train, random_split(8, seed=1), random_split(8, seed=2), replace(train, targets={})
    return Dataset("random", TASKS, ("a", "b", "c", "d", "e"), *splits, "0")


@pytest.fixture
def architecture() -> Architecture:
    return Architecture({name: task.channels for name, task in TASKS.items()}, widths=WIDTHS, stride=8, head_width=8, dropout=0.0)


@pytest.fixture
def model(architecture):
    return build(architecture, seed=0)
