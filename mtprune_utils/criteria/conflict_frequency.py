"""How often two tasks' gradients of a filter point apart, with a minus.

    - share of (minibatch, pair i < j) with cos(g_i, g_j) < 0

Shi et al., Recon, ICLR 2023, which counts conflicts per layer to find layers that tasks should not
share; here per filter. Of coupled layers, the gradients are one vector. Few minibatches give few
different values. Cost: one backward pass through the trunk per task, as for `cosprune`.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import pairs

NEEDS = TASK_GRADIENTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    cosines = signals.task_cosines()
    return -pairs((cosines < 0).to(cosines.dtype))
