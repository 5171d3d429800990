"""An equal share of what is left each time, in as many removals as "fixed" takes."""

import math


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    removals = math.ceil(spare / filters_per_step)
    share = (total - spare) / total
    return [round(total * share ** ((i + 1) / removals)) for i in range(removals)]
