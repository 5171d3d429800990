"""The stages of the experiment, from run folder to run folder: dense training, tuning, pruning, re-training.

Each takes a `Run`, does nothing if it is finished, and writes `done.json` last. A figure notebook opened alone calls
the same functions for whatever is missing.
"""

import errno
import hashlib
import math
import os
import shutil
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mtprune_utils import training
from mtprune_utils.checkpoints import Checkpoints, Interrupted, random_state, set_random_state
from mtprune_utils.data import Dataset, load_dataset
from mtprune_utils.files import UNFINISHED, locked, parse_json, read_json, read_table, write_atomically
from mtprune_utils.models import (
    Architecture, Interface, MultiTaskNet, build, count_parameters, load_imagenet_backbone, load_model, model_bytes, uniform_widths,
)
from mtprune_utils.profiles import Optimization, Profile, Pruning
from mtprune_utils.runs import TABLES, Run, code_digest


def load_data(run: Run) -> Dataset:
    """The run's data set, as many images as its profile takes, on the CPU."""
    profile = run.profile
    return load_dataset(
        run.experiment.data, run.experiment.data_root, profile.train_images, profile.test_images,
        profile.validation_share,
    )


def execute(run: Run, report: Callable[[str], None] = print, wait: bool = False) -> None:
    """Do the run, and first whatever it starts from, unless it is finished. An interrupted one goes on where it was.

    Waits for a process that is at what it starts from; with `wait`, also for one that is at the run
    itself, else raises ValueError, as it does where a part of the chain was finished by other code.
    Raises in one line what a run can fail of: RuntimeError (memory, a loss that is not finite, an
    interruption) or OSError (the disk).
    """
    run.experiment.check()
    run.reopen_if_damaged(report)
    if run.done:
        if outdated := run.outdated():
            raise ValueError(outdated)
        shutil.rmtree(run.path("checkpoints"), ignore_errors=True)  # killed before it could do that itself
        report(f"{run.stage} {run.name}: finished before, nothing to do")
        return
    profile, origin = run.profile, run.provenance()  # before the run: the code may be edited while it lasts
    device = device_of(profile)
    set_up(profile, device)
    origin |= {"threads": torch.get_num_threads(), "device": device_kind(device)}
    same = [run.name, *(origin[key] for key in ("code", "threads", "device"))]
    same = " ".join(map(str, (*same, torch.cuda.device_count(), torch.__version__)))
    checkpoints = Checkpoints(run.path("checkpoints"), profile.checkpoint_seconds, same, report)
    try:
        with locked(run.lock_file, f"{run.stage} {run.name}", wait, report):
            for upstream in run.inputs:
                execute(upstream, report, wait=True)
            with checkpoints.stopping():
                if not run.done:  # by another process, meanwhile
                    _execute(run, origin, report, checkpoints)
                if checkpoints.stop:  # asked for too late for a checkpoint
                    finished = f"{run.stage} {run.name} finished"
                    raise Interrupted(f"stopped, with {finished}: run it again to go on")
    except training.Diverged as error:
        kept = f"; the last good checkpoint is that of step {checkpoints.step}" if checkpoints.step else ""
        raise training.Diverged(f"{error}{kept}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise
        raise OSError(
            f"{error.strerror} at {error.filename or f'{run.stage} {run.name}'}: make room or choose another folder (`runs`, or "
            "MTPRUNE_CACHE for the decoded data), and run it again; what is finished is kept"
        ) from error
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            size, crop = profile.batch_size, profile.crop
            smaller = {"batch_size": size // 2} if size > 1 else {"crop": crop // 2}
            raise RuntimeError(
                f"out of memory on {device} with batches of {size} at {crop} pixels: override "
                f"batch_size or crop, e.g. {smaller}"
            ) from error
        if checkpoints.loaded and not isinstance(error, Interrupted):  # no step has come of it
            unfit = f"{checkpoints.loaded} holds no state that the run can go on from"
            raise ValueError(f"{unfit}: delete it") from error
        raise


def _execute(run: Run, origin: dict, report: Callable[[str], None], checkpoints: Checkpoints) -> None:
    inputs = run.input_contents()
    torch.manual_seed(_seed(run))  # dropout; everything else has a generator of its own
    for unfinished in run.folder.rglob(f".*{UNFINISHED}"):  # what a killed process was writing
        unfinished.unlink()
    run.write_json("params.json", run.params)
    dataset = load_data(run)
    run.write_json("provenance.json", origin | {"data_digest": dataset.digest, "settings": asdict(settings_of(run))})
    stage = {"dense": _dense, "tune": _tune, "prune": _prune, "retrain": _retrain}[run.stage]
    stage(run, dataset.resized_for_evaluation(run.profile.crop).to(device_of(run.profile)), report, checkpoints)
    run.write_json("timing.json", {"seconds": round(checkpoints.elapsed, 1)})
    written = ("params.json", "provenance.json", *TABLES[run.stage])
    if gone := ", ".join(file for file in written if not run.path(file).exists()):
        checkpoints.clear()  # it has to begin anew
        raise FileNotFoundError(f"{run.folder}: {gone} was deleted while it ran: run it again")
    run.finish(origin["code"], inputs)
    checkpoints.clear()


def execute_missing(runs: list[Run], report: Callable[[str], None] = print) -> None:
    """For a figure: make what is missing of the smoke profile; of a larger one, say which command makes it.

    Raises FileNotFoundError in the latter case, and ValueError for runs of several codes.
    """
    for run in runs:
        run.reopen_if_damaged(report)
    runs[0].experiment.check_codes((run.stage, run.marker["code"]) for run in runs if run.done)
    missing = [run for run in runs if not run.done]
    if missing and runs[0].profile.name != "smoke":
        experiment = runs[0].experiment
        raise FileNotFoundError(
            f"{len(missing)} of {len(runs)} runs of {experiment.profile.name} are missing: run `{experiment.command}`"
        )
    for run in missing:
        execute(run, report)


def _seed(run: Run) -> int:
    """One stream of random numbers per stage and seed. Criterion and arm are left out: their runs are paired."""
    return _stream(f"{run.stage} {run.seed}")


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def device_of(profile: Profile) -> torch.device:
    """Raises ValueError if the profile asks for a GPU and there is none."""
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here: override it with auto or cpu")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if profile.device == "auto" else profile.device)


def device_kind(device: torch.device) -> str:
    """The device as results depend on it: "cpu AVX2", "cuda NVIDIA H100 80GB HBM3"."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {kind}"


def set_up(profile: Profile, device: torch.device) -> None:
    """Turn torch's global switches."""
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains little on small networks, and two busy thread pools slow each other tenfold.
        torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic operations ask for
        torch.use_deterministic_algorithms(profile.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not profile.deterministic  # shapes stay the same from one removal to the next
        torch.backends.cudnn.allow_tf32 = True  # of convolutions; CosPrune's products stay float32


def _dense(run: Run, dataset: Dataset, report, checkpoints: Checkpoints) -> None:
    if run.arm != "multitask":
        dataset = dataset.only(run.arm)
    model = build(run.profile.architecture({name: task.channels for name, task in dataset.tasks.items()}), _seed(run))
    if run.profile.pretrained:
        load_imagenet_backbone(model)
    _train_and_save(run, model, dataset, settings_of(run), report, checkpoints)
    trivial = training.trivial_predictors(dataset, run.profile)
    run.write_table("trivial.csv", [{"predictor": name} | metrics for name, metrics in trivial.items()])


def _train_and_save(
    run: Run, model: MultiTaskNet, dataset: Dataset, settings: Optimization, report, checkpoints: Checkpoints
) -> None:
    model.to(device_of(run.profile))
    curve = training.train(model, dataset, run.profile, settings, _seed(run), report, checkpoints=checkpoints)
    run.write_table("curve.csv", curve)
    fresh = _save(run, "model.safetensors", model, dataset)
    metrics = training.evaluate(fresh, dataset.test, dataset.tasks, run.profile)
    settings_used = {"steps": settings.steps, "lr": settings.lr, "weight_decay": settings.weight_decay}
    run.write_table("evaluations.csv", [settings_used | training.describe(model, run.profile) | metrics])


def _save(run: Run, file: str, model: MultiTaskNet, dataset: Dataset) -> MultiTaskNet:
    """Write the network as it is evaluated, with fresh batch statistics. Returns it like that."""
    profile, tasks = run.profile, dataset.tasks
    fresh = training.refreshed(model, dataset, profile)
    one = torch.ones(())
    scales = {
        name: task.unscaled(one, training.output_scale(profile)).item() for name, task in tasks.items()
    }
    pixels = tuple(name for name, task in tasks.items() if task.geometry != "image")
    fresh.interface = Interface(profile.crop, tuple(dataset.classes), scales, pixels)
    write_atomically(run.path(file), model_bytes(fresh, trained=model))
    return fresh


# --- pruning ---

def _prune(run: Run, dataset: Dataset, report, checkpoints: Checkpoints) -> None:
    settings = settings_of(run)
    last = len(run.profile.sizes) - 1
    model = network(run.source, "model.safetensors").to(device_of(run.profile))
    evaluations, layers = training.prune_iteratively(
        model, dataset, run.profile, settings, run.criterion, _seed(run),
        measure=lambda model: training.evaluate_afresh(model, dataset, dataset.test, run.profile),
        last_rank=None if run.rank in (None, last) else run.rank,
        landed=lambda rank: _save(run, landed(rank), model, dataset),
        report=report, checkpoints=checkpoints,
    )
    run.write_table("evaluations.csv", evaluations)
    run.write_table("layers.csv", layers)
    _save(run, "model.safetensors", model, dataset)


def landed(rank: int) -> str:
    """The file of a pruning run that holds the network of the size with that rank."""
    return f"size{rank}.safetensors"


def network(run: Run, file: str) -> MultiTaskNet:
    """A network that a finished run has left. Where its weights are gone or damaged, the run is repeated for them.

    Raises ValueError if the repetition does not give the same tables, as with other code or on another kind of machine.
    """
    if not run.intact(file):
        print(f"{run.stage} {run.name}: {file} is gone or damaged, the run is repeated for it")
        state = random_state()
        place = run.experiment.root / "repeated" / run.name  # beside the run, whose tables others may be reading
        with locked(place / ".lock", f"repeating {run.name}", wait=True):
            if not run.intact(file):  # another job may have repeated it, meanwhile
                repeated = _elsewhere(run, place)
                execute(repeated)
                if repeated.path("evaluations.csv").read_bytes() != run.path("evaluations.csv").read_bytes():
                    raise ValueError(
                        f"{run.stage} {run.name} has no weights here, and repeating it gives other results than its tables "
                        f"hold (other code, or another machine): delete {run.folder}, and start without --restore"
                    )
                write_atomically(run.path(file), repeated.path(file).read_bytes())
                run.vouch_for(file)
            shutil.rmtree(place, ignore_errors=True)
        set_random_state(state)
    return load_model(run.path(file), to_train=True)


def _elsewhere(run: Run, scratch: Path) -> Run:
    """The same run in another folder, where the searches that it takes its settings from are known."""
    moved = replace(run, experiment=replace(run.experiment, root=scratch))
    for upstream, copy in zip(run.inputs, moved.inputs):
        if upstream.stage == "tune":
            shutil.copytree(upstream.folder, copy.folder, dirs_exist_ok=True)
        else:
            _elsewhere(upstream, scratch)
    return moved


# --- re-training ---

def _retrain(run: Run, dataset: Dataset, report, checkpoints: Checkpoints) -> None:
    _train_and_save(run, start_of(run, _seed(run)), dataset, settings_of(run), report, checkpoints)


def settings_of(run: Run) -> Optimization | Pruning:
    """What a run trains or prunes with: its profile's numbers, as its arm and a finished search change them.

    Of a search: what it begins with.
    """
    settings = tuned(_profile_settings(run), run.tuning)
    return replace(settings, steps=equal_compute_steps(run)) if run.arm == "scratch_longer" else settings


def _profile_settings(run: Run) -> Optimization | Pruning:
    """Fine-tuning takes pruning's optimizer for re-training's length and schedule."""
    profile = run.profile
    if run.stage == "dense":
        return profile.dense
    if run.stage == "prune" or run.arm == "prune":
        return replace(profile.prune, **run.experiment.schedules.get(run.arm, {}))
    if run.arm == "finetune":
        own = {name: getattr(profile.prune, name) for name in ("optimizer", "betas", "lr", "weight_decay")}
        return replace(profile.retrain, **own)
    return profile.retrain


def start_of(run: Run, seed: int) -> MultiTaskNet:
    """The network that re-training starts from: the found widths at random, or the weights that pruning kept."""
    if run.arm == "finetune":
        return network(run.source, landed(run.rank))
    return build(found_architecture(run), seed)


def found_architecture(run: Run) -> Architecture:
    """What is re-trained: the pruning run's architecture at the run's size, or uniform widths of that size."""
    dense = run.profile.architecture({name: task.channels for name, task in run.experiment.tasks.items()})
    if run.source:
        rows = read_table(run.source.path("evaluations.csv"))
        widths = next(row["widths"] for row in rows if row["landing"] == str(run.rank))
        return replace(dense, widths=tuple(map(int, widths.split())))
    target = round(run.profile.sizes[run.rank] * count_parameters(dense))
    return uniform_widths(dense, target, run.profile.prune.floor)


def equal_compute_steps(run: Run) -> int:
    """How many steps the found network gets for the compute of dense training and of pruning until it was found.

    Scratch-B of Liu et al. (Rethinking the Value of Network Pruning, ICLR 2019), in multiply-accumulates; at most
    `controls.budget` times the profile's steps, and at least those.
    """
    rows = read_table(run.source.path("evaluations.csv"))
    end = next(i for i, row in enumerate(rows) if row["landing"] == str(run.rank))
    spent = run.profile.dense.steps * int(rows[0]["macs"])
    spent += sum((int(after["step"]) - int(row["step"])) * int(row["macs"]) for row, after in zip(rows[:end], rows[1:]))
    steps = run.profile.retrain.steps
    return min(max(spent // int(rows[end]["macs"]), steps), round(run.profile.controls.budget * steps))


# --- tuning ---

def tuned(settings, search: Run | None):
    """The settings with the learning rate and weight decay that a finished search found best, if there is one."""
    if search is None:
        return settings
    best = read_json(search.path("best.json"))
    return replace(settings, lr=best["lr"], weight_decay=best["weight_decay"])


def _tune(run: Run, dataset: Dataset, report, checkpoints: Checkpoints) -> None:
    """Optuna's search on validation images: each trial is written down as it ends, an interrupted one goes on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of a progress bar that nobody shows
        import optuna  # only here: the other stages run without it
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, trials = settings_of(run), run.profile.tuning.trials
    spaces = {name: optuna.distributions.FloatDistribution(*getattr(run.profile.tuning, name), log=True)
              for name in ("lr", "weight_decay")}
    journal = run.path("journal.log")
    study = optuna.create_study(
        storage=_storage(journal, report), load_if_exists=True,
        study_name=f"{run.name} {code_digest('tune', run.experiment.data)}",  # trials of other code do not count
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=run.profile.retrain.steps // 2),
    )
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of an interrupted batch
        study.tell(trial.number, state=TrialState.FAIL)
    if not study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING]):
        study.enqueue_trial({name: getattr(settings, name) for name in spaces})  # the profile's own come first

    def finished() -> list:
        return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])

    while len(finished()) < trials:
        # A seed of each trial's own: an interrupted search goes on as an uninterrupted one would.
        seed = _stream(f"{run.stream} {len(finished())}") % 2**32
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=6, seed=seed)
        trial = study.ask(spaces)
        checkpoints.part = f"trial {len(finished())}"
        try:
            loss = _try(run, dataset, replace(settings, **trial.params), trial, checkpoints)
        except (training.Diverged, optuna.TrialPruned):
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, loss)
            report(f"trial {len(finished())}/{trials}: validation loss {loss:.3f}")
    rows = [
        {"trial": i, "state": trial.state.name.lower(), **trial.params,
         "loss": trial.value if trial.state == TrialState.COMPLETE else None}
        for i, trial in enumerate(finished())
    ]
    run.write_table("trials.csv", rows)
    if not any(row["state"] == "complete" for row in rows):
        raise training.Diverged(f"{run.name}: every trial diverged, lower tuning.lr, now {run.profile.tuning.lr}")
    run.write_json("best.json", {**study.best_params, "loss": study.best_value})


def _storage(journal: Path, report: Callable[[str], None]):
    """Optuna's storage in the journal, cut where it can no longer be replayed."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _mend(journal, report)

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


def _mend(journal: Path, report: Callable[[str], None]) -> None:
    """Drop what a killed process leaves of a journal: its lock, half a line, and what follows damage."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # the run's own is held here

    def whole(lines: list[bytes]) -> bool:
        try:
            return lines[-1].endswith(b"\n") and type(parse_json(lines[-1])) is dict
        except ValueError:
            return False

    _cut(journal, lambda lines: all(whole([line]) for line in lines), report)


def _cut(
    journal: Path, fine: Callable[[list[bytes]], bool], report: Callable[[str], None]
) -> None:
    """Keep as many of a journal's first lines as are fine together: with one more, they are not."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    counts = range(1, len(lines) + 1)
    kept = bisect_left(counts, True, key=lambda count: not fine(lines[:count]))
    if kept < len(lines):
        report(f"{journal.name} is broken off: going on from its first {kept} of {len(lines)} lines")
        write_atomically(journal, b"".join(lines[:kept]))


def _try(run: Run, dataset: Dataset, settings: Optimization | Pruning, trial, checkpoints: Checkpoints) -> float:
    """The validation loss that one trial's settings reach."""
    seed = _stream(f"{run.arm} {run.seed}")
    torch.manual_seed(seed)
    if run.arm != "prune":
        import optuna

        def watch(step: int, loss: float) -> None:
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        model = start_of(run, seed).to(device_of(run.profile))
        curve = training.train(
            model, dataset, run.profile, settings, seed, report=lambda line: None, watch=watch, checkpoints=checkpoints
        )
        return min(map(training.total_loss, curve))
    model = network(run.source, "model.safetensors").to(device_of(run.profile))
    training.prune_iteratively(
        model, dataset, run.profile, settings, run.criterion, seed, measure=lambda model: {}, last_rank=run.rank,
        checkpoints=checkpoints,
    )
    loss = training.total_loss(training.evaluate_afresh(model, dataset, dataset.validation, run.profile))
    if not math.isfinite(loss):
        raise training.Diverged(f"the validation loss is {loss}")
    return loss
