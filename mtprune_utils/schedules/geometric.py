"""An equal share of what is left each time, in as many removals as "fixed" takes."""

import math


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    removals = math.ceil(spare / filters_per_step)
    share = (total - spare) / total
    counts = [round(total * share ** ((i + 1) / removals)) for i in range(removals)]
    for i in reversed(range(removals - 1)):  # where the share is less than a filter, one goes
        counts[i] = max(counts[i], counts[i + 1] + 1)
    return counts
