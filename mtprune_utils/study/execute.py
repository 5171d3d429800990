"""Doing runs: each after what it starts from, once, and so that an interrupted one goes on."""

import errno
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from mtprune_utils.core import trainer
from mtprune_utils.core.checkpoints import Checkpoints, Interrupted, random_state, set_random_state
from mtprune_utils.core.data import Dataset
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.targets import IGNORE, Depth, ImageClass, Labels, Normals
from mtprune_utils.core.task import Task
from mtprune_utils.datasets import load_dataset
from mtprune_utils.files import UNFINISHED, locked
from mtprune_utils.stages._training import device_kind, device_of, set_up
from mtprune_utils.study import store
from mtprune_utils.study.grid import Run
from mtprune_utils.study.phases import Phase, Report, Watched

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)


def load_data(run: Run) -> Dataset:
    """The run's data set, see `checked_data`."""
    return checked_data(run.experiment.data, run.experiment.data_root, run.profile)


def checked_data(data: str, root: str, profile: Profile) -> Dataset:
    """A data set, as many images as the profile takes, on the CPU.

    Raises ValueError where it is not as `check_dataset` wants it.
    """
    names = ("train_images", "test_images", "validation_share")
    dataset = load_dataset(data, root, **{name: getattr(profile, name) for name in names})
    check_dataset(dataset)
    return dataset


def check_dataset(dataset: Dataset) -> None:
    """Whether all is in the common form (`core.data`), as training and evaluation take for granted.

    For data sets whose loader does not look. Raises ValueError, in one line, for what is not.
    """
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        image, where = split.image, f"{dataset.name}, {part}"
        if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"{where}: images are {_form(image)}, expected uint8 (N, 3, H, W)")
        if split.targets.keys() != dataset.tasks.keys():
            found, expected = (", ".join(names) for names in (split.targets, dataset.tasks))
            raise ValueError(f"{where}: there are targets {found}, expected those of {expected}")
        for name, task in dataset.tasks.items():
            _check_target(split.targets[name], task, image, f"{where}: {name}")


def _check_target(target: Tensor, task: Task, image: Tensor, where: str) -> None:
    """Raises ValueError where a split's target is not of its task's kind. image: (N, 3, H, W)."""
    count, _, height, width = image.shape
    shapes = {
        Labels: (count, height, width),
        Depth: (count, 1, height, width),
        Normals: (count, 3, height, width),
        ImageClass: (count,),
    }
    kinds = [kind for kind in shapes if isinstance(task.target, kind)]
    classes = isinstance(task.target, (Labels, ImageClass))
    right = target.is_floating_point() != classes
    if kinds and (target.shape != shapes[kinds[0]] or not right):
        expected = f"{'whole numbers' if classes else 'floats'} {shapes[kinds[0]]}"
        raise ValueError(f"{where} is {_form(target)}, expected {expected}")
    if classes:
        wrong = target[((target < 0) | (target >= task.channels)) & (target != IGNORE)]
        if len(wrong):
            most = f"0 to {task.channels - 1}, or {IGNORE} for what does not count"
            raise ValueError(f"{where} has class {wrong[0].item()}, expected {most}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def execute(run: Run, report: Report | None = None, wait: bool = False) -> None:
    """Do the run, and first whatever it starts from, unless it is finished.

    report: told what it says; by default each phase has a bar in a notebook (see `phases`).
    An interrupted one goes on where it was. Waits for a process that is at what it starts from;
    with `wait`, also for one that is at the run itself, else raises ValueError, as it does where a
    part of the chain was finished by other code. Raises in one line what a run can fail of:
    RuntimeError (memory, a loss that is not finite, an interruption) or OSError (the disk).
    """
    run.experiment.check()
    phase = Phase(run, report)
    run.invalidate_if_corrupt(phase.say)
    if run.done:
        if outdated := run.outdated():
            raise ValueError(outdated)
        shutil.rmtree(run.path("checkpoints"), ignore_errors=True)  # killed before it could
        phase.say(f"{run.stage} {run.name}: finished before, nothing to do")
        return
    # Before the run: the code may be edited while it lasts.
    profile, origin = run.profile, store.origin_of(run)
    device = device_of(profile)
    set_up(profile, device)
    origin |= {"threads": torch.get_num_threads(), "device": device_kind(device)}
    same = [run.name, *(origin[key] for key in ("code", "threads", "device"))]
    same = " ".join(map(str, (*same, torch.cuda.device_count(), torch.__version__)))
    place = run.path("checkpoints")
    checkpoints = Watched(place, profile.checkpoint_seconds, same, phase)
    try:
        with locked(run.lock_file, f"{run.stage} {run.name}", wait, phase.say):
            for upstream in run.inputs:
                execute(upstream, report, wait=True)
            with checkpoints.stopping():
                if not run.done:  # by another process, meanwhile
                    with phase:
                        _perform(run, origin, phase.say, checkpoints)
                if checkpoints.stop:  # asked for too late for a checkpoint
                    finished = f"{run.stage} {run.name} finished"
                    raise Interrupted(f"stopped, with {finished}: run it again to go on")
    except trainer.Diverged as error:
        step = checkpoints.step
        kept = f"; the last good checkpoint is that of step {step}" if step else ""
        raise trainer.Diverged(f"{error}{kept}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or f"{run.stage} {run.name}"
        raise OSError(
            f"{error.strerror} at {where}: make room or choose another folder (`runs`, or "
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


def _perform(run: Run, origin: dict, report: Report, checkpoints: Checkpoints) -> None:
    inputs, profile = run.input_contents(), run.profile
    restore_weights(run)
    torch.manual_seed(run.random_seed)  # dropout; all else has a generator of its own
    for unfinished in run.folder.rglob(f".*{UNFINISHED}"):  # what a killed process was writing
        unfinished.unlink()
    run.write_json("params.json", run.params)
    dataset = load_data(run)
    settings = asdict(run.record.settings(run))
    more = {"data_digest": dataset.digest, "settings": settings}
    run.write_json(store.PROVENANCE, origin | more)
    ready = dataset.resized_for_evaluation(profile.crop).to(device_of(profile))
    run.record.perform(run, ready, report, checkpoints)
    run.write_json("timing.json", {"seconds": round(checkpoints.elapsed, 1)})
    written = ("params.json", store.PROVENANCE, *run.tables)
    if gone := ", ".join(file for file in written if not run.path(file).exists()):
        checkpoints.clear()  # it has to begin anew
        raise FileNotFoundError(f"{run.folder}: {gone} was deleted while it ran: run it again")
    run.finish(origin["code"], inputs)
    checkpoints.clear()


def execute_missing(runs: list[Run], report: Report | None = None) -> None:
    """For a figure: make what is missing of smoke; of a larger profile, say what makes it.

    Raises FileNotFoundError in the latter case, and ValueError for runs of several codes.
    """
    for run in runs:
        run.invalidate_if_corrupt(report or print)
    experiment = runs[0].experiment
    experiment.check_codes((run, run.marker["code"]) for run in runs if run.done)
    missing = [run for run in runs if not run.done]
    if missing and experiment.profile.name != "smoke":
        raise FileNotFoundError(
            f"{len(missing)} of {len(runs)} runs of {experiment.profile.name} are missing: run "
            f"`{experiment.command}`"
        )
    for run in missing:
        execute(run, report)


# --- weights that a restored run lacks ---


def restore_weights(run: Run) -> None:
    """Have the weights that the run goes on from, repeating the finished run that made them.

    Raises ValueError if the repetition does not give the same tables, as with other code or on
    another kind of machine.
    """
    file, source = run.record.weights(run), run.source
    if file is None or source is None or source.intact(file):
        return
    print(f"{source.stage} {source.name}: {file} is gone or damaged, the run is repeated for it")
    state = random_state()
    place = source.experiment.root / "repeated" / source.name  # others may read the run's tables
    with locked(place / ".lock", f"repeating {source.name}", wait=True):
        if not source.intact(file):  # another job may have repeated it, meanwhile
            repeated = _elsewhere(source, place)
            execute(repeated)
            table = "evaluations.csv"
            if repeated.path(table).read_bytes() != source.path(table).read_bytes():
                raise ValueError(
                    f"{source.stage} {source.name} has no weights here, and repeating it gives "
                    "other results than its tables hold (other code, or another machine): delete "
                    f"{source.folder}, and start without --restore"
                )
            source.write(file, repeated.path(file).read_bytes())
            source.update_checksum(file)
        shutil.rmtree(place, ignore_errors=True)
    set_random_state(state)


def _elsewhere(run: Run, scratch: Path) -> Run:
    """The same run in another folder, where the searches whose settings it takes are known."""
    moved = replace(run, experiment=replace(run.experiment, root=scratch))
    for upstream, copy in zip(run.inputs, moved.inputs):
        if upstream.stage == "tune":
            shutil.copytree(upstream.folder, copy.folder, dirs_exist_ok=True)
        else:
            _elsewhere(upstream, scratch)
    return moved
