"""Mean absolute weight of a filter, so that layers with different fan-in compare.

L1 of Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017. Of coupled layers, the mean.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals

NEEDS = WEIGHTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    means = [weight.abs().mean(1) for weight in signals.weights()]
    return means[0] if len(means) == 1 else torch.stack(means).mean(0)
