"""The share of a filter's activations that are not zero.

    1 - APoZ, APoZ = E share of (a = 0)

Hu et al., Network Trimming, 2016: filters with the largest average percentage of zeros go first. a
is what layers behind are given, as in `activation`: max-pooling leaves fewer zeros than there were.
Tells filters apart only where activations can be zero, as behind ReLU. Of several feature maps, the
mean. Cost: no gradient; one pass over the feature maps.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import ACTIVATIONS, Signals

NEEDS = ACTIVATIONS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return signals.mean_activations(lambda a: a != 0)
