"""Rankings, one file each: how filters of different layers compare.

`comparable(scores) -> list[Tensor]`: of one (units,) tensor of scores per group as many numbers
that can be compared between groups, whose order within a group is that of its scores. The lowest
of all go first.
"""

from collections.abc import Callable

from torch import Tensor

from mtprune_utils import registry

FOLDER = "rankings"


def get_ranking(name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """A ranking's `comparable`. Raises ValueError, with the nearest name, for an unknown one.

    >>> import torch
    >>> get_ranking("lamp")([torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])])[0].tolist()
    [0.25, 1.0]
    """
    return registry.entry(FOLDER, name, "ranking").comparable
