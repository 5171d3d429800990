"""An equal share of what is left each time, in as many removals as "fixed" takes."""

import math

from mtprune_utils.schedules._counts import at_least_one_each


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    removals = math.ceil(spare / filters_per_step)
    share = (total - spare) / total
    counts = [round(total * share ** ((i + 1) / removals)) for i in range(removals)]
    return at_least_one_each(counts)
