"""(gate x dL/dgate)^2 for a gate of value 1 on the feature map behind the activation.

The gate form of Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019; the
paper's single-task criterion. L is the summed loss. Of coupled layers, the mean over their gates.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals

NEEDS = GRADIENT


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    gates = signals.gate_gradients()
    if len(gates) == 1 and gates[0].shape[1] == 1:
        return gates[0].squeeze(1).square()
    return torch.cat(gates, 1).square().mean(1)
