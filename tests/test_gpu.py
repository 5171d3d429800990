"""The GPU's script with small numbers, on the CPU: on a GPU nobody has time to mend it."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from mtprune_utils.files import PROJECT
from mtprune_utils.processes import ENVIRONMENT

PARTS = ("steps", "run-taylor", "run-cosprune", "ratios", "scores", "latency", "checks")


def gpu(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "benchmarks" / "gpu.py"), *map(str, words)]
    environment = os.environ | ENVIRONMENT  # else it would begin twice
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Those of a rehearsal, by name, and the folder that they lie in."""
    out = tmp_path_factory.mktemp("gpu")
    ended = gpu("--rehearse", "--out", out)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder,) = out.iterdir()
    return {path.stem: pd.read_csv(path) for path in folder.iterdir()}, out


def test_every_part_is_rehearsed_to_its_end(tables):
    parts = tables[0]["parts"].set_index("part")["outcome"]
    assert parts.to_dict() == dict.fromkeys(PARTS, "finished")
    assert set(tables[0]["checks"]["outcome"]) == {"holds"}


def test_its_numbers_go_together(tables):
    steps = tables[0]["steps"]
    peak = steps[["product_tflops", "convolution_tflops"]].max(axis=1)
    share = (steps["tflops_per_second"] / peak).rename("share_of_matrix_peak")
    pd.testing.assert_series_equal(steps["share_of_matrix_peak"], share, rtol=2e-3)
    assert not steps.duplicated(["network", "step", "precision", "layout", "kernels"]).any()
    for criterion in ("taylor", "cosprune"):
        run = tables[0][f"run-{criterion}"]
        assert run["removal"].tolist() == list(range(len(run)))
        assert run["filters"].is_monotonic_decreasing and run["filters"].iloc[-1] == 13 * 5
    dense = tables[0]["latency"].query("network == 'dense'")
    assert (dense["speedup"] == 1).all()


def test_what_is_finished_is_not_done_again(tables):
    (folder,) = tables[1].iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = gpu("--rehearse", "--out", tables[1])
    assert again.returncode == 0 and not again.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_part_is_begun_that_does_not_fit(tmp_path):
    ended = gpu("--rehearse", "--out", tmp_path, "--minutes", 1e-6, "--parts", "latency")
    assert ended.returncode == 0
    (table,) = tmp_path.rglob("parts.csv")
    assert pd.read_csv(table)["outcome"].str.startswith("cut short").all()


def test_without_a_gpu_it_says_how_to_try_it():
    ended = gpu()
    assert ended.returncode == 2
    assert "torch finds no GPU here: --rehearse tries the script" in ended.stderr
