"""The absolute first-order effect of each weight by itself, summed over a filter.

    E sum |w g|

A variant of Molchanov et al., ICLR 2017 and CVPR 2019, that is often meant by "Taylor". Of coupled
layers, the mean. Cost: one product with the training gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals
from mtprune_utils.criteria._shared import mean

NEEDS = GRADIENT


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    both = zip(signals.weights(), signals.weight_gradients())
    return mean([(weight * grad).abs().sum(1) for weight, grad in both])
