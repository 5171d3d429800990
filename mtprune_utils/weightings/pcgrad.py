"""PCGrad: each task's gradient less what points against another's, in random order, summed.

Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, Algorithm 1, by TorchJD.
"""

from torch import nn

from mtprune_utils.weightings._torchjd import Aggregation


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Aggregation("PCGrad")
