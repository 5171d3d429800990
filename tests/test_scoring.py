"""The two steps of a criterion: what is averaged, what is shared on one pass, what is watched."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

from conftest import TASKS, backward_by_task, convs, narrow, scores_of
from mtprune_utils import registry
from mtprune_utils.core.activations import Watch
from mtprune_utils.core.groups import trace
from mtprune_utils.core.model import build
from mtprune_utils.core.pruner import Pruner
from mtprune_utils.core.scoring import (
    ACTIVATIONS,
    TASK_GRADIENTS,
    Criterion,
    Scores,
    Signals,
    score_minibatch,
)
from mtprune_utils.core.signals import backward
from mtprune_utils.criteria import get_criterion
from mtprune_utils.criteria._shared import ranks, shares
from test_criteria import losses_of

CRITERIA = registry.names("criteria")
ALL = pytest.mark.parametrize("name", CRITERIA)


@pytest.fixture
def normed(architecture):
    """With batch norm, of which every criterion is defined."""
    return build(narrow(architecture, backbone="vgg16_bn"), 0).train()


def equal(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# --- several criteria on one pass ---


def test_criteria_scored_on_one_pass_are_those_scored_each_by_itself(normed):
    together = [scores_of(name, normed) for name in CRITERIA]
    alone = {name: scores_of(name, normed) for name in CRITERIA}
    for seed in range(2):
        normed.zero_grad()
        gradients = backward_by_task(losses_of(normed, seed), normed)
        score_minibatch(together, gradients)
        for scores in alone.values():
            scores.update(gradients)
    for scores in together:
        assert equal(scores.mean(), alone[scores.criterion.name].mean()), scores.criterion.name


def test_what_criteria_share_is_computed_once(normed, monkeypatch):
    calls, read = [], Signals.task_gradients
    monkeypatch.setattr(
        Signals, "task_gradients", lambda self: (calls.append(self.group.root), read(self))[1]
    )
    names = "cosprune", "conflict_frequency", "taylor_minus_conflict", "cosprune_taylor"
    scores = [scores_of(name, normed) for name in names]
    score_minibatch(scores, backward_by_task(losses_of(normed), normed))
    assert calls == [group.root for group in normed.groups]


def test_criteria_that_compare_tasks_take_no_more_passes_than_cosprune(normed, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **more: (passes.append(1), grad(*a, **more))[1]
    )
    scores = [scores_of(n, normed) for n in CRITERIA if get_criterion(n).needs == TASK_GRADIENTS]
    forwards = []
    normed.trunk.register_forward_hook(lambda *_: forwards.append(1))
    score_minibatch(scores, backward_by_task(losses_of(normed), normed))
    assert len(passes) == len(TASKS) and len(forwards) == 1
    assert all(len(of.mean()) == len(normed.groups) for of in scores)


# --- averages, then scores ---


def statistics_of(name: str, model, batches, resumed: bool = False) -> list[torch.Tensor]:
    scores = scores_of(name, model, torch.Generator().manual_seed(3))
    for seed in batches:
        model.zero_grad()
        scores.update(backward_by_task(losses_of(model, seed), model))
        if resumed:
            file = io.BytesIO()
            torch.save(scores.state(), file)
            file.seek(0)
            scores = scores_of(name, model)
            scores.restore(torch.load(file, weights_only=True))
    return scores.mean()


@ALL
def test_scores_go_on_from_a_checkpoint_to_the_bit(normed, name):
    assert equal(*(statistics_of(name, normed, range(3), resumed) for resumed in (False, True)))


@ALL
def test_scores_are_of_the_averages_not_averages_of_scores(normed, name):
    """The same minibatch twice is the same as once; and the sums are not changed by being read."""
    once = statistics_of(name, normed, [0])
    for a, b in zip(once, statistics_of(name, normed, [0, 0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    scores = scores_of(name, normed)
    scores.update(backward_by_task(losses_of(normed), normed))
    if name != "random":
        assert equal(scores.mean(), scores.mean())


def test_a_vote_is_on_averages(model):
    """Each task's rank of the average: averages of ranks would differ."""
    values = [{"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([0.0, 3.0])}[k] for k in "ab"]
    seen = iter(values)
    own = Criterion(
        "own",
        "gradient",
        lambda signals, _: {"value": next(seen)},
        lambda means, signals: [means[0]["value"].argsort().argsort()],
    )
    group = type("Two", (), {"units": 2, "root": "x"})
    scores = Scores(own, [group], model)
    scores.update(), scores.update()
    assert scores.sums[0]["value"].tolist() == [4, 3] and scores.mean()[0].tolist() == [1, 0]


def test_equal_values_share_a_rank_and_a_task_without_gradients_has_no_share():
    values = torch.tensor([[3.0, 0.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    places = torch.tensor([[2.5, 1.5], [0.0, 1.5], [2.5, 1.5], [1.0, 1.5]])
    assert torch.equal(ranks(values), places) and torch.equal(ranks(values[:, 0]), places[:, 0])
    found = shares(values)
    torch.testing.assert_close(found[:, 0], values[:, 0] / 9)
    assert not found[:, 1].any()


def test_fisher_takes_weights_as_they_are_when_filters_are_chosen(model):
    fisher, taylor = scores_of("fisher", model), scores_of("taylor_weight", model)
    backward(losses_of(model))
    score_minibatch([fisher, taylor])
    before = fisher.mean(), taylor.mean()
    for a, b in zip(*before, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        convs(model)[0].weight.mul_(2)
    torch.testing.assert_close(fisher.mean()[0], 4 * before[0][0])
    assert equal(taylor.mean(), before[1])


@pytest.mark.parametrize("backbone", ["vgg16", "vgg16_bn"])
def test_jacobian_is_twice_taylor_where_one_layer_reads(architecture, backbone):
    model = build(narrow(architecture, backbone=backbone), 0).double().train()
    scores = [scores_of(name, model) for name in ("taylor", "jacobian")]
    backward(losses_of(model))
    score_minibatch(scores)
    taylor, jacobian = (of.mean() for of in scores)
    for a, b in zip(taylor[:-1], jacobian[:-1]):  # the last is read by every head
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=1e-14)
    assert not torch.allclose(2 * taylor[-1], jacobian[-1], rtol=1e-2)


# --- what is refused ---


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda n: torch.zeros(n + 1, 2), "statistics per filter, a tensor of shape .*, got shape"),
        (
            lambda n: {"a": torch.zeros(n), "b": torch.zeros(2)},
            "as b a tensor of shape .*, got shape",
        ),
        (lambda n: {}, "got dict"),
        (lambda n: None, "got NoneType"),
        (lambda n: {"a": torch.full((n,), torch.nan)}, "gave a score that is NaN"),
    ],
)
def test_statistics_are_checked_and_named(model, given, message):
    zeros = lambda means, signals: [torch.zeros(of.units) for of in signals]  # noqa: E731
    own = Criterion("own", "gradient", lambda signals, _: given(signals.units), zeros)
    scores = Scores(own, model.groups, model)
    with pytest.raises(ValueError, match=f"the criterion own .*{message}"):
        scores.update()
        scores.mean()


@pytest.mark.parametrize(
    "combine, message",
    [
        (lambda means, signals: means[1:], "must combine scores of 13 groups, got 12"),
        (lambda means, signals: [of[:1] for of in means], "must combine one score .*, got shape"),
        (lambda means, signals: [of[:, 0] / 0 for of in means], "gave a score that is NaN"),
    ],
)
def test_what_is_combined_is_checked_and_named(model, combine, message):
    own = Criterion("own", "weights", lambda of, _: torch.zeros(of.units, 2), combine)
    with pytest.raises(ValueError, match=f"the criterion own {message}"):
        Scores(own, model.groups, model).mean()


def test_tasks_are_compared_only_where_there_are_some(model):
    losses = losses_of(model)
    scores = scores_of("cosprune", model)
    gradients = backward_by_task({"depth": losses["depth"]}, model)
    with pytest.raises(ValueError, match="needs at least two, and there is one"):
        scores.update(gradients)
    with pytest.raises(ValueError, match="there is no gradient of any task"):
        scores.update()


def test_fpgm_takes_a_layer_of_one_filter_and_refuses_a_network_of_such(architecture):
    widths = [1, 4, *[1] * 11]
    found = scores_of("fpgm", build(narrow(architecture, widths=widths), 0)).mean()
    assert found[0].tolist() == [0] and (found[1] > 0).all()
    with pytest.raises(ValueError, match="fpgm compares a layer's filters, and every layer has"):
        scores_of("fpgm", build(narrow(architecture, widths=[1] * 13), 0)).mean()


def test_fpgm_of_many_filters_is_as_exact(architecture):
    """Wide layers take another way to the same distances."""
    weight = torch.randn(60, 40, 3, 3)
    layer = nn.Conv2d(40, 60, 3)
    layer.weight.data = weight
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(60, 2, 1))
    groups, _ = trace(model, (torch.zeros(1, 40, 4, 4),), "0")
    rows = weight.double().flatten(1)
    exact = (rows[:, None] - rows[None]).norm(dim=2).sum(1)
    found = Scores(get_criterion("fpgm"), groups, model).mean()[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


# --- watching activations ---


def test_only_a_criterion_of_activations_watches_and_no_longer_than_it_lives(normed):
    for name in CRITERIA:
        before = hooks(normed)
        scores = scores_of(name, normed)
        watches = get_criterion(name).needs == ACTIVATIONS
        assert (hooks(normed) > before) == watches
        scores.close()
        assert hooks(normed) == before
    scores = scores_of("apoz", normed)
    assert hooks(normed)
    del scores
    gc.collect()
    assert not hooks(normed)


def test_a_pruner_watches_the_network_as_it_is_and_none_of_its_copies(normed):
    images = torch.rand(2, 3, 32, 32)
    pruner = Pruner(normed, (images,), "trunk", "activation")
    count = hooks(normed)
    for filters in (9, 0):
        losses = {task: out.square().mean() for task, out in normed(images).items()}
        copy.deepcopy(normed)(images + 1)
        with torch.no_grad():
            normed(images + 2)
        pruner.backward(losses)
        expected = normed.trunk[:3](images).abs().mean((0, 2, 3))
        torch.testing.assert_close(pruner.scores.mean()[0], expected)
        pruner.prune(filters, optimizer=None)
        assert hooks(normed) == count


def test_watching_changes_no_mode_and_what_it_watches_is_there_once(normed):
    normed.trunk[4].eval()
    modes = [module.training for module in normed.modules()]
    images = torch.rand(2, 3, 32, 32)
    expected, random = normed(images), torch.get_rng_state()
    watch = Watch(normed, normed.groups)
    assert equal(expected.values(), normed(images).values())
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in normed.modules()]
    assert [len(maps) for maps in watch.take()] == [1] * 13, "all branches of all heads read one"
    assert [len(maps) for maps in watch.take()] == [0] * 13


def test_scores_that_were_made_after_the_forward_pass_say_so(normed):
    losses = losses_of(normed)
    scores = scores_of("activation", normed)
    backward(losses)
    with pytest.raises(ValueError, match="make the scores before the forward pass"):
        scores.update()


class Reads(nn.Module):
    """Channels that are read in blocks, side by side with others, and flattened."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
        self.blocks, self.both = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(6, 3, 1)
        self.flat = nn.Linear(4 * 6 * 6, 2)

    def forward(self, x):
        first, other = self.first(x).relu(), self.other(x).relu()
        joined = self.both(torch.cat([other, first], 1))
        return {
            "a": self.blocks(first).mean((2, 3)),
            "b": joined.mean((2, 3)),
            "c": self.flat(first.flatten(1)),
        }


def test_a_unit_is_found_however_it_is_read():
    torch.manual_seed(0)
    model, images = Reads().double(), torch.rand(3, 3, 6, 6).double()
    groups, _ = trace(model, (images,), model.first)
    (group,) = groups
    assert group.units == 2, "the same filter of both blocks"
    scores = {name: Scores(get_criterion(name), groups, model) for name in ("activation", "apoz")}
    backward({task: out.square().mean() for task, out in model(images).items()})
    score_minibatch(list(scores.values()))
    first = model.first(images).relu()
    for name, of in (("activation", first), ("apoz", (first != 0).double())):
        by_filter = of.mean((0, 2, 3))
        expected = (by_filter[:2] + by_filter[2:]) / 2
        torch.testing.assert_close(scores[name].mean()[0], expected)
    products = Signals(group, dict(model.named_parameters())).reader_products()
    gate = (first.detach() * 1).requires_grad_()
    flat = torch.autograd.grad(model.flat(gate.flatten(1)).square().mean(), gate)[0] * gate
    by_filter = flat.sum((0, 2, 3)).detach()
    assert any(torch.allclose(by_filter[:2] + by_filter[2:], of) for of in products)
