"""Loss weightings: what each entry promises, their formulas, and training and pruning by them."""

import builtins
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TASKS, narrow, scores_of
from mtprune_utils import registry
from mtprune_utils.core.checkpoints import Checkpoints, Interrupted, pack, unpack
from mtprune_utils.core.model import build
from mtprune_utils.core.settings import Optimization, Profile, Pruning
from mtprune_utils.core.signals import aggregation_of, backward, task_backward
from mtprune_utils.core.trainer import Diverged, Trainer, train
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.study.execute import execute_missing
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import get_profile
from mtprune_utils.weightings import get_weighting

sys.path.append(str(PROJECT / ".venv" / "foreign"))  # TorchJD, see FOREIGN in Makefile

import torchjd  # noqa: F401

NAMES = registry.names("weightings")
EPOCH = 3  # minibatches
PROFILE = Profile(
    "tiny",
    image_height=32,
    crop=32,
    scale=(0.75, 1.0),
    batch_size=8,
    backbone="vgg16_bn",
    stride=8,
    head_width=8,
    dropout=0.2,
    dense=Optimization(steps=9, lr=1e-2, evaluations=3),
)


def weighting_of(name: str, tasks=("a", "b", "c")) -> nn.Module:
    return get_weighting(name)(list(tasks), EPOCH)


def aggregating() -> list[str]:
    return [name for name in NAMES if aggregation_of(weighting_of(name))]


def losses_at(step: int, tasks=("a", "b", "c")) -> dict[str, torch.Tensor]:
    """Of some minibatch."""
    generator = torch.Generator().manual_seed(step)
    values = torch.rand(len(tasks), generator=generator) + 0.5
    return {task: value.requires_grad_() for task, value in zip(tasks, values)}


# --- what each promises ---


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_what_it_is_and_a_misspelt_one_is_refused(name):
    module = registry.entry("weightings", name, "weighting")
    assert module.__doc__.strip()[-1] in ".:"
    message = f"unknown weighting '{name}x': did you mean '"
    with pytest.raises(ValueError, match=message):
        get_weighting(f"{name}x")
    with pytest.raises(ValueError, match=message):
        get_profile("smoke", {"weighting": f"{name}x"})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_as_many_finite_losses_come_of_it_and_gradients_flow(name, count):
    tasks = ("c", "a", "b")[:count]
    weighting = weighting_of(name, tasks)
    for step in range(4 * EPOCH):
        losses = losses_at(step, tasks)
        weighted = weighting(losses)
        assert [*weighted] == [*losses]
        assert all(loss.shape == () and loss.isfinite() for loss in weighted.values())
        sum(weighted.values()).backward()
        assert all(loss.grad > 0 for loss in losses.values())
    assert all(parameter.grad.any() for parameter in weighting.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_its_state_survives_a_checkpoint_and_it_goes_on_from_there(name, tmp_path):
    weighting, twin = weighting_of(name), weighting_of(name)
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter.add_(torch.arange(1.0, len(parameter) + 1))
    for step in range(3 * EPOCH - 1):
        weighting(losses_at(step))
    (tmp_path / "state").write_bytes(pack(weighting.state_dict()))
    twin.load_state_dict(unpack(tmp_path / "state"))
    for step in range(10, 10 + 2 * EPOCH):
        ours, theirs = weighting(losses_at(step)), twin(losses_at(step))
        assert all(torch.equal(ours[task], theirs[task]) for task in ours)


class StopsAt(Checkpoints):
    """Asked to stop after some steps."""

    def __init__(self, folder, *steps):
        super().__init__(folder, 0.0, "code", lambda line: None)
        self.steps = steps

    def keep(self, step, state):
        self.stop = step in self.steps
        super().keep(step, state)


@pytest.fixture
def trained(architecture, dataset, tmp_path):
    """Training with a weighting, stopped after some steps: its curve and weights."""

    def of(name, *stops):
        torch.manual_seed(5)
        model = build(narrow(architecture, backbone="vgg16_bn", dropout=0.2), 0)
        profile, checkpoints = replace(PROFILE, weighting=name), StopsAt(tmp_path, *stops)
        curve = train(
            model, dataset, profile, profile.dense, 0, lambda line: None, checkpoints=checkpoints
        )
        checkpoints.clear()
        return curve, torch.cat([value.flatten() for value in model.state_dict().values()])

    return of


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_ends_with_the_same_bits(name, trained):
    curve, weights = trained(name)
    for stop in (4, 7):  # within epochs of three minibatches
        with pytest.raises(Interrupted):
            trained(name, stop)
        torch.rand(stop)  # another process has drawn other numbers
    again, resumed = trained(name)
    assert again == curve and torch.equal(resumed, weights)


@pytest.mark.parametrize("name", ["uncertainty", "dwa"])
def test_what_a_weighting_remembers_matters(name, trained, monkeypatch):
    """Negative control of the test above: leave it out, and the results differ."""
    curve, _ = trained(name)
    with pytest.raises(Interrupted):
        trained(name, 7)
    restore = Trainer.restore

    def forgetful(self, state):
        restore(self, state | {"weighting": self.weighting.state_dict()})

    monkeypatch.setattr(Trainer, "restore", forgetful)
    assert trained(name)[0] != curve


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_loss_is_said_to_be_so(name, model, dataset):
    with torch.no_grad():
        model.heads["depth"].branches[0][-1].bias.fill_(float("nan"))
    with pytest.raises(Diverged, match="the loss of depth is nan at step 1"):
        train(model, dataset, replace(PROFILE, weighting=name), PROFILE.dense, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_training_learns(name, architecture, dataset):
    learnable = replace(dataset, train=dataset.validation[torch.arange(16) % 8])
    settings = Optimization(lr=3e-3, steps=40, evaluations=2)
    curve = train(
        build(architecture, 0),
        learnable,
        replace(PROFILE, weighting=name),
        settings,
        0,
        lambda line: None,
    )
    assert curve[1]["train.depth.loss"] < 0.9 * curve[0]["train.depth.loss"]


# --- formulas ---


def test_equal_leaves_losses_and_optimizer_as_they_are(model, dataset):
    losses = losses_at(0)
    weighted = weighting_of("equal")(losses)
    assert all(weighted[task] is losses[task] for task in losses)
    made = Trainer(model, dataset, PROFILE, PROFILE.dense, 9, 0)
    (group,) = made.optimizer.param_groups
    assert group["params"] == list(model.parameters())


def test_uncertainty_in_numpy():
    weighting, losses = weighting_of("uncertainty"), losses_at(0)
    s = np.array([-1.0, 0.0, 2.0])
    with torch.no_grad():
        weighting.log_variances.copy_(torch.from_numpy(s))
    weighted = weighting(losses)
    values = np.array([loss.item() for loss in losses.values()])
    expected = 0.5 * (np.exp(-s) * values + s)
    np.testing.assert_allclose([of.item() for of in weighted.values()], expected, rtol=1e-6)
    sum(weighted.values()).backward()
    grads = [loss.grad.item() for loss in losses.values()]
    np.testing.assert_allclose(grads, 0.5 * np.exp(-s), rtol=1e-6)
    np.testing.assert_allclose(
        weighting.log_variances.grad.numpy(), 0.5 * (1 - np.exp(-s) * values), rtol=1e-5
    )


def test_uncertainties_are_trained_without_weight_decay_and_scored_steps_train_them_alike(
    architecture, dataset
):
    """They move by the losses alone, with per-task passes or without."""
    ends = []
    for name in ("taylor", "cosprune"):
        model = build(architecture, 0)
        settings = Pruning(lr=1e-2, weight_decay=10.0)
        made = Trainer(model, dataset, replace(PROFILE, weighting="uncertainty"), settings, 6, 0)
        networks, weights = made.optimizer.param_groups
        assert (networks["weight_decay"], weights["weight_decay"]) == (10.0, 0.0)
        assert weights["params"] == list(made.weighting.parameters())
        for _ in range(4):
            made.step([scores_of(name, model)])
        ends.append(made.weighting.log_variances.detach().clone())
    assert ends[0].all()
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_dynamic_weight_average_in_numpy():
    weighting = weighting_of("dwa")
    means = []
    for epoch in range(5):
        seen = [losses_at(EPOCH * epoch + i) for i in range(EPOCH)]
        if epoch < 2:
            expected = np.ones(3)
        else:
            exps = np.exp(means[-1] / means[-2] / 2)
            expected = 3 * exps / exps.sum()
        for losses in seen:
            sum(weighting(losses).values()).backward()
            grads = [loss.grad.item() for loss in losses.values()]
            np.testing.assert_allclose(grads, expected, rtol=1e-5)
        means.append(np.mean([[loss.item() for loss in of.values()] for of in seen], axis=0))
    assert np.abs(expected - 1).max() > 0.01, "or nothing is tested"


def test_dynamic_weight_average_of_a_loss_that_is_zero_is_finite():
    weighting = weighting_of("dwa", ("a", "b"))
    for _ in range(3 * EPOCH):
        weighting({"a": torch.zeros(()), "b": torch.ones(())})
    assert weighting.weights.tolist() == pytest.approx([1, 1])


def test_an_epoch_is_what_the_minibatches_take_it_for(model, dataset):
    made = Trainer(model, dataset, replace(PROFILE, weighting="dwa"), PROFILE.dense, 9, 0)
    for _ in range(7):
        made.step()
    assert made.weighting.epoch == 3  # 24 images by 8
    losses = torch.stack([torch.stack(of) for of in made.losses.values()])
    torch.testing.assert_close(made.weighting.means, losses[:, 3:6].mean(1))
    rates = losses[:, 3:6].mean(1) / losses[:, :3].mean(1)
    torch.testing.assert_close(made.weighting.weights, 3 * (rates / 2).softmax(0))


def test_a_step_does_not_wait_for_the_device(model, dataset, monkeypatch):
    for name in set(NAMES) - {*aggregating()}:
        made = Trainer(model, dataset, replace(PROFILE, weighting=name), PROFILE.dense, 9, 0)
        with monkeypatch.context() as patch:
            for read in ("item", "tolist", "cpu", "__bool__", "__float__"):
                patch.setattr(torch.Tensor, read, lambda *_: pytest.fail("waits for the device"))
            for step in range(2 * EPOCH):
                sum(made.weighting(losses_at(step, [*TASKS])).values()).backward()


# --- aggregation ---


def test_pcgrad_of_two_tasks():
    """Each gradient less its projection onto the other, if they conflict; their sum."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 50, generator=generator)
    other = other - 2 * one  # against each other
    product = one @ other
    assert product < 0
    expected = one - product / (other @ other) * other + other - product / (one @ one) * one
    aggregate = weighting_of("pcgrad").aggregate
    torch.testing.assert_close(aggregate(torch.stack([one, other])), expected)
    agreeing = torch.stack([one, -other])
    torch.testing.assert_close(aggregate(agreeing), agreeing.sum(0))


@pytest.mark.parametrize("name", aggregating())
def test_the_trunk_gets_the_aggregate_and_each_head_its_own_gradient(name, model, dataset):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weighting, shared = weighting_of(name, [*TASKS]), [*model.trunk.parameters()]

    def losses():
        outputs = model(images)
        return {task: (outputs[task] - 1).square().mean() for task in TASKS}

    rows, heads = [], {}
    for task in TASKS:
        model.zero_grad()
        backward({task: losses()[task]})
        rows.append(torch.cat([p.grad.flatten() for p in shared]))
        heads[task] = [p.grad for p in model.heads[task].parameters()]
    model.zero_grad()
    torch.manual_seed(3)  # of PCGrad's order
    gradients = task_backward(weighting(losses()), model, shared, weighting)
    torch.manual_seed(3)
    expected = weighting.aggregate(torch.stack(rows))
    found = torch.cat([p.grad.flatten() for p in shared])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    for row, of in zip(rows, gradients.values()):
        torch.testing.assert_close(torch.cat([of[p].flatten() for p in shared]), row)
    for task in TASKS:
        for parameter, own in zip(model.heads[task].parameters(), heads[task]):
            torch.testing.assert_close(parameter.grad, own)
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_criteria_read_the_gradient_that_is_trained_with(model, dataset):
    """With an aggregating weighting, and that on every step by one forward pass."""
    made = Trainer(model, dataset, replace(PROFILE, weighting="pcgrad"), PROFILE.dense, 9, 0)
    forwards, read = [], []
    model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    scores = scores_of("taylor", model)
    weighting, aggregate = made.weighting, made.weighting.aggregate
    weighting.aggregate = lambda rows: (read.append(aggregate(rows)), read[-1])[1]
    made.optimizer.param_groups[0]["lr"] = 0.0  # the weights stay where they were scored
    made.step([scores])
    trained = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    assert len(forwards) == len(read) == 1 and torch.equal(trained, read[0])
    again = scores_of("taylor", model)
    again.update()
    assert all(torch.equal(*pair) for pair in zip(scores.mean(), again.mean()))


@pytest.mark.parametrize(
    "name, package",
    [("pcgrad", "torchjd==0.18.0"), ("upgrad", r"torchjd\[quadprog_projector\]==0.18.0")],
)
def test_without_torchjd_one_line_says_what_to_install(name, package, monkeypatch):
    own = builtins.__import__

    def without(module, *more):
        if module.startswith(("torchjd", "qpsolvers", "quadprog")):
            raise ImportError(f"No module named {module!r}")
        return own(module, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"pip install '{package}'") as raised:
        weighting_of(name)
    assert "\n" not in str(raised.value)


# --- runs ---

TINY = {
    "train_images": 24,
    "test_images": 8,
    "crop": 32,
    "image_height": 32,
    "dense.steps": 4,
    "dense.evaluations": 1,
    "retrain.steps": 4,
    "retrain.evaluations": 1,
    "prune.prune_interval": 1,
    "prune.filters_per_step": 110,
    "prune.cosine_batches": 1,
    "tuning.trials": 0,
    "seeds": 1,
    "controls.seeds": 0,
    "criteria": ["taylor"],
}


def opened(folder, **more) -> Experiment:
    return Experiment.open("smoke", "rooms", "", str(folder), TINY | more)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "pcgrad"])
def test_a_profile_is_trained_pruned_and_retrained_by_it(name, tmp_path):
    experiment = opened(tmp_path, weighting=name)
    runs = experiment.runs()
    assert {run.stage for run in runs} == {"dense", "prune", "retrain"}
    execute_missing(runs)
    assert all(run.done for run in runs)
    for run in runs:
        assert read_json(run.path("params.json"))["weighting"] == name


def test_a_weighting_is_part_of_a_runs_name_and_code_and_equal_keeps_the_names_there_were(tmp_path):
    kept = Experiment(get_profile("study"), root=tmp_path)
    assert kept.dense(0).name == "seed0-multitask-9e8ea39da6"
    assert kept.prune("taylor", 0, 0).name == "taylor-seed0-level0-iterative-3040a8ce96"
    assert kept.retrain("taylor", 0, 0).name == "taylor-seed0-level0-scratch-36e9ebf328"
    of_each = [opened(tmp_path, weighting=name) for name in NAMES]
    for made in (
        [of.dense(0) for of in of_each],
        [of.prune("taylor", 0) for of in of_each],
        [of.retrain("taylor", 0, 0) for of in of_each],
    ):
        assert len({run.name for run in made}) == len({run.code for run in made}) == len(NAMES)
    sources = {path.name for path in registry.sources("weightings.pcgrad")}
    assert "_torchjd.py" in sources and "_torchjd.py" not in {
        path.name for path in registry.sources("stages.prune", "weightings.equal")
    }
