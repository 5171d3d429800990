"""Iterative pruning, down to the floor or to the size that its optimizer was tuned for."""

from dataclasses import replace

from mtprune_utils.core.evaluation import evaluate_with_recalibrated_bn
from mtprune_utils.core.iterative import prune_iteratively
from mtprune_utils.core.settings import Pruning
from mtprune_utils.stages._training import DENSE, at_level, device_of, network, save, tuned

TABLES = ("evaluations.csv", "layers.csv")
SETTINGS = ("prune", "sizes")
NOTEBOOK = "02_prune_iteratively"


def source(run):
    return run.experiment.dense(run.seed)


def search(run):
    return (
        run.experiment.tune("prune", run.criterion, run.level)
        if run.profile.tuning.trials
        else None
    )


def scheduled(run) -> Pruning:
    """The profile's numbers, as the run's arm changes them."""
    return replace(run.profile.prune, **run.experiment.schedules.get(run.arm, {}))


def settings(run) -> Pruning:
    return tuned(scheduled(run), search(run))


def weights(run) -> str:
    return DENSE


def entries(run) -> list[str]:
    # The cosine of every layer is observed, whatever the criterion.
    criteria = dict.fromkeys((run.criterion, "cosprune"))
    schedule = scheduled(run).pruning_schedule
    rest = f"schedules.{schedule}", "rankings.global"
    return [*(f"criteria.{name}" for name in criteria), *rest]


def perform(run, dataset, report, checkpoints) -> None:
    profile, last = run.profile, len(run.profile.sizes) - 1
    model = network(run.source, DENSE).to(device_of(profile))

    def measure(model) -> dict[str, float]:
        return evaluate_with_recalibrated_bn(model, dataset, dataset.test, profile)

    evaluations, layers = prune_iteratively(
        model, dataset, profile, settings(run), run.criterion, run.random_seed, measure,
        last_level=None if run.level in (None, last) else run.level,
        at_level=lambda level: save(run, at_level(level), model, dataset),
        report=report, checkpoints=checkpoints,
    )
    run.write_table("evaluations.csv", evaluations)
    run.write_table("layers.csv", layers)
    save(run, DENSE, model, dataset)
