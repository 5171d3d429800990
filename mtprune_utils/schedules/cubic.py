"""Gradual: many filters at first and ever fewer, in as many removals as "fixed" takes.

After a share t of the removals 1 - (1 - t)^3 of what can go is gone (Zhu and Gupta, To Prune, or
Not to Prune, 2017).
"""

import math

from mtprune_utils.schedules._counts import at_least_one_each


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    removals = math.ceil(spare / filters_per_step)
    left = [(1 - (i + 1) / removals) ** 3 for i in range(removals)]
    return at_least_one_each([total - spare + round(spare * share) for share in left])
