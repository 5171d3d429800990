"""The stages of the experiment, one file each, from run folder to run folder.

A stage says all that there is to know of it in one place:

TABLES      files that it writes and that are collected beside the figures
SETTINGS    the profile's groups of numbers that it reads, beside those that all stages share
NOTEBOOK    the notebook that runs one
source(run), search(run)    what it starts from and the search whose settings it takes, or None
settings(run)               what it trains or prunes with; needs finished inputs
weights(run)                the file of its source that it goes on from, or None
entries(run)                names in the registries that its results depend on
perform(run, dataset, report, checkpoints)    what it does
"""

from types import ModuleType

from mtprune_utils import registry

FOLDER = "stages"
# Those that are there, in the order they are shown.
ORDER = ("dense", "tune", "prune", "retrain", "score")


def get_stage(name: str) -> ModuleType:
    """A stage's module. Raises ValueError, with the nearest name, for an unknown one."""
    return registry.entry(FOLDER, name, "stage")


def stage_names() -> tuple[str, ...]:
    """Every stage: the known ones in their order, then any other."""
    there = registry.names(FOLDER)
    return (*(name for name in ORDER if name in there), *sorted({*there} - {*ORDER}))
