"""The batch: every figure of a profile in one command, and the single notebook that a job is.

    python -m mtprune_utils.run.launch notebook NOTEBOOK OUTPUT -p NAME VALUE ...
    python -m mtprune_utils.run.launch figures --profile quick
    python -m mtprune_utils.run.launch claims --profile study
    python -m mtprune_utils.run.launch refresh

All but the last take --plugin my.py, entries of the registries of one's own: docs/code.md.

`figures` drives Snakemake (see Snakefile), which runs `notebook` once for each job: here, or with
`--on` on a cluster (see `cluster`). No torch is imported at the top: the runner of a job waits for
its kernel and needs none.
"""

import argparse
import contextlib
import getpass
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtprune_utils import events
from mtprune_utils.files import (
    PROJECT,
    locked,
    read_json,
    read_table,
    try_lock,
    write_atomically,
    write_json,
)
from mtprune_utils.processes import ENVIRONMENT, end_with_parent
from mtprune_utils.registry import PLUGIN
from mtprune_utils.run import cluster
from mtprune_utils.run.notebook import (
    NotebookError,
    check_run,
    execute,
    notebook_parameters,
    refresh_notebooks,
)
from mtprune_utils.run.progress import ELSEWHERE, HERE, Running, Screen, duration, on_terminal
from mtprune_utils.stages import stage_names
from mtprune_utils.study import store

STAGES = (*stage_names(), "figure")
RETRIES = 1  # of a failed job
RESUME = "Run the same command again to resume: what is finished stays finished."
CLAIMS = "fig5_claims"  # the figure whose notebook judges them
# What Snakemake says of a job that could not tell its end itself.
KILLED = re.compile(r" --job ('[^']+'|\S+) .* died with <Signals\.(\w+)")
NO_GPU = ("", "-1")  # in CUDA_VISIBLE_DEVICES


def visible_gpus() -> list[str]:
    """The GPUs that may be used, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name for name in named if name.strip() not in NO_GPU]
    try:
        command = ["nvidia-smi", "-L"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(index) for index in range(len(re.findall(r"^GPU \d+:", listing, re.MULTILINE)))]


@contextlib.contextmanager
def one_gpu():
    """Give this process a GPU of its own, waiting for a free one.

    Snakemake counts GPUs, but does not say which. (A cluster does.)
    """
    with contextlib.ExitStack() as stack:
        locks = {}
        for gpu in visible_gpus():
            name = urllib.parse.quote(gpu, safe="")  # MIG's have slashes
            path = Path(tempfile.gettempdir(), f"mtprune-{os.getuid()}-gpu-{name}.lock")
            locks[gpu] = stack.enter_context(open(path, "a", opener=_no_link))

        def first_free() -> str | None:
            return next((gpu for gpu, lock in locks.items() if try_lock(lock)), None)

        while (free := first_free()) is None and locks:
            time.sleep(1)
        if free is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = free
        yield


def _no_link(path: str, flags: int) -> int:
    """Open a file where everybody may write: no link that somebody else has put there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def run_notebook(
    notebook: str, output: str, parameters: dict, expected_files: list[str], job: str | None
) -> int:
    """Execute one notebook with the ENVIRONMENT. Returns the exit code.

    job: its name in the batch; such a run ends with the batch, takes a GPU of its own and reports
    to the launcher.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ[events.JOB] = job or ""  # the kernel tells of it
    if job:
        end_with_parent(signal.SIGTERM)
    start = time.monotonic()
    trains_here = job and not job.startswith("figure") and events.FOLDER not in os.environ
    takes_gpu = trains_here and parameters.get("overrides", {}).get("device") != "cpu"
    try:
        with one_gpu() if takes_gpu else contextlib.nullcontext():
            events.tell(job, "started")
            start = time.monotonic()
            if not job:  # the launcher has looked at all of a batch's
                check_run(notebook, parameters)
            execute(notebook, output, parameters, expected_files)
    except (NotebookError, ValueError, OSError) as error:
        failed = str(Path(output).with_name(f"{Path(output).stem}.failed.ipynb"))
        events.tell(
            job, "failure", seconds=time.monotonic() - start, error=str(error), notebook=failed
        )
        print(f"{error}\nSee {failed}" if Path(failed).exists() else error, file=sys.stderr)
        return 1
    except (SystemExit, KeyboardInterrupt):  # from main's handlers of signals
        seconds, why = time.monotonic() - start, "stopped from outside (a time limit?)"
        events.tell(job, "failure", seconds=seconds, error=f"{why}; its checkpoint is kept")
        again = "Run it again: it goes on from its last checkpoint, if it has one"
        print(f"{Path(notebook).name}: stopped. {again}", file=sys.stderr)
        raise
    events.tell(job, "done", seconds=time.monotonic() - start)
    if not job:
        print(f"{Path(notebook).name} ran to its end: {output}")
    return 0


# --- the batch ---


class Progress:
    """What the launcher knows of its jobs.

    It prints a line on each as it starts and ends, and a summary at the end. With a `screen` a
    table is shown of those at work, below the lines.
    """

    screen: Screen | None = None

    def __init__(self, timings: Path, at_once: str, retries: int = RETRIES):
        self.timings, self.at_once, self.retries = timings, at_once, retries
        self.start = time.monotonic()
        self.jobs: list[str] = []  # every job of the profile, finished or not
        self.figures: list[str] = []
        self.total = 0
        self.running: dict[str, Running] = {}
        self.failed: dict[str, dict] = {}
        self.attempts: dict[str, int] = {}
        self.took: dict[str, float] = {}  # seconds of those done in this batch
        self.seconds: dict[str, float] = {}  # of every job, also of earlier batches
        if self.timings.exists():
            self.seconds = {row["job"]: float(row["seconds"]) for row in read_table(self.timings)}

    @property
    def finished(self) -> int:
        """How many jobs are done; each counts once, though its group is tried again."""
        return len(self.took)

    def read(self, line: str) -> None:
        """Take in a line of Snakemake's: an event of ours, or a row of its table of jobs to run."""
        try:
            event = json.loads(line.partition(events.EVENT)[2])
        except ValueError:  # Snakemake's own
            if row := re.fullmatch(rf"({'|'.join(STAGES)})\s+(\d+)", line.strip()):
                self.total += int(row[2])
            elif (dead := KILLED.search(line)) and (job := shlex.split(dead[1])[0]) in self.running:
                seconds = time.monotonic() - self.running[job].since
                self.failure(job, seconds, f"killed from outside by {dead[2]} (out of memory?)")
            return
        take_in = (self.grid, self.started, self.at, self.done, self.failure)
        {method.__name__: method for method in take_in}[event.pop("event")](**event)

    def recall(self, line: str) -> None:
        """Take in an event of an earlier batch, whose launcher was killed: only what was done."""
        event = json.loads(line.partition(events.EVENT)[2])
        if event["event"] == "done":
            self.seconds[event["job"]] = event["seconds"]

    def grid(self, job: str, jobs: list[str], figures: list[str]) -> None:
        self.jobs, self.figures = jobs, figures

    def started(self, job: str) -> None:
        if not self.attempts:
            earlier = len(self.jobs) - self.total
            count = f"{self.total} jobs to do, {earlier} finished earlier"
            self.print(f"{count}; {self.at_once}")
        self.attempts[job] = self.attempts.get(job, 0) + 1
        self.running[job] = Running(time.monotonic())
        if not self.screen:  # which shows it
            self.say(job, "started")

    def at(self, job: str, step: int, total: int, said: str) -> None:
        if job in self.running:
            self.running[job].at(step, total, said)

    def done(self, job: str, seconds: float) -> None:
        self.running.pop(job, None)  # it may be another attempt's word
        self.failed.pop(job, None)
        self.seconds[job] = self.took[job] = seconds
        rows = [
            f"{name.split()[0]},{name},{self.seconds[name]:.1f}\n"
            for name in self.jobs
            if name in self.seconds
        ]
        write_atomically(self.timings, ("stage,job,seconds\n" + "".join(rows)).encode())
        elapsed = duration(time.monotonic() - self.start)
        self.say(job, f"done in {duration(seconds)}   (elapsed {elapsed})")

    def failure(self, job: str, seconds: float, error: str, notebook: str = "none") -> None:
        self.running.pop(job, None)
        self.failed[job] = {"error": error, "notebook": notebook}
        left = self.left(job)
        again = ", trying once more" if left == 1 else f", {left} tries left" if left > 1 else ""
        self.say(job, f"FAILED after {duration(seconds)}{again}: {error}", bad=True)

    def left(self, job: str) -> int:
        """How often a job that has failed is still tried."""
        return self.retries + 1 - self.attempts.get(job, 1)

    def given_up(self, job: str) -> bool:
        return job in self.failed and job not in self.running and self.left(job) < 1

    def say(self, job: str, what: str, bad: bool = False) -> None:
        done = f"{self.finished:{len(str(self.total))}}/{self.total}"
        self.print(f"[{done}] {job}  {what}", bad)

    def print(self, line: str, bad: bool = False) -> None:
        if self.screen:
            self.screen.say(line, bad)
        else:
            print(line, flush=True)

    def showing(self) -> contextlib.AbstractContextManager:
        return self.screen.showing(self) if self.screen else contextlib.nullcontext()

    def summary(self) -> str:
        lines = [f"Done in {duration(time.monotonic() - self.start)}."]
        if not self.total:
            lines = [f"Everything is up to date: all {len(self.jobs)} jobs were finished earlier."]
        for stage in STAGES:
            jobs = [job for job in self.jobs if job.split()[0] == stage]
            times = [self.seconds[job] for job in jobs if job in self.seconds]
            if times:
                total, mean = duration(sum(times)), duration(sum(times) / len(times))
                lines.append(f"  {stage:8} {len(times):3} jobs   {total} in total, {mean} each")
        lines.append("Figures (each also as .pdf, with its data as .csv and its origin as .json):")
        return "\n".join([*lines, *(f"  {shown(figure)}" for figure in self.figures)])

    def trouble(self, log: Path) -> str:
        killed = {"error": "killed from outside (out of memory?)"}
        failed = self.failed | dict.fromkeys(self.running, killed)
        if not failed:
            lines = log.read_text(encoding="utf-8").rstrip().split("\n")
            lines = [line for line in lines if events.EVENT not in line]
            return "\n".join(["Snakemake failed; its log ends:", *lines[-8:], RESUME])
        lines = [f"{len(failed)} {'job' if len(failed) == 1 else 'jobs'} failed:"]
        for job, failure in failed.items():
            lines.append(f"  {job}: {failure['error']}")
            if (PROJECT / failure.get("notebook", "none")).exists():
                lines.append(f"    the notebook with its traceback: {shown(failure['notebook'])}")
        return "\n".join([*lines, RESUME])


def choose_cache() -> None:
    """Without a home folder to write to, as in many containers, decoded data lies beside runs."""
    if os.environ.get("MTPRUNE_CACHE"):
        return
    try:
        folder = Path("~/.cache/mtprune").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    except (OSError, RuntimeError):  # no home, or a file in its place
        pass
    os.environ["MTPRUNE_CACHE"] = str((PROJECT / "runs" / ".cache").resolve())


def shown(path: str | Path) -> str:
    """A path as the user would type it; `path` is relative to the repository."""
    absolute = PROJECT / path
    return os.path.relpath(absolute) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def from_repository(path: str | Path) -> str:
    """A path relative to the repository, if it lies inside: notebooks hold none of this machine."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(PROJECT) if absolute.is_relative_to(PROJECT) else absolute)


def snakemake_command(config: Path, where: list[str]) -> list[str]:
    """How the batch calls Snakemake. where: `local_arguments` or those of a cluster.

    The launcher's lock stands in for Snakemake's, which outlives a killed driver. Its marks of
    incomplete outputs are passed over: ours are whole or missing, the last one is the marker, and
    a cluster's job may have finished well after its driver. Of Snakemake's reasons to run a job
    again, the text of its shell command is left out: results do not depend on it.
    """
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        "Snakefile",
        "--directory",
        ".",
        "--nocolor",
        "--nolock",
        "--scheduler",
        "greedy",
        "--keep-going",
        "--ignore-incomplete",
        "--rerun-triggers",
        "input",
        "--configfile",
        str(config),
        *where,
    ]


# All but the source cache, which is made in the user's home.
SHARED_FILES = (
    "--shared-fs-usage",
    "persistence",
    "input-output",
    "software-deployment",
    "sources",
    "storage-local-copies",
)


def local_arguments(jobs: int) -> list[str]:
    """Snakemake's, for so many jobs at a time on this machine."""
    gpus = len(visible_gpus())
    return [
        "--cores",
        str(jobs),
        *(["--resources", f"gpu={gpus}"] if gpus else []),
        "--retries",
        str(RETRIES),
        "--profile",
        "none",  # of the user's own
        *SHARED_FILES,
    ]


def make_figures(
    settings: dict, figures: str, jobs: int | None = None, restore: bool = False, on: str = ""
) -> int:
    """Bring every run and figure of a profile up to date. Returns the exit code.

    A lock refuses a second batch. settings: profile, data, root, runs and overrides, see
    `Experiment.open`. jobs: at a time; by default one per core, or what the cluster's profile says.
    restore: what the committed result tables know and is not here counts as finished. on: the
    cluster whose machines do it.
    """
    from mtprune_utils.datasets import data_root
    from mtprune_utils.run import plan
    from mtprune_utils.study import tables
    from mtprune_utils.study.grid import Experiment

    experiment = Experiment.open(**settings)  # a misspelt name is told at once, in one line
    experiment.check()
    odd = re.search(r"[{}\x00-\x1f\x7f\ud800-\udfff]", f"{settings['runs']}{figures}")
    if odd:  # Snakemake takes braces for wildcards
        raise ValueError(
            f"runs and figures may lie in no folder whose name has {odd[0]!r} in it: choose others"
        )
    profile = experiment.profile.name
    folder, place = PROJECT / settings["runs"] / profile, PROJECT / figures / experiment.label
    elsewhere = cluster.Cluster(on, folder) if on else None
    if not elsewhere:
        check_gpus(experiment.profile.device)
    with locked(folder.parent / f".lock-{profile}", f"profile {profile!r}") as (lock, killed):
        if elsewhere:
            if left := elsewhere.cancel():
                print(f"{left} jobs that an earlier driver left in the queue are cancelled")
        elif killed:  # its kernels notice within a second or two, let them end
            time.sleep(3)
        root = settings["root"] and str(Path(data_root(settings["root"])).resolve())
        write_json(folder / "batch.json", {**settings, "root": root, "figures": figures})
        timings, committed = folder / f"timings-{experiment.label}.csv", place / store.TIMINGS
        if restore:
            count = tables.restore(experiment, place.parent)
            print(f"{count} finished runs laid out from {shown(place / 'results')}", flush=True)
            if committed.exists() and not timings.exists():
                write_atomically(timings, committed.read_bytes())
        reopen_outdated(experiment, place, restore)
        if elsewhere:
            progress = Progress(timings, f"on {on}", elsewhere.retries)
            for event in cluster.take_events(elsewhere.events):
                progress.recall(event)
            at_once = ["--jobs", str(jobs)] if jobs else []
            # The figures' folder has the label in it.
            seconds = plan.stage_seconds(experiment, place.parent)
            where = [*elsewhere.arguments(seconds), *at_once]
            where += SHARED_FILES if elsewhere.shares_files else ()
            most = jobs or elsewhere.most
        else:
            most = jobs or os.cpu_count() or 1
            progress, where = Progress(timings, f"{most} at a time"), local_arguments(most)
        if on_terminal():
            progress.screen = Screen.of(experiment, place, most)
        command = snakemake_command(folder / "batch.json", where)
        code = _drive(command, folder / "snakemake.log", progress, lock, elsewhere)
        if code == 0 and timings.exists():  # beside the figures, for the README's table
            write_atomically(committed, timings.read_bytes())
        return code


def check_gpus(device: str) -> None:
    """Raises ValueError where a GPU's work would fail, or begin on one core."""
    import torch

    gpus = visible_gpus()
    if device == "cuda" and not gpus:
        raise ValueError("device is cuda, but there is no GPU here: override it with auto or cpu")
    if device != "cpu" and gpus and not torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        what = f"CUDA_VISIBLE_DEVICES names {named}, which" if named else "there is a GPU here that"
        way = "correct or unset it" if named else "update its driver"
        raise ValueError(f"{what} torch cannot use: {way}, or override device with cpu")


def reopen_outdated(experiment, figures: Path, restored: bool = False) -> None:
    """Take for unfinished what is not the present code's, or not made from what is here.

    That is decided by content. Snakemake then makes what is missing, and what depends on it.
    restored: runs come from committed tables; rather than lost, they are refused (ValueError).
    """
    grid = experiment.runs()
    for run in grid:
        run.invalidate_if_corrupt(print)
    outdated = {run: why for run in grid if run.done and (why := run.outdated())}
    if outdated:
        what = f"{len(outdated)} of {len(grid)} runs are outdated: {next(iter(outdated.values()))}"
        if restored:
            again = f"make figures PROFILE={experiment.profile.name}"
            raise ValueError(f"{what}. `{again}` makes all again, without the tables")
        print(f"{what}. They are made again.", flush=True)
    for run in outdated:
        run.path(store.DONE).unlink()
    for name in store.figure_notebooks():
        figure = figures / f"{name}.json"
        if figure.exists() and not is_current(figure, experiment):
            figure.unlink()
    for path in (file for run in grid for file in run.folder.glob("*")):
        if path.stat().st_mtime > time.time():  # the clock was ahead: Snakemake's check would fail
            os.utime(path)


def is_current(figure: Path, experiment) -> bool:
    """Whether the figure with this provenance file would be drawn alike from the runs here.

    One that shows fewer runs than are here is not: they were finished by hand, or in a batch that
    was stopped before it came to the figure.
    """
    try:
        origin = read_json(figure)
        drawn = {label: run["content"] for label, run in origin["runs"].items()}
        needs = store.about_notebook(store.figure_notebooks()[figure.stem])["needs"]
        shown = [run for run in experiment.needed(needs) if run.done]
        same = drawn == {f"{run.stage}/{run.name}": run.content for run in shown}
        same_margin = origin["profile"]["margin"] == experiment.profile.margin
        return same and same_margin and not store.drawn_otherwise(figure.stem, origin)
    except (ValueError, LookupError, TypeError):  # no JSON, or not what `save_figure` writes
        return False


def judge_claims(settings: dict, figures: str) -> None:
    """The claims of what is finished so far: for a study of which not every run is there yet."""
    from mtprune_utils.study.grid import Experiment

    notebook = store.figure_notebooks()[CLAIMS]
    parameters = {**settings, "figures": figures, "train": False}
    check_run(notebook, parameters)
    executed = PROJECT / settings["runs"] / settings["profile"] / "figures" / f"{CLAIMS}.ipynb"
    execute(notebook, executed, parameters)
    place = PROJECT / figures / Experiment.open(**settings).label
    print(f"Judged: {shown(place / 'table1_claims.csv')}")


def _drive(
    command: list[str],
    log: Path,
    progress: Progress,
    lock: int,
    elsewhere: cluster.Cluster | None = None,
) -> int:
    """Run Snakemake, its words into the log, ours onto the screen.

    It dies with this process and holds the lock too. elsewhere: the cluster that its jobs run on.
    """
    print(f"Looking at what there is to do (Snakemake's log: {shown(log)})", flush=True)
    environment = os.environ | {"PYTHONUTF8": "1"}
    if elsewhere:
        environment |= elsewhere.environment
    if progress.screen:
        environment[events.EVERY] = str(ELSEWHERE if elsewhere else HERE)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name; Snakemake asks for it
        environment["LOGNAME"] = str(os.getuid())
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=[lock],
        preexec_fn=lambda: end_with_parent(signal.SIGKILL),
    )
    assert process.stdout is not None  # a pipe, see above
    said = cluster.with_events(process.stdout, elsewhere.events) if elsewhere else process.stdout
    try:
        with log.open("w", encoding="utf-8") as file, progress.showing():
            for line in said:
                file.write(line)
                file.flush()
                progress.read(line)
        code = process.wait()
    except (KeyboardInterrupt, SystemExit, OSError):  # the last where the disk takes no more
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        print("\nStopping the running jobs ...", flush=True)
        _stop(process, elsewhere)
        print(f"Stopped. {RESUME}", flush=True)
        raise
    print(progress.trouble(log) if code else progress.summary(), flush=True)
    return code


def _stop(process: subprocess.Popen, elsewhere: cluster.Cluster | None) -> None:
    """End Snakemake and its jobs, which write their checkpoints."""
    if elsewhere:  # asked to end, it would wait for them
        os.killpg(process.pid, signal.SIGKILL)
        try:
            elsewhere.cancel()
        except OSError as error:
            print(f"{error}: jobs may still be queued there", flush=True)
        return
    # Snakemake starts no more jobs, the runners end their kernels.
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


# --- the command line ---


def parsed(text: str) -> object:
    """A parameter's value: the text itself, unless it is JSON.

    (The notebook's types refuse half an object.)
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or none that anybody means
        return text


def overrides(text: str) -> dict:
    """Overrides as the command line gives them."""
    given = parsed(text)
    if not isinstance(given, dict):
        example = """write it like '{"dense.steps": 200}'"""
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object: {example}")
    return given


def with_plugin(numbers: dict, plugin: str) -> dict:
    """Overrides in which the plugin goes to every job, wherever that runs."""
    place = Path(plugin).expanduser()
    named = from_repository(place) if place.exists() else plugin
    return {**numbers, PLUGIN: named} if plugin else numbers


def job_count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of jobs: 1 or more run at a time")
    return int(text)


def add_experiment(
    parser: argparse.ArgumentParser, profile: str = "quick", data: str = "rooms"
) -> None:
    """The options that say which experiment a command is about, but for its overrides.

    profile, data: their defaults; "": what the command's network was made with.
    """
    for name, default in (("profile", profile), ("data", data)):
        what = f"default: {default or 'what the network was made with'}"
        parser.add_argument(f"--{name}", default=default, help=what)
    where = "where the data set lies, if it is not embedded"
    parser.add_argument("--root", default="", help=where)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--overrides and --plugin, which `with_plugin` joins."""
    numbers = """numbers of the profile to replace, e.g. '{"dense.steps": 200}'"""
    parser.add_argument("--overrides", type=overrides, default={}, metavar="JSON", help=numbers)
    add_plugin(parser)


def add_plugin(parser: argparse.ArgumentParser) -> None:
    what = "file or folder of criteria, data sets, backbones and so on of your own: docs/code.md"
    parser.add_argument("--plugin", default="", metavar="PATH", help=what)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The batch's commands, and that of one notebook; `perform` does them."""
    listed = (
        "`papermill --help-notebook NOTEBOOK` lists the names of its parameters, and what they do"
    )
    one = commands.add_parser("notebook", help="execute one notebook", epilog=listed)
    one.add_argument("notebook")
    one.add_argument("output", help="where the executed notebook goes")
    one.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    expected = "files that must be there afterwards"
    one.add_argument("--expect", nargs="*", default=[], metavar="FILE", help=expected)
    add_plugin(one)
    packed = f"used by the Snakefile where no disk is shared: files, of which {cluster.PACKED} are"
    for name, what in (("unpack", "unpacked before"), ("pack", "packed afterwards")):
        one.add_argument(
            f"--{name}", nargs="*", default=[], metavar="FILE", help=f"{packed} {what}"
        )
    one.add_argument("--job", help="used by the Snakefile: the job's name in the batch")

    every = "make every figure of a profile, training what is missing"
    figures = commands.add_parser("figures", help=every)
    at_once = "at a time; default: one per core, or what the cluster's profile says"
    figures.add_argument("--jobs", type=job_count, help=at_once)
    which = "cluster that does it, described in cluster/<name>/config.yaml; default: this machine"
    figures.add_argument("--on", default="", metavar="NAME", help=which)
    known = "runs that the committed result tables know count as finished: to go on with a study"
    figures.add_argument("--restore", action="store_true", help=known)
    judged = "judge the claims by the runs that are finished so far, training nothing"
    claims = commands.add_parser("claims", help=judged)
    for command in (figures, claims):
        add_experiment(command)
        add_overrides(command)
        for name, what in (("runs", "folder of the run folders; "), ("figures", "")):
            place, what = str(PROJECT / name), f"{what}default: {name}"
            command.add_argument(f"--{name}", default=place, help=what)
    commands.add_parser("refresh", help="execute the repository's notebooks anew, in place")


def need_repository(command: str) -> None:
    """Raises FileNotFoundError outside of a clone."""
    if not store.notebook_paths():
        raise FileNotFoundError(
            f"{command} needs the repository, with its notebooks: run it in a clone"
        )


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m mtprune_utils.run.launch", description=about)
    add_commands(parser.add_subparsers(dest="command", required=True))
    return guarded(perform, parser.parse_args(arguments))


def guarded(perform: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """What a command comes to: its exit status, errors in one line, signals as a shell has them."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    # A shell's background jobs start with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names that the locale has no letters for
            stream.reconfigure(errors="backslashreplace")
    choose_cache()
    try:
        return perform(options)
    except BrokenPipeError:  # whoever reads has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        print(f"{error}: `pip install 'mtprune-utils[notebooks]'` has it", file=sys.stderr)
        return 1
    except (NotebookError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def perform(options: argparse.Namespace) -> int:
    if options.command == "notebook":
        declared = notebook_parameters(options.notebook)
        texts = [name for name, (kind, _) in declared.items() if kind is str]  # they stay text
        parameters: dict[str, Any] = {
            name: text if name in texts else parsed(text) for name, text in options.parameters
        }
        given = parameters.get("overrides", {})
        if options.plugin and isinstance(given, dict):  # what is none is refused below
            parameters["overrides"] = with_plugin(given, options.plugin)
        cluster.unpack(options.unpack)
        expected = [file for file in options.expect if file not in options.pack]
        code = run_notebook(options.notebook, options.output, parameters, expected, options.job)
        if code == 0:
            cluster.pack(options.pack)
        return code
    need_repository(options.command)
    if options.command == "refresh":
        refresh_notebooks()
        return 0
    own = ("profile", "data", "root", "overrides")
    settings = {name: getattr(options, name) for name in own}
    settings["overrides"] = with_plugin(options.overrides, options.plugin)
    settings["runs"] = from_repository(options.runs)
    folder = from_repository(options.figures)
    if options.command == "figures":
        return make_figures(settings, folder, options.jobs, options.restore, options.on)
    judge_claims(settings, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
