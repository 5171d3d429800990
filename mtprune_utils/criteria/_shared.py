"""What several criteria share."""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import Signals


def mean(of_members: list[Tensor]) -> Tensor:
    """(units,) of each layer that produces a group's channels: their mean."""
    return of_members[0] if len(of_members) == 1 else torch.stack(of_members).mean(0)


def taylor(signals: Signals) -> Tensor:
    """(units,): the squared gate gradient, as the criterion `taylor`."""
    gates = signals.gate_gradients()
    if len(gates) == 1 and gates[0].shape[1] == 1:
        return gates[0].squeeze(1).square()
    return torch.cat(gates, 1).square().mean(1)


def taylor_by_task(signals: Signals) -> Tensor:
    """(units, tasks): T_k, the squared gate gradient of each task's loss; the mean over gates."""
    return signals.task_gate_gradients().square().mean(2)


def pairs(of_pairs: Tensor) -> Tensor:
    """(units,): the mean over pairs of different tasks of a (units, tasks, tasks) tensor."""
    tasks = of_pairs.shape[1]
    others = of_pairs.sum((1, 2)) - of_pairs.diagonal(dim1=1, dim2=2).sum(1)
    return others / (tasks * (tasks - 1))


def over_all(function, of_groups: list[Tensor]) -> list[Tensor]:
    """The function of all groups' (units, ...) as one tensor, given back by group."""
    return list(function(torch.cat(of_groups)).split([len(of) for of in of_groups]))


def ranks(values: Tensor) -> Tensor:
    """The place of each value in its column, from 0; equal ones share the mean of their places."""
    columns = values.reshape(len(values), -1).T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns)
    upto = torch.searchsorted(ordered, columns, right=True)
    return ((below + upto - 1) / 2).T.reshape(values.shape)


def shares(values: Tensor) -> Tensor:
    """Each value as a share of its column's total; 0 where the total is."""
    total = values.sum(0)
    return torch.where(total > 0, values / total, 0)
