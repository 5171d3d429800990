"""Real processes killed at random moments: what is finished stays, the rest goes on.

It ends with the same tables and weights. `make stress` kills more often (MTPRUNE_KILLS), at moments
drawn from a seed of its own (MTPRUNE_KILL_SEED).
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import LAUNCH
from mtprune_utils.core.checkpoints import Interrupted
from mtprune_utils.files import PROJECT, UNFINISHED
from mtprune_utils.stages import dense
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment

KILLS = int(os.environ.get("MTPRUNE_KILLS", 3))
SEED = int(os.environ.get("MTPRUNE_KILL_SEED", time.time_ns() % 10**6))
TINY = {
    "train_images": 24,
    "test_images": 8,
    "crop": 32,
    "image_height": 32,
    "dropout": 0.2,
    "dense.steps": 30,
    "dense.evaluations": 3,
    "retrain.steps": 30,
    "retrain.evaluations": 3,
    "prune.prune_interval": 8,
    "prune.filters_per_step": 110,
    "prune.cosine_batches": 2,
    "tuning.trials": 2,
    "checkpoint_seconds": 0.0,
}
# For what must meet the process in the middle of its first run.
LONG = TINY | {"dense.steps": 100_000}
EXECUTE = """
import json, sys
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
experiment = Experiment.open("smoke", "rooms", "", sys.argv[1], json.loads(sys.argv[2]))
execute(experiment.retrain("cosprune", 0, 0, "finetune"))
"""


def start(folder: Path, numbers: dict = TINY) -> subprocess.Popen:
    command = [sys.executable, "-c", EXECUTE, str(folder), json.dumps(numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """The process, which does not outlive the block."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_a_checkpoint(process: subprocess.Popen, folder: Path) -> Path:
    while not (kept := [path for path in checkpoints(folder) if path.name.startswith("step")]):
        assert process.poll() is None
        time.sleep(0.001)
    return kept[0]


def results(folder: Path) -> dict[str, bytes]:
    """Every table, network and found setting under a folder."""
    assert not checkpoints(folder), "a finished run keeps no checkpoints"
    kept = [
        path
        for path in files(folder)
        if path.suffix in (".csv", ".safetensors") or path.name == "best.json"
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def files(folder: Path) -> list[Path]:
    """Every file under a folder that a process is at work in.

    Unlike `rglob`, no error if a folder goes meanwhile.
    """
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def being_written(folder: Path) -> list[Path]:
    return [
        path
        for path in files(folder)
        if path.name.startswith(".") and path.name.endswith(UNFINISHED)
    ]


def finished(folder: Path) -> set[Path]:
    return {path for path in files(folder) if path.name == "done.json"}


def checkpoints(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.parent.name == "checkpoints"]


def kill_somewhere(process: subprocess.Popen, folder: Path, draw: random.Random) -> str | None:
    """Kill a process at a random moment of its work; says how, or None if it has ended before."""
    earlier = set(being_written(folder))
    while process.poll() is None and not any(
        path.parent.name == "checkpoints" for path in set(being_written(folder)) - earlier
    ):
        if draw.random() < 0.0005:  # while it reads data, measures, or writes its results
            break
        time.sleep(0.001)
    pause = draw.uniform(0, 0.3)
    time.sleep(pause)
    if draw.random() < 0.5:  # in the middle of a write
        while process.poll() is None and not set(being_written(folder)) - earlier:
            pass
    if process.poll() is not None:
        return None
    process.kill()
    process.communicate()
    return f"{pause:.2f} s after work began" + (
        ", in a write" if set(being_written(folder)) - earlier else ""
    )


def test_runs_killed_at_random_end_as_if_nothing_had_happened(tmp_path):
    print(f"MTPRUNE_KILL_SEED={SEED}")
    draw, kills, hit, chains = random.Random(SEED), [], set(), 0
    process = start(tmp_path / "whole")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    expected = results(tmp_path / "whole")
    runs = len(finished(tmp_path / "whole"))
    assert {name.split("/")[1] for name in expected} == {"dense", "tune", "prune", "retrain"}

    while len(kills) < KILLS:
        chains += 1
        killed = tmp_path / f"killed{chains}"
        process, how = start(killed), ""
        while how is not None and len(kills) < KILLS:
            # Spread over the chain: it is let come to its share of the runs first.
            while process.poll() is None and len(finished(killed)) < len(kills) * runs // KILLS:
                time.sleep(0.001)
            before = finished(killed)
            if how := kill_somewhere(process, killed, draw):
                kills.append(how)
                hit |= {path.parents[2].name for path in checkpoints(killed)}
                assert before <= finished(killed), "what is finished stays finished"
                done = f"{len(finished(killed))} of {runs} runs are finished"
                print(f"kill {len(kills)}/{KILLS}, {how}; {done}")
                process = start(killed)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        found = results(killed)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert not being_written(killed)
    in_writes = sum("in a write" in how for how in kills)
    print(
        f"{in_writes} of {len(kills)} kills fell into a write; unfinished were then {sorted(hit)}"
    )
    if KILLS >= 20:
        assert in_writes and hit == {"dense", "tune", "prune", "retrain"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_says_where_it_goes_on(tmp_path, signum):
    with ended(start(tmp_path, LONG)) as process:
        wait_for_a_checkpoint(process, tmp_path)
        process.send_signal(signum)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "whose state is kept: run it again to go on" in said.splitlines()[-1]
    assert not finished(tmp_path) and checkpoints(tmp_path)


def test_a_stop_after_the_last_checkpoint_still_ends_the_chain(tmp_path, monkeypatch):
    run = Experiment.open("smoke", "rooms", "", str(tmp_path), TINY | {"tuning.trials": 0}).prune(
        "taylor", 0
    )
    trivial = dense.trivial_predictors

    def asked(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return trivial(*arguments)

    monkeypatch.setattr(dense, "trivial_predictors", asked)
    with pytest.raises(
        Interrupted, match=f"stopped, with dense {run.source.name} finished: run it again to go on"
    ):
        execute(run, lambda line: None)
    assert run.source.done and not run.folder.exists()


def test_a_second_process_at_the_same_run_is_refused(tmp_path):
    with ended(start(tmp_path, LONG)) as first:
        wait_for_a_checkpoint(first, tmp_path)
        first.send_signal(signal.SIGSTOP)
        with ended(start(tmp_path, LONG)) as second:
            said, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert (
            f"is already being run there, by process {first.pid}: wait for it or end it"
            in said.splitlines()[-1]
        )


def test_a_batch_systems_time_limit_leaves_a_checkpoint_and_an_exit_code_of_its_own(tmp_path):
    overrides = json.dumps({"dense.steps": 100_000, "checkpoint_seconds": 2})
    parameters = {"profile": "smoke", "runs": str(tmp_path), "overrides": overrides}
    words = [word for name, value in parameters.items() for word in ("-p", name, value)]
    command = [*LAUNCH, "notebook", "notebooks/01_train_dense.ipynb"]
    runner = subprocess.Popen(
        [*command, str(tmp_path / "out.ipynb"), *words],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended(runner):
        first = wait_for_a_checkpoint(runner, tmp_path)
        time.sleep(0.5)  # it is there a moment before the run goes on
        asked = time.time()
        runner.terminate()
        _, said = runner.communicate(timeout=100)
    assert runner.returncode == 128 + signal.SIGTERM
    again = "Run it again: it goes on from its last checkpoint, if it has one"
    assert f"01_train_dense.ipynb: stopped. {again}" in said
    last = max(first.parent.glob("step*.safetensors"))
    assert not last.name.startswith("step000000000") and last.stat().st_mtime >= asked
    assert not (tmp_path / "out.ipynb").exists()
