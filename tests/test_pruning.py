"""The selector's rules; removing filters is the same as masking them, optimizer included."""

from functools import partial

import pytest
import torch

from conftest import WIDTHS, backward_by_task, convs, narrow
from mtprune_utils.core.iterative import removal_plan
from mtprune_utils.core.model import build
from mtprune_utils.core.pruner import Pruner
from mtprune_utils.core.selection import select
from mtprune_utils.core.settings import Pruning
from mtprune_utils.core.signals import backward
from test_criteria import losses_of


def lists(chosen):
    return [indices.tolist() for indices in chosen]


def test_ranking_is_global_and_the_floor_holds():
    scores = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.15, 0.9, 0.8, 0.7])]
    assert lists(select(scores, 2, floor=2)) == [[0], [0]]
    assert lists(select(scores, 3, floor=2)) == [[0, 1], [0]]
    assert lists(select(scores, 4, floor=2)) == [[0, 1], [0, 3]]  # layer 0 is at its floor


def test_ties_break_by_layer_then_filter():
    scores = [torch.zeros(4), torch.zeros(4)]
    assert lists(select(scores, 3, floor=2)) == [[0, 1], [0]]
    assert lists(select([torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3)], 2, floor=1)) == [
        [1, 2],
        [],
    ]


def test_asking_for_more_than_there_is_says_how_many_there_are():
    scores = [torch.rand(4), torch.rand(6)]
    with pytest.raises(
        ValueError, match="asked to remove 2 filters, but only 1 are above the floor of 5"
    ):
        select(scores, 2, floor=5)


def test_widths_that_are_kept_are_rounded_up_to_a_multiple():
    scores = [torch.arange(16.0), 100 + torch.arange(8.0), torch.arange(12.0) + 0.5]
    assert lists(select(scores, 8, floor=4, multiple=4)) == [[*range(4)], [], [*range(4)]]
    assert lists(select(scores, 15, floor=4, multiple=4)) == [[*range(8)], [], [*range(8)]], (
        "not 8, 0 and 7"
    )
    assert lists(select(scores, 1, floor=4, multiple=4)) == [[*range(4)], [], []]
    assert lists(select(scores, 0, floor=4, multiple=4)) == [[], [], []]
    assert lists(select([torch.arange(7.0)], 3, floor=4, multiple=4)) == [[0, 1, 2]], (
        "no layer grows"
    )


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        select([torch.tensor([float("nan"), 1, 2])], 1, floor=1)


def masked(model, removed):
    """The reference: filters silenced by masks behind the activations, nothing removed."""
    activations = [m for m in model.trunk if isinstance(m, torch.nn.ReLU)]
    for relu, layer, indices in zip(activations, convs(model), removed):
        mask = torch.ones(1, layer.out_channels, 1, 1, dtype=layer.weight.dtype)
        mask[:, indices] = 0
        relu.inplace = False
        relu.register_forward_hook(lambda module, inputs, output, mask=mask: output * mask)


def steps(model, optimizer, seeds, backward=backward):
    history = []
    for seed in seeds:
        optimizer.zero_grad()
        losses = losses_of(model, seed)
        backward(losses)
        optimizer.step()
        history.append(sum(losses.values()).item())
    return history


def pruned_and_masked(architecture, drop_optimizer_state: bool):
    """Ten AdamW steps, surgery, ten more; the same with masks. Returns losses and kept weights of
    both.

    The first as the loop does it: channels last, gradients by task, a fused optimizer; the
    reference plainly.
    """
    results = []
    for remove in (True, False):
        model = (
            build(architecture, seed=0)
            .double()
            .to(memory_format=torch.channels_last if remove else torch.contiguous_format)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=remove)
        backward_of = partial(backward_by_task, model=model) if remove else backward
        steps(model, optimizer, range(10), backward_of)
        scores = [layer.weight.detach().abs().flatten(1).sum(1) for layer in convs(model)]
        removed = select(scores, 40, floor=5)
        assert sum(map(len, removed)) == 40
        if remove:
            model.remove(removed, optimizer)
            if drop_optimizer_state:
                optimizer.state.clear()
        else:
            masked(model, removed)
        losses = steps(model, optimizer, range(10, 20), backward_of)
        kept = [
            [i for i in range(len(score)) if i not in set(indices.tolist())]
            for score, indices in zip(scores, removed)
        ]
        weights = [layer.weight.detach() for layer in convs(model)]
        if not remove:
            inputs = [list(range(3)), *kept[:-1]]
            weights = [weight[out][:, into] for weight, out, into in zip(weights, kept, inputs)]
        heads = [p.detach() for p in model.heads.parameters()]
        if not remove:
            heads = [p[:, kept[-1]] if p.dim() == 4 and p.shape[2] == 3 else p for p in heads]
        results.append((losses, weights + heads))
    return results


@pytest.mark.parametrize("backbone", ["vgg16", "vgg16_bn"])
def test_removal_trains_on_exactly_as_masks_do(architecture, backbone):
    (losses, weights), (masked_losses, masked_weights) = pruned_and_masked(
        narrow(architecture, backbone=backbone), False
    )
    assert losses == pytest.approx(masked_losses, rel=1e-10)
    for ours, reference in zip(weights, masked_weights, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_gradients_and_moments_lie_as_their_parameters_do(architecture):
    """A fused optimizer on the CPU takes them so without a look: with other strides it mixes up
    weights.
    """
    model = build(architecture, 0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps(model, optimizer, range(2), partial(backward_by_task, model=model))
    scores = [layer.weight.detach().abs().sum((1, 2, 3)) for layer in convs(model)]
    model.remove(select(scores, 30, floor=5), optimizer)
    steps(model, optimizer, range(1), partial(backward_by_task, model=model))
    for parameter in model.parameters():
        moments = [value for value in optimizer.state[parameter].values() if value.dim()]
        assert len(moments) == 2 and {t.stride() for t in (parameter.grad, *moments)} == {
            parameter.stride()
        }


def test_the_comparison_fails_if_the_optimizer_forgets(architecture):
    (losses, _), (masked_losses, _) = pruned_and_masked(architecture, drop_optimizer_state=True)
    assert losses != pytest.approx(masked_losses, rel=1e-10)


def test_outputs_equal_the_masked_networks_in_float32(architecture):
    reference, model = build(architecture, seed=1).eval(), build(architecture, seed=1).eval()
    removed = [torch.arange(layer.out_channels - 5) for layer in convs(model)]
    masked(reference, removed)
    model.remove(removed)
    assert model.architecture.width_list == [5] * 13
    images = torch.randn(2, 3, 48, 48)
    for task, output in model(images).items():
        torch.testing.assert_close(output, reference(images)[task], rtol=1e-5, atol=1e-5)


def test_filters_are_gone_and_the_optimizer_knows_only_what_is_left(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, range(2))
    before = sum(p.numel() for p in model.parameters())
    for _ in range(2):  # the graph is traced once and serves again
        scores = [torch.rand(layer.out_channels) for layer in convs(model)]
        model.remove(select(scores, 15, floor=5), optimizer)
        steps(model, optimizer, range(2))
    assert sum(p.numel() for p in model.parameters()) < before
    assert model.architecture.filters == 134 - 30
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert (
        {id(p) for p in in_groups}
        == {id(p) for p in model.parameters()}
        == {id(p) for p in optimizer.state}
    )
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


def test_tracing_leaves_train_mode_and_batch_statistics_alone(architecture):
    model = build(narrow(architecture, backbone="vgg16_bn"), seed=0).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Pruner(model, (torch.zeros(1, 3, 32, 32),), "trunk")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_removal_plans_end_at_the_floor_in_as_many_removals():
    widths = (8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64)
    fixed = removal_plan(widths, Pruning(filters_per_step=13))
    geometric = removal_plan(widths, Pruning(filters_per_step=13, pruning_schedule="geometric"))
    assert len(fixed) == len(geometric) == 36 and fixed[-1] == geometric[-1] == 65
    assert {a - b for a, b in zip(fixed, fixed[1:-1])} == {13}
    shares = [b / a for a, b in zip([528, *geometric], geometric)]
    assert max(shares) - min(shares) < 0.02, "an equal share of what is left, up to whole filters"
    assert removal_plan((5, 4), Pruning()) == []


@pytest.mark.parametrize(
    "indices",
    [
        lambda width: [0, 0],
        lambda width: [-1],
        lambda width: [width],
        lambda width: [0.0],
        lambda width: [True] * width,
        lambda width: [[0]],
        lambda width: list(range(width)),
        lambda width: [10**12],
    ],
)
def test_indices_that_a_layer_has_not_are_refused_before_anything_is_removed(model, indices):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filters = [torch.tensor([0])] * 12
    for place in (0, 12):  # the last one is refused before the first is touched
        layer = convs(model)[place]
        wrong = torch.tensor(indices(layer.out_channels))
        with pytest.raises(ValueError, match=f"^{model.groups[place].root}: "):
            model.remove([*filters[:place], wrong, *filters[place:]])
    with pytest.raises(ValueError, match="12 index tensors for 13 groups"):
        model.remove(filters)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_indices_and_whole_numbers_of_any_kind_are_fine(model):
    kinds = torch.tensor([], dtype=torch.float32), torch.tensor([1], dtype=torch.int32), [2, 0]
    model.remove([*kinds, *[torch.tensor([0])] * 10])
    assert model.architecture.width_list[:4] == [8, 7, 6, 7]


@pytest.mark.parametrize("frozen", ["trunk.0.weight", "heads.depth.branches.0.6.bias"])
def test_frozen_parameters_are_cut_like_the_others_and_stay_frozen(model, frozen):
    model.get_parameter(frozen).requires_grad_(False)
    model.remove([torch.tensor([0])] * 13)
    assert model.architecture.width_list == [width - 1 for width in WIDTHS]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [frozen]
    assert len(model.get_parameter("trunk.0.weight")) == 7


@pytest.mark.parametrize("budget", [-1, 1.0, float("nan"), True, None, "3"])
def test_a_budget_is_a_whole_number_of_filters(budget):
    with pytest.raises(ValueError, match="a whole number from 0"):
        select([torch.arange(8.0)], budget, floor=2)
