"""The Pruner as a reader meets it: any network in a training loop of one's own."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import narrow
from mtprune_utils import Pruner, load_pretrained, registry, save_pretrained
from mtprune_utils.core import cost
from mtprune_utils.core.model import Architecture, build
from mtprune_utils.core.scoring import TASK_GRADIENTS, Criterion, Scores
from mtprune_utils.core.signals import backward, task_backward
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import checksum, read_json, write_json
from test_groups import silence

IMAGES = torch.rand(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NORMED = (nn.BatchNorm2d, nn.LayerNorm, nn.PReLU)


class Net(nn.Module):
    """A trunk and two heads on what it makes, (B, channels, H, W) or (B, channels)."""

    def __init__(self, trunk, channels):
        super().__init__()
        self.trunk = trunk
        self.classes, self.depth = nn.Linear(channels, 5), nn.Linear(channels, 1)

    def forward(self, images):
        features = self.trunk(images)
        features = features.mean((2, 3)) if features.dim() == 4 else features
        return {"classes": self.classes(features), "depth": self.depth(features)}


def chain(seed=0):
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3),
        nn.ReLU(),
    )
    return Net(nn.Sequential(*layers), 20).double()


def losses_of(model, images=IMAGES):
    outputs = model(images)
    target = torch.arange(len(images)) % 5
    return {
        "classes": F.cross_entropy(outputs["classes"], target),
        "depth": (outputs["depth"].squeeze(1) - target).abs().mean(),
    }


def scored(model, criterion="taylor", **options):
    """A Pruner that has seen a minibatch."""
    pruner = Pruner(model, (IMAGES,), model.trunk, criterion, **options)
    pruner.backward(losses_of(model))
    return pruner


def numel(model):
    return sum(p.numel() for p in model.parameters())


# --- outputs of every kind ---


@dataclass
class Outputs:
    classes: Tensor
    depth: Tensor


Pair = namedtuple("Pair", "classes depth")
KINDS = {
    "a dictionary": dict,
    "a tuple": lambda **out: tuple(out.values()),
    "a list": lambda **out: list(out.values()),
    "a named tuple": Pair,
    "a dataclass": Outputs,
    "nested ones": lambda **out: {"first": [out["classes"]], "second": (None, {"x": out["depth"]})},
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be(kind):
    class OfThatKind(Net):
        def forward(self, images):
            return KINDS[kind](**super().forward(images))

    model = OfThatKind(chain().trunk, 20).double()
    pruner = Pruner(model, (IMAGES,))  # the trunk is what all outputs share
    assert pruner.widths() == {"trunk.0": 12, "trunk.3": 16, "trunk.5": 20}
    outputs = Net.forward(model, IMAGES)
    pruner.backward({task: output.square().mean() for task, output in outputs.items()})
    assert pruner.prune(filters=9, optimizer=None)["filters"] == 39
    assert numel(model) == pruner.size()["parameters"]


# --- the gradient ---


@pytest.mark.parametrize("criterion", ["taylor", "cosprune", "l1"])
def test_backward_gives_the_gradient_of_the_sum_and_touches_nothing_else(criterion):
    model = chain()
    plain = copy.deepcopy(model)
    pruner = Pruner(model, (IMAGES,), "trunk", criterion)
    random = torch.get_rng_state()
    sum(losses_of(plain).values()).backward()
    losses = losses_of(model)
    before, own = copy.deepcopy(model.state_dict()), list(model.parameters())
    pruner.backward(losses)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(own, model.parameters()))
    assert torch.equal(random, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("criterion", ["taylor", "cosprune"])
def test_gradients_add_up_and_each_minibatch_is_scored_by_its_own(criterion):
    once, twice = chain(), chain()
    apart, together = (Pruner(m, (IMAGES,), m.trunk, criterion) for m in (once, twice))
    total = []
    for images in (IMAGES, IMAGES.flip(2)):
        once.zero_grad()
        apart.backward(losses_of(once, images))
        total.append([p.grad.clone() for p in once.parameters()])
        together.backward(losses_of(twice, images))
    for parameter, first, second in zip(twice.parameters(), *total):
        torch.testing.assert_close(parameter.grad, first + second)
    torch.testing.assert_close(apart.scores.mean(), together.scores.mean())


class Tapped(nn.Module):
    """One head reads the first layer already."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.a, self.b = nn.Conv2d(6, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        low = self.first(images).relu()
        return {"a": self.a(low), "b": self.b(self.second(low).relu())}


def test_a_minibatch_without_a_task_leaves_what_it_does_not_reach():
    model = Tapped().double()
    model.trunk = nn.ModuleList([model.first, model.second])
    pruner = Pruner(model, (IMAGES,), "trunk")
    pruner.backward({"a": model(IMAGES)["a"].square().mean()})
    assert model.second.weight.grad is None and model.first.weight.grad is not None
    first, second = pruner.scores.mean()
    assert (first > 0).all() and (second == 0).all()


@pytest.mark.parametrize("criterion", registry.names("criteria"))
def test_scores_are_those_of_the_suites_own_loop(criterion):
    architecture = narrow(Architecture({"a": 3, "b": 2}, "vgg16_bn", 8, head_width=8, dropout=0.0))
    ours, theirs = build(architecture, 0), build(architecture, 0)
    images = torch.rand(2, 3, 32, 32)
    pruner = Pruner(ours, (images,), "trunk", criterion)
    assert [group.root for group in pruner.groups] == [group.root for group in theirs.groups]
    own = Scores(get_criterion(criterion), theirs.groups, theirs)
    for shift in (0, 1):
        losses = [
            {task: (out - shift).abs().mean() for task, out in model(images).items()}
            for model in (ours, theirs)
        ]
        ours.zero_grad(), theirs.zero_grad()
        pruner.backward(losses[0])
        if own.criterion.needs == TASK_GRADIENTS:
            own.update(task_backward(losses[1], theirs, theirs.trunk.parameters()))
        else:
            backward(losses[1])
            own.update()
    for a, b in zip(pruner.scores.mean(), own.mean(), strict=True):
        torch.testing.assert_close(a, b)


# --- what layers may be in a trunk ---


class Branches(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.left, self.join = nn.Conv2d(8, 8, 3, padding=1), join
        if join == "concat":
            self.right = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(14 if join == "concat" else 8, 10, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        left = self.left(x)
        joined = torch.cat([left, self.right(x)], 1) if self.join == "concat" else x + left
        return self.last(joined.relu()).relu()


def trunks():
    conv = nn.Conv2d
    first = [conv(3, 12, 3), nn.ReLU()]
    return {
        "no norm": nn.Sequential(*first, conv(12, 10, 3), nn.Tanh()),
        "batch norm": nn.Sequential(
            *first, conv(12, 10, 3, bias=False), nn.BatchNorm2d(10), nn.SiLU()
        ),
        "instance norm": nn.Sequential(
            *first, conv(12, 10, 3), nn.InstanceNorm2d(10, affine=True), nn.ReLU()
        ),
        "blocks": nn.Sequential(*first, conv(12, 12, 3, groups=3), nn.ReLU(), conv(12, 10, 1)),
        "depthwise": nn.Sequential(
            *first, conv(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.ReLU6(), conv(12, 10, 1)
        ),
        "one PReLU": nn.Sequential(*first, conv(12, 10, 3), nn.PReLU()),
        "a PReLU per channel": nn.Sequential(*first, conv(12, 10, 3), nn.PReLU(10)),
        "gated": nn.Sequential(conv(3, 24, 3), nn.GLU(1), conv(12, 10, 1), nn.ReLU()),
        "concat": Branches("concat"),
        "residual": Branches("residual"),
        "transposed": nn.Sequential(
            *first, nn.ConvTranspose2d(12, 8, 3, stride=2), nn.BatchNorm2d(8), conv(8, 10, 1)
        ),
        "flattened": nn.Sequential(
            *first, nn.Flatten(), nn.Linear(1200, 16), nn.ReLU(), nn.Linear(16, 10)
        ),
    }


@pytest.mark.parametrize("criterion", ["taylor", "cosprune"])
@pytest.mark.parametrize("name", trunks())
def test_trunks_of_all_kinds_are_scored_and_cut_as_masks_would(name, criterion):
    torch.manual_seed(0)
    model = Net(trunks()[name], 10).double()
    for module in model.modules():
        if isinstance(module, NORMED):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.2, 1.0)
    pruner = scored(model, criterion)
    assert not pruner.left_alone, pruner.left_alone
    scores = pruner.scores.mean()
    assert all(score.isfinite().all() and len(score.unique()) > 1 for score in scores)
    groups, chosen = pruner.groups, [s.argsort()[: max(len(s) // 3, 1)] for s in scores]
    masked = copy.deepcopy(model)
    silence(masked, groups, chosen)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    masked.load_state_dict(model.state_dict())
    pruner.remove(chosen, optimizer)
    assert pruner.size()["parameters"] == numel(model) < numel(masked)
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(IMAGES), masked.train(mode)(IMAGES))
    pruner.backward(losses_of(model))
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(10, affine=False), nn.InstanceNorm2d(10)], ids=["batch", "instance"]
)
def test_norms_without_a_scale_are_cut(norm):
    """By criteria that read weights: there is no scale whose gradient would be a gate's."""
    model = Net(nn.Sequential(nn.Conv2d(3, 10, 3), norm, nn.ReLU()), 10).double()
    pruner = scored(model, "cosprune")
    masked, chosen = copy.deepcopy(model), [torch.tensor([1, 4, 9])]
    silence(masked, pruner.groups, chosen)
    pruner.remove(chosen, None)
    assert len(model.trunk[0].weight) == 7
    if norm.track_running_stats:
        assert norm.num_features == 7
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(IMAGES), masked.train(mode)(IMAGES))


def test_layer_norm_sees_the_channels_that_are_left():
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Flatten(), nn.Linear(432, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 10)
    )
    model = Net(trunk, 10).double()
    nn.init.uniform_(trunk[2].weight), nn.init.uniform_(trunk[2].bias)
    dense, pruner = copy.deepcopy(model.trunk), scored(model)
    gone = torch.tensor([0, 5, 6])
    kept = [i for i in range(12) if i not in gone]
    pruner.remove([gone, torch.tensor([3])], None)
    hidden = dense[1](IMAGES.flatten(1))[:, kept]
    hidden = F.layer_norm(hidden, (9,), dense[2].weight[kept], dense[2].bias[kept])
    expected = F.linear(F.gelu(hidden), dense[4].weight[:, kept], dense[4].bias)
    torch.testing.assert_close(model.trunk(IMAGES), expected[:, [i for i in range(10) if i != 3]])


class SelfSimilar(nn.Module):
    """A product of features with themselves: its cost falls with their channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.values = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 10, 1)

    def forward(self, x):
        keys = self.embed(x).flatten(2)
        weights = (keys.transpose(1, 2) @ keys).softmax(-1)
        values = (weights @ self.values(x).flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.last(values.unflatten(2, x.shape[2:]))


def test_costs_are_measured_anew_after_a_removal():
    model = Net(SelfSimilar(), 10).double()
    pruner = scored(model)
    pruner.prune(filters=3, optimizer=None)
    with FlopCounterMode(display=False) as counter:
        model(IMAGES)
    assert pruner.size()["macs"] == counter.get_total_flops() / 2 / len(IMAGES)


# --- goals ---


def test_filters_go_by_number_lowest_first():
    model = chain()
    pruner = scored(model)
    flat = torch.cat(pruner.scores.mean()).sort().values
    expected = {r: int((s > flat[10]).sum()) for r, s in zip(pruner.widths(), pruner.scores.mean())}
    assert pruner.prune(filters=11, optimizer=None) == pruner.size() and pruner.widths() == expected
    assert pruner.scores.batches == 0, "scores begin anew"


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("goal", ["parameters", "macs"])
def test_shares_are_reached_with_as_few_filters_as_it_takes(goal, ranking):
    def left(**given):
        pruner = scored(chain(), ranking=ranking)
        return pruner.prune(**given, optimizer=None), pruner.dense

    ours, dense = left(**{goal: 0.4})
    gone = dense["filters"] - ours["filters"]
    assert left(filters=gone)[0] == ours and ours[goal] <= 0.4 * dense[goal]
    assert left(filters=gone - 1)[0][goal] > 0.4 * dense[goal]


def test_shares_are_of_the_network_as_it_was_first_met(monkeypatch):
    monkeypatch.setattr(cost, "latency", lambda model, inputs: float(numel(model)))
    model = chain()
    whole, pruner = numel(model), scored(model)
    pruner.prune(parameters=0.7, optimizer=None)
    pruner.backward(losses_of(model))
    pruner.prune(latency=0.5, optimizer=None)
    assert pruner.dense["latency"] == whole == pruner.dense["parameters"]
    assert 0.4 * whole < numel(model) <= 0.5 * whole
    pruner.backward(losses_of(model))
    assert pruner.prune(macs=0.2, optimizer=None)["macs"] <= 0.2 * pruner.dense["macs"]


def test_latency_is_measured_in_seconds_and_leaves_the_network_as_it_is():
    model = chain()
    pruner = scored(model)
    pruner.prune(latency=0.9, optimizer=None)
    assert 0 < pruner.dense["latency"] < 1 and model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("goal", [{"filters": 20}, {"parameters": 0.5}, {"macs": 0.5}])
def test_every_layer_keeps_its_least_and_a_multiple(goal):
    model = chain()
    pruner = scored(model, min_filters=6, round_to=4)
    pruner.prune(**goal, optimizer=None)
    assert all(width >= 8 and width % 4 == 0 for width in pruner.widths().values())
    assert pruner.size()["filters"] < 48


def test_by_layer_each_keeps_the_same_share():
    pruner = scored(chain(), ranking="layer")
    pruner.prune(filters=24, optimizer=None)
    shares = [new / old for new, old in zip(pruner.widths().values(), (12, 16, 20))]
    assert shares == pytest.approx([0.5] * 3, abs=1 / 12)


def test_layers_are_left_alone_on_demand():
    model = chain()
    for leave in ((model.trunk[3],), ("trunk.3",), ["trunk.3"]):
        pruner = Pruner(model, (IMAGES,), model.trunk, "l1", leave=leave)
        assert pruner.left_alone == {"trunk.3": "trunk.3 is to be left alone"}
        assert list(pruner.widths()) == ["trunk.0", "trunk.5"]
    pruner.prune(filters=30, optimizer=None)
    assert model.trunk[3].out_channels == 16 and pruner.size()["filters"] == 2


def test_a_network_down_to_its_last_filters_is_met_as_such():
    model = chain()
    scored(model).prune(filters=45, optimizer=None)
    pruner = scored(model)
    assert pruner.size()["filters"] == 3
    with pytest.raises(ValueError, match="asked to remove 1 filters, but only 0"):
        pruner.prune(filters=1, optimizer=None)


# --- what it says ---


def test_the_tables_shares_are_what_goes_when_all_filters_but_one_go():
    model = Net(Branches("residual"), 10).double()
    whole = Pruner(model, (IMAGES,), "trunk", "l1")
    table = whole.table()
    assert list(table["first layer"]) == list(whole.widths())
    for i, row in table.iterrows():
        alone = copy.deepcopy(model)
        pruner = Pruner(alone, (IMAGES,), "trunk", "l1")
        chosen = [torch.arange(g.units - 1 if j == i else 0) for j, g in enumerate(pruner.groups)]
        pruner.remove(chosen, None)
        with FlopCounterMode(display=False) as counter:
            alone(IMAGES[:1])
        macs = counter.get_total_flops() / 2
        assert row["parameters"] == pytest.approx(1 - numel(alone) / numel(model))
        assert row["macs"] == pytest.approx(1 - macs / whole.dense["macs"])
        assert row["filters"] == pruner.groups[i].units + len(chosen[i])
    assert table["made by"][0] == "trunk.stem, trunk.left"
    assert table["read by"][0] == "trunk.left, trunk.last"


def test_it_prints_what_goes_together_and_what_is_left_alone():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 10, 3))
    text = repr(Pruner(Net(trunk, 10).double(), (IMAGES,), "trunk"))
    assert text.startswith("Pruner by taylor of Net: 10 filters, ")
    assert "10 filters of trunk.2: " in text and "% of the macs" in text
    reason = "its filters reach trunk.1, a GroupNorm, which cannot be cut"
    assert f"left alone: trunk.0: {reason}" in text


# --- refusals ---


class Broken(Net):
    def forward(self, images):
        raise RuntimeError("two\nlines")


def made(model, *arguments, **options):
    return lambda: Pruner(model, *arguments, **options)


def after(act, criterion="taylor", **options):
    def run():
        model = chain()
        act(Pruner(model, (IMAGES,), model.trunk, criterion, **options), model)

    return run


def freeze(pruner, model):
    model.trunk.requires_grad_(False)
    pruner.backward(losses_of(model))


def head_only(pruner, model):
    pruner.backward({**losses_of(model), "size": model.classes.weight.square().sum()})


def goal(**given):
    return after(lambda p, model: p.prune(**{"optimizer": None} | given), "l1")


def loss(value):
    return after(lambda pruner, model: pruner.backward({"depth": value}))


def with_last(layer):
    return Net(nn.Sequential(nn.Conv2d(3, 10, 3), layer), 10).double()


class Auxiliary(Net):
    """A head that is there in training only."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3), 10)
        self.double()

    def forward(self, images):
        outputs = super().forward(images)
        return outputs | {"aux": outputs["depth"]} if self.training else outputs


class Keeps(Net):
    """It keeps features that autograd made, which nobody can copy."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3).double(), 10)
        self.double()
        self.kept = self.trunk(IMAGES)


REFUSED = {
    "a GroupNorm": (
        lambda: Pruner(with_last(nn.GroupNorm(2, 10)), (IMAGES,)),
        "nothing of the trunk can be pruned .*GroupNorm",
    ),
    "a softmax over channels": (
        lambda: Pruner(with_last(nn.Softmax(1)), (IMAGES,)),
        "not the same as to silence",
    ),
    "a head as a trunk": (made(chain(), (IMAGES,), "depth"), "depth is not shared: only depth"),
    "another's layer": (made(chain(), (IMAGES,), chain().trunk), "Sequential is no part of the"),
    "a misspelt trunk": (made(chain(), (IMAGES,), "trnk"), "'trnk' is no part of the Net"),
    "all left alone": (made(chain(), (IMAGES,), "trunk", leave=("trunk",)), "to be left alone"),
    "no shared layer": (made(Tapped(), (IMAGES.float(),), "a"), "trunk a is not shared: only a"),
    "no tuple": (made(chain(), IMAGES), "example_inputs must be a tuple"),
    "wrong images": (made(chain(), (IMAGES[:, :2],)), "does not run on example_inputs"),
    "a broken network": (made(Broken(nn.Conv2d(3, 4, 1), 4), (IMAGES,)), "RuntimeError: two lines"),
    "no network": (made("resnet18", (IMAGES,)), "model must be a torch.nn.Module, got a str"),
    "no output": (made(nn.Identity(), (IMAGES,)), "no output of the network depends"),
    "an unknown criterion": (made(chain(), (IMAGES,), None, "tailor"), "did you mean 'taylor'"),
    "a function": (made(chain(), (IMAGES,), None, len), "criterion must be a criterion's name"),
    "an unknown ranking": (made(chain(), (IMAGES,), ranking="globl"), "did you mean 'global'"),
    "one layer's name": (made(chain(), (IMAGES,), leave="trunk.3"), "leave must be a tuple of"),
    "no filters kept": (made(chain(), (IMAGES,), min_filters=0), "min_filters is a whole number"),
    "a fraction kept": (made(chain(), (IMAGES,), round_to=1.5), "round_to is a whole number"),
    "a frozen trunk": (after(freeze), "frozen .requires_grad is False., trunk.0.bias among them"),
    "a loss of a head": (after(head_only), "the loss of size does not depend on the trunk"),
    "the same by task": (after(head_only, "cosprune"), "loss of size does not depend on the trunk"),
    "a number": (loss(1.0), "the loss of depth must be one number with a gradient, got 1.0"),
    "no gradient": (loss(torch.ones(())), "the loss of depth does not depend on the trunk"),
    "a loss per image": (
        after(lambda p, m: p.backward({"depth": m(IMAGES)["depth"]})),
        "depth must be one number",
    ),
    "the sum": (
        after(lambda p, m: p.backward(sum(losses_of(m).values()))),
        "losses must be a dictionary",
    ),
    "no losses": (after(lambda p, m: p.backward({})), "losses is empty"),
    "too early": (after(lambda p, m: p.prune(1, optimizer=None)), "has seen none: train before"),
    "no goal": (goal(), "say filters, parameters, macs, latency or growth: one of them"),
    "two goals": (goal(filters=3, macs=0.5), "one of them"),
    "too many filters": (goal(filters=46), "only 45 are above the floor of 1 per layer"),
    "half a filter": (goal(filters=0.5), "a number of filters, a whole number from 0, got 0.5"),
    "a share of all": (goal(macs=1.0), "macs is a share between 0 and 1, got 1.0"),
    "percents": (goal(parameters=30), "parameters is a share between 0 and 1, got 30"),
    "text": (goal(macs="0.3"), "macs is a share between 0 and 1, got '0.3'"),
    "nothing": (goal(latency=float("nan")), "latency is a share between 0 and 1, got nan"),
    "out of reach": (
        after(lambda p, m: p.prune(macs=0.1, optimizer=None), "l1", min_filters=8),
        r"macs cannot come down to 0.1: with min_filters=8 and round_to=1 .*, 0.\d\d\d is left",
    ),
    "out of reach in multiples": (
        after(lambda p, m: p.prune(parameters=0.2, optimizer=None), "l1", round_to=8),
        r"parameters cannot come down to 0.2: .*0.\d\d\d is left",
    ),
    "half an optimizer": (
        after(lambda p, m: p.prune(9, optimizer=torch.optim.SGD(m.trunk.parameters())), "random"),
        "the optimizer has not classes.weight, which is cut too",
    ),
    "a wrapped network": (
        lambda: Pruner(nn.DataParallel(chain()), (IMAGES,)),
        "wrapped in a DataParallel: give the",
    ),
    "an output in training only": (
        lambda: Pruner(Auxiliary(), (IMAGES,)),
        "output aux is not there both in training and in",
    ),
    "what cannot be copied": (lambda: Pruner(Keeps(), (IMAGES,)), "cannot be copied or run by"),
    "another's optimizer": (
        goal(filters=9, optimizer=torch.optim.SGD(chain().parameters())),
        "the optimizer has none of the pruned parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_clear_line(case):
    act, reason = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError), match=reason) as error:
        act()
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500


@pytest.mark.parametrize("criterion", ["taylor", "cosprune"])
def test_a_refusal_leaves_gradients_scores_and_network_as_they_are(criterion):
    model = chain()
    pruner = scored(model, criterion)
    before = [p.grad.clone() for p in model.parameters()]
    scores, shapes = pruner.scores.mean(), [p.shape for p in model.parameters()]
    with pytest.raises(ValueError):
        head_only(pruner, model)
    with pytest.raises(ValueError):
        pruner.prune(macs=1e-6, optimizer=None)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(scores, pruner.scores.mean()))
    assert shapes == [p.shape for p in model.parameters()]


def test_a_criterion_of_ones_own():
    needs_weights = Criterion("first", "weights", lambda signals, _: torch.arange(signals.units))
    pruner = Pruner(chain(), (IMAGES,), "trunk", needs_weights)
    pruner.prune(filters=3, optimizer=None)
    assert pruner.widths() == {"trunk.0": 11, "trunk.3": 15, "trunk.5": 19}


@pytest.mark.parametrize("criterion", ["taylor", "cosprune"])
def test_what_lies_outside_the_network_gets_its_gradient_too(criterion):
    """Kendall's learnt weights of losses, a layer in front."""
    found = []
    for prunes in (True, False):
        model, front = chain(), nn.Conv2d(3, 3, 1).double()
        nn.init.ones_(front.weight)
        spread = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        own = losses_of(model, front(IMAGES))
        losses = {task: loss * spread[i].exp() for i, (task, loss) in enumerate(own.items())}
        if prunes:
            Pruner(model, (IMAGES,), criterion=criterion).backward(losses)
        else:
            sum(losses.values()).backward()
        found.append([spread.grad, front.weight.grad, *(p.grad for p in model.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_new_pruner_goes_on_from_what_shares_referred_to():
    model = chain()
    first = Pruner(model, (IMAGES,), criterion="l1")
    first.prune(macs=0.5, optimizer=None)
    again = Pruner(model, (IMAGES,), criterion="l1", dense=first.dense)
    assert again.prune(macs=0.3, optimizer=None)["macs"] > 0.25 * first.dense["macs"]


def test_a_frozen_head_is_cut_and_stays_frozen():
    model = chain()
    model.classes.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    pruner = scored(model)
    pruner.prune(9, optimizer=optimizer)
    assert not model.classes.weight.requires_grad and losses_of(model)["classes"].isfinite()


class Centred(nn.Module):
    """Without its mean over channels: no channel goes without the others' noticing."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def test_example_inputs_of_zeros_hide_nothing():
    convolution = nn.Conv2d(3, 10, 3, bias=False)
    for images in (torch.zeros(2, 3, 12, 12), torch.rand(2, 3, 12, 12)):
        model = Net(nn.Sequential(convolution, Centred()), 10)
        with pytest.raises(ValueError, match="not the same as to silence"):
            Pruner(model, (images,))


class InSinglePrecision(Net):
    def forward(self, images):
        features = self.trunk(images).float().mean((2, 3)).to(torch.float32)
        return {"classes": self.classes(features), "depth": self.depth(features).float()}


def test_casts_within_a_network_are_no_reason_to_refuse_it():
    model = InSinglePrecision(nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU()), 10)
    assert Pruner(model, (IMAGES.float(),)).widths() == {"trunk.0": 10}


# --- a folder for others ---


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state, config: state["trunk.0.weight"].fill_(float("nan")), "0.weight holds NaN"),
        (lambda state, config: config["widths"].update({"trunk.0": 3}), "tells other widths than"),
        (lambda state, config: config.pop("widths"), "tells other widths than"),
        (
            lambda state, config: state.update({"trunk.1.bias": state["trunk.1.bias"][:3].clone()}),
            "trunk.1: its tensors are of several lengths",
        ),
        (lambda state, config: state.pop("trunk.1.bias"), "trunk.1.bias is not in it"),
        (lambda state, config: config.update(format=2), "expected format 1, got 2"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_in_one_line(spoil, message, tmp_path):
    save_pretrained(chain(), tmp_path, builder=chain)
    weights, config = tmp_path / "model.safetensors", read_json(tmp_path / "config.json")
    state = load_file(weights)
    spoil(state, config)
    weights.write_bytes(save(state))
    config["made_by"]["SHA-256 of the weights"] = checksum(weights)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(tmp_path, chain)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    save_pretrained(chain(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged, or not the file that config.json is about"):
        load_pretrained(tmp_path, chain)


def test_the_card_tells_criterion_sizes_metrics_and_draws_the_widths(tmp_path):
    model = chain()
    pruner = Pruner(model, (IMAGES,), criterion="l1")
    pruner.prune(filters=5, optimizer=None)
    save_pretrained(model, tmp_path, builder=chain, pruner=pruner, metrics={"accuracy": (0.9, 0.8)})
    card = (tmp_path / "README.md").read_text()
    before, after = (f"{count['parameters']:,}" for count in (pruner.dense, pruner.size()))
    for said in ("l1", f"| parameters | {before} | {after} |", "| accuracy | 0.9 | 0.8 |"):
        assert said in card
    assert "SHA-256" in card and "widths.svg" in card
    assert (tmp_path / "widths.svg").read_text().count("<rect") == 1 + 2 * 5, "two for each layer"
    with pytest.raises(ValueError, match="is not in"):
        save_pretrained(model, tmp_path / "other", builder=lambda: torch.nn.Linear(2, 2))
    assert not (tmp_path / "other").exists()
