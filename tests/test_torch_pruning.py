"""Torch-Pruning and this suite together: our scores in its pruners, its importances in our loop,
and what we say of three of its importances, held against the version that is installed.
"""

import copy
import io
import re
from contextlib import redirect_stdout

import pytest
import torch
import torch_pruning as tp
from torch import nn

from mtprune_utils import Pruner
from mtprune_utils.core.interop import CriterionImportance, criterion_of
from mtprune_utils.core.model import build
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.selection import select
from mtprune_utils.core.signals import task_backward
from mtprune_utils.core.surgery import remove
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import PROJECT
from test_groups import at_random, small
from test_pruner import IMAGES, Net, chain, losses_of

PAGE = PROJECT / "docs" / "torch_pruning.md"
BACKBONES = ("vgg16_bn", "resnet18")
MINIBATCHES = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EXAMPLE = (MINIBATCHES[0],)


def network(backbone):
    torch.manual_seed(0)  # for what `at_random` adds
    return at_random(build(small(backbone), seed=0))


def loss_by_task(model, images):
    """Of two tasks that do not agree, and differ in scale."""
    outputs = model(images)
    return {"a": outputs["a"].square().mean(), "b": 3 * (outputs["b"] - 1).abs().mean()}


def graph_of(model):
    """Torch-Pruning's own, with the network left in training mode."""
    graph = tp.DependencyGraph().build_dependency(
        model, EXAMPLE, output_transform=lambda outputs: list(outputs.values())
    )
    model.train()
    return graph


def their_pruner(model, importance, inputs=EXAMPLE, **options):
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance,
        output_transform=lambda outputs: list(outputs.values()),
        **options,
    )
    model.train()
    return pruner


# --- ours in its pruners ---


@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_groups_get_the_scores_that_ours_have(backbone):
    model = network(backbone)
    names = {module: name for name, module in model.named_modules()}
    its_groups = list(graph_of(model).get_all_groups())
    # Of weights, of the gradient, of tasks; a vote among all filters; of feature maps.
    for name in ("l1", "taylor", "cosprune", "mt_taylor_max", "activation"):
        importance = CriterionImportance(model, EXAMPLE, model.trunk, name)
        ours = importance.pruner.groups
        expected = Scores(get_criterion(name), ours, model)
        for images in MINIBATCHES:
            model.zero_grad()
            losses = loss_by_task(model, images)
            expected.update(task_backward(losses, model, model.trunk.parameters()))
            importance.backward(loss_by_task(model, images))
        scores, met = expected.mean(), []
        for group in its_groups:
            root = names[group[0].dep.target.module]
            found = importance(group)
            at = [i for i, of in enumerate(ours) if root in {m.name for m in of.producers}]
            if found is None:
                assert not at and not root.startswith("trunk.")
            else:
                torch.testing.assert_close(found, scores[at[0]], msg=f"{name} of {root}")
                met += at
        assert sorted(met) == list(range(len(ours))), name
        expected.close()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_pruner_removes_what_scores_lowest_and_goes_on_with_new_scores(backbone):
    model = network(backbone)
    importance = CriterionImportance(model, EXAMPLE, model.trunk, "cosprune")
    pruner = their_pruner(model, importance, pruning_ratio=0.5, iterative_steps=2)
    dense = [group.units for group in importance.pruner.groups]
    for share in (0.25, 0.5):
        for images in MINIBATCHES:
            importance.backward(loss_by_task(model, images))
        groups, scores = importance.pruner.groups, importance.pruner.scores.mean()
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        pruner.step()
        for group, score, width in zip(groups, scores, dense, strict=True):
            stay = score.argsort()[group.units - int(width * (1 - share)) :].sort().values
            norms = [m for m in group.members if m.kind == "norm"]
            assert norms
            for norm in norms:  # a convolution's columns go as well: a norm tells who stays
                name = f"{norm.name}.weight"
                assert torch.equal(model.get_parameter(name), before[name][stay]), name
        importance.renew()
    outputs = model(MINIBATCHES[0])
    assert {name: output.shape[1] for name, output in outputs.items()} == {"a": 3, "b": 2}


def test_what_is_left_alone_stays_and_global_pruning_compares_all_layers():
    model = chain()
    with torch.no_grad():
        model.trunk[0].weight[:4] *= 0.01  # else all of the first layer's are larger
    importance = CriterionImportance(model, (IMAGES,), model.trunk, "l2", leave=("trunk.3",))
    scores = importance.pruner.scores.mean()
    lowest = torch.cat(scores).sort().values[7]
    kept = [int((of > lowest).sum()) for of in scores]
    pruner = their_pruner(model, importance, (IMAGES,), pruning_ratio=0.25, global_pruning=True)
    pruner.step()
    assert kept == [8, 16]
    assert [model.trunk[i].out_channels for i in (0, 3, 5)] == [8, 16, 16]


def test_a_step_without_scores_or_with_old_ones_ends_in_one_line():
    model = chain()
    importance = CriterionImportance(model, (IMAGES,), model.trunk, "taylor")
    pruner = their_pruner(model, importance, (IMAGES,), pruning_ratio=0.5, iterative_steps=2)
    with pytest.raises(RuntimeError, match="has seen none: train before choosing"):
        pruner.step()
    pruner.reset()
    importance.backward(losses_of(model))
    pruner.step()
    with pytest.raises(RuntimeError, match=r"call renew\(\) after each step"):
        pruner.step()
    with pytest.raises(RuntimeError, match=r"call renew\(\) after each step"):
        importance.backward(losses_of(model))


def test_scores_are_of_the_weights_at_the_time_and_of_the_indices_that_are_asked_for():
    model = chain()
    importance = CriterionImportance(model, (IMAGES,), model.trunk, "l1")
    graph = tp.DependencyGraph().build_dependency(
        model, (IMAGES,), output_transform=lambda outputs: list(outputs.values())
    )
    layer = model.trunk[3]
    made = graph.get_pruning_group(layer, tp.prune_conv_out_channels, [5, 2])
    torch.testing.assert_close(importance(made), layer.weight.abs().mean((1, 2, 3))[[5, 2]])
    layer.weight.data *= 2
    torch.testing.assert_close(importance(made), layer.weight.abs().mean((1, 2, 3))[[5, 2]])
    read = graph.get_pruning_group(layer, tp.prune_conv_in_channels, [7, 1])
    behind = model.trunk[0].weight.abs().mean((1, 2, 3))[[7, 1]]
    torch.testing.assert_close(importance(read), behind)


# --- its importances in our loop ---

IMPORTANCES = {
    "magnitude": tp.importance.GroupMagnitudeImportance(),
    "lamp": tp.importance.LAMPImportance(),
    "batch norm's scale": tp.importance.BNScaleImportance(),
    "taylor": tp.importance.GroupTaylorImportance(),
}


def asked(importance, model, groups):
    """Its scores of our groups' filters, by a graph and groups of its own."""
    graph, found = graph_of(model), []
    for group in groups:
        root = model.get_submodule(group.root)
        its = graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(group.width)))
        found.append(importance(its))
    return found


@pytest.mark.parametrize(
    "backbone, name", [("vgg16_bn", "taylor"), *(("resnet18", name) for name in IMPORTANCES)]
)
def test_the_filters_go_that_its_importance_ranks_lowest(backbone, name):
    importance, model = IMPORTANCES[name], network(backbone)
    criterion = criterion_of(importance, model, EXAMPLE)
    pruner = Pruner(model, EXAMPLE, model.trunk, criterion, min_filters=2)
    for _ in range(2):  # the second time with what the first has left
        by_minibatch = []
        for images in MINIBATCHES:
            plain = copy.deepcopy(model)
            plain.zero_grad()
            sum(loss_by_task(plain, images).values()).backward()
            by_minibatch.append(asked(importance, plain, pruner.groups))
            pruner.backward(loss_by_task(model, images))
        model.zero_grad()  # as a loop does before it prunes
        expected = [sum(of) / len(of) for of in zip(*by_minibatch)]
        for ours, its in zip(pruner.scores.mean(), expected, strict=True):
            torch.testing.assert_close(ours, its)
        chosen = select(expected, 10, floor=2)
        smaller = copy.deepcopy(model)
        remove(smaller, pruner.groups, chosen)
        pruner.prune(filters=10, optimizer=None)
        for ours, its in zip(model.parameters(), smaller.parameters(), strict=True):
            assert torch.equal(ours, its)


def test_a_units_score_is_the_mean_of_its_filters():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()
    model = Net(nn.Sequential(*layers), 8)
    images = IMAGES.float()
    importance = tp.importance.GroupMagnitudeImportance(group_reduction="first", normalizer=None)
    pruner = Pruner(model, (images,), model.trunk, criterion_of(importance, model, (images,)))
    assert [group.units for group in pruner.groups] == [4, 4]
    for score, layer in zip(pruner.scores.mean(), (model.trunk[0], model.trunk[2])):
        of_filters = layer.weight.square().sum((1, 2, 3))
        torch.testing.assert_close(score, of_filters.view(2, 4).mean(0))


def test_the_network_and_its_gradient_are_left_as_they_are():
    model = network("vgg16_bn")
    plain = copy.deepcopy(model)
    criterion = criterion_of(tp.importance.GroupTaylorImportance(), model, EXAMPLE)
    pruner = Pruner(model, EXAMPLE, model.trunk, criterion)
    sum(loss_by_task(plain, MINIBATCHES[0]).values()).backward()
    pruner.backward(loss_by_task(model, MINIBATCHES[0]))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    for ours, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_an_importance_that_cannot_score_is_named_in_one_line():
    model = Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 8).double()

    def scores(importance, **options):
        criterion = criterion_of(importance, model, (IMAGES,), **options)
        return Pruner(model, (IMAGES,), model.trunk, criterion).scores.mean()

    with pytest.raises(ValueError, match="BNScaleImportance must give .* trunk.0, got nothing"):
        scores(tp.importance.BNScaleImportance())
    with pytest.raises(ValueError, match="GroupTaylorImportance fails on trunk.0 .*say needs"):
        scores(tp.importance.GroupTaylorImportance(), needs="weights")
    with pytest.raises(ValueError, match=r"Hessian importance overwrites .grad.* fisher"):
        scores(tp.importance.HessianImportance())
    with pytest.raises(ValueError, match="another network than the one that is scored"):
        other = criterion_of(tp.importance.LAMPImportance(), copy.deepcopy(model), (IMAGES,))
        Pruner(model, (IMAGES,), model.trunk, other).scores.mean()
    with pytest.raises(ValueError, match=r"8 filters of trunk.0, got shape \(2, 8\)"):
        scores(tp.importance.GroupMagnitudeImportance(group_reduction=None))


# --- what docs/torch_pruning.md says of three importances ---


def one_layer(*weights):
    layer = nn.Linear(1, len(weights), bias=False)
    layer.weight.data = torch.tensor(weights).unsqueeze(1)
    graph = tp.DependencyGraph().build_dependency(layer, torch.rand(1, 1))
    every = list(range(len(weights)))
    return layer, graph.get_pruning_group(layer, tp.prune_linear_out_channels, every)


def as_today(what, found, today, right):
    """Fails where Torch-Pruning gives anything else than it did, and says what that means."""
    found = found.tolist()
    assert found != pytest.approx(right), f"{what} is mended upstream: say so in {PAGE.name}"
    assert found == pytest.approx(today), f"{what} has changed upstream: see {PAGE.name}"


def test_its_hessian_keeps_the_last_sample_only():
    layer, group = one_layer(1.0, 2.0)
    hessian = tp.importance.GroupHessianImportance(normalizer=None)
    for sample in ([3.0, 0.0], [1.0, 1.0]):
        layer.weight.grad = torch.tensor(sample).unsqueeze(1)
        hessian.accumulate_grad(layer)
    # w^2 E[g^2]: 1 (9 + 1) / 2, and 4 (0 + 1) / 2
    as_today("GroupHessianImportance", hessian(group), today=[1, 4], right=[5, 2])


@pytest.mark.parametrize("p, today", [(2, [3, 3, 6]), (1, [1, 1, 2])])
def test_its_fpgm_measures_distances_between_powers_of_weights(p, today):
    _, group = one_layer(1.0, -1.0, 2.0)
    found = tp.importance.FPGMImportance(p=p, normalizer=None)(group)
    # |1 + 1| + |1 - 2|, |-1 - 1| + |-1 - 2|, |2 - 1| + |2 + 1|
    as_today("FPGMImportance", found, today, right=[3, 5, 4])


def test_its_taylor_takes_absolute_values_of_what_minibatches_add_up_to():
    layer, group = one_layer(1.0, 1.0)
    for minibatch in ([2.0, 1.0], [-2.0, 1.0]):
        gradient = torch.tensor(minibatch).unsqueeze(1)
        layer.weight.grad = gradient if layer.weight.grad is None else layer.weight.grad + gradient
    for multivariable in (False, True):
        taylor = tp.importance.GroupTaylorImportance(normalizer=None, multivariable=multivariable)
        # E (w g)^2: (4 + 4) / 2, and (1 + 1) / 2
        as_today("GroupTaylorImportance", taylor(group), today=[0, 2], right=[4, 1])


def test_its_taylor_reads_no_scale_of_a_batch_norm():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False)
    )
    graph = tp.DependencyGraph().build_dependency(model, torch.rand(2, 1, 4, 4))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[1].weight.grad = torch.tensor([3.0, -5.0])  # its scales are 1
    found = tp.importance.GroupTaylorImportance(normalizer=None, group_reduction="sum")(group)
    as_today("GroupTaylorImportance of batch norms", found, today=[0, 0], right=[3, 5])


# --- the page itself ---


def test_the_code_of_the_page_runs_and_prints_what_it_says():
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    namespace, printed = {}, io.StringIO()
    with redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), namespace)
    said = re.findall(r"^print\(.*  # (.*)$", text, re.MULTILINE)
    assert len(said) == 3 and printed.getvalue().splitlines() == said
    assert namespace["pruner"].size()["filters"] == 32 - 2 * 8
