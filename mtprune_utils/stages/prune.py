"""Iterative pruning, down to the floor or to the size that its optimizer was tuned for.

Arms: "iterative" (the profile's schedule), the experiment's `schedules`, and "shuffled", a control:
the removals of the criterion's iterative run, layer by layer as many, but of filters drawn at
random.
"""

from dataclasses import replace

from mtprune_utils.core.evaluation import evaluate_with_recalibrated_bn
from mtprune_utils.core.iterative import Removal, prune_iteratively
from mtprune_utils.core.settings import Pruning
from mtprune_utils.files import read_table
from mtprune_utils.stages._training import DENSE, at_level, device_of, network, save, tuned

TABLES = ("evaluations.csv", "layers.csv")
SETTINGS = ("prune", "sizes")
NOTEBOOK = "02_prune_iteratively"
SHUFFLED = "shuffled"


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
    criteria = dict.fromkeys((scored_by(run), "cosprune"))
    own = scheduled(run)
    rest = f"schedules.{own.pruning_schedule}", f"rankings.{own.ranking}"
    return [*(f"criteria.{name}" for name in criteria), *rest]


def scored_by(run) -> str:
    """The criterion that chooses its filters: `random` for the arm SHUFFLED."""
    return "random" if run.arm == SHUFFLED else run.criterion


def removals(run) -> list[Removal] | None:
    """Those that the run repeats, if it does."""
    if run.replayed is None:
        return None
    layers = read_table(run.replayed.path("layers.csv"))
    rows = read_table(run.replayed.path("evaluations.csv"))
    levels = {row["removal"]: row["target_level"] for row in rows if row["phase"] == "recovered"}
    counts: dict[int, list[int]] = {}
    for row in layers:
        counts.setdefault(int(row["removal"]), []).append(int(row["removed_next"]))
    # What is removed after removal i leads to the network of row i + 1.
    found = []
    for i, numbers in counts.items():
        level = levels.get(str(i + 1))
        found.append(Removal(numbers, int(level) if level else None))
    return found


def perform(run, dataset, report, checkpoints) -> None:
    profile, last = run.profile, len(run.profile.sizes) - 1
    model = network(run.source, DENSE).to(device_of(profile))

    def measure(model) -> dict[str, float]:
        return evaluate_with_recalibrated_bn(model, dataset, dataset.test, profile)

    evaluations, layers = prune_iteratively(
        model,
        dataset,
        profile,
        settings(run),
        scored_by(run),
        run.random_seed,
        measure,
        removals=removals(run),
        last_level=None if run.level in (None, last) else run.level,
        at_level=lambda level: save(run, at_level(level), model, dataset),
        report=report,
        checkpoints=checkpoints,
    )
    run.write_table("evaluations.csv", evaluations)
    run.write_table("layers.csv", layers)
    save(run, DENSE, model, dataset)
