"""Mean over pairs of tasks of the cosine similarity of a filter's weight gradients.

    E mean over pairs i < j of cos(g_i, g_j)

Garg, Zhang and Guan, 2023, CosPrune. A zero gradient has similarity 0 with everything. Low: the
tasks pull the filter apart. Of coupled layers, the gradients are one vector. Cost: one backward
pass through the trunk per task.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import pairs

NEEDS = TASK_GRADIENTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return pairs(signals.task_cosines())
