"""Squared first-order effect of a filter's gate, and of the next layer's slice that reads it.

    E (<w, g> + b g^b)^2 + E <v, dL/dv>^2, v the slice of the next layer

After Chen et al., Optimal Brain Connection, arXiv 2508.05521, from a summary of it: the first term
is `taylor`. Where one layer alone reads a filter (behind nothing but ReLU and pooling) both terms
are equal, so that there it ranks as `taylor` does: they differ where several layers read. Of
coupled layers, the mean over gates, and over the layers that read. Cost: one product with the
training gradient of the filters, and of the layers that read them, heads included.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import GRADIENT, Signals
from mtprune_utils.criteria._shared import mean, taylor

NEEDS = GRADIENT


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return taylor(signals) + mean([of.square() for of in signals.reader_products()])
