"""Choosing filters by their scores."""

from bisect import bisect_left
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from mtprune_utils.rankings import get_ranking


def select(
    scores: list[Tensor], budget: int, floor: int, multiple: int = 1, ranking: str = "global"
) -> list[Tensor]:
    """The `budget` units with the lowest scores, leaving at least `floor` in every group.

    scores: one (units,) tensor per group. ranking: an entry of `rankings`, how scores of different
    groups compare. multiple: what is kept is rounded up to a multiple of this, and the next lowest
    go in place of what this gives back; up to multiple - 1 more than the budget may go. Returns the
    sorted units to remove, one int64 tensor per group. Ties break by (score, group, unit). Raises
    ValueError if fewer than `budget` can go, the budget is no whole number from 0, or a score is
    NaN.

        >>> scores = [torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.3, 0.4])]
        >>> select(scores, budget=2, floor=1)
        [tensor([0, 2]), tensor([], dtype=torch.int64)]
    """
    return chooser(scores, floor, multiple, ranking)(budget)


def chooser(
    scores: list[Tensor], floor: int, multiple: int = 1, ranking: str = "global"
) -> Callable[[int], list[Tensor]]:
    """`select` for any budget, with all sorting done once."""
    widths = [len(score) for score in scores]
    flat = torch.cat(scores).cpu()  # one transfer
    if flat.isnan().any():
        raise ValueError("a score is NaN: the loss diverged; lower the learning rate")
    flat = torch.cat(get_ranking(ranking)(list(flat.split(widths))))
    available = sum(max(width - floor, 0) for width in widths)
    rank = [ranks(part) for part in flat.split(widths)]
    # A unit may go only if enough better ones of its group stay.
    may_go = torch.cat([r < width - floor for r, width in zip(rank, widths)])
    order = flat.argsort(stable=True)  # stable: ties stay in (group, unit) order
    order = order[may_go[order]]
    group = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))[order]
    whole = torch.tensor(widths)

    def removed(count: int) -> Tensor:
        """How many of each group go with the `count` lowest."""
        left = whole - torch.bincount(group[:count], minlength=len(widths))
        return (whole - -(-left // multiple) * multiple).clamp(min=0)

    def choose(budget: int) -> list[Tensor]:
        if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 0:
            rule = "the budget is a number of filters, a whole number from 0"
            raise ValueError(f"{rule}, got {budget!r}")
        if budget > available:
            raise ValueError(
                f"asked to remove {budget} filters, but only {available} are above the floor of "
                f"{floor} per layer"
            )
        counts = range(budget, available + 1)
        at = bisect_left(counts, budget, key=lambda count: int(removed(count).sum()))
        numbers = removed(counts[min(at, len(counts) - 1)])
        return [(r < number).nonzero().flatten() for r, number in zip(rank, numbers)]

    return choose


def within_bound(
    scores: list[Tensor],
    floor: int,
    multiple: int,
    bound: float,
    losses: Callable[[list[Tensor]], dict[str, float]],
) -> list[Tensor]:
    """Layer by layer the most of its lowest units that leave every task's loss within a bound.

    After Ye et al., Performance-Aware Approximation of Global Channel Pruning for Multitask CNNs,
    TPAMI 2023 (PAGCP), from its description alone; that growth is counted from the network before
    each layer, and that layers go in their order, is our reading. scores, floor, multiple, and what
    is returned: as in `select`; scores are compared within their group only. losses(chosen): {task:
    validation loss} of the network without the chosen units. bound: how much of itself each loss
    may grow by each group's removal, those of the groups before it done: the worst task's growth
    counts, and over G groups a loss may grow by (1 + bound)^G in all. How many go is found by
    halving, which takes losses to rise with the number: whatever they do, what is returned keeps
    the bound. About log2(units) calls of `losses` a group. Raises ValueError for a NaN score.
    """
    scores = [of.cpu() for of in scores]
    if any(of.isnan().any() for of in scores):
        raise ValueError("a score is NaN: the loss diverged; lower the learning rate")
    chosen = [torch.arange(0) for _ in scores]
    before = losses(chosen)
    for i, score in enumerate(scores):
        order, width = score.argsort(stable=True), len(score)
        kept = [n for n in range(max(floor, 1), width) if n % multiple == 0]
        counts = [0, *(width - n for n in reversed(kept))]  # of units that may go
        low, high, best = 0, len(counts) - 1, (chosen[i], before)
        while low < high:  # counts[low] fits, what is beyond counts[high] does not
            middle = (low + high + 1) // 2
            units = order[: counts[middle]].sort().values
            after = losses([*chosen[:i], units, *chosen[i + 1 :]])
            if all(after[task] <= loss + bound * abs(loss) for task, loss in before.items()):
                low, best = middle, (units, after)
            else:
                high = middle - 1
        chosen[i], before = best
    return chosen


def ranks(scores: Tensor) -> Tensor:
    """The place of each score among all, from 0; ties in their order.

    >>> ranks(torch.tensor([0.5, 0.1, 0.3]))
    tensor([2, 0, 1])
    """
    return scores.argsort(stable=True).argsort()
