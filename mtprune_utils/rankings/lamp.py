"""LAMP: each score as a share of all scores of its layer that are not smaller.

    s / (sum of the layer's scores not smaller than s)

Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, who apply it to
squared weights; here to any score that is not negative. The highest score of a layer stands at 1
beside those of other layers, so that none collapses.
"""

import torch
from torch import Tensor


def comparable(scores: list[Tensor]) -> list[Tensor]:
    return [_shares(of.double()) for of in scores]


def _shares(scores: Tensor) -> Tensor:
    if (scores < 0).any():
        raise ValueError(
            "the ranking lamp takes shares of scores, and some are below 0: take global or layer"
        )
    ordered = scores.sort().values
    not_smaller = ordered.flip(0).cumsum(0).flip(0)[torch.searchsorted(ordered, scores)]
    return torch.where(not_smaller > 0, scores / not_smaller, 0)
