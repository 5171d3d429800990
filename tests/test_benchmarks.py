"""The benchmarks measure what they say. No times are tested."""

from importlib import import_module

import pandas as pd
import pytest
import torch

from mtprune_utils.files import PROJECT
from mtprune_utils.study.profiles import get_profile

SMOKE = {
    "train_images": None,
    "batch_size": 4,
    "prune.prune_interval": 2,
    "prune.filters_per_step": 200,
}


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmarks' module of that name."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return import_module


def test_a_run_is_timed_removal_by_removal(benchmark):
    throughput = benchmark("throughput")
    case = throughput.Case(get_profile("smoke", SMOKE))
    written = []
    table = throughput.timed_run(case, "cosprune", 1e9, lambda rows: written.append(len(rows)))
    assert written == list(range(1, len(table) + 1))
    assert table["removal"].tolist() == list(range(len(table))) and len(table) >= 3
    assert table["filters"].is_monotonic_decreasing
    assert table["filters"].iloc[-1] == 13 * case.profile.prune.min_filters
    assert (table[["steps_per_second", "evaluation_seconds"]] > 0).all(axis=None)
    others = (case.profile.prune.prune_interval - 1) / table["steps_per_second"]
    seconds = table["first_step_seconds"] + others
    pd.testing.assert_series_equal(table["train_seconds"], seconds, check_names=False)
    assert (table["removal_seconds"].iloc[2:] > 0).all()


def test_the_peak_is_measured_in_either_way(benchmark):
    found = benchmark("throughput").peaks(torch.device("cpu"), "float32", side=64, seconds=0.01)
    assert set(found) == {"product", "convolution"} and min(found.values()) > 0


def test_operations_of_a_step_are_those_of_its_passes(benchmark):
    """Forward once; backward through the backbone once per task.

    The latter is two products of the forward pass's size each.
    """
    throughput = benchmark("throughput")
    case = throughput.Case(get_profile("smoke", SMOKE))
    model = throughput.build(case.architecture, 0)
    with throughput.FlopCounterMode(display=False) as counter:
        images = torch.zeros(case.profile.batch_size, 3, case.profile.crop, case.profile.crop)
        model.trunk(images)
        backbone = counter.get_total_flops()
    tasks = len(case.dataset.tasks)
    counted = throughput.step_flops(case, case.architecture, "cosprune")
    # Heads and scores come beside it.
    assert (1 + 2 * tasks) * backbone * 0.9 < counted < (1 + 2 * tasks) * backbone * 1.6
    assert throughput.step_flops(case, case.architecture, "taylor") < 0.6 * counted


@pytest.mark.parametrize("batched", [False, True])
def test_the_step_by_hand_does_the_work_of_a_scored_one(benchmark, batched):
    """Else it would be no yardstick: both leave the same weights."""
    case = benchmark("ratios").Case(get_profile("smoke", SMOKE))
    scored, by_hand = case.step("cosprune"), case.minimal(batched)
    for step in (scored, by_hand) * 2:
        step()
    expected, found = (trainer_of(step).model.state_dict() for step in (scored, by_hand))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("ratios", "--rounds 0"),
        ("throughput", "--profile smok"),
        ("throughput", "--criterion tailor"),
        ("scores", "--seeds 0"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    benchmark, monkeypatch, capsys, name, words
):
    monkeypatch.setattr("sys.argv", [name, *words.split()])
    with pytest.raises(SystemExit):
        benchmark(name).main()
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]


def trainer_of(step):
    return next(
        cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "optimizer")
    )
