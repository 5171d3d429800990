"""Tuning, re-training's arms, and the order in which runs take what others found."""

import json
from dataclasses import replace

import pytest
import torch

from mtprune_utils.core import evaluation
from mtprune_utils.core.model import load_model
from mtprune_utils.core.trainer import Diverged
from mtprune_utils.files import read_json, read_table
from mtprune_utils.stages import _training, prune, retrain, tune
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import get_profile

TINY = {
    "train_images": 24,
    "test_images": 8,
    "crop": 32,
    "image_height": 32,
    "dense.steps": 4,
    "dense.evaluations": 1,
    "retrain.steps": 4,
    "retrain.evaluations": 2,
    "prune.prune_interval": 1,
    "prune.filters_per_step": 60,
    "sizes": [0.6, 0.4],
    "tuning.trials": 3,
}


def quiet(line):
    pass


def experiment(folder, **more) -> Experiment:
    return Experiment.open("smoke", "rooms", "", str(folder), TINY | more)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An experiment in which one search for pruning and one for re-training have been run."""
    base = experiment(tmp_path_factory.mktemp("tuned"))
    for arm in ("prune", "retrain", "finetune"):
        execute(base.tune(arm, "taylor", 0), quiet)
    return base


def test_a_search_writes_its_history_and_its_best(tuned):
    for arm in ("prune", "retrain", "finetune"):
        run = tuned.tune(arm, "taylor", 0)
        rows, best = read_table(run.path("trials.csv")), read_json(run.path("best.json"))
        own = tune.settings(run)
        assert len(rows) == 3 and float(rows[0]["lr"]) == own.lr
        assert float(rows[0]["weight_decay"]) == own.weight_decay
        losses = [float(row["loss"]) for row in rows if row["state"] == "complete"]
        assert best["loss"] == min(losses)
        low, high = tuned.profile.tuning.lr
        assert all(low <= float(row["lr"]) <= high for row in rows)


def test_a_search_uses_its_own_seed_and_never_the_test_images(tuned, monkeypatch, tmp_path):
    run = tuned.tune("prune", "taylor", 0)
    assert run.seed == 1000 and [upstream.seed for upstream in run.inputs] == [1000]
    seen = []

    def evaluate(model, split, *rest):
        seen.append(len(split))
        return {"depth.loss": 1.0}

    base = experiment(tmp_path)
    execute(base.dense(1000), quiet)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    execute(base.tune("prune", "taylor", 0), quiet)
    assert set(seen) == {3}, "the validation images are 3, the test images 8"


def test_a_gpu_that_is_not_there_is_refused_in_one_line(tmp_path):
    base = Experiment.open("smoke", "rooms", "", str(tmp_path), TINY | {"device": "cuda"})
    expected = "device is cuda, but torch finds no GPU here: override it with auto or cpu"
    with pytest.raises(ValueError, match=expected):
        execute(base.dense(0), quiet)


def test_how_a_run_is_done_is_no_part_of_its_name(tmp_path):
    def opened(**overrides):
        return Experiment.open("smoke", "rooms", "", str(tmp_path), overrides)

    other = opened(device="cpu", deterministic=True, checkpoint_seconds=1)
    assert other.dense(0).name == opened().dense(0).name and other.label == "smoke"
    assert opened(precision="bf16").dense(0).name != opened().dense(0).name


def test_switches_of_a_gpu(monkeypatch):
    """Set without a GPU too, so that they are tested where there is none."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = torch.backends.cudnn.benchmark
    try:
        for deterministic in (True, False):
            _training.set_up(
                get_profile("paper", {"deterministic": deterministic}), torch.device("cuda")
            )
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert torch.backends.cudnn.benchmark is not deterministic
            assert torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest", "scores are float32"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before


def test_an_interrupted_search_ends_as_an_uninterrupted_one(tuned, tmp_path, monkeypatch):
    base, done = experiment(tmp_path), []
    attempt = tune._run_trial

    def until_interrupted(*arguments):
        if len(done) == 1:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append("trial")
        return attempt(*arguments)

    monkeypatch.setattr(tune, "_run_trial", until_interrupted)
    run = base.tune("prune", "taylor", 0)
    with pytest.raises(KeyboardInterrupt):
        execute(run, quiet)
    assert not run.done
    with run.path("journal.log").open("ab") as journal:
        journal.write(b'{"op_code":6,"work')  # killed while writing
    run.path("journal.log.lock").symlink_to(run.path("journal.log"))
    execute(run, quiet)
    assert done == ["trial", "interrupted", "trial", "trial"], "the finished trial is not repeated"
    assert (
        run.path("trials.csv").read_bytes()
        == tuned.tune("prune", "taylor", 0).path("trials.csv").read_bytes()
    )


def test_a_trial_that_diverges_is_given_up_and_the_search_goes_on(tmp_path, monkeypatch):
    outcomes = iter([1.0, Diverged("nan"), 0.5])

    def attempt(*arguments):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(tune, "_run_trial", attempt)
    base = experiment(tmp_path)
    execute(base.dense(1000), quiet)
    run = base.tune("prune", "cosprune", 0)
    execute(run, quiet)
    assert [row["state"] for row in read_table(run.path("trials.csv"))] == [
        "complete",
        "pruned",
        "complete",
    ]
    assert read_json(run.path("best.json"))["loss"] == 0.5


def test_runs_take_the_settings_that_were_found_best(tuned):
    best = read_json(tuned.tune("prune", "taylor", 0).path("best.json"))
    run = tuned.prune("taylor", 0, level=0)
    settings = prune.settings(run)
    assert (settings.lr, settings.weight_decay) == (best["lr"], best["weight_decay"])
    assert replace(settings, lr=0.1, weight_decay=0.1) == replace(
        tuned.profile.prune, lr=0.1, weight_decay=0.1
    )
    scratch, finetune = (tuned.retrain("taylor", 0, 0, arm) for arm in ("scratch", "finetune"))
    assert scratch.search == tuned.tune("retrain", "taylor", 0)
    assert finetune.search == tuned.tune("finetune", "taylor", 0)
    uniform = tuned.retrain("uniform", 0, 0)
    assert uniform.source is None and uniform.search == tuned.tune("retrain", "uniform", 0)
    with pytest.raises(ValueError, match="unknown arm 'prune'"):
        tuned.tune("prune", "uniform", 0)
    assert experiment("x", **{"tuning.trials": 0}).prune("taylor", 0).search is None


def test_sizes_share_a_pruning_run_unless_each_is_tuned(tmp_path):
    untuned, tuned = experiment(tmp_path, **{"tuning.trials": 0}), experiment(tmp_path)
    assert untuned.prune("taylor", 0, 0).name == untuned.prune("taylor", 0, 1).name
    assert tuned.prune("taylor", 0, 0).name != tuned.prune("taylor", 0, 1).name
    assert tuned.prune("taylor", 0).name == tuned.prune("taylor", 0, 1).name, (
        "the last one goes to the floor"
    )


def test_arms_of_retraining(tmp_path):
    base = experiment(tmp_path, **{"tuning.trials": 0})
    runs = {
        arm: base.retrain("taylor", 0, 1, arm) for arm in ("scratch", "scratch_longer", "finetune")
    }
    for run in runs.values():
        execute(run, quiet)
    rows = {arm: read_table(run.path("evaluations.csv"))[0] for arm, run in runs.items()}
    assert len({row["widths"] for row in rows.values()}) == 1
    assert [rows[arm]["steps"] for arm in rows] == ["4", "6", "4"], (
        "a budget of 1.5 times the steps"
    )
    assert float(rows["finetune"]["lr"]) == base.profile.prune.lr != float(rows["scratch"]["lr"])
    kept = _training.network(runs["finetune"].source, _training.at_level(1)).state_dict()
    start = load_model(runs["finetune"].path("model.safetensors")).state_dict()
    other = load_model(runs["scratch"].path("model.safetensors")).state_dict()
    name = "heads.depth.branches.0.0.weight"

    def distance(state):
        return (state[name] - kept[name]).norm()

    assert distance(start) < 0.2 * distance(other), (
        "fine-tuning starts from the weights that pruning kept"
    )


def test_equal_compute_counts_multiply_accumulates_of_all_that_came_before(tmp_path):
    base = experiment(tmp_path, **{"tuning.trials": 0, "controls.budget": 100.0})
    run = base.retrain("taylor", 0, 1, "scratch_longer")
    execute(run.source, quiet)
    rows = [
        row for row in read_table(run.source.path("evaluations.csv")) if row["phase"] == "recovered"
    ]
    dense = int(read_table(run.source.path("evaluations.csv"))[0]["macs"])
    end = next(i for i, row in enumerate(rows) if row["target_level"] == "1")
    # Each recovery is one step on the network as it then is. The first minibatches score the dense
    # network.
    spent = 4 * dense + dense + sum(int(row["macs"]) for row in rows[: end + 1])
    assert abs(retrain.equal_compute_steps(run) - spent / int(rows[end]["macs"])) <= 1


def test_single_task_networks_have_one_head_and_see_the_same_images(tmp_path):
    base = experiment(tmp_path)
    run = base.dense(0, "depth")
    execute(run, quiet)
    assert load_model(run.path("model.safetensors")).architecture.tasks == {"depth": 1}
    columns = read_table(run.path("evaluations.csv"))[0]
    assert {name.split(".")[0] for name in columns if "." in name} == {"depth"}
    assert run.random_seed == base.dense(0).random_seed
    with pytest.raises(ValueError, match="unknown arm 'deth': did you mean 'depth'"):
        base.dense(0, "deth")


def test_controls_change_the_schedule_and_nothing_else():
    base = Experiment.open("study", "rooms", "", "runs")
    paper, constant, geometric = (
        base.prune("taylor", 0, arm=arm).params["prune"]
        for arm in ("iterative", "constant_rate", "geometric")
    )
    assert constant == paper | {"lr_schedule": "constant"}
    assert geometric == paper | {"pruning_schedule": "geometric"}
    assert paper["lr_schedule"] == "cosine" and paper["pruning_schedule"] == "fixed"
    assert "cosine_rate" in Experiment.open("quick", "rooms", "", "runs").schedules, (
        "where the profile's own is constant"
    )
    assert json.dumps(paper)
