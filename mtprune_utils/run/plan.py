"""What a batch will take before it has run, and who waits for whom: no run's result is needed.

    mtprune plan --profile study --workers 2 16

Seconds come from a measured batch (its timings.csv): of the same experiment if there is one, else
of the same profile, else of `quick`. A job takes what a kernel's start takes, and so long for each
step of training as those of its stage did; between profiles, a step's time goes by its
multiply-accumulates. So a figure of the same profile is good, one of another profile a guess, and
it says which.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from mtprune_utils.core.model import complexity, count_parameters
from mtprune_utils.core.task import channels
from mtprune_utils.files import PROJECT, read_table
from mtprune_utils.stages._training import architecture
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.phases import job_name, steps
from mtprune_utils.study.profiles import get_profile
from mtprune_utils.study.tables import recorded_origins

STARTUP = 6.0  # seconds of a job in which it trains nothing: its kernel, the imports, the data
# Seconds until the first job starts, and between two on one worker, of which no job knows.
BATCH_START, BETWEEN_JOBS = 8.0, 2.0
FIGURE_SECONDS = 10.0
# Of a cluster's job, against what one of its kind took: other machines, a disk that many share.
TIME_FACTOR, LEAST_MINUTES, UNKNOWN_MINUTES = 3, 15, 240
# A seed is finished before the next begins, so that a study of many sittings has whole seeds; but
# what others wait for goes first, dense networks a seed ahead, so that no core idles.
PRIORITIES = {"dense": 14, "tune": 3, "prune": 2, "retrain": 1, "score": 1}
MEASURED = "quick"  # the profile whose speed stands for those that nobody has measured
TEXTS = 200e3  # bytes of a run that are not weights: tables, provenance, the executed notebook
WORKERS = (1, 2, 4, 8, 16, 64, 256, 1000)
DRIVER = PROJECT / "benchmarks" / "graph.csv"  # see benchmarks/graph.py


# --- the batch, as the Snakefile has it ---


def figures(experiment: Experiment) -> dict[str, Path]:
    """{figure: its notebook}. What else that one draws comes with it, and not in every profile."""
    about = {path: store.about_notebook(path) for path in store.notebook_paths()}
    return {
        found["figures"][0]: path
        for path, found in about.items()
        if "figures" in found and experiment.draws(found)
    }


def priority(run: Run) -> int:
    """All above a figure's 0: those fill the gaps at the end."""
    profile = run.profile
    first = -1 if run.seed == profile.tuning.seed else run.seed
    return PRIORITIES[run.stage] + 10 * (profile.seeds - first)


@dataclass(frozen=True)
class Job:
    """One job of a batch.

    inputs: the numbers, in its list, of those it waits for. alone: it runs while nothing else does.
    """

    name: str
    seconds: float
    inputs: tuple[int, ...] = ()
    priority: int = 0
    alone: bool = False


def jobs_of(experiment: Experiment, seconds: Callable[[Run], float | None]) -> list[Job]:
    """Every job of the batch, each after what it waits for. seconds: of a run, as `Seconds`."""
    runs = experiment.runs()
    number = {run.folder: i for i, run in enumerate(runs)}
    jobs = [
        Job(
            job_name(run),
            seconds(run) or 0.0,
            tuple(number[upstream.folder] for upstream in run.inputs),
            priority(run),
        )
        for run in runs
    ]
    for figure, path in figures(experiment).items():
        about = store.about_notebook(path)
        inputs = tuple(number[run.folder] for run in experiment.needed(about["needs"]))
        alone = about.get("alone", False)
        jobs.append(Job(f"figure {figure}", FIGURE_SECONDS, inputs, alone=alone))
    return jobs


# --- seconds ---


class Seconds:
    """How long a run takes, by a measured batch. figures: the folder where its timings may lie."""

    def __init__(self, experiment: Experiment, figures: Path = PROJECT / "figures"):
        self.experiment = experiment
        own = replace(experiment, profile=get_profile(experiment.profile.name))
        other = Experiment(get_profile(MEASURED))
        places = (figures, own), (PROJECT / "figures", own), (PROJECT / "figures", other)
        self.measured: Experiment | None = None  # the one that was
        for folder, measured in places:
            self.file = folder / measured.label / store.TIMINGS
            self.rows = read_table(self.file) if self.file.exists() else []
            # Of figures alone, as where all runs came from elsewhere, nothing is told.
            if any(row["stage"] != "figure" for row in self.rows):
                self.measured = measured
                break

    @property
    def guessed(self) -> bool:
        """Whether what was measured is another profile."""
        return self.measured is None or self.measured.profile.name != self.experiment.profile.name

    @property
    def worker(self) -> str:
        """What was measured to work: "CPU" or "GPU", or "worker" where nothing says which."""
        if self.measured is None:
            return "worker"
        folder = self.file.parent.parent
        try:
            origins = recorded_origins(self.measured, folder).values()
        except FileNotFoundError:  # times are there, tables are not
            return "worker"
        devices = {origin.get("device", "").split(" ")[0] for origin in origins}
        return {"cpu": "CPU", "cuda": "GPU"}.get("".join(devices), "worker")

    @property
    def basis(self) -> str:
        if not self.measured:
            return f"nothing is measured: there is no {self.file}"
        name = self.measured.label
        file = self.file.relative_to(PROJECT) if self.file.is_relative_to(PROJECT) else self.file
        return f"by the measured batch {name}, {file}"

    @cached_property
    def rates(self) -> dict[tuple, float]:
        """Seconds per unit of work of the measured runs, by what `_kinds` names."""
        runs = {job_name(run): run for run in self.measured.runs()} if self.measured else {}
        spent: dict[tuple, float] = defaultdict(float)
        work: dict[tuple, float] = defaultdict(float)
        for row in self.rows:
            if run := runs.get(row["job"]):  # else the profile has changed since
                for kind in _kinds(run):
                    spent[kind] += max(float(row["seconds"]) - STARTUP, 0.0)
                    work[kind] += steps(run) * _step_macs(run.experiment)
        return {kind: spent[kind] / work[kind] for kind in spent}

    def __call__(self, run: Run) -> float | None:
        """None where nothing is measured."""
        if not self.measured or not self.rates:
            return None
        rate = next(self.rates[kind] for kind in _kinds(run) if kind in self.rates)
        return STARTUP + rate * steps(run) * _step_macs(run.experiment)


def _kinds(run: Run) -> list[tuple]:
    """Those runs that take as long, from the most alike to all."""
    stage = run.stage
    return [(stage, run.arm, run.criterion), (stage, run.arm), (stage,), ()]


@cache
def _step_macs(experiment: Experiment) -> int:
    """Multiply-accumulates of a minibatch, forward, in the dense network."""
    profile = experiment.profile
    network = architecture(profile, channels(experiment.tasks))
    return profile.batch_size * complexity(network, (profile.crop, profile.crop))["macs"]


def time_limit(seconds: Seconds, run: Run) -> int:
    """In minutes, for a cluster's job; from another profile's times none is guessed."""
    expected = None if seconds.guessed else seconds(run)
    if expected is None:
        return UNKNOWN_MINUTES
    return max(math.ceil(TIME_FACTOR * expected / 60), LEAST_MINUTES)


def stage_seconds(experiment: Experiment, figures: Path) -> dict[str, float]:
    """{stage: seconds of one of its jobs}, as far as that is known."""
    known, seconds = defaultdict(list), Seconds(experiment, figures)
    for run in experiment.runs():
        if expected := seconds(run):
            known[run.stage].append(expected)
    means = {stage: sum(found) / len(found) for stage, found in known.items()}
    return means | {"figure": FIGURE_SECONDS}


# --- what follows ---


@dataclass(frozen=True)
class Driver:
    """What starting jobs costs, in seconds.

    begin: until the first can start; each: of a worker, for every job; submit: of the driver, which
    starts one after another.
    """

    begin: float = BATCH_START
    each: float = BETWEEN_JOBS
    submit: float = 0.0

    @classmethod
    def of_cluster(cls, runs: int) -> "Driver":
        """For so many runs, on a line through the two nearest sizes of those measured.

        A cluster's job reads the grid twice before it begins. (Where several go together they share
        that: then this is too much.)
        """
        rows = [{k: float(v) for k, v in row.items()} for row in read_table(DRIVER)]
        upper = next((i for i, row in enumerate(rows) if row["runs"] >= runs), len(rows) - 1)
        one, two = rows[max(upper, 1) - 1], rows[max(upper, 1)]
        share = (runs - one["runs"]) / (two["runs"] - one["runs"])

        def at(name: str) -> float:
            return one[name] + share * (two[name] - one[name])

        started = at("drive_seconds") / at("jobs")
        return cls(at("graph_seconds"), 2 * at("read_seconds"), started)


LOCAL = Driver()


def makespan(jobs: list[Job], workers: float, driver: Driver = LOCAL) -> float:
    """Seconds of the whole batch, a free worker always taking the foremost job that can start."""
    waiting = [len(job.inputs) for job in jobs]
    followers: list[list[int]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        for source in job.inputs:
            followers[source].append(i)
    # Those that run alone come last: they wait until no other is at work.
    ready = [(job.alone, -job.priority, i) for i, job in enumerate(jobs) if not job.inputs]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now = free = driver.begin  # free: when the driver is
    while ready or running:
        while ready and len(running) < workers and not (ready[0][0] and running):
            alone, _, i = heapq.heappop(ready)
            free = max(free, now) + driver.submit
            heapq.heappush(running, (free + driver.each + jobs[i].seconds, i))
            if alone:
                break
        now, done = heapq.heappop(running)
        for i in followers[done]:
            waiting[i] -= 1
            if not waiting[i]:
                heapq.heappush(ready, (jobs[i].alone, -jobs[i].priority, i))
    return now


def longest_chain(jobs: list[Job]) -> list[Job]:
    """The jobs, each waiting for the one before, that take longest together."""
    ends: list[float] = []
    before: list[int | None] = []
    for job in jobs:
        source = max(job.inputs, key=lambda i: ends[i], default=None)
        before.append(source)
        ends.append(job.seconds + (ends[source] if source is not None else 0))
    at: int | None = max(range(len(jobs)), key=lambda i: ends[i])
    chain = []
    while at is not None:
        chain.append(jobs[at])
        at = before[at]
    return chain[::-1]


def storage(experiment: Experiment) -> float:
    """Bytes of all run folders in the end."""
    parameters = count_parameters(architecture(experiment.profile, channels(experiment.tasks)))
    sizes = experiment.profile.sizes

    def kept(run: Run) -> float:
        """In networks as large as the dense one."""
        if run.stage == "prune":
            return sum(sizes if run.level is None else sizes[: run.level + 1])
        return {"dense": 1.0, "retrain": sizes[run.level or 0]}.get(run.stage, 0.0)

    return sum(TEXTS + 4 * parameters * kept(run) for run in experiment.runs())


def report(experiment: Experiment, workers: Sequence[int] = WORKERS) -> str:
    """What there is to know, in lines. Raises ValueError where nothing is measured."""
    seconds = Seconds(experiment)
    if not seconds.measured:
        raise ValueError(f"{seconds.basis}: `make figures` measures {MEASURED}")
    jobs = jobs_of(experiment, seconds)
    by_stage = defaultdict(list)
    for job in jobs:
        by_stage[job.name.split()[0]].append(job.seconds)
    total = sum(job.seconds for job in jobs)
    chain = longest_chain(jobs)
    least = sum(job.seconds for job in chain)
    lines = [f"{experiment.label}: {len(jobs)} jobs, {seconds.basis}"]
    if seconds.guessed:
        lines.append(
            "That is another profile: a guess, by the multiply-accumulates of its training steps."
        )
    hours = f"{seconds.worker}-hours"
    width = len(hours) + 2
    lines += ["", f"stage     jobs   minutes each   {hours}"]
    for stage, found in by_stage.items():
        each = sum(found) / len(found) / 60
        lines.append(f"{stage:8} {len(found):5} {each:14.1f} {sum(found) / 3600:{width}.1f}")
    mean = total / len(jobs)
    lines.append(f"{'all':8} {len(jobs):5} {mean / 60:14.1f} {total / 3600:{width}.1f}")
    driver = Driver.of_cluster(len(experiment.runs()))
    lines += ["", "workers   hours here   at work   hours on a cluster   at work"]
    for count in workers:
        walls = [makespan(jobs, count, one) for one in (LOCAL, driver)]
        here, there = ((wall / 3600, total / wall / count) for wall in walls)
        lines.append(f"{count:7} {here[0]:12.2f} {here[1]:9.0%} {there[0]:20.2f} {there[1]:9.0%}")
    enough = math.ceil(total / least)
    carried = math.floor((mean + driver.each) / driver.submit)
    waiting = driver.each / (mean + driver.each)
    if waiting > 0.5:
        first = "reading the grid: workers do that for longer than what they are for"
    else:
        first = "the longest chain" if enough <= carried else "the driver"
    names = ", ".join(job.name for job in chain)
    graph = f"{driver.begin:.0f} s for the graph, {driver.submit:.3f} s to start a job"
    lines += [
        "",
        f"Storage: {storage(experiment) / 1e9:.2f} GB, and two checkpoints of each job at work.",
        f"The longest chain takes {least / 3600:.2f} hours: {names}.",
        f"So more than {enough} workers gain little, whatever the queue.",
        f"One driver on a cluster ({graph}) keeps {carried} workers busy at most.",
        f"A job there reads the grid for {driver.each:.0f} s first, {waiting:.0%} of all its time.",
        f"What stops scaling first is {first}.",
    ]
    return "\n".join(lines)
