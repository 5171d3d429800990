"""Re-training of an architecture: from random weights, or from those that pruning kept.

Arms: "scratch" (Scratch-E of Liu et al., Rethinking the Value of Network Pruning, ICLR 2019), for
the profile's steps; "scratch_longer" (Scratch-B), for the compute that finding the architecture
took; "finetune", from the pruned weights, with pruning's optimizer; "finetune_shuffled", likewise,
from the criterion's widths with other filters (see `stages.prune`).
"""

from dataclasses import replace

from mtprune_utils.core.model import (
    Architecture,
    MultiTaskModel,
    build,
    count_parameters,
    uniform_widths,
)
from mtprune_utils.core.settings import Optimization
from mtprune_utils.core.task import channels
from mtprune_utils.files import read_table
from mtprune_utils.stages import prune
from mtprune_utils.stages._training import architecture, at_level, network, train_and_save, tuned

TABLES = ("evaluations.csv", "curve.csv")
SETTINGS = ("retrain",)
NOTEBOOK = "03_retrain_from_scratch"
FINETUNE_SHUFFLED = "finetune_shuffled"
FROM_WEIGHTS = ("finetune", FINETUNE_SHUFFLED)
ARMS = ("scratch", "scratch_longer", *FROM_WEIGHTS)
UNIFORM = "uniform"  # in a criterion's place: the same pruning ratio in every layer


def source(run):
    if run.criterion == UNIFORM:
        return None
    arm = prune.SHUFFLED if run.arm == FINETUNE_SHUFFLED else "iterative"
    return run.experiment.prune(run.criterion, run.seed, run.level, arm)


def search(run):
    if not run.profile.tuning.trials:
        return None
    phase = "finetune" if run.arm in FROM_WEIGHTS else "retrain"
    return run.experiment.tune(phase, run.criterion, run.level)


def begun_with(run) -> Optimization:
    """Fine-tuning takes pruning's optimizer for re-training's length and schedule."""
    if run.arm not in FROM_WEIGHTS:
        return run.profile.retrain
    names = ("optimizer", "betas", "lr", "weight_decay")
    own = {name: getattr(run.profile.prune, name) for name in names}
    return replace(run.profile.retrain, **own)


def settings(run) -> Optimization:
    own = tuned(begun_with(run), search(run))
    return replace(own, steps=equal_compute_steps(run)) if run.arm == "scratch_longer" else own


def weights(run) -> str | None:
    return at_level(run.level) if run.arm in FROM_WEIGHTS else None


def entries(run) -> list[str]:
    return []


def perform(run, dataset, report, checkpoints) -> None:
    start = start_of(run, run.random_seed)
    train_and_save(run, start, dataset, settings(run), report, checkpoints)


def start_of(run, seed: int) -> MultiTaskModel:
    """The network that re-training starts from."""
    if run.arm in FROM_WEIGHTS:
        return network(run.source, at_level(run.level))
    return build(found_architecture(run), seed)


def found_architecture(run) -> Architecture:
    """The pruning run's architecture at the run's level, or uniform widths of that size."""
    dense = architecture(run.profile, channels(run.experiment.tasks))
    if run.source:
        rows = read_table(run.source.path("evaluations.csv"))
        widths = next(row["widths"] for row in rows if row["target_level"] == str(run.level))
        return dense.with_widths(widths_of(widths))
    target = round(run.profile.sizes[run.level] * count_parameters(dense))
    return uniform_widths(dense, target, run.profile.prune.min_filters)


def widths_of(text: str) -> list[int]:
    """Of "8 8 16"."""
    return list(map(int, text.split()))


def equal_compute_steps(run) -> int:
    """How many steps the found network gets for the compute until it was found.

    That of dense training and of pruning, in multiply-accumulates; at most `controls.budget` times
    the profile's steps, and at least those.
    """
    rows = read_table(run.source.path("evaluations.csv"))
    end = next(i for i, row in enumerate(rows) if row["target_level"] == str(run.level))
    spent = run.profile.dense.steps * int(rows[0]["macs"])
    for row, after in zip(rows[:end], rows[1:]):
        spent += (int(after["step"]) - int(row["step"])) * int(row["macs"])
    steps = run.profile.retrain.steps
    most = round(run.profile.controls.budget * steps)
    return min(max(spent // int(rows[end]["macs"]), steps), most)
