"""The distances of a filter's weights to those of its layer's other filters, summed.

    sum over j of ||w - w_j||

He et al., Filter Pruning via Geometric Median, CVPR 2019. Low: others can stand in for it. The sum
grows with the layer's width, and the paper compares filters of one layer only: take it with the
ranking "layer". Of coupled layers, the weights are one vector. A layer's only filter has score 0.
Cost: one product of a layer's weights with themselves, when filters are chosen.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals

NEEDS = WEIGHTS


def statistics(signals: Signals, generator: torch.Generator) -> Tensor:
    weights = torch.cat(signals.weights(), 1)
    return torch.cdist(weights, weights).fill_diagonal_(0).sum(1)


def combine(means: list[Tensor], signals: list[Signals]) -> list[Tensor]:
    if all(len(of) == 1 for of in means):
        raise ValueError("fpgm compares a layer's filters, and every layer has only one")
    return means
