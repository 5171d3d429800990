"""Optimal brain damage with the diagonal of the empirical Fisher information for a Hessian.

    sum w^2 E[g^2], with w as it is when filters are chosen

LeCun et al., Optimal Brain Damage, 1990; Theis et al., Faster Gaze Prediction With Dense Networks
and Fisher Pruning, 2018. g is a minibatch's mean gradient, not one example's. For weights that do
not move it is `taylor_weight`, which takes each w with its own g: the two differ by what training
does between removals. Of coupled layers, the mean. Cost: one product with the training gradient,
and the memory of one more copy of the trunk's weights.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals
from mtprune_utils.criteria._shared import mean

NEEDS = GRADIENT


def statistics(signals: Signals, generator: torch.Generator) -> dict[str, Tensor]:
    both = zip(signals.group.producers, signals.weight_gradients())
    return {member.name: grad.square() for member, grad in both}


def combine(means: list[dict[str, Tensor]], signals: list[Signals]) -> list[Tensor]:
    return [
        mean([(w.square() * square).sum(1) for w, square in zip(of.weights(), squares.values())])
        for squares, of in zip(means, signals)
    ]
