"""Weightings of the tasks' losses, one file each: how one training signal is made of them.

`build(tasks, epoch) -> nn.Module`: for these tasks' losses, in this order, and so many minibatches
an epoch. Its `forward(losses)` takes {task: scalar} and gives as many, whose sum is trained. What
it learns are its parameters, which the optimizer trains without weight decay; what it remembers
lies in its `state_dict`.

A weighting that joins gradients, not losses, has `aggregate(rows) -> Tensor` as well: of each
task's gradient of the trunk, (tasks, n), the one that trains it, (n,). Each head keeps its own
task's.

Each training phase begins with a new one. In a loop of your own: `weighting(losses)` on each
minibatch, with `weighting.parameters()` given to the optimizer, and what comes of it to
`Pruner.backward`. That one adds gradients up: `core.signals.task_backward` aggregates.
"""

from collections.abc import Callable

from torch import nn

from mtprune_utils import registry

FOLDER = "weightings"


def get_weighting(name: str) -> Callable[[list[str], int], nn.Module]:
    """A weighting's `build`. Raises ValueError, with the nearest name, for an unknown one."""
    return registry.entry(FOLDER, name, "weighting").build
