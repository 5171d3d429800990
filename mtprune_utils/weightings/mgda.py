"""MGDA: the shortest of the convex combinations of the gradients, which increases no loss.

Désidéri, 2012; Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
Algorithm 2, by TorchJD.
"""

from torch import nn

from mtprune_utils.weightings._torchjd import Aggregation


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Aggregation("MGDA")
