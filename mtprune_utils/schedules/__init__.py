"""Pruning schedules, one file each: how many filters are left after each removal.

`plan(total, spare, filters_per_step) -> list[int]`: total filters, of which `spare` can go before
every group is at its least; the counts after each removal, each smaller than the one before, down
to total - spare.
"""

from collections.abc import Callable

from mtprune_utils import registry

FOLDER = "schedules"


def get_schedule(name: str) -> Callable[[int, int, int], list[int]]:
    """A schedule's `plan`. Raises ValueError, with the nearest name, for an unknown one.

    >>> get_schedule("fixed")(100, 80, 30)
    [70, 40, 20]
    >>> get_schedule("geometric")(100, 80, 30)
    [58, 34, 20]
    """
    return registry.entry(FOLDER, name, "pruning schedule").plan
