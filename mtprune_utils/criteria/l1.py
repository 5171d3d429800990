"""Mean absolute weight of a filter, so that layers with different fan-in compare.

    mean |w|

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017. Of coupled layers, the mean. Cost:
one pass over the weights, when filters are chosen.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals
from mtprune_utils.criteria._shared import mean

NEEDS = WEIGHTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return mean([weight.abs().mean(1) for weight in signals.weights()])
