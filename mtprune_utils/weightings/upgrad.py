"""UPGrad: the mean of the gradients, each projected to where it increases no loss.

Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, by TorchJD.
"""

from torch import nn

from mtprune_utils.weightings._torchjd import Aggregation


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Aggregation("UPGrad", extra="quadprog_projector")
