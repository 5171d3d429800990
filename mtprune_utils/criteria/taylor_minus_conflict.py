"""What a filter is worth to the task that needs it most, less what tasks quarrel over it.

    max over k of E[T_k] / mean of E[T_k] over all filters
    - CONFLICT * E mean over pairs of max(0, -cos(g_i, g_j)), T_k = (<w, g_k> + b g_k^b)^2

In the spirit of arXiv 2511.05557, whose formula we have not seen. A filter of average worth to a
task is at 1, and so is one whose gradients are always opposed, at -1. Cost: one backward pass
through the trunk per task, as for `cosprune`, and one product with each task's gradient.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import over_all, pairs, shares, taylor_by_task

NEEDS = TASK_GRADIENTS
CONFLICT = 1.0  # lambda: how much conflict counts beside worth


def statistics(signals: Signals, generator: torch.Generator) -> dict[str, Tensor]:
    conflict = pairs((-signals.task_cosines()).clamp(min=0))
    return {"taylor": taylor_by_task(signals), "conflict": conflict}


def combine(means: list[dict[str, Tensor]], signals: list[Signals]) -> list[Tensor]:
    worth = over_all(
        lambda values: (shares(values) * len(values)).amax(1), [of["taylor"] for of in means]
    )
    return [own - CONFLICT * of["conflict"] for own, of in zip(worth, means)]
