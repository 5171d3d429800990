"""IMTL-G: the combination of the gradients that has equal projections onto each one's direction.

Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, by TorchJD.
"""

from torch import nn

from mtprune_utils.weightings._torchjd import Aggregation


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Aggregation("IMTLG")
