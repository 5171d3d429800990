"""A run's phase as it goes: a bar in a notebook, which leaves one line, and what a batch is told.

Nothing is computed for it. The steps come from the checkpoints that a training offers before each;
losses and filters are read from the state offered with them, and only where it has just been
evaluated, so that no device is waited for in between.
"""

import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mtprune_utils.core.checkpoints import Checkpoints
from mtprune_utils.core.evaluation import total_loss
from mtprune_utils.core.iterative import removal_plan
from mtprune_utils.core.task import channels
from mtprune_utils.events import EVERY, JOB, standard_output, tell
from mtprune_utils.files import read_json, read_table
from mtprune_utils.stages import prune
from mtprune_utils.stages._training import architecture
from mtprune_utils.study import store
from mtprune_utils.study.grid import Run

Report = Callable[[str], None]
TRIAL = "trial "  # and its number: how a search calls its parts
ROUTINE = ("step ", TRIAL, "removal ")  # how those lines begin that a bar shows by itself


# --- a run's name and length ---


def cell(run: Run) -> dict:
    """A run's cell as its notebook's parameters: a search has its profile's seed."""
    named = {name: value for name, value in run.cell.items() if value not in (None, "")}
    if run.stage == "tune":
        del named["seed"]
    return named


def job_name(run: Run) -> str:
    """A run among the jobs of its batch, for people: its stage and cell."""
    plain = ("criterion", "arm")
    named = cell(run).items()
    words = [f"{value}" if name in plain else f"{name} {value}" for name, value in named]
    return " ".join([run.stage, *words])


def steps(run: Run) -> float:
    """Optimizer steps, or minibatches that are scored."""
    profile, retraining = run.profile, run.profile.retrain.steps
    if run.stage == "dense":
        return profile.dense.steps
    if run.stage == "score":
        return profile.agreement_batches
    if run.stage == "tune":  # the search breaks some of its trials off
        return profile.tuning.trials * (_pruning_steps(run) if run.arm == "prune" else retraining)
    if run.stage == "prune":
        return _pruning_steps(run)
    return retraining * (profile.controls.budget if run.arm == "scratch_longer" else 1)


def _pruning_steps(run: Run) -> int:
    own, sizes = prune.scheduled(run), run.profile.sizes
    widths = architecture(run.profile, channels(run.experiment.tasks)).width_list
    plan, last = removal_plan(widths, own), len(sizes) - 1
    level = last if run.level is None else run.level
    if level < last:  # it ends there; parameters go about with the square of the filters
        plan = [left for left in plan if left >= math.sqrt(sizes[level]) * sum(widths)]
    return (len(plan) + level + 2) * own.prune_interval


# --- the phase ---


class Phase(contextlib.AbstractContextManager):
    """One run at work; while it is entered, its bar is shown.

    report: told the run's lines. Without one, they are printed, but in a notebook, where there is a
    bar. A job of the batch has none: it tells the launcher, if that has asked for it.
    """

    def __init__(self, run: Run, report: Report | None = None):
        self.run, self.report, self.name = run, report, job_name(run)
        self.one_line = report is None and in_notebook()
        self.bar: Bar | None = None
        self.step = self.total = 0
        self.facts: list[str] = []
        self.evaluated = True  # since the state was last read
        self.job, self.every = os.environ.get(JOB), os.environ.get(EVERY)
        self.told = -math.inf

    def __enter__(self) -> "Phase":
        # A re-training knows its length: what it starts from is finished by now.
        exact = self.run.stage == "retrain"
        self.total = round(self.run.record.settings(self.run).steps if exact else steps(self.run))
        if self.one_line and not self.job:
            self.bar = Bar(self.name, self.total)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self.one_line:
            return
        stopped = [f"stopped after step {self.step} of {self.total}", *self.facts]
        line = f"{self.name}: {', '.join(stopped if error else result(self.run))}"
        if self.bar:
            self.bar.leave(line)
        else:
            print(line)

    def say(self, line: str) -> None:
        """Take in a line that the run reports."""
        routine = line.startswith(ROUTINE)
        self.evaluated |= routine
        if self.report:
            self.report(line)
        elif not (self.one_line and routine):
            print(line)

    def at(self, step: int, part: str, state: Callable[[], dict]) -> None:
        """Take in that so many steps are done. part, state: as `Checkpoints` has them."""
        run, interval = self.run, self.run.profile.prune.prune_interval
        if "prune" in (run.stage, run.arm):
            self.evaluated |= step % interval == 0  # a removal, whose losses have been read
        if run.stage == "tune":
            step += int(part.removeprefix(TRIAL)) * self.total // run.profile.tuning.trials
        self.step, self.total = step, max(self.total, step)
        if not (self.bar or self.job):
            return
        if self.evaluated:
            self.evaluated, self.facts = False, [*filter(None, [part]), *facts(state())]
        if self.bar:
            self.bar.at(step, ", ".join(self.facts))
        if self.job and self.every and time.monotonic() - self.told >= float(self.every):
            self.told = time.monotonic()
            tell(self.job, "at", step=step, total=self.total, said=", ".join(self.facts))


class Watched(Checkpoints):
    """Checkpoints that also tell a phase where its run is."""

    def __init__(self, folder: Path, seconds: float, origin: str, phase: Phase):
        super().__init__(folder, seconds, origin, phase.say)
        self.phase = phase

    def keep(self, step: int, state: Callable[[], dict]) -> None:
        super().keep(step, state)
        self.phase.at(step, self.part, state)


def facts(state: dict) -> list[str]:
    """What there is to say of a run's state: its filters, and its losses where it was evaluated."""
    found, rows = [], state.get("curve") or state.get("evaluations")
    if "widths" in state:
        found.append(f"{sum(state['widths'])} filters left")
    if not rows:
        return found
    losses = {name: float(x) for name, x in rows[-1].items() if name.endswith(".loss") and x != ""}
    training = {name: x for name, x in losses.items() if name.startswith("train.")}
    if training:
        each = (f"{name[len('train.') : -len('.loss')]} {x:.3f}" for name, x in training.items())
        found.append(f"training loss {', '.join(each)}")
    return [*found, f"validation loss {total_loss(losses):.3f}"] if "curve" in state else found


def result(run: Run) -> list[str]:
    """The same of a finished run, by its tables."""
    if run.stage == "score":
        return [f"{run.profile.agreement_batches} minibatches"]
    if run.stage == "tune":
        best = read_json(run.path(store.BEST))["loss"]
        return [f"{run.profile.tuning.trials} trials, the best validation loss is {best:.3f}"]
    pruned = run.stage == "prune"
    rows = read_table(run.path("evaluations.csv" if pruned else "curve.csv"))
    last = rows[-1]
    state: dict = {"curve": rows}
    if pruned:
        widths = [int(width) for width in last["widths"].split()]
        state = {"evaluations": rows, "widths": widths}
    return [f"{last['step']} steps", *facts(state)]


# --- the bar ---


def in_notebook() -> bool:
    """Whether this is a notebook's kernel that can show a bar."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = shell is not None and "IPKernelApp" in shell.config
    return kernel and all(map(importlib.util.find_spec, ("tqdm", "ipywidgets")))


class Bar:
    """tqdm's, with steps per second and the time left. Its output is one line once it has ended.

    (tqdm itself would leave its first state there, at 0 %.) Where `launch notebook` runs the
    notebook, nobody sees its output: then the bar is on the terminal, if there is one.
    """

    def __init__(self, name: str, total: int):
        from IPython.display import display
        from tqdm import tqdm
        from tqdm.auto import tqdm as tqdm_here

        options = {"total": total, "desc": name, "unit": " steps", "leave": False}
        self.terminal, self.seen = None, True
        if JOB in os.environ:
            self.terminal = os.fdopen(os.dup(standard_output()), "w")  # the launcher's too
            self.seen = self.terminal.isatty()
            own = {"dynamic_ncols": True, "disable": not self.seen}
            self.bar = tqdm(file=self.terminal, **own, **options)
        else:
            self.bar = tqdm_here(mininterval=0.5, display=False, **options)
            self.output = display(self.bar.container, display_id=True)

    def at(self, step: int, said: str) -> None:
        """Go to a step. One that others have done, before an interruption, counts for no speed."""
        bar = self.bar
        if bar.disable:  # nobody sees it, and it has no such numbers
            return
        gone = step - bar.n
        if gone not in (0, 1):
            for name in ("initial", "n", "last_print_n"):
                setattr(bar, name, getattr(bar, name) + gone)
            gone = 0
        bar.total = max(bar.total, step)
        bar.set_postfix_str(said, refresh=False)
        bar.update(gone)

    def leave(self, line: str) -> None:
        """End the bar, and show the line in its place."""
        self.bar.total = self.bar.n  # less would be shown as a failure
        self.bar.close()
        if not self.terminal:
            self.output.update({"text/plain": line}, raw=True)
            return
        print(line)
        if self.seen:
            print(line, file=self.terminal, flush=True)
