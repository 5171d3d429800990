"""The contract of each registry, held by every entry that is there: none is named, but for oracles.

A new entry is tested by being there. What a test has to know of one beyond its contract (an oracle
of its own, small files of its data) stands in a dictionary, whose test says if an entry is missing.
"""

import inspect
import itertools
from dataclasses import fields
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import test_runs
from mtprune_utils import registry
from mtprune_utils.backbones import get_backbone
from mtprune_utils.core.groups import trace
from mtprune_utils.core.model import Architecture, build, plan_of
from mtprune_utils.core.scoring import NEEDS, WEIGHTS, Scores
from mtprune_utils.core.selection import ranks
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.signals import task_backward
from mtprune_utils.core.targets import IGNORE, Depth, ImageClass, InverseDepth, Labels, Normals
from mtprune_utils.core.task import numbers
from mtprune_utils.criteria import get_criterion
from mtprune_utils.datasets import data_digest, data_tasks, load_dataset
from mtprune_utils.files import read_json, read_table
from mtprune_utils.rankings import get_ranking
from mtprune_utils.schedules import get_schedule
from mtprune_utils.stages import get_stage, stage_names
from mtprune_utils.study import store
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
from test_real_data import cityscapes, mtan

REGISTRIES = (
    "criteria",
    "tasks",
    "datasets",
    "backbones",
    "schedules",
    "stages",
    "rankings",
    "weightings",
)


def entries(folder: str):
    return pytest.mark.parametrize("name", registry.names(folder))


@pytest.mark.parametrize("folder", REGISTRIES)
def test_an_entry_is_found_by_its_file_says_what_it_is_and_a_misspelt_one_is_refused(folder):
    assert len(registry.names(folder)) >= 2
    for name in registry.names(folder):
        module = registry.entry(folder, name, "entry")
        assert isinstance(module, ModuleType) and module.__name__.endswith(f"{folder}.{name}")
        assert module.__doc__ and module.__doc__.strip()[-1] in ".:"
        with pytest.raises(ValueError, match=f"unknown entry '{name}x': did you mean '"):
            registry.entry(folder, f"{name}x", "entry")


# --- criteria: small networks, of which the test knows by itself what goes with a filter ---


class Residual(nn.Module):
    """A stem, and a block whose sum ties its last convolution to the stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.block = nn.Sequential(
            nn.Conv2d(6, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
        )

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(x + self.block(x))


def separable() -> nn.Sequential:
    def layer(*arguments, **more):
        return nn.Conv2d(*arguments, bias=False, **more), nn.BatchNorm2d(arguments[1]), nn.ReLU6()

    return nn.Sequential(*layer(3, 6, 1), *layer(6, 6, 3, padding=1, groups=6), *layer(6, 4, 1))


def norms() -> nn.Sequential:
    first, second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 5, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.BatchNorm2d(5), nn.ReLU())


class Known(NamedTuple):
    """A group: layers that make its channels, what stands before activations, who reads them."""

    made: tuple[str, ...]
    gates: tuple[str, ...]
    readers: tuple[str, ...]


TASKS = ("one", "two", "three")
HEADS = " ".join(f"heads.{task}" for task in TASKS)


def known(made: str, gates: str, readers: str) -> Known:
    return Known(
        *(
            tuple(name if name.startswith("heads.") else f"trunk.{name}" for name in of.split())
            for of in (made, gates, readers)
        )
    )


def residual_maps(trunk, x):
    stem = trunk.stem(x).relu()
    return [[stem, trunk(x)], [trunk.block[:3](stem)]]


# {network: (its trunk, its groups, each group's feature maps)}
NETWORKS = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()),
        [known("0", "0", "2"), known("2", "2", HEADS)],
        lambda trunk, x: [[trunk[:2](x)], [trunk(x)]],
    ),
    "batch norm": (
        norms,
        [known("0", "1", "3"), known("3", "4", HEADS)],
        lambda trunk, x: [[trunk[:3](x)], [trunk(x)]],
    ),
    "residual": (
        Residual,
        [
            known("stem.0 block.3", "stem.1 block.4", f"block.0 {HEADS}"),
            known("block.0", "block.1", "block.3"),
        ],
        residual_maps,
    ),
    "depthwise": (
        separable,
        [known("0 3", "1 4", "6"), known("6", "7", HEADS)],
        lambda trunk, x: [[trunk[:3](x), trunk[:6](x)], [trunk(x)]],
    ),
    "linear": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()
        ),
        [known("1", "1", "3"), known("3", "3", HEADS)],
        lambda trunk, x: [[trunk[:3](x)], [trunk(x)]],
    ),
}
IMAGE = (4, 3, 8, 8)
# {criterion: networks of which it is not defined, and what it says there}
UNDEFINED = {
    "bn_scale": (("convolutions", "linear"), "no norm scales the filters of trunk.[01]: leave it")
}


class Tasks(nn.Module):
    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        wide = trunk(torch.zeros(IMAGE)).shape
        head = nn.Linear if len(wide) == 2 else lambda a, b: nn.Conv2d(a, b, 1)
        self.heads = nn.ModuleDict({task: head(wide[1], i + 1) for i, task in enumerate(TASKS)})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


@cache
def met(network: str):
    """A network in double precision, its groups, and what the test knows of them."""
    torch.manual_seed(0)
    make, expected, maps = NETWORKS[network]
    model = Tasks(make()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # at 1 and 0 a gate would not tell them apart
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias)
    groups, _ = trace(model, (torch.zeros(IMAGE).double(),), model.trunk)
    assert [group.root for group in groups] == [of.made[0] for of in expected]
    return model.train(), groups, expected, maps


defined = pytest.mark.parametrize(
    "name, network",
    [
        (name, network)
        for name in registry.names("criteria")
        for network in NETWORKS
        if network not in UNDEFINED.get(name, ((),))[0]
    ],
)


def images_of(batch: int) -> torch.Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(batch)).double()


def losses_of(model: nn.Module, batch: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + batch)
    return {
        task: factor
        * (
            output
            - torch.randn(output.shape[:2], generator=generator)
            .double()
            .view(*output.shape[:2], *[1] * (output.dim() - 2))
        )
        .square()
        .mean()
        for task, output in model(images_of(batch)).items()
    }


def scored(name: str, model, groups, factor: float = 1.0, seed: int = 0, turn: int = 1):
    """Each group's scores over two minibatches; turn: -1 gives the tasks in reverse."""
    scores = Scores(get_criterion(name), groups, model, torch.Generator().manual_seed(seed))
    for batch in range(2):
        model.zero_grad()
        losses = dict(list(losses_of(model, batch, factor).items())[::turn])
        scores.update(task_backward(losses, model, model.trunk.parameters()))
    return scores.mean()


@defined
def test_a_criterion_gives_one_finite_number_per_filter_and_draws_from_its_generator(name, network):
    model, groups, *_ = met(network)
    assert get_criterion(name).needs in NEEDS
    scores, again = scored(name, model, groups), scored(name, model, groups)
    for group, score, same in zip(groups, scores, again, strict=True):
        assert score.shape == (group.units,) and score.is_floating_point()
        assert score.isfinite().all() and not score.requires_grad
        assert torch.equal(score, same)
    assert len(torch.cat(scores).unique()) > 1


@pytest.mark.parametrize(
    "name, network",
    [(name, network) for name, (networks, _) in UNDEFINED.items() for network in networks],
)
def test_where_a_criterion_is_not_defined_it_says_so_in_a_line(name, network):
    model, groups, *_ = met(network)
    with pytest.raises(ValueError, match=UNDEFINED[name][1]) as error:
        scored(name, model, groups)
    assert "\n" not in str(error.value) and name in str(error.value)


@defined
def test_a_criterion_leaves_the_network_and_its_gradients_alone(name, network):
    model, groups, *_ = met(network)
    scores = Scores(get_criterion(name), groups, model)
    model.zero_grad()
    gradients = task_backward(losses_of(model, 0), model, model.trunk.parameters())

    def tensors():
        grads = [grad for of in gradients.values() for grad in of.values()]
        return [*model.state_dict().values(), *(p.grad for p in model.parameters()), *grads]

    before, random = [t.clone() for t in tensors()], torch.get_rng_state()
    scores.update(gradients)
    scores.mean()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert torch.equal(random, torch.get_rng_state()), "only its own generator is drawn from"


@defined
@pytest.mark.parametrize("factor", [4.0, 2.0**-10])
def test_the_unit_of_the_loss_does_not_change_the_ranking(name, network, factor):
    model, groups, *_ = met(network)
    before, after = (scored(name, model, groups, of) for of in (1.0, factor))
    assert torch.equal(ranks(torch.cat(before)), ranks(torch.cat(after)))


@defined
def test_the_order_of_the_tasks_does_not_count(name, network):
    model, groups, *_ = met(network)
    for one, other in zip(scored(name, model, groups), scored(name, model, groups, turn=-1)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


def permuted(state: dict, groups, orders) -> dict:
    """The same network with each group's filters in another order."""
    state = dict(state)
    for group, order in zip(groups, orders):
        for member in group.members:
            assert member.identical
            for tensor, dim in member.slices:
                state[tensor] = state[tensor].index_select(dim, order)
    return state


@defined
def test_filters_in_another_order_have_their_scores_in_that_order(name, network):
    """Or the criterion looks at nothing at all, and gives the same numbers to another network."""
    model, groups, *_ = met(network)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    orders = [torch.randperm(group.units) for group in groups]
    another = {key: of + torch.rand(of.shape) if of.dim() else of for key, of in state.items()}
    before, outputs = scored(name, model, groups), model(torch.ones(IMAGE).double())
    try:
        model.load_state_dict(permuted(state, groups, orders))
        for task, output in model(torch.ones(IMAGE).double()).items():
            torch.testing.assert_close(output, outputs[task], rtol=1e-9, atol=1e-9)
        after = scored(name, model, groups)
        model.load_state_dict(another)
        blind = all(map(torch.equal, scored(name, model, groups), before))
    finally:
        model.load_state_dict(state)
    for one, other, order in zip(before, after, orders):
        torch.testing.assert_close(other, one if blind else one[order], rtol=1e-7, atol=1e-12)


# --- what each criterion is, one filter at a time ---


class Seen(NamedTuple):
    """weights: {name: array}; batches: of each minibatch {task: {name: gradient}}; groups; maps: of
    each minibatch and group its feature maps, channels second."""

    weights: dict
    batches: list
    groups: list
    maps: list

    def rows(self, group: Known, f: int, of: dict | None = None) -> list[np.ndarray]:
        """The filter's weights in each layer that makes it, or their gradients."""
        return [(of or self.weights)[f"{name}.weight"][f].ravel() for name in group.made]

    def summed(self) -> list[dict]:
        return [
            {name: sum(of[name] for of in batch.values()) for name in self.weights}
            for batch in self.batches
        ]

    def gate(self, group: Known, f: int, gradient: dict) -> float:
        """(gate x gradient)^2, the mean over gates."""
        squares = []
        for gate in group.gates:
            own = [name for name in (f"{gate}.weight", f"{gate}.bias") if name in self.weights]
            squares.append(sum((self.weights[n][f] * gradient[n][f]).sum() for n in own) ** 2)
        return np.mean(squares)

    def cosines(self, group: Known, f: int) -> np.ndarray:
        """(minibatches, pairs of tasks)"""
        found = []
        for batch in self.batches:
            vectors = [np.concatenate(self.rows(group, f, of)) for of in batch.values()]
            found.append(
                [
                    a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)
                    for a, b in itertools.combinations(vectors, 2)
                ]
            )
        return np.array(found)

    def by_task(self, group: Known, f: int) -> np.ndarray:
        """E[T_k]"""
        return np.array(
            [
                np.mean([self.gate(group, f, batch[task]) for batch in self.batches])
                for task in TASKS
            ]
        )

    def all(self, function) -> list[np.ndarray]:
        """function(seen, group, filter) of every filter, by group."""
        widths = [len(self.weights[f"{group.made[0]}.weight"]) for group in self.groups]
        return [
            np.array([function(self, group, f) for f in range(width)])
            for group, width in zip(self.groups, widths)
        ]


def place(values: np.ndarray) -> np.ndarray:
    return np.array([(values < own).sum() + ((values == own).sum() - 1) / 2 for own in values])


def l1(seen, group, f):
    return np.mean([np.abs(row).mean() for row in seen.rows(group, f)])


def l2(seen, group, f):
    return np.mean([(row**2).mean() for row in seen.rows(group, f)])


def bn_scale(seen, group, f):
    return np.mean([abs(seen.weights[f"{gate}.weight"][f]) for gate in group.gates])


def fpgm(seen, group, f):
    width = len(seen.weights[f"{group.made[0]}.weight"])
    own, *others = (np.concatenate(seen.rows(group, i)) for i in (f, *range(width)))
    return sum(np.sqrt(((own - other) ** 2).sum()) for other in others)


def taylor(seen, group, f):
    return np.mean([seen.gate(group, f, of) for of in seen.summed()])


def by_weight(effect, seen, group, f):
    return np.mean(
        [
            np.mean(
                [effect(w * g).sum() for w, g in zip(seen.rows(group, f), seen.rows(group, f, of))]
            )
            for of in seen.summed()
        ]
    )


def fisher(seen, group, f):
    squares = [
        np.mean([seen.rows(group, f, of)[i] ** 2 for of in seen.summed()], 0)
        for i in range(len(group.made))
    ]
    return np.mean([(w**2 * g).sum() for w, g in zip(seen.rows(group, f), squares)])


def jacobian(seen, group, f):
    found = []
    for of in seen.summed():
        products = [
            (seen.weights[f"{name}.weight"] * of[f"{name}.weight"])[:, f].sum()
            for name in group.readers
        ]
        found.append(seen.gate(group, f, of) + np.mean(np.square(products)))
    return np.mean(found)


def of_maps(function, seen, group, f):
    at = seen.groups.index(group)
    return np.mean([np.mean([function(a[:, f]).mean() for a in maps[at]]) for maps in seen.maps])


def cosprune(seen, group, f):
    return seen.cosines(group, f).mean()


def conflict(seen, group, f):
    return np.maximum(0, -seen.cosines(group, f)).mean()


def over_all(function, values: list[np.ndarray]) -> list[np.ndarray]:
    """Of all filters at once: each column by itself."""
    whole = np.concatenate(values)
    found = np.stack([function(column) for column in whole.T], 1)
    return np.split(found, np.cumsum([len(of) for of in values])[:-1])


def vote(function, of_columns, seen):
    tasks = over_all(of_columns, seen.all(Seen.by_task))
    return [np.array([function(row) for row in of]) for of in tasks]


def taylor_minus_conflict(seen):
    worth = vote(max, lambda column: column / column.mean(), seen)
    return [a - b for a, b in zip(worth, seen.all(conflict))]


def cosprune_taylor(seen):
    both = [np.stack(of, 1) for of in zip(seen.all(cosprune), seen.all(taylor))]
    return [of.mean(1) for of in over_all(place, both)]


def each(function):
    return lambda seen: seen.all(function)


# {criterion: of all that was seen one array per group}
ORACLES = {
    "l1": each(l1),
    "l2": each(l2),
    "bn_scale": each(bn_scale),
    "fpgm": each(fpgm),
    "taylor": each(taylor),
    "taylor_weight": each(partial(by_weight, np.square)),
    "taylor_abs": each(partial(by_weight, np.abs)),
    "fisher": each(fisher),
    "jacobian": each(jacobian),
    "activation": each(partial(of_maps, np.abs)),
    "apoz": each(partial(of_maps, lambda a: a != 0)),
    "cosprune": each(cosprune),
    "conflict_frequency": each(lambda *of: -(Seen.cosines(*of) < 0).mean()),
    "mt_taylor_sum": each(lambda *of: Seen.by_task(*of).sum()),
    "mt_taylor_normalised": partial(vote, sum, lambda column: column / column.sum()),
    "mt_taylor_max": partial(vote, max, place),
    "mt_taylor_min": partial(vote, min, place),
    "taylor_minus_conflict": taylor_minus_conflict,
    "cosprune_taylor": cosprune_taylor,
}
NO_ORACLE = {"random": "a draw: test_criteria holds that it is seeded"}


def test_every_criterion_has_an_oracle_or_a_reason_why_not():
    missing = {*registry.names("criteria")} - {*ORACLES} - {*NO_ORACLE}
    assert not missing, f"write {missing} down in NumPy, beside the others in ORACLES"


@cache
def seen_of(network: str) -> Seen:
    model, _, expected, maps_of = met(network)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    batches, maps = [], []
    for batch in range(2):
        batches.append({})
        for task in TASKS:
            model.zero_grad()
            losses_of(model, batch)[task].backward()
            batches[-1][task] = {
                name: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy()
                for name, p in model.named_parameters()
            }
        with torch.no_grad():
            maps.append([[a.numpy() for a in of] for of in maps_of(model.trunk, images_of(batch))])
    return Seen(weights, batches, expected, maps)


@defined
def test_a_criterion_is_what_its_oracle_says(name, network):
    if name in NO_ORACLE:
        return
    model, groups, *_ = met(network)
    expected = ORACLES[name](seen_of(network))
    for score, own in zip(scored(name, model, groups), expected, strict=True):
        np.testing.assert_allclose(score.numpy(), own, rtol=1e-9, atol=1e-15)


@defined
def test_a_criterion_that_reads_weights_alone_needs_no_minibatch(name, network):
    model, groups, *_ = met(network)
    scores = Scores(get_criterion(name), groups, model)
    if get_criterion(name).needs == WEIGHTS:
        model.zero_grad()
        assert len(scores.mean()) == len(groups)
    else:
        with pytest.raises(RuntimeError, match="seen none"):
            scores.mean()


# --- tasks ---

PIXELS = (6, 8)


def labels(task, generator, images):
    return torch.randint(task.channels, (images, *PIXELS), generator=generator).byte()


def vectors(task, generator, images):
    return F.normalize(torch.randn(images, 3, *PIXELS, generator=generator), dim=1)


def depths(task, generator, images):
    return torch.rand(images, 1, *PIXELS, generator=generator) * 4 + 0.5


# Targets of each kind; a task of a new kind adds its own here.
EXAMPLES = {
    Labels: labels,
    Depth: depths,
    InverseDepth: lambda *of: depths(*of) / 10,
    Normals: vectors,
    ImageClass: lambda task, generator, images: torch.randint(
        task.channels, (images,), generator=generator
    ).byte(),
}


def made(name: str, **options):
    """The task that an entry's function of the same name makes, of some classes if it has such."""
    function = getattr(registry.entry("tasks", name, "task"), name)
    given = {"name": "own", "classes": ("a", "b", "c", "d")}
    takes = inspect.signature(function).parameters
    return function(**{key: value for key, value in given.items() if key in takes}, **options)


def variants() -> dict[str, dict]:
    """Every entry as it is, and with each of its switches turned: {label: its name and options}."""
    found = {}
    for name in registry.names("tasks"):
        takes = inspect.signature(getattr(registry.entry("tasks", name, "task"), name)).parameters
        turned = {key: not p.default for key, p in takes.items() if isinstance(p.default, bool)}
        found[name] = {"name": name}
        found |= {f"{name} {key}": {"name": name, key: value} for key, value in turned.items()}
    return found


@pytest.fixture(params=variants())
def task(request):
    return made(**variants()[request.param])


def targets_of(task, images: int = 3, invalid: bool = True) -> torch.Tensor:
    target = EXAMPLES[type(task.target)](task, torch.Generator().manual_seed(images), images)
    if invalid and task.target.of_pixels:
        target[..., 0, :] = invalid_as(task, target)[..., 0, :]
    return target


def invalid_as(task, target: torch.Tensor) -> torch.Tensor:
    return torch.full_like(target, IGNORE if type(task.target) is Labels else 0)


def best_output(task, target: torch.Tensor) -> torch.Tensor:
    """What fits each image by itself; of classes, with certainty."""
    certain = 1e3 if task.classes else 1.0
    return torch.cat([task.prior(one[None]) * certain for one in target]).float()


def any_output(task, images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, task.channels, *PIXELS, generator=generator)


def metrics_of(task, *batches) -> dict[str, float]:
    meter = task.meter()
    for output, target in batches:
        meter.update(output, target)
    return numbers(meter.compute())


def test_a_task_is_whole(task):
    target = targets_of(task)
    found = metrics_of(task, (any_output(task, 3), target))
    assert task.name == "own" and task.channels >= 1 and task.target.name
    assert {task.endpoint, task.shown, *task.higher_is_better} <= found.keys()
    assert not task.classes or len(task.classes) == task.channels == len({*task.classes})
    prior = task.prior(target)
    sides = PIXELS if task.target.of_pixels else (1, 1)
    assert prior.shape == (1, task.channels, *sides) and prior.isfinite().all()


def test_a_loss_is_one_number_with_a_gradient_and_least_where_all_is_right(task):
    target = targets_of(task)
    output = any_output(task, 3).requires_grad_()
    loss = task.loss(output, target)
    loss.backward()
    assert loss.shape == () and loss.isfinite() and loss > 0
    assert output.grad.isfinite().all() and output.grad.abs().sum() > 0
    best = task.loss(best_output(task, target), target)
    assert best == pytest.approx(0, abs=1e-5)
    assert task.loss(output - 1e-2 * output.grad, target) < loss, "down its gradient it falls"


def test_metrics_are_best_where_all_is_right(task):
    target = targets_of(task)
    best = metrics_of(task, (best_output(task, target), target))
    assert np.isfinite([*best.values()]).all()
    for seed in range(5):
        for metric, value in metrics_of(task, (any_output(task, 3, seed), target)).items():
            sign = 1 if metric in task.higher_is_better else -1
            assert np.isfinite(value) and sign * best[metric] >= sign * value, metric


def test_what_stands_at_invalid_pixels_does_not_count(task):
    target, output = targets_of(task), any_output(task, 3)
    valid = task.target.valid(target)
    assert valid.shape == target.shape[:1] + (PIXELS if task.target.of_pixels else ())
    if not task.target.of_pixels:
        assert valid.all()
        return
    assert valid[:, 1:].all() and not valid[:, 0].any()
    other = torch.where(valid[:, None], output, 1e3).requires_grad_()
    loss = task.loss(other, target)
    loss.backward()
    assert loss.item() == pytest.approx(task.loss(output, target).item(), rel=1e-6)
    assert not other.grad.movedim(1, -1)[~valid].any()
    same = pytest.approx(metrics_of(task, (output, target)), rel=1e-6)
    assert metrics_of(task, (other.detach(), target)) == same
    nothing = invalid_as(task, target)
    assert metrics_of(task, (output, target), (output, nothing)) == same
    both = torch.cat([output, output]), torch.cat([target, nothing])
    assert task.loss(*both).item() == pytest.approx(task.loss(output, target).item(), rel=1e-6)


def test_one_valid_pixel_is_enough_and_a_loss_without_any_is_zero(task):
    target = targets_of(task, 2, invalid=False)
    if task.target.of_pixels:
        nothing = invalid_as(task, target)
        output = any_output(task, 2).requires_grad_()
        task.loss(output, nothing).backward()
        assert task.loss(output, nothing) == 0 and not output.grad.any()
        nothing[0, ..., 2, 3], target = target[0, ..., 2, 3], nothing
        assert task.target.valid(target).sum() == 1
    output = any_output(task, 2).requires_grad_()
    loss = task.loss(output, target)
    loss.backward()
    assert loss.isfinite() and output.grad.isfinite().all()
    assert np.isfinite([*metrics_of(task, (output.detach(), target)).values()]).all()


def test_metrics_are_of_the_whole_set_however_it_is_cut(task):
    target, output = targets_of(task, 7), any_output(task, 7)
    whole = metrics_of(task, (output, target))
    for sizes in ([1] * 7, [4, 3], [2, 5]):
        parts = zip(output.split(sizes), target.split(sizes))
        assert metrics_of(task, *parts) == pytest.approx(whole, rel=1e-6)


def test_mirrored_twice_and_enlarged_and_brought_back_a_target_is_as_it_was(task):
    target, count = targets_of(task), 3
    valid = task.target.valid(target)

    def sampled(target, side: int, factor: float | None):
        matrix = torch.tensor([[float(side), 0, 0], [0, 1, 0]]).expand(count, 2, 3)
        grid = F.affine_grid(matrix, [count, 1, *PIXELS], align_corners=False)
        sides = torch.full((count,), float(side))
        factors = None if factor is None else torch.full((count,), factor)
        return task.target.sample(target, grid, sides, factors)

    def same(one, other):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(task.target.valid(one), valid)

    mirrored = sampled(target, -1, None)
    assert torch.equal(task.target.valid(mirrored), valid.flip(-1) if valid.dim() > 1 else valid)
    same(sampled(mirrored, -1, None), target)
    same(sampled(sampled(target, 1, 1.25), 1, 0.8), target)
    same(task.target.unscaled(sampled(target, 1, 1.5), 1.5), target)
    assert torch.equal(task.target.unscaled(target, 1.0), target)


def test_targets_and_outputs_at_their_own_size_are_left_as_they_are(task):
    target, output = targets_of(task), any_output(task, 3)
    for centred in (False, True):
        assert torch.equal(task.target.resize(target, PIXELS, centred), target)
    small = task.target.resize(target, (3, 4))
    assert task.target.valid(small).shape[1:] == ((3, 4) if task.target.of_pixels else ())
    torch.testing.assert_close(task.target.resize_output(output, PIXELS), output)
    enlarged = task.target.resize_output(output[..., :3, :4], PIXELS).shape[-2:]
    assert enlarged == (PIXELS if task.target.of_pixels else (3, 4))


# --- data sets ---

# {data set: what writes it in miniature}; others are tested where their files are on this machine.
SAMPLES = {"nyuv2": mtan, "cityscapes": cityscapes}


@pytest.fixture(params=registry.names("datasets"), scope="module")
def data(request, tmp_path_factory):
    """(name, root) of a data set that is here."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTPRUNE_OFFLINE", "1")
        root = ""
        if name in SAMPLES:
            folder = tmp_path_factory.mktemp(name)
            patch.setenv("MTPRUNE_CACHE", str(folder / "cache"))
            root = str(SAMPLES[name](folder / "data"))
        try:
            data_digest(name, root)
        except FileNotFoundError as error:
            pytest.skip(f"not on this machine ({error})")
        yield name, root


def test_a_data_set_holds_what_its_tasks_are_about(data):
    name, root = data
    loaded = load_dataset(name, root, validation_share=0.25)
    tasks = data_tasks(name, root)
    assert loaded.name == name and list(loaded.tasks) == list(tasks) and len(tasks) >= 1
    for part in (loaded.train, loaded.validation, loaded.test):
        images, size = part.image, part.image.shape[-2:]
        assert len(part) >= 1 and images.dtype == torch.uint8 and images.shape[1] == 3
        assert images[:8].max() > images[:8].min()
        assert {*part.targets} == {*tasks}
        for task in tasks.values():
            target = part.targets[task.name][:64]
            kind = type(task.target)
            shape = {
                Depth: (1, *size),
                InverseDepth: (1, *size),
                Normals: (3, *size),
                Labels: (*size,),
                ImageClass: (),
            }[kind]
            assert len(part.targets[task.name]) == len(part) and target.shape[1:] == shape
            valid = task.target.valid(target)
            assert valid.any() and target.float().isfinite().all()
            if kind in (Labels, ImageClass):
                assert target.dtype == torch.uint8 and target[valid].max() < task.channels
                assert len(task.classes) == task.channels
            elif kind is Normals:
                length = target.float().norm(dim=1)
                assert target.dtype == torch.float16
                assert (length[valid] - 1).abs().max() < 2e-3 and not length[~valid].any()
            else:
                assert target.dtype == torch.float32 and 0 <= target.min() < target.max() < 30
            assert task.loss(any_target_output(task, target), target.float()).isfinite()


def any_target_output(task, target: torch.Tensor) -> torch.Tensor:
    sides = target.shape[-2:] if task.target.of_pixels else (2, 2)
    return torch.ones(len(target), task.channels, *sides)


def test_a_data_set_is_split_into_parts_that_share_no_image(data):
    name, root = data
    loaded = load_dataset(name, root, validation_share=0.25)
    whole = len(loaded.train) + len(loaded.validation)
    assert len(loaded.validation) == round(0.25 * whole)
    seen: set[bytes] = set()
    for part in (loaded.train, loaded.validation, loaded.test):
        images = part[:: max(1, len(part) // 64)]
        tensors = zip(images.image, *images.targets.values())
        samples = {b"".join(tensor.numpy().tobytes() for tensor in sample) for sample in tensors}
        assert len(samples) == len(images)
        if part is not loaded.test or name not in SAMPLES:  # whose parts are written alike
            assert not seen & samples
        seen |= samples
    assert torch.equal(loaded.calibration.image, loaded.train.image[: len(loaded.calibration)])
    assert not loaded.calibration.targets


def test_a_data_set_is_the_same_each_time_and_counts_what_is_asked_for(data):
    name, root = data
    first, second = (load_dataset(name, root, train_images=8, test_images=2) for _ in range(2))
    assert first.digest == second.digest == data_digest(name, root) != ""
    assert (len(first.train), len(first.validation), len(first.test)) == (7, 1, 2)
    assert first.mirror == second.mirror
    for part in ("train", "validation", "test"):
        one, other = getattr(first, part), getattr(second, part)
        assert torch.equal(one.image, other.image)
        assert all(torch.equal(one.targets[task], other.targets[task]) for task in one.targets)
    with pytest.raises(ValueError, match="asked for 1000000000 test images, but there are only"):
        load_dataset(name, root, test_images=10**9)


# --- backbones (test_models tests them in depth) ---


def strides_of(name: str) -> list[int]:
    """The strides that a backbone has; the others are refused in a line that names them."""
    found = []
    for stride in (1, 2, 4, 8, 16, 32, 64):
        try:
            with torch.device("meta"):
                get_backbone(name)(stride)
            found.append(stride)
        except ValueError as error:
            assert "stride must be one of" in str(error) and str(stride) in str(error)
    assert found
    return found


@entries("backbones")
def test_a_backbone_gives_features_at_each_of_its_strides_and_groups_to_prune(name):
    for stride in strides_of(name):
        with torch.device("meta"):
            trunk = get_backbone(name)(stride).eval()
            features = trunk(torch.zeros(2, 3, 64, 96))
        assert features.shape[0] == 2 and features.shape[2:] == (64 // stride, 96 // stride)
    architecture = network_of(name)
    groups = plan_of(architecture).groups
    assert len(groups) >= 2 and architecture.filters == sum(group.width for group in groups)
    assert all(group.root.startswith("trunk.") and group.units >= 2 for group in groups)
    assert any(group.width == features.shape[1] for group in groups), "what the heads read"


def network_of(name: str) -> Architecture:
    return Architecture({"a": 2, "b": 1}, name, strides_of(name)[-1], head_width=4, dropout=0.0)


@entries("backbones")
def test_a_backbone_is_built_alike_from_a_seed(name):
    full = network_of(name)
    narrow = full.narrowed(1 / 16, 8)
    one, same, other = (build(narrow, seed) for seed in (0, 0, 1))
    states = [model.state_dict() for model in (one, same, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    side = 64 // full.stride
    outputs = one.eval()(torch.randn(2, 3, 64, 64))
    assert {task: tuple(o.shape) for task, o in outputs.items()} == {
        "a": (2, 2, side, side),
        "b": (2, 1, side, side),
    }
    assert all(output.isfinite().all() for output in outputs.values())


# --- schedules ---

CASES = [  # (filters, of which so many can go, filters per removal)
    (4224, 4159, 100),
    (272, 207, 110),
    (264, 199, 17),
    (12, 9, 1),
    (100, 99, 1),
    (100, 1, 1),
    (40, 40 - 5, 7),
    (100, 60, 60),
    (100, 60, 1000),
    (100, 0, 10),
]


@entries("schedules")
@pytest.mark.parametrize("total, spare, step", CASES)
def test_a_schedule_removes_something_each_time_until_all_that_can_go_is_gone(
    name, total, spare, step
):
    plan = get_schedule(name)(total, spare, step)
    assert all(type(count) is int for count in plan)
    assert plan == get_schedule(name)(total, spare, step)
    assert all(before > after for before, after in itertools.pairwise([total, *plan]))
    assert plan[-1:] == ([total - spare] if spare else [])


@pytest.mark.parametrize("total, spare, step", CASES)
def test_geometric_takes_a_share_of_what_is_left_in_as_many_removals_as_fixed(total, spare, step):
    fixed, geometric = (get_schedule(name)(total, spare, step) for name in ("fixed", "geometric"))
    assert len(fixed) == len(geometric) == -(-spare // step)
    taken = [before - after for before, after in itertools.pairwise([total, *fixed])]
    assert taken[:-1] == [step] * (len(fixed) - 1)
    shares = [after / before for before, after in itertools.pairwise([total, *geometric])]
    if spare and min(geometric) > 50:  # where rounding hardly counts
        assert shares == pytest.approx([(1 - spare / total) ** (1 / len(fixed))] * len(fixed), 0.02)


@pytest.mark.parametrize("total, spare, step", CASES)
def test_cubic_removes_ever_fewer_and_one_shot_all_at_once(total, spare, step):
    cubic, fixed = (get_schedule(name)(total, spare, step) for name in ("cubic", "fixed"))
    assert len(cubic) == len(fixed)
    taken = [before - after for before, after in itertools.pairwise([total, *cubic])]
    assert all(a + 1 >= b for a, b in itertools.pairwise(taken)), "to rounding"
    if spare > 1000:
        n = len(cubic)
        gone = [(total - left) / spare for left in cubic]
        assert gone == pytest.approx([1 - (1 - i / n) ** 3 for i in range(1, n + 1)], abs=0.01)
    assert get_schedule("one_shot")(total, spare, step) == fixed[-1:]


# --- rankings ---


def layers_of(seed: int, ties: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [10.0**-i * torch.rand(5 + 3 * i, generator=generator) for i in range(4)]
    return [(3 * of / of.max()).round() for of in scores] if ties else scores


@entries("rankings")
@pytest.mark.parametrize("ties", [False, True])
def test_a_ranking_keeps_the_order_within_each_layer_and_does_not_touch_the_scores(name, ties):
    for seed in range(10):
        scores = layers_of(seed, ties)
        before = [of.clone() for of in scores]
        found = get_ranking(name)(scores)
        for of, own, same in zip(scores, found, before, strict=True):
            assert torch.equal(of, same) and own.shape == of.shape and own.is_floating_point()
            assert own.isfinite().all() and torch.equal(ranks(of), ranks(own))


def test_each_ranking_is_what_it_says():
    scores = layers_of(0)
    assert all(map(torch.equal, get_ranking("global")(scores), scores))
    for of, places, lamp in zip(scores, get_ranking("layer")(scores), get_ranking("lamp")(scores)):
        for i, own in enumerate(of.tolist()):
            assert places[i].item() == pytest.approx(sum(s < own for s in of.tolist()) / len(of))
            share = own / sum(s for s in of.tolist() if s >= own)
            assert lamp[i].item() == pytest.approx(share, rel=1e-12)
        assert lamp.max() == 1


def test_lamp_refuses_scores_below_zero_and_takes_a_layer_of_zeros():
    with pytest.raises(ValueError, match="lamp takes shares of scores, and some are below 0"):
        get_ranking("lamp")([torch.tensor([0.5, -0.1])])
    assert torch.equal(get_ranking("lamp")([torch.zeros(3)])[0], torch.zeros(3).double())


# --- stages ---

TINY = test_runs.TINY | {"tuning.trials": 1, "seeds": 1, "criteria": ["taylor", "random"]}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return Experiment.open("smoke", "rooms", "", str(folder), TINY).runs()


@pytest.mark.parametrize("name", stage_names())
def test_a_stage_is_a_whole_record_and_writes_its_tables(name, grid):
    stage, run = get_stage(name), next(run for run in grid if run.stage == name)
    assert {*stage_names()} == {*registry.names("stages")}
    assert {*stage.SETTINGS} <= {field.name for field in fields(Profile)}
    assert stage.TABLES and all(file.endswith(".csv") for file in stage.TABLES)
    assert store.stage_notebook(name).exists()
    for function in (stage.source, stage.search, stage.settings, stage.weights, stage.entries):
        assert list(inspect.signature(function).parameters) == ["run"]
    assert list(inspect.signature(stage.perform).parameters) == [
        "run",
        "dataset",
        "report",
        "checkpoints",
    ]
    for entry in stage.entries(run):
        folder, _, known = entry.partition(".")
        assert known in registry.names(folder)
    assert run.source in (None, *grid) and run.search in (None, *grid)
    execute(run, report=lambda line: None)
    assert run.done and run.outdated() == ""
    assert read_json(run.path(store.PROVENANCE))["code"] == run.code
    for file in run.tables:
        assert read_table(run.path(file)), f"{file} has no row"
    if stage.weights(run):
        assert run.source.intact(stage.weights(run))
