"""The same number of filters each time, so that the last removals are large beside what is left."""

import math


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    removals = math.ceil(spare / filters_per_step)
    return [total - min(filters_per_step * (i + 1), spare) for i in range(removals)]
