"""Mean over pairs of tasks of the cosine similarity of a filter's weight gradients.

Garg, Zhang and Guan, 2023, CosPrune. A zero gradient has similarity 0 with everything. Low: the
tasks pull the filter apart. Of coupled layers, the gradients are one vector.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import TASK_GRADIENTS, Signals

NEEDS = TASK_GRADIENTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    grads = signals.task_gradients()
    tasks = grads.shape[1]
    if tasks < 2:
        raise ValueError("cosprune compares tasks: it needs at least two")
    products = grads @ grads.mT  # (units, tasks, tasks)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms.unsqueeze(1) * norms.unsqueeze(2)
    cosines = torch.where(scale > 0, products / scale, 0)
    pairs = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return pairs / (tasks * (tasks - 1))
