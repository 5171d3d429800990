"""Mean absolute activation of a filter's feature map.

    E mean |a|

As in Molchanov et al., ICLR 2017. a is what layers behind are given: behind the activation, and
behind pooling and sums if there are. Of several feature maps, the mean. Cost: no gradient; one pass
over the feature maps.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import ACTIVATIONS, Signals

NEEDS = ACTIVATIONS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return signals.mean_activations(torch.abs)
