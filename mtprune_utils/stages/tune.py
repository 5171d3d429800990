"""Careful tuning: Optuna's search for a learning rate and a weight decay, on validation images.

Arms: the phase that is tuned, "prune", "retrain" or "finetune", for one criterion and level. Each
trial is written down as it ends; an interrupted search goes on.
"""

import hashlib
import math
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mtprune_utils.core import trainer
from mtprune_utils.core.checkpoints import Checkpoints
from mtprune_utils.core.data import Dataset
from mtprune_utils.core.evaluation import evaluate_with_recalibrated_bn, total_loss
from mtprune_utils.core.iterative import prune_iteratively
from mtprune_utils.core.settings import Optimization, Pruning
from mtprune_utils.files import parse_json, write_atomically
from mtprune_utils.stages import prune, retrain
from mtprune_utils.stages._training import DENSE, device_of, network

TABLES = ("trials.csv",)
SETTINGS = ("tuning", "prune", "retrain", "sizes")
NOTEBOOK = "07_tune_optimizer"
ARMS = ("prune", "retrain", "finetune")
STARTUP = {"trials": 6, "pruner": 4}  # trials at random before TPE, and before any is broken off


def source(run):
    return run.experiment.dense(run.seed) if run.arm == "prune" else retrain.source(run)


def search(run) -> None:
    return None


def settings(run) -> Optimization | Pruning:
    """What the search begins with: the profile's own numbers."""
    return run.profile.prune if run.arm == "prune" else retrain.begun_with(run)


def weights(run) -> str | None:
    return DENSE if run.arm == "prune" else retrain.weights(run)


def entries(run) -> list[str]:
    return prune.entries(run) if run.arm == "prune" else []


def perform(run, dataset: Dataset, report, checkpoints: Checkpoints) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of a bar that nobody shows
        import optuna  # only here: the other stages run without it
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own, tuning = settings(run), run.profile.tuning
    spaces = {
        name: optuna.distributions.FloatDistribution(*getattr(tuning, name), log=True)
        for name in ("lr", "weight_decay")
    }
    study = optuna.create_study(
        storage=_storage(run.path("journal.log"), report),
        load_if_exists=True,
        study_name=f"{run.name} {run.code}",  # trials of other code do not count
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=STARTUP["pruner"], n_warmup_steps=run.profile.retrain.steps // 2
        ),
    )
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of an interrupted batch
        study.tell(trial.number, state=TrialState.FAIL)
    begun = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING]
    if not study.get_trials(states=begun):
        study.enqueue_trial({name: getattr(own, name) for name in spaces})  # they come first

    def finished() -> list:
        return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])

    while (number := len(finished())) < tuning.trials:
        # A seed of each trial's own: an interrupted search goes on as an uninterrupted one would.
        seed = stream(f"{run.stream} {number}") % 2**32
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP["trials"], seed=seed)
        trial = study.ask(spaces)
        checkpoints.part = f"trial {number}"
        try:
            loss = _run_trial(run, dataset, replace(own, **trial.params), trial, checkpoints)
        except (trainer.Diverged, optuna.TrialPruned):
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, loss)
            report(f"trial {number + 1}/{tuning.trials}: validation loss {loss:.3f}")
    rows = [
        {
            "trial": i,
            "state": trial.state.name.lower(),
            **trial.params,
            "loss": trial.value if trial.state == TrialState.COMPLETE else None,
        }
        for i, trial in enumerate(finished())
    ]
    run.write_table("trials.csv", rows)
    if not any(row["state"] == "complete" for row in rows):
        what = f"{run.name}: every trial diverged"
        raise trainer.Diverged(f"{what}, lower tuning.lr, now {tuning.lr}")
    run.write_json("best.json", {**study.best_params, "loss": study.best_value})


def stream(name: str) -> int:
    """A stream of random numbers of that name's own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _run_trial(
    run, dataset: Dataset, own: Optimization | Pruning, trial, checkpoints: Checkpoints
) -> float:
    """The validation loss that one trial's settings reach."""
    import optuna

    seed = stream(f"{run.arm} {run.seed}")
    torch.manual_seed(seed)
    device = device_of(run.profile)
    if run.arm != "prune":

        def watch(step: int, loss: float) -> None:
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        model = retrain.start_of(run, seed).to(device)
        curve = trainer.train(
            model,
            dataset,
            run.profile,
            own,
            seed,
            report=lambda line: None,
            watch=watch,
            checkpoints=checkpoints,
        )
        return min(map(total_loss, curve))
    model = network(run.source, DENSE).to(device)
    prune_iteratively(
        model,
        dataset,
        run.profile,
        own,
        run.criterion,
        seed,
        measure=lambda model: {},
        last_level=run.level,
        checkpoints=checkpoints,
    )
    metrics = evaluate_with_recalibrated_bn(model, dataset, dataset.validation, run.profile)
    if not math.isfinite(loss := total_loss(metrics)):
        raise trainer.Diverged(f"the validation loss is {loss}")
    return loss


def _storage(journal: Path, report: Callable[[str], None]):
    """Optuna's storage in the journal, cut where it can no longer be replayed."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _repair(journal, report)

    def replays(lines: list[bytes]) -> bool:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(lines))
            file.flush()
            try:
                JournalStorage(JournalFileBackend(file.name))
            except Exception:  # whatever Optuna stumbles over: it checks nothing
                return False
        return True

    _cut(journal, replays, report)
    return JournalStorage(JournalFileBackend(str(journal)))


def _repair(journal: Path, report: Callable[[str], None]) -> None:
    """Drop what a killed process leaves: its lock, half a line, and what follows damage."""
    lock = journal.with_name(f"{journal.name}.lock")
    lock.unlink(missing_ok=True)  # the run's own is held here

    def whole(lines: list[bytes]) -> bool:
        try:
            return lines[-1].endswith(b"\n") and type(parse_json(lines[-1])) is dict
        except ValueError:
            return False

    _cut(journal, lambda lines: all(whole([line]) for line in lines), report)


def _cut(journal: Path, fine: Callable[[list[bytes]], bool], report: Callable[[str], None]) -> None:
    """Keep as many of a journal's first lines as are fine together: with one more, they are not."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    counts = range(1, len(lines) + 1)
    kept = bisect_left(counts, True, key=lambda count: not fine(lines[:count]))
    if kept < len(lines):
        known = f"its first {kept} of {len(lines)} lines"
        report(f"{journal.name} is broken off: going on from {known}")
        write_atomically(journal, b"".join(lines[:kept]))
