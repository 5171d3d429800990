"""What the jobs of a batch tell its launcher, and the table that it shows of them on a terminal.

Where the output is no terminal, or in CI, there is no table, only the launcher's lines.
"""

import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, for which the runner of a job need not wait
    from mtprune_utils.run import plan

# Every how many seconds jobs tell of their steps, on this machine and on a cluster, where each time
# costs a file on a shared disk.
HERE, ELSEWHERE = 1, 10
FIRST = 10**6  # above every priority


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def on_terminal() -> bool:
    """Whether somebody looks at what is printed, on a screen that can be written anew."""
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return sys.stdout.isatty() and able and not os.environ.get("CI")


@dataclass
class Running:
    """A job at work, by what it has told. Times are `time.monotonic`'s."""

    since: float
    step: int = 0
    total: int = 0  # 0: it has none, or has not begun to train
    said: str = ""
    begun: tuple[float, int] | None = None  # when it first told a step, and which
    heard: float = 0.0  # when it last did

    def at(self, step: int, total: int, said: str) -> None:
        self.heard = time.monotonic()
        if step < self.step or total != self.total:  # another run, before the job's own
            self.begun = None
        self.step, self.total, self.said = step, total, said
        self.begun = self.begun or (self.heard, step)

    def left(self, expected: float | None) -> float | None:
        """Seconds, by its own speed, or as long as it has shown none, by those expected of all.

        None where it has taken more already.
        """
        now = time.monotonic()
        if self.begun and self.step > self.begun[1]:
            speed = (self.step - self.begun[1]) / (self.heard - self.begun[0])
            return max((self.total - self.step) / speed - (now - self.heard), 0.0)
        if expected is None or expected < now - self.since:
            return None
        return expected - (now - self.since)


class Screen:
    """The table below the lines of a batch.

    jobs: all of them, each after what it waits for, with the seconds that it is thought to take.
    measured: whether those are seconds, and not only all alike. finished: those that were before.
    workers: how many run at a time.
    """

    def __init__(self, jobs: "list[plan.Job]", measured: bool, finished: set[str], workers: float):
        from rich.console import Console

        self.measured, self.workers, self.start = measured, workers, time.monotonic()
        self.again: dict[int, plan.Job] = {}  # those to do, by their number
        for i, job in enumerate(jobs):
            if job.name not in finished or self.again.keys() & {*job.inputs}:
                self.again[i] = job
        self.console = Console()

    @classmethod
    def of(cls, experiment, figures: Path, workers: float) -> "Screen":
        """For a batch whose figures lie there."""
        from mtprune_utils.run import plan

        seconds = plan.Seconds(experiment, figures.parent)
        measured = bool(seconds.measured)
        jobs = plan.jobs_of(experiment, seconds if measured else lambda run: plan.FIGURE_SECONDS)
        drawn = {f"figure {path.stem}" for path in figures.glob("*.json")}
        runs = {plan.job_name(run) for run in experiment.runs() if run.done}
        return cls(jobs, measured, runs | drawn, workers)

    def showing(self, progress):
        """While that is entered, the table is below the lines; it leaves nothing behind."""
        from rich.live import Live

        return Live(
            get_renderable=lambda: self.table(progress),
            console=self.console,
            refresh_per_second=2,
            transient=True,
        )

    def say(self, line: str, bad: bool = False) -> None:
        style = "bold red" if bad else None
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, progress):
        """The jobs at work, a row each, and a line on all."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        running = dict(progress.running)  # the other thread goes on
        expected = self.expected(progress.took)
        room = max(self.console.height - 4, 1)
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        rows.add_column(width=16)
        for _ in range(2):
            rows.add_column(no_wrap=True, justify="right")
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, job in list(running.items())[:room]:
            left = job.left(expected.get(name))
            rows.add_row(
                Text(name),
                ProgressBar(job.total or None, job.step, pulse=not job.total),
                f"{job.step}/{job.total}" if job.total else "",
                "" if left is None else f"{duration(left)} left",
                Text(job.said, style="dim"),
            )
        more = [f"... and {len(running) - room} more"] if len(running) > room else []
        return Group(Text(), rows, *more, Text.assemble(*self.summary(progress, running, expected)))

    def summary(self, progress, running: dict[str, Running], expected: dict[str, float]) -> list:
        """The last line: [text, or (text, style)]."""
        so_far = f"{duration(time.monotonic() - self.start)} so far"
        if not progress.attempts:  # Snakemake is still looking
            return [so_far]
        parts: list = [f"{progress.finished} of {progress.total} jobs finished"]
        if progress.failed:
            parts += [", ", (f"{len(progress.failed)} failed", "bold red")]
        parts += [f", {len(running)} running, {so_far}"]
        left = self.left(progress, running, expected)
        return parts if left is None else [*parts, f", about {duration(left)} left"]

    def expected(self, took: dict[str, float]) -> dict[str, float]:
        """{job: seconds} of the jobs to do; nothing as long as nothing is known.

        took: {job: seconds} of those done in this batch. By them the thought ones are corrected,
        stage by stage.
        """
        thought: dict[str, float] = defaultdict(float)
        real: dict[str, float] = defaultdict(float)
        for job in self.again.values():
            if job.name in took:
                for kind in ("", job.name.split()[0]):  # all, and its stage
                    thought[kind] += job.seconds
                    real[kind] += took[job.name]
        if not (real or self.measured):
            return {}
        factors = {kind: real[kind] / thought[kind] for kind in real if thought[kind]}
        rest = factors.get("", 1.0)
        stage = {job.name: job.name.split()[0] for job in self.again.values()}
        return {
            job.name: job.seconds * factors.get(stage[job.name], rest)
            for job in self.again.values()
        }

    def left(self, progress, running: dict[str, Running], expected: dict[str, float]):
        """Seconds until the batch ends. None where nothing is known to tell them by."""
        from mtprune_utils.run import plan

        if not expected:
            return None
        lost: set[int] = set()  # given up, or waiting for such a job
        to_do = {}
        for i, job in self.again.items():
            if progress.given_up(job.name) or lost & {*job.inputs}:
                lost.add(i)
            elif job.name not in progress.took:
                to_do[i] = job
        number = {i: new for new, i in enumerate(to_do)}
        jobs = []
        for job in to_do.values():
            at_work = running.get(job.name)
            seconds = at_work.left(expected[job.name]) or 0.0 if at_work else expected[job.name]
            inputs = tuple(number[i] for i in job.inputs if i in number)
            priority = FIRST if at_work else job.priority
            jobs.append(replace(job, seconds=seconds, inputs=inputs, priority=priority))
        return plan.makespan(jobs, self.workers) - plan.BATCH_START if jobs else 0.0
