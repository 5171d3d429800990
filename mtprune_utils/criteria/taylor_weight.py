"""The squared first-order effect of each weight by itself, summed over a filter.

    E sum (w g)^2

The weight form of Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019:
weights do not offset each other, as they do in `taylor`. Of coupled layers, the mean. Cost: one
product with the training gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals
from mtprune_utils.criteria._shared import mean

NEEDS = GRADIENT


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    both = zip(signals.weights(), signals.weight_gradients())
    return mean([(weight * grad).square().sum(1) for weight, grad in both])
