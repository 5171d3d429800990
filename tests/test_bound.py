"""PAGCP's bound: as many filters of each layer as no task's loss grows too much without."""

import copy

import pytest
import torch
from torch import nn

from mtprune_utils.core.pruner import Pruner
from mtprune_utils.core.selection import within_bound
from test_pruner import IMAGES, chain, losses_of, scored


def scanned(scores, floor, multiple, bound, losses):
    """The rule, one count at a time."""
    chosen = [[] for _ in scores]
    before = losses(chosen)
    for i, score in enumerate(scores):
        order = sorted(range(len(score)), key=lambda unit: (score[unit], unit))
        best, base = [], before
        for count in range(1, len(score) - floor + 1):
            if (len(score) - count) % multiple:
                continue
            tried = [*chosen[:i], sorted(order[:count]), *chosen[i + 1 :]]
            after = losses(tried)
            if max((after[task] - base[task]) / base[task] for task in base) > bound:
                break
            best, before = tried[i], after
        chosen[i] = best
    return chosen


@pytest.mark.parametrize("bound", [0.0, 0.03, 0.2, 5.0])
@pytest.mark.parametrize("floor, multiple", [(1, 1), (3, 1), (4, 4)])
def test_the_choice_is_that_of_a_plain_loop_and_takes_few_evaluations(bound, floor, multiple):
    generator = torch.Generator().manual_seed(0)
    for case in range(20):
        widths = torch.randint(1, 20, (4,), generator=generator).tolist()
        scores = [torch.rand(width, generator=generator) for width in widths]
        if case % 2:
            scores = [(3 * score).round() for score in scores]  # ties
        costs = {
            task: [torch.rand(width, generator=generator) / 10 for width in widths]
            for task in ("one", "two")
        }
        calls = []

        def losses(chosen, costs=costs, calls=calls):
            calls.append(1)
            return {
                task: 1
                + sum(
                    float(cost[torch.as_tensor(units)].sum())
                    for cost, units in zip(of, chosen)
                    if len(units)
                )
                for task, of in costs.items()
            }

        found = within_bound(scores, floor, multiple, bound, losses)
        assert len(calls) <= 1 + sum(width.bit_length() for width in widths)
        expected = scanned(scores, floor, multiple, bound, losses)
        assert [units.tolist() for units in found] == expected


def validation(model: nn.Module) -> dict:
    assert not model.training and not torch.is_grad_enabled()
    return losses_of(model)


def test_no_tasks_loss_grows_by_more_at_any_layer():
    model = chain()
    pruner = scored(model)
    dense = {task: float(loss) for task, loss in validation_of(model).items()}
    before, bound = copy.deepcopy(model), 0.02
    groups = pruner.groups
    size = pruner.prune(growth=bound, losses=validation, optimizer=None)
    assert model.training and size["filters"] < sum(group.units for group in groups)
    for task, loss in validation_of(model).items():
        assert float(loss) <= dense[task] * (1 + bound) ** len(groups)
    assert {name for name, _ in before.named_parameters()} == dict(model.named_parameters()).keys()
    with pytest.raises(RuntimeError, match="seen none"):
        pruner.prune(growth=bound, losses=validation, optimizer=None)


def validation_of(model: nn.Module) -> dict:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return validation(model)


def test_where_nothing_fits_nothing_goes_and_without_a_bound_all_but_the_floor():
    worse = lambda model: {"a": -sum(p.numel() for p in model.parameters())}  # noqa: E731
    better = lambda model: {"a": sum(p.numel() for p in model.parameters())}  # noqa: E731
    model = chain()
    dense = dict(Pruner(model, (IMAGES,), "trunk").widths())
    pruner = scored(model, min_filters=4)
    pruner.prune(growth=0.0, losses=worse, optimizer=None)
    assert pruner.widths() == dense
    pruner.backward(losses_of(model))
    pruner.prune(growth=0.0, losses=better, optimizer=None)
    assert set(pruner.widths().values()) == {4}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"growth": 0.1}, "growth is of losses: give both"),
        ({"filters": 3, "losses": validation}, "growth is of losses: give both"),
        ({"growth": 0.1, "macs": 0.5, "losses": validation}, "latency or growth: one of them"),
        ({"growth": -1, "losses": validation}, "growth is a share from 0, got -1"),
        (
            {"growth": 0.1, "losses": {"a": 1.0}},
            "losses must be a function of the network, got a dict",
        ),
        (
            {"growth": 0.1, "losses": lambda model: 1.0},
            "losses must return a dictionary, .*, got 1.0",
        ),
        ({"growth": 0.1, "losses": lambda model: {}}, "losses must return a dictionary"),
    ],
)
def test_what_makes_no_bound_is_one_line(given, message):
    pruner = scored(chain())
    before = pruner.widths()
    with pytest.raises(ValueError, match=message):
        pruner.prune(optimizer=None, **given)
    assert pruner.widths() == before
