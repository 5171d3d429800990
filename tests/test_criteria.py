"""Scores against their definitions: explicit gates, explicit pairs; and that scoring leaves
training alone.
"""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from conftest import TASKS, backward_by_task, convs, gated, narrow, random_split, scores_of
from mtprune_utils import registry
from mtprune_utils.core.iterative import dead_units
from mtprune_utils.core.model import build
from mtprune_utils.core.scoring import Criterion, Scores
from mtprune_utils.core.signals import backward
from mtprune_utils.core.task import task_losses


def losses_of(model, seed=0):
    batch = random_split(2, seed=seed)
    targets = {
        name: t if name == "segmentation" else t.to(next(model.parameters()).dtype)
        for name, t in batch.targets.items()
    }
    images = (batch.image / 127.5 - 1).to(next(model.parameters()).dtype)
    return task_losses(TASKS, model(images), targets)


def add_gates(model):
    """A gate of value 1 behind each activation, as Molchanov et al. define it."""
    gates, modules = [], list(model.trunk)
    for i, module in enumerate(modules):
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
            width = next(m.weight.shape[0] for m in reversed(modules[:i]) if hasattr(m, "weight"))
            gate = torch.ones(1, width, 1, 1, dtype=torch.float64, requires_grad=True)
            module.register_forward_hook(lambda m, inputs, output, gate=gate: output * gate)
            gates.append(gate)
    return gates


@pytest.mark.parametrize("backbone", ["vgg16", "vgg16_bn"])
def test_taylor_is_the_squared_gradient_of_explicit_gates(architecture, backbone):
    model = build(narrow(architecture, backbone=backbone), seed=0).double()
    for layer in gated(model):  # biases matter for the identity
        torch.nn.init.normal_(layer.bias, std=0.1)
    gates = add_gates(model)
    total, batches = [0.0] * len(gates), 3
    scores = scores_of("taylor", model)
    for seed in range(batches):
        model.zero_grad()
        for gate in gates:
            gate.grad = None
        backward(losses_of(model, seed))
        scores.update()
        total = [t + gate.grad.flatten().square() for t, gate in zip(total, gates)]
    for ours, reference in zip(scores.mean(), total):
        torch.testing.assert_close(ours, reference / batches, rtol=1e-8, atol=1e-14)


def test_cosprune_is_the_mean_over_explicit_pairs(model):
    gradients = backward_by_task(losses_of(model), model)
    scores = scores_of("cosprune", model)
    scores.update(gradients)
    for layer, ours in zip(convs(model), scores.mean()):
        for f in range(len(ours)):
            vectors = [grads[layer.weight][f].flatten() for grads in gradients.values()]
            pairs = [
                F.cosine_similarity(a, b, dim=0, eps=1e-30) for a, b in combinations(vectors, 2)
            ]
            assert ours[f].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_a_zero_gradient_has_similarity_zero_and_is_reported_dead(model):
    with torch.no_grad():
        convs(model)[4].weight[3] = 0
        convs(model)[4].bias[3] = -1  # never active
    gradients = backward_by_task(losses_of(model), model)
    scores = scores_of("cosprune", model)
    scores.update(gradients)
    assert scores.mean()[4][3] == 0
    assert torch.cat(scores.mean()).isfinite().all()
    assert dead_units(model)[4][3]
    assert not dead_units(model)[4].all()


def test_task_gradients_sum_to_the_training_gradient_in_one_forward_pass(model):
    forwards = []
    model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    backward(losses_of(model))
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = losses_of(model)
    assert len(forwards) == 2
    gradients = backward_by_task(losses, model)
    assert len(forwards) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    first = convs(model)[0].weight
    torch.testing.assert_close(sum(grads[first] for grads in gradients.values()), first.grad)


@pytest.mark.parametrize("name", registry.names("criteria"))
def test_scoring_changes_nothing_but_the_scores(architecture, name):
    def state(scored: bool):
        model = build(narrow(architecture, backbone="vgg16_bn", dropout=0.5), seed=0).train()
        torch.manual_seed(0)
        scores = scores_of(name, model) if scored else None
        gradients = backward_by_task(losses_of(model), model)
        if scored:
            scores.update(gradients)
            scores.mean()
        return [p.grad for p in model.parameters()] + list(model.state_dict().values()) + [
            torch.rand(1)
        ], [m.training for m in model.modules()]

    (plain, modes), (scored, scored_modes) = state(False), state(True)
    assert (
        all(torch.equal(a, b) for a, b in zip(plain, scored, strict=True)) and modes == scored_modes
    )


def test_random_is_seeded_and_l1_reads_the_weights(model):
    def draw(seed):
        return torch.cat(scores_of("random", model, torch.Generator().manual_seed(seed)).mean())

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with torch.no_grad():
        convs(model)[2].weight[1] = 0.5
    assert scores_of("l1", model).mean()[2][1] == 0.5


def test_scores_without_a_minibatch_are_refused(model):
    with pytest.raises(RuntimeError, match="seen none"):
        scores_of("taylor", model).mean()


@pytest.mark.parametrize("needs", ["weights", "gradient"])
@pytest.mark.parametrize(
    "score, words",
    [
        (lambda n: torch.zeros(n + 1), "got shape"),
        (lambda n: torch.zeros(n, 1), "got shape"),
        (lambda n: torch.tensor(0.0), "got shape"),
        (lambda n: torch.zeros(n, dtype=torch.complex64), "got"),
        (lambda n: None, "got NoneType"),
        (lambda n: [0.0] * n, "got list"),
        (lambda n: torch.full((n,), torch.nan), "NaN"),
    ],
)
def test_what_a_criterion_returns_is_checked_and_named(model, needs, score, words):
    own = Criterion("own", needs, lambda signals, generator: score(signals.units))
    backward(losses_of(model))
    scores = Scores(own, model.groups, model)
    with pytest.raises(ValueError, match=f"the criterion own .*{words}"):
        scores.update()
        scores.mean()


@pytest.mark.parametrize("step", [backward, backward_by_task])
@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5), torch.zeros(2, requires_grad=True), None])
def test_a_loss_is_one_number_with_a_gradient_or_its_task_is_named(model, step, loss):
    losses = losses_of(model) | {"depth": loss}
    with pytest.raises(ValueError, match="the loss of depth must be one number with a gradient"):
        step(*((losses,) if step is backward else (losses, model)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_without_the_backbone_is_named_and_one_of_an_early_layer_has_zero_gradients(model):
    own = model.heads["depth"].branches[0][0].bias.sum()
    with pytest.raises(ValueError, match="the loss of depth does not depend on the trunk"):
        backward_by_task({"depth": own}, model)
    model.zero_grad()
    early = convs(model)[0].weight.sum()
    gradients = backward_by_task({"early": early}, model)["early"]
    assert gradients[convs(model)[0].weight].eq(1).all()
    assert gradients[convs(model)[1].weight].eq(0).all()
