"""Pruning criteria, one file each: `NEEDS` and `score(signals, generator)`, see `Criterion`."""

from mtprune_utils import registry
from mtprune_utils.core.scoring import Criterion

FOLDER = "criteria"


def get_criterion(name: str) -> Criterion:
    """Raises ValueError, with the nearest name, for an unknown criterion."""
    module = registry.entry(FOLDER, name, "criterion")
    return Criterion(name, module.NEEDS, module.score)
