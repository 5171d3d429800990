"""A batch on SLURM, which runs on this machine alone: `make test-slurm` (some minutes).

A job is cancelled while it trains, the driver is killed, and in the end every table has the bytes
of a local batch's.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time

import pytest

from conftest import LAUNCH
from loopback_slurm import lacking, slurm
from mtprune_utils.files import PROJECT, read_table
from mtprune_utils.run import plan
from mtprune_utils.study import phases

pytestmark = pytest.mark.skipif("MTPRUNE_SLURM" not in os.environ, reason="make test-slurm runs it")

# A run or two of every stage. The dense one lasts long enough to be stopped on its way.
OVERRIDES = {
    "seeds": 1,
    "controls.seeds": 0,
    "tuning.trials": 0,
    "questions": ["paper"],  # Figure 8 needs controls
    "dense.steps": 400,
    "checkpoint_seconds": 1.0,
}
JOBS = 11  # dense, two pruned, two re-trained, scores, five figures
LABEL = "smoke-custom"
MEASURED = ("fig4_speedup.csv", "timings.csv")  # hold seconds, which differ


def copy_repository(place):
    for folder in ("mtprune_utils", "notebooks", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(PROJECT / folder, place / folder, ignore=ignored)
    shutil.copy(PROJECT / "Snakefile", place)
    (place / "figures/quick").mkdir(parents=True)
    shutil.copy(PROJECT / "figures/quick/timings.csv", place / "figures/quick")
    return place


@contextlib.contextmanager
def launcher(repository, environment, *more):
    """The batch's driver, what it says going to a file. It ends with the block in any case."""
    command = [
        *LAUNCH,
        "figures",
        "--profile",
        "smoke",
        "--overrides",
        json.dumps(OVERRIDES),
        *more,
    ]
    path = f"{repository}:{environment.get('PYTHONPATH', '')}"
    environment = environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (repository / "said.txt").open("w") as said:
        driver = subprocess.Popen(
            command, cwd=repository, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        yield driver
    finally:
        driver.kill()  # Snakemake and local jobs end with it
        driver.wait()


def so_far(repository):
    """What there is to read where the batch does not do what it should."""
    names = ("said.txt", "runs/smoke/snakemake.log")
    texts = [(repository / name).read_text() for name in names if (repository / name).exists()]
    logs = [path.read_text() for path in (repository / "runs/smoke/cluster_logs").rglob("*.log")]
    return "\n".join([*(text[-6000:] for text in texts), *(log[-2000:] for log in logs)])


def wait_until(condition, driver, repository, seconds=900):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert driver.poll() is None, so_far(repository)
        assert time.monotonic() < end, f"not in {seconds} s:\n{so_far(repository)}"
        time.sleep(0.3)
    return found


def finish(driver, repository, seconds=2400):
    try:
        code = driver.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end in {seconds} s:\n{so_far(repository)}")
    assert code == 0, so_far(repository)
    return (repository / "said.txt").read_text()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A copy in which the batch has run on this machine, with two numbers: the seconds until its
    first job started, and all that it took.
    """
    repository = copy_repository(tmp_path_factory.mktemp("local") / "repository")
    said, begin = repository / "said.txt", time.monotonic()
    with launcher(repository, dict(os.environ), "--jobs", "2") as driver:
        wait_until(lambda: "  started" in said.read_text(), driver, repository)
        first = time.monotonic() - begin
        finish(driver, repository)
    return repository, first, time.monotonic() - begin


def test_the_plan_says_how_long_a_batch_takes(local):
    """From the seconds of its jobs, within a quarter.

    Where a busy machine starts programs slowly, it does so for all: by as much as for the first.
    """
    repository, first, seconds = local
    slow = max(first / plan.BATCH_START, 1.0)
    names = {
        row["job"]: float(row["seconds"])
        for row in read_table(repository / "figures" / LABEL / "timings.csv")
    }
    experiment = plan.Experiment.open("smoke", "rooms", "", str(repository / "runs"), OVERRIDES)
    jobs = plan.jobs_of(experiment, lambda run: names[phases.job_name(run)])
    jobs = [plan.replace(job, seconds=names[job.name]) for job in jobs]
    starting = plan.Driver(slow * plan.BATCH_START, slow * plan.BETWEEN_JOBS)
    assert plan.makespan(jobs, 2, starting) == pytest.approx(seconds, rel=0.25)


def test_a_batch_on_slurm_survives_kills_and_gives_the_same_bytes(local, tmp_path):
    assert not (why := lacking()), why
    repository = copy_repository(tmp_path / "repository")
    edit_profile(repository / "cluster/slurm/config.yaml")
    with slurm(tmp_path / "slurm", cores=1) as environment:

        def ask(*command):
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout

        def queue(form, *more):
            return ask("squeue", "--noheader", "--format", form, *more).split()

        said = repository / "said.txt"
        with launcher(repository, environment, "--on", "slurm") as driver:
            # The first job is cancelled while it trains: its retry goes on from the checkpoint.
            checkpoints = "runs/smoke/dense/*/checkpoints/*"
            wait_until(lambda: list(repository.glob(checkpoints)), driver, repository)
            (job,) = queue("%A")
            about = ask("scontrol", "show", "job", job)
            assert re.search(r"Tres\w+=.*gpu[:=]1", about) and "TimeLimit=00:15:00" in about
            ask("scancel", job)
            done = "dense seed 0 multitask  done"
            wait_until(lambda: done in said.read_text(), driver, repository)
            (notebook,) = repository.glob("runs/smoke/dense/*/notebook.ipynb")
            assert "going on after step" in notebook.read_text()
            # The driver is killed while jobs run: the next one ends them, and loses nothing.
            running = r"(prune|score) .* started"
            wait_until(lambda: re.search(running, said.read_text()), driver, repository)
            driver.kill()
            driver.wait()
            left = queue("%A")
            before = said.read_text()
        assert left
        with launcher(repository, environment, "--on", "slurm") as driver:
            after = finish(driver, repository)
        # One or another may have finished before the next driver looked.
        cancelled = re.search(r"(\d+) jobs that an earlier driver left .* are cancelled", after)
        assert cancelled and 1 <= int(cancelled[1]) <= len(left)
        began = told("started", after)
        assert len(set(began)) == len(began) and not set(began) & set(told("done in", before))
        assert f"{len(began)} jobs to do, {JOBS - len(began)} finished earlier; on slurm" in after
        assert set(told("done in", after)) == set(began)
        assert not queue("%A")
        nodes = queue("%N", "--states", "all")
        assert set(nodes) == {"n1", "n2"}
    compare(local[0] / "figures" / LABEL, repository / "figures" / LABEL)


def told(what, said):
    """The jobs of which the launcher says so, in their order."""
    return re.findall(rf"^\[[ \d]+/\d+\] (.+)  {what}", said, re.MULTILINE)


def edit_profile(path):
    """As a user would: a GPU for each job that trains, and here everything sooner."""
    text = re.sub(r"# (\w+: \{gpu: 1\})", r"\1", path.read_text())
    assert text.count("gpu: 1") == 5
    text = text.replace("mem_mb: 4000", "mem_mb: 2000")
    path.write_text(text.replace("before-status-checks: 20", "before-status-checks: 2"))


def compare(one, two):
    names = {str(path.relative_to(one)) for path in one.rglob("*.csv")}
    assert names == {str(path.relative_to(two)) for path in two.rglob("*.csv")}
    assert len(names) > 10
    different = [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()]
    assert set(different) <= set(MEASURED)
