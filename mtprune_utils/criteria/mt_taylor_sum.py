"""Each task's Taylor score, summed over tasks: tasks do not offset each other.

    sum over k of E[T_k], T_k = (<w, g_k> + b g_k^b)^2

Molchanov et al., CVPR 2019, for each task by itself; `taylor` takes the summed loss's gradient. The
task with the largest gradients has the most to say. Cost: one backward pass through the trunk per
task, as for `cosprune`, and one product with each task's gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import taylor_by_task

NEEDS = TASK_GRADIENTS


def statistics(signals: Signals, generator: torch.Generator) -> Tensor:
    return taylor_by_task(signals)


def combine(means: list[Tensor], signals: list[Signals]) -> list[Tensor]:
    return [of.sum(1) for of in means]
