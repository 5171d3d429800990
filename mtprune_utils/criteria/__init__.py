"""Pruning criteria, one file each: `NEEDS`, and `score` or `statistics` and `combine`.

`score(signals, generator)` is averaged over minibatches, and the average is the score. A criterion
that ranks, votes or normalises gives `statistics(signals, generator)`, which are averaged, and
`combine(means, signals)`, which makes scores of all groups' averages: see `Criterion`.
"""

from mtprune_utils import registry
from mtprune_utils.core.scoring import Criterion

FOLDER = "criteria"


def get_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises ValueError, with the nearest name, for an unknown one.

    >>> get_criterion("cosprune").needs
    'task_gradients'
    >>> get_criterion("tailor")
    Traceback (most recent call last):
    ValueError: unknown criterion 'tailor': did you mean 'taylor'?
    """
    module = registry.entry(FOLDER, name, "criterion")
    if hasattr(module, "score"):
        return Criterion(name, module.NEEDS, module.score)
    return Criterion(name, module.NEEDS, module.statistics, module.combine)
