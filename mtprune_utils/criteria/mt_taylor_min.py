"""A filter's lowest rank by any task's Taylor score: it goes when one task lets it.

    min over k of R_k, R_k the rank of E[T_k] among all filters, T_k = (<w, g_k> + b g_k^b)^2

The opposite vote to `mt_taylor_max`, as a control of it. Equal values share a rank. Cost: one
backward pass through the trunk per task, as for `cosprune`, and one product with each task's
gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import over_all, ranks, taylor_by_task

NEEDS = TASK_GRADIENTS


def statistics(signals: Signals, generator: torch.Generator) -> Tensor:
    return taylor_by_task(signals)


def combine(means: list[Tensor], signals: list[Signals]) -> list[Tensor]:
    return over_all(lambda values: ranks(values).amin(1), means)
