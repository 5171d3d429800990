"""What is shown of work as it goes: a notebook's bars, a batch's table, else plain lines."""

import io
import json
import os
import re
import sys
import time

import nbformat
import pytest
from rich.console import Console
from tqdm import tqdm

from conftest import LAUNCH
from mtprune_utils import events
from mtprune_utils.files import PROJECT
from mtprune_utils.run import launch, notebook, plan, progress
from mtprune_utils.run.plan import Job
from mtprune_utils.study import phases
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.phases import Bar, Phase
from test_batch import in_terminal, write_notebook

# Of each phase some steps, no search.
OVERRIDES = {"tuning.trials": 0, "seeds": 1, "controls.seeds": 0}
TIME = re.compile(r"\d:\d\d|steps/s|%")
JOBS = [
    Job("dense seed 0 multitask", 100.0, (), 24),
    Job("prune taylor seed 0 iterative", 200.0, (0,), 12),
    Job("prune cosprune seed 0 iterative", 200.0, (0,), 12),
    Job("retrain taylor seed 0 level 0 scratch", 50.0, (1,), 11),
    Job("figure fig1_iterative_pruning", 10.0, (1, 2)),
]
DENSE, TAYLOR, COSPRUNE, RETRAIN, FIGURE = (job.name for job in JOBS)


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still: [seconds]."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def event(job, event, **more):
    return f"{events.EVENT}{json.dumps({'job': job, 'event': event, **more})}\n"


GRID = event("batch", "grid", jobs=[job.name for job in JOBS], figures=["figures/fig1.png"])
TABLE = ["job  count\n", "dense 1\n", "prune  2\n", "retrain 1\n", "figure  1\n", "total 5\n"]


def a_batch(tmp_path, clock, screen=True, finished=(), measured=True, height=24):
    """What the launcher knows of a batch of JOBS, two at a time, and its console."""
    batch = launch.Progress(tmp_path / "timings.csv", "2 at a time")
    if screen:
        batch.screen = progress.Screen(JOBS, measured, set(finished), 2)
        wide = {"width": 120, "height": height, "force_terminal": True}
        batch.screen.console = Console(record=True, file=io.StringIO(), **wide)
    for line in [GRID, *TABLE]:
        batch.read(line)
    return batch


def shown(batch):
    """The table as text, line by line."""
    batch.screen.console.export_text(clear=True)
    batch.screen.console.print(batch.screen.table(batch))
    return [line.rstrip() for line in batch.screen.console.export_text().splitlines()][1:]


# --- the batch's table ---


def test_running_jobs_have_bars_and_the_batch_a_line(tmp_path, clock):
    batch = a_batch(tmp_path, clock)
    assert shown(batch) == ["0 s so far"]
    batch.read(event(DENSE, "started"))
    clock[0] += 20
    assert [line.split("━")[0].strip() for line in shown(batch)] == [
        DENSE,
        # What the dense network still takes, one pruning run beside the other, the re-training.
        "0 of 5 jobs finished, 1 running, 20 s so far, about 5 min 36 s left",
    ]
    batch.read(event(DENSE, "at", step=0, total=200, said=""))
    clock[0] += 10
    batch.read(event(DENSE, "at", step=50, total=200, said="training loss depth 0.511"))
    row, _ = shown(batch)
    # Fifty steps took ten seconds.
    assert re.search(r"multitask +━+.* 50/200 30 s left training loss depth 0.511$", row)
    clock[0] += 30
    batch.read(event(DENSE, "done", seconds=60.0))
    for job in (TAYLOR, COSPRUNE):
        batch.read(event(job, "started"))
    assert len(shown(batch)) == 3
    assert shown(batch)[-1].startswith("1 of 5 jobs finished, 2 running, 1 min 0 s so far, about")


def test_a_failure_is_told_at_once_with_its_reason_and_counted(tmp_path, clock):
    batch = a_batch(tmp_path, clock)
    batch.read(event(DENSE, "started"))
    clock[0] += 7
    batch.read(event(DENSE, "failure", seconds=7.0, error="01: the loss is nan", notebook="x"))
    said = batch.screen.console.export_text(styles=True)
    why = f"[0/5] {DENSE}  FAILED after 7 s, trying once more: 01: the loss is nan"
    assert f"\x1b[1;31m{why}" in said, "in red"
    assert "1 failed, 0 running" in shown(batch)[-1]
    batch.read(event(DENSE, "started"))
    batch.read(event(DENSE, "done", seconds=7.0))
    assert "failed" not in shown(batch)[-1]


def test_a_job_that_is_killed_is_told_at_once_though_it_could_not(tmp_path, clock, capsys):
    batch = a_batch(tmp_path, clock, screen=False)
    died = (
        f"Command 'set; exec python -m x --job '{DENSE}' -p seed 0' died with <Signals.SIGKILL: 9>."
    )
    batch.read(died)  # of a job that has told its end, or was never seen
    batch.read(event(DENSE, "started"))
    capsys.readouterr()
    batch.read(died)
    reason = "killed from outside by SIGKILL (out of memory?)"
    line = f"[0/5] {DENSE}  FAILED after 0 s, trying once more: {reason}\n"
    assert capsys.readouterr().out == line and not batch.running
    assert f"{DENSE}: {reason}" in batch.trouble(tmp_path / "log")


def test_no_more_rows_than_the_terminal_has(tmp_path, clock):
    batch = a_batch(tmp_path, clock, height=7)
    for job in JOBS:
        batch.read(event(job.name, "started"))
    lines = shown(batch)
    assert lines[3] == "... and 2 more" and len(lines) == 5


def test_a_terminal_gets_no_line_for_a_start_and_another_output_does(tmp_path, clock, capsys):
    stream = [
        event(DENSE, "started"),
        event(DENSE, "at", step=3, total=9, said="training loss depth 0.5"),
        "    output: done.json\n",
        event(DENSE, "done", seconds=12.0),
        event(TAYLOR, "started"),
        event(TAYLOR, "failure", seconds=3.0, error="why", notebook="x"),
    ]
    plain, live = a_batch(tmp_path, clock, screen=False), a_batch(tmp_path, clock)
    for line in stream:
        plain.read(line)
        live.read(line)
    ends = [
        "5 jobs to do, 0 finished earlier; 2 at a time",
        f"[1/5] {DENSE}  done in 12 s   (elapsed 0 s)",
        f"[1/5] {TAYLOR}  FAILED after 3 s, trying once more: why",
    ]
    assert live.screen.console.export_text().splitlines() == ends
    assert capsys.readouterr().out.splitlines() == [
        ends[0],
        f"[0/5] {DENSE}  started",
        ends[1],
        f"[1/5] {TAYLOR}  started",
        ends[2],
    ]


@pytest.mark.parametrize(
    "terminal, environment, expected",
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {}, False),
        (True, {"TERM": "xterm", "CI": "true"}, False),
    ],
)
def test_the_table_is_for_somebody_who_looks(terminal, environment, expected, monkeypatch):
    for name in ("TERM", "CI", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert progress.on_terminal() is expected


# --- the time that is left ---


def left(batch):
    screen = batch.screen
    return screen.left(batch, dict(batch.running), screen.expected(batch.took))


def test_time_left_is_that_of_the_plan_before_anything_has_run(tmp_path, clock):
    assert left(a_batch(tmp_path, clock)) == plan.makespan(JOBS, 2) - plan.BATCH_START


def test_time_left_takes_what_jobs_really_took(tmp_path, clock):
    batch = a_batch(tmp_path, clock)
    batch.read(event(DENSE, "done", seconds=50.0))
    # With none of their stage to go by, jobs take half of what was thought, as the dense one did.
    assert left(batch) == 100 + 25 + 2 * plan.BETWEEN_JOBS
    batch.read(event(TAYLOR, "done", seconds=400.0))
    # The other pruning takes twice the thought, as this one did; the figure their average.
    figure = 10 * (50 + 400) / (100 + 200)
    assert left(batch) == pytest.approx(400 + figure + 2 * plan.BETWEEN_JOBS)


def test_time_left_is_unknown_until_a_job_is_done_where_nothing_was_measured(tmp_path, clock):
    batch = a_batch(tmp_path, clock, measured=False)
    assert left(batch) is None
    batch.read(event(DENSE, "started"))
    assert "left" not in "".join(shown(batch))
    batch.read(event(DENSE, "done", seconds=50.0))
    assert left(batch) > 0


def test_what_a_finished_job_waits_for_makes_it_run_again(tmp_path, clock):
    def again(*finished):
        return [*a_batch(tmp_path, clock, finished=finished).screen.again]

    assert again(DENSE, TAYLOR, RETRAIN) == [2, 4]
    assert again(TAYLOR, COSPRUNE, RETRAIN, FIGURE) == [0, 1, 2, 3, 4]
    assert again(*(job.name for job in JOBS)) == []


def test_nothing_is_expected_of_jobs_that_are_given_up(tmp_path, clock):
    batch = a_batch(tmp_path, clock, finished=[DENSE])
    for _ in range(2):
        batch.read(event(TAYLOR, "started"))
        batch.read(event(TAYLOR, "failure", seconds=1.0, error="why", notebook="x"))
    # Its re-training and the figure wait for it in vain.
    assert left(batch) == 200 + plan.BETWEEN_JOBS


def test_what_runs_alone_waits_for_what_is_left(tmp_path, clock):
    alone = [*JOBS[:3], Job("figure fig4_speedup", 30.0, (0,), alone=True)]
    batch = a_batch(tmp_path, clock)
    batch.screen = progress.Screen(alone, True, {DENSE}, 2)
    assert left(batch) == 200 + 30 + 2 * plan.BETWEEN_JOBS


# --- a run's phase ---


class Recorded:
    """A bar that notes what it is told."""

    def __init__(self, *given):
        self.steps, self.said, self.line = [], [], None

    def at(self, step, said):
        self.steps.append(step)
        self.said.append(said)

    def leave(self, line):
        self.line = line


@pytest.fixture
def bars(monkeypatch):
    """The bars of this process's runs, {name: Recorded}, as if it were a notebook's kernel."""
    made = {}
    monkeypatch.delenv(events.JOB, raising=False)
    monkeypatch.setattr(phases, "in_notebook", lambda: True)
    monkeypatch.setattr(phases, "Bar", lambda name, total: made.setdefault(name, Recorded()))
    return made


def smoke(tmp_path, **overrides):
    return Experiment.open("smoke", "rooms", "", str(tmp_path), {**OVERRIDES, **overrides})


def test_a_chain_of_runs_has_a_bar_and_a_line_each(bars, tmp_path, capsys):
    execute(smoke(tmp_path).retrain("taylor", 0, 0))
    dense, prune, retrain = bars.values()
    names = [DENSE, "prune taylor seed 0 iterative", "retrain taylor seed 0 level 0 scratch"]
    assert [*bars] == names and not capsys.readouterr().out
    assert dense.steps == [*range(24)] and prune.steps == [*range(16)]
    first = r"training loss segmentation \d.\d{3}, depth \d.\d{3}, normals \d.\d{3}"
    trained = rf"{first}, validation loss \d.\d{{3}}"
    # Evaluated after 12 steps of 24, and at the end.
    assert dense.said[11] == "" and re.fullmatch(trained, dense.said[12])
    assert prune.said[0] == "272 filters left"
    assert re.fullmatch(rf"\d+ filters left, {first}", prune.said[-1])
    assert re.fullmatch(rf"{names[0]}: 24 steps, {trained}", dense.line)
    assert re.fullmatch(rf"{names[1]}: 16 steps, 65 filters left, {first}", prune.line)
    assert retrain.line.startswith(f"{names[2]}: 24 steps, training loss")


def test_a_search_has_one_bar_over_all_its_trials(bars, tmp_path):
    overrides = {"tuning.trials": 2, "retrain.steps": 6, "retrain.evaluations": 1}
    execute(smoke(tmp_path, **overrides).tune("retrain", "uniform", 0))
    search = bars["tune uniform level 0 retrain"]
    assert search.steps == [*range(12)]
    assert search.said[0] == "trial 0" and search.said[-1].startswith("trial 1")
    assert re.search(r": 2 trials, the best validation loss is \d.\d{3}$", search.line)


def test_a_stopped_run_says_where(bars, tmp_path, monkeypatch):
    def broken(*given):
        raise OSError("no more")

    monkeypatch.setattr("mtprune_utils.core.trainer.evaluate", broken)
    with pytest.raises(OSError, match="no more"):
        execute(smoke(tmp_path).dense(0))
    assert bars[DENSE].line == f"{DENSE}: stopped after step 11 of 24"


def test_the_state_is_read_only_where_it_has_just_been_evaluated(bars, tmp_path):
    read = []
    run = smoke(tmp_path).dense(0)
    with Phase(run) as phase:
        for step in range(24):
            phase.at(step, "", lambda: read.append(step) or {})
            if step == 11:
                phase.say("step 12/24: validation loss 3.000")
        run.write_table("curve.csv", [{"step": 24, "depth.loss": 1.0}])
    assert read == [0, 12]


def test_a_job_tells_where_it_is_as_often_as_is_asked(bars, tmp_path, clock, monkeypatch):
    told = []
    monkeypatch.setenv(events.JOB, DENSE)
    monkeypatch.setenv(events.EVERY, "10")
    monkeypatch.setattr(phases, "tell", lambda job, event, **more: told.append((job, event, more)))
    run = smoke(tmp_path).dense(0)
    run.write_table("curve.csv", [{"step": 24, "depth.loss": 1.0}])
    with Phase(run) as phase:
        for step in range(24):
            phase.at(step, "", dict)
            clock[0] += 1
    assert not bars, "nobody sees a job's notebook"
    assert told == [(DENSE, "at", {"step": step, "total": 24, "said": ""}) for step in (0, 10, 20)]


def test_nothing_is_told_where_nobody_asks(bars, tmp_path, monkeypatch):
    told = []
    monkeypatch.setenv(events.JOB, DENSE)
    monkeypatch.delenv(events.EVERY, raising=False)
    monkeypatch.setattr(phases, "tell", lambda *event, **more: told.append(event))
    with pytest.raises(KeyboardInterrupt), Phase(smoke(tmp_path).dense(0)) as phase:
        phase.at(0, "", dict)
        raise KeyboardInterrupt
    assert told == []


def test_steps_before_an_interruption_count_for_no_speed():
    bar = Bar.__new__(Bar)
    bar.bar = tqdm(total=100, file=io.StringIO())
    for step in (50, *range(51, 61)):
        bar.at(step, "loss")
    assert (bar.bar.initial, bar.bar.n) == (50, 60)
    bar.at(80, "the next trial")  # the one before was broken off
    assert (bar.bar.initial, bar.bar.n) == (70, 80)
    bar.bar.close()


# --- in a real kernel ---


def test_an_executed_notebook_has_a_line_for_each_phase_and_no_times(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    given = {"runs": str(tmp_path), "overrides": OVERRIDES}
    notebook.execute("notebooks/02_prune_iteratively.ipynb", tmp_path / "out.ipynb", given)
    text = (tmp_path / "out.ipynb").read_text()
    cells = nbformat.reads(notebook.without_volatile_metadata(text), as_version=4).cells
    (cell,) = (cell for cell in cells if cell.source == "execute(run)")
    assert all(output.output_type == "display_data" for output in cell.outputs)
    assert [[*output.data] for output in cell.outputs] == [["text/plain"]] * 2
    lines = [output.data["text/plain"] for output in cell.outputs]
    assert [line.split(":")[0] for line in lines] == [DENSE, "prune taylor seed 0 iterative"]
    assert not any("\n" in line or TIME.search(line) for line in lines)


CELLS = """\
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
execute(Experiment.open("smoke", "rooms", "", runs).dense(0))"""


def test_a_notebook_run_by_hand_shows_its_bar_on_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    write_notebook(tmp_path / "nb.ipynb", CELLS, parameters='runs: str = "runs"')
    command = [*LAUNCH, "notebook", "nb.ipynb", "out.ipynb"]
    runs = str(tmp_path / "runs")
    code, said = in_terminal([*command, "-p", "runs", runs], tmp_path)
    assert code == 0, said
    assert re.search(rf"{DENSE}: +\d+%\|", said) and " steps/s" in said
    *_, line, end = said.strip().splitlines()
    assert line.startswith(f"{DENSE}: 24 steps, training loss")
    assert end == "nb.ipynb ran to its end: out.ipynb"
    cell = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1]
    assert [output.text.count("\n") for output in cell.outputs] == [1]
