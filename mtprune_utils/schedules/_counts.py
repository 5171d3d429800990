"""What several schedules share."""


def at_least_one_each(counts: list[int]) -> list[int]:
    """The counts after each removal, so that one filter goes where less than one would."""
    for i in reversed(range(len(counts) - 1)):
        counts[i] = max(counts[i], counts[i + 1] + 1)
    return counts
