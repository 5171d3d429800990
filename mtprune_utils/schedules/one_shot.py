"""All that can go at once. Of several sizes, each is one removal from the one before."""


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    return [total - spare] if spare else []
