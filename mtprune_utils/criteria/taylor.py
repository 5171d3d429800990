"""(gate x dL/dgate)^2 for a gate of value 1 on the feature map behind the activation.

    E (<w, g> + b g^b)^2

The gate form of Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019; the
paper's single-task criterion. L is the summed loss. Of coupled layers, the mean over their gates.
Cost: one product with the training gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals
from mtprune_utils.criteria import _shared

NEEDS = GRADIENT


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return _shared.taylor(signals)
