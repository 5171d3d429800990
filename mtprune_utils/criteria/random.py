"""Uniform random scores: the control that any criterion has to beat. Cost: nothing."""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals

NEEDS = WEIGHTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    device = signals.weights()[0].device
    return torch.rand(signals.units, generator=generator).to(device)
