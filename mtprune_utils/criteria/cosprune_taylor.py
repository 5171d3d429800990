"""The mean of a filter's ranks by `cosprune` and by `taylor` among all filters.

    (R(cosprune) + R(taylor)) / 2

Ours: a filter goes first that matters little and that tasks pull apart. Equal values share a rank.
Cost: one backward pass through the trunk per task, as for `cosprune`.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals
from mtprune_utils.criteria._shared import over_all, pairs, ranks, taylor

NEEDS = TASK_GRADIENTS


def statistics(signals: Signals, generator: torch.Generator) -> dict[str, Tensor]:
    return {"cosprune": pairs(signals.task_cosines()), "taylor": taylor(signals)}


def combine(means: list[dict[str, Tensor]], signals: list[Signals]) -> list[Tensor]:
    both = [torch.stack([of["cosprune"], of["taylor"]], 1) for of in means]
    return over_all(lambda values: ranks(values).mean(1), both)
