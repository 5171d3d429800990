"""Each task's Taylor score as a share of its total over all filters, summed over tasks.

    sum over k of E[T_k] / total of E[T_k] over all filters, T_k = (<w, g_k> + b g_k^b)^2

As `mt_taylor_sum`, but no loss's scale dominates: each task has one vote to share out. Cost: one
backward pass through the trunk per task, as for `cosprune`, and one product with each task's
gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import over_all, shares, taylor_by_task

NEEDS = TASK_GRADIENTS


def statistics(signals: Signals, generator: torch.Generator) -> Tensor:
    return taylor_by_task(signals)


def combine(means: list[Tensor], signals: list[Signals]) -> list[Tensor]:
    return over_all(lambda values: shares(values).sum(1), means)
