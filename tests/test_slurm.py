"""A batch on SLURM, which runs on this machine alone: `make test-slurm` (some minutes).

A job is cancelled while it trains, the driver is killed, and in the end every table has the bytes
of a local batch's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from loopback_slurm import lacking, slurm
from mtprune_utils.files import PROJECT, read_table
from mtprune_utils.run import plan

pytestmark = pytest.mark.skipif("MTPRUNE_SLURM" not in os.environ, reason="make test-slurm runs it")

# A run or two of every stage. The dense one lasts long enough to be stopped on its way.
OVERRIDES = {
    "seeds": 1,
    "controls.seeds": 0,
    "tuning.trials": 0,
    "dense.steps": 400,
    "checkpoint_seconds": 1.0,
}
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


def start(repository, environment, *more):
    """The launcher, what it says going to a file."""
    command = [
        sys.executable,
        "-m",
        "mtprune_utils.run.launch",
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
        return subprocess.Popen(
            command, cwd=repository, env=environment, stdout=said, stderr=subprocess.STDOUT
        )


def wait_until(condition, repository, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, (repository / "said.txt").read_text()
        time.sleep(0.3)
    return found


def finish(process, repository, seconds=900):
    try:
        code = process.wait(seconds)
    finally:
        process.terminate()
    said = (repository / "said.txt").read_text()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A copy in which the batch has run on this machine, and how many seconds that took."""
    repository = copy_repository(tmp_path_factory.mktemp("local") / "repository")
    start_time = time.monotonic()
    finish(start(repository, dict(os.environ), "--jobs", "2"), repository)
    return repository, time.monotonic() - start_time


def test_the_plan_says_how_long_a_batch_takes(local):
    """From the seconds of its jobs, within a quarter."""
    repository, seconds = local
    names = {
        row["job"]: float(row["seconds"])
        for row in read_table(repository / "figures" / LABEL / "timings.csv")
    }
    experiment = plan.Experiment.open("smoke", "rooms", "", str(repository / "runs"), OVERRIDES)
    jobs = plan.jobs_of(experiment, lambda run: names[plan.job_name(run)])
    jobs = [plan.replace(job, seconds=names[job.name]) for job in jobs]
    assert plan.makespan(jobs, 2) == pytest.approx(seconds, rel=0.25)


def test_a_batch_on_slurm_survives_kills_and_gives_the_same_bytes(local, tmp_path):
    assert not (why := lacking()), why
    repository = copy_repository(tmp_path / "repository")
    edit_profile(repository / "cluster/slurm/config.yaml")
    with slurm(tmp_path / "slurm", cores=1) as environment:

        def queue(form, *more):
            command = ["squeue", "--noheader", "--format", form, *more]
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout.split()

        driver = start(repository, environment, "--on", "slurm")
        # The first job is cancelled while it trains: its retry goes on from the checkpoint.
        wait_until(lambda: list(repository.glob("runs/smoke/dense/*/checkpoints/*")), repository)
        (job,) = queue("%A")
        about = subprocess.run(
            ["scontrol", "show", "job", job],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"Tres\w+=.*gpu[:=]1", about) and "TimeLimit=00:15:00" in about
        subprocess.run(["scancel", job], env=environment, check=True)
        said = repository / "said.txt"
        wait_until(lambda: "dense seed 0 multitask  done" in said.read_text(), repository)
        (notebook,) = repository.glob("runs/smoke/dense/*/notebook.ipynb")
        assert "going on after step" in notebook.read_text()
        # The driver is killed while jobs run: the next one ends them, and loses nothing.
        wait_until(lambda: re.search(r"(prune|score) .* started", said.read_text()), repository)
        driver.kill()
        driver.wait()
        left = queue("%A")
        assert left
        output = finish(start(repository, environment, "--on", "slurm"), repository)
        assert f"{len(left)} jobs that an earlier driver left in the queue are cancelled" in output
        assert "1 finished earlier; on slurm" in output and "dense seed 0" not in output
        assert not queue("%A")
        nodes = queue("%N", "--states", "all")
        assert set(nodes) == {"n1", "n2"}
    compare(local[0] / "figures" / LABEL, repository / "figures" / LABEL)


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
