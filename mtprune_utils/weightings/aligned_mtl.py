"""Aligned-MTL: the mean of the gradients once their principal components are orthogonal and equal.

Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, Algorithm 1,
by TorchJD.
"""

from torch import nn

from mtprune_utils.weightings._torchjd import Aggregation


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Aggregation("AlignedMTL")
