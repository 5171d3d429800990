"""The Pruner: structured pruning in anybody's loop, for any network with a shared trunk."""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mtprune_utils.core import cost, surgery
from mtprune_utils.core.groups import Group, Untraceable, leaves, outputs_of, trace
from mtprune_utils.core.pretrained import check_unwrapped, give_shapes
from mtprune_utils.core.scoring import TASK_GRADIENTS, Criterion, Scores
from mtprune_utils.core.selection import chooser, within_bound
from mtprune_utils.core.signals import backward, task_backward
from mtprune_utils.criteria import get_criterion
from mtprune_utils.rankings import get_ranking

if TYPE_CHECKING:
    import pandas as pd


class Pruner:
    """Scores the trunk's filters while a network is trained, and removes them physically.

        pruner = Pruner(model, example_inputs=(images,), trunk=model.encoder, criterion="cosprune")
        pruner.backward(losses)                         # for sum(losses.values()).backward()
        pruner.prune(filters=100, optimizer=optimizer)  # every so many optimizer.step()

    model: a network whose outputs have names (a dictionary, sequence or dataclass), the same in
    training and evaluation; itself, not wrapped for several GPUs or compiled. example_inputs: a
    tuple of what it is called with, by position. trunk: the part that is pruned; by default every
    layer that all outputs depend on. criterion: a name, or a `Criterion`. leave: layers to leave
    alone. min_filters: what every group keeps at least; round_to: what is kept is a multiple of
    this. ranking: "global" compares scores of all layers, "layer" takes the same share of each,
    "lamp" compares shares of a layer's scores. dense: what shares of a size refer to, an earlier
    Pruner's `dense`; by default the network as it is. It lets an interrupted run go on.

    `groups` are what can be pruned, `left_alone` says why the trunk's other layers cannot. Raises
    ValueError, in one line, where nothing can be pruned.

    A network with two outputs, from 8 filters to 3:

        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        ...         self.depth, self.edges = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)
        ...
        ...     def forward(self, images):
        ...         features = self.trunk(images)
        ...         return {"depth": self.depth(features), "edges": self.edges(features)}
        >>> model, images = Net(), torch.rand(2, 3, 8, 8)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> pruner = Pruner(model, (images,), criterion="cosprune")
        >>> pruner.backward({task: out.square().mean() for task, out in model(images).items()})
        >>> optimizer.step()
        >>> pruner.prune(filters=5, optimizer=optimizer)["filters"]
        3
        >>> model.trunk[0].weight.shape
        torch.Size([3, 3, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple,
        trunk: nn.Module | str | None = None,
        criterion: str | Criterion = "taylor",
        *,
        leave: tuple[nn.Module | str, ...] = (),
        min_filters: int = 1,
        round_to: int = 1,
        ranking: str = "global",
        seed: int = 0,
        dense: dict[str, float] | None = None,
    ):
        for name, value in (("min_filters", min_filters), ("round_to", round_to)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is a whole number from 1, got {value!r}")
        _expect("model", model, nn.Module, "a torch.nn.Module")
        check_unwrapped(model)
        _expect("criterion", criterion, (str, Criterion), "a criterion's name, or a Criterion")
        _expect("leave", leave, (tuple, list), "a tuple of layers or their names")
        self.criterion = get_criterion(criterion) if isinstance(criterion, str) else criterion
        get_ranking(ranking)  # else a misspelt one were met as filters are chosen
        self.ranking = ranking
        self.model, self._examples = model, example_inputs
        self.min_filters, self.round_to = min_filters, round_to
        self.generator = torch.Generator().manual_seed(seed)
        self.groups, self.left_alone = _groups(model, example_inputs, trunk, leave)
        self._measure_uses()
        self.dense = self.size() | (dense or {})
        self._dense_shapes = {name: t.shape for name, t in _tensors(model).items()}
        self.scores = self._new_scores()

    @property
    def inputs(self) -> tuple:
        """The example inputs, where the network is now."""
        device = next(self.model.parameters()).device
        return tuple(x.to(device) if torch.is_tensor(x) else x for x in self._examples)

    def _measure_uses(self) -> None:
        """Anew after each removal: what `cost` takes for constant may have shrunk as well."""
        self.uses = cost.uses_of_weights(self.model, self.inputs)

    @property
    def _shared(self) -> dict[str, nn.Parameter]:
        """What criteria read of the trunk, by name."""
        tensors = dict(self.model.named_parameters())
        made = [m for group in self.groups for m in group.members if m.produces]
        names = [name for m in made for name, _ in m.slices]
        return {name: tensors[name] for name in names if name in tensors}

    def _new_scores(self) -> Scores:
        return Scores(self.criterion, self.groups, self.model, self.generator)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradient of the losses' sum to `.grad`, and score the filters on the way.

        losses: {task: scalar}. Weights of losses and whatever else the losses depend on get their
        gradients too. A criterion that needs one gradient per task calls no hooks of the network's
        parameters. Raises ValueError, which names the task and leaves `.grad` as it is, for a loss
        that is no scalar or does not depend on the trunk.
        """
        _expect("losses", losses, dict, "a dictionary, {task: scalar}")
        read = self._shared
        _check_trainable(read)
        shared = list(read.values())
        self._check_losses(losses, shared)
        with _empty_gradients(self.model.parameters()):
            if self.criterion.needs == TASK_GRADIENTS:
                own, total = set(map(id, self.model.parameters())), sum(losses.values())
                if outer := [leaf for leaf in leaves(total) if id(leaf) not in own]:
                    torch.autograd.backward(total, inputs=outer, retain_graph=True)
                self.scores.update(task_backward(losses, self.model, shared))
                return
            backward(losses)
            unreached = [parameter for parameter in shared if parameter.grad is None]
            for parameter in unreached:
                parameter.grad = torch.zeros_like(parameter)
            self.scores.update()
            for parameter in unreached:
                parameter.grad = None

    def _check_losses(self, losses: dict[str, Tensor], shared: list[nn.Parameter]) -> None:
        if not losses:
            raise ValueError("losses is empty: give one scalar per task")
        ids = set(map(id, shared))
        for task, loss in losses.items():
            if not torch.is_tensor(loss) or loss.numel() != 1:
                got = tuple(loss.shape) if torch.is_tensor(loss) else repr(loss)
                expected = "must be one number with a gradient"
                raise ValueError(f"the loss of {task} {expected}, got {got}")
            if not any(id(leaf) in ids for leaf in leaves(loss)):
                raise ValueError(f"the loss of {task} does not depend on the trunk")

    def size(self) -> dict[str, int]:
        """Filters that can be pruned, the network's parameters, multiply-accumulates a sample."""
        counts = self._cost().without()
        return {"filters": sum(group.units for group in self.groups), **counts}

    def _cost(self) -> cost.Cost:
        return cost.Cost(self.model, self.groups, self.uses)

    def widths(self) -> dict[str, int]:
        """{first layer of a group: its filters}."""
        return {group.root: group.width for group in self.groups}

    def prune(
        self,
        filters: int | None = None,
        *,
        parameters: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        growth: float | None = None,
        losses: Callable[[nn.Module], dict[str, Tensor]] | None = None,
        optimizer: torch.optim.Optimizer | None,
    ) -> dict[str, int]:
        """Remove the filters with the lowest scores; training goes on with the smaller network.

        filters: how many; or parameters, macs, latency: as many as it takes to come down to that
        share of `dense`; or growth: layer by layer as many as let no task's loss grow by more than
        this share of it, see `within_bound`. Give one of them. losses, with growth: a function of a
        network, of which it is given smaller copies in evaluation mode, that returns {task:
        validation loss}. optimizer: the one that trains them, which keeps the moments of what is
        left; None if you make a new one now. Returns the new `size`, and begins new scores. Raises,
        before anything is removed, ValueError if that cannot be reached, and RuntimeError if no
        minibatch was scored.
        """
        given = {"parameters": parameters, "macs": macs, "latency": latency}
        goals = {name: share for name, share in given.items() if share is not None}
        if len(goals) + (filters is not None) + (growth is not None) != 1:
            raise ValueError("say filters, parameters, macs, latency or growth: one of them")
        if (growth is None) != (losses is None):
            raise ValueError("growth is of losses: give both, losses as a function of the network")
        scores = self.scores.mean()
        choose = chooser(scores, self.min_filters, self.round_to, self.ranking)
        if growth is not None:
            chosen = self._within(growth, losses, scores)
        elif goals:
            ((measure, share),) = goals.items()
            chosen = self._down_to(measure, share, choose)
        else:
            chosen = choose(filters)
        self.remove(chosen, optimizer)
        return self.size()

    def _down_to(self, measure: str, share: float, choose: Callable) -> list[Tensor]:
        """The fewest filters without which the network is at most that share of what it was."""
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < 1:
            raise ValueError(f"{measure} is a share between 0 and 1, got {share!r}")
        spare = sum(max(group.units - self.min_filters, 0) for group in self.groups)
        if measure == "latency":
            timed = cost.latency_without(self.model, self.groups, self.inputs)
            if "latency" not in self.dense:
                self.dense["latency"] = cost.latency(self._as_first_met(), self.inputs)
            costs = lambda count: timed(choose(count))  # noqa: E731
        else:
            sizes = self._cost()
            costs = lambda count: sizes.without(choose(count))[measure]  # noqa: E731
        goal = share * self.dense[measure]
        counts = range(spare + 1)
        at = bisect_left(counts, -goal, key=lambda count: -costs(count))
        if at > spare:
            least = costs(spare) / self.dense[measure]
            at_least = f"min_filters={self.min_filters} and round_to={self.round_to}"
            raise ValueError(
                f"{measure} cannot come down to {share:g}: with {at_least} everywhere, "
                f"{least:.3f} is left"
            )
        return choose(at)

    def _within(self, growth: float, losses: Callable, scores: list[Tensor]) -> list[Tensor]:
        """The filters without which no task's loss grows by more, layer by layer."""
        if type(growth) not in (int, float) or not 0 <= growth < math.inf:
            raise ValueError(f"growth is a share from 0, got {growth!r}")
        _expect("losses", losses, Callable, "a function of the network")

        def without(chosen: list[Tensor]) -> dict[str, float]:
            smaller = copy.deepcopy(self.model).eval()
            surgery.remove(smaller, self.groups, chosen)
            with torch.no_grad():
                found = losses(smaller)
            if not isinstance(found, dict) or not found:
                raise ValueError(f"losses must return a dictionary, {{task: loss}}, got {found!r}")
            return {task: float(loss) for task, loss in found.items()}

        return within_bound(scores, self.min_filters, self.round_to, growth, without)

    def _check_trains_all(self, optimizer: torch.optim.Optimizer, cuts: surgery.Cuts) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        tensors = dict(self.model.named_parameters())
        cut = [name for name, _ in cuts if name in tensors and tensors[name].requires_grad]
        missing = [name for name in cut if id(tensors[name]) not in held]
        if 0 < len(missing) < len(cut):
            raise ValueError(
                f"the optimizer has not {missing[0]}, which is cut too: give one that has all "
                "(its param_groups may have rates of their own)"
            )

    def _as_first_met(self) -> nn.Module:
        """A copy with the widths that the network had then, and weights of zero."""
        model = copy.deepcopy(self.model)
        give_shapes(model, self._dense_shapes)
        with torch.no_grad():
            for tensor in _tensors(model).values():
                tensor.zero_()
        return model

    def remove(self, chosen: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Remove chosen filters: one tensor of distinct indices per group, in their order.

        Raises ValueError, before anything is removed, as `surgery.remove` does, and for an
        optimizer that trains only some of what is cut.
        """
        if optimizer is not None:
            self._check_trains_all(optimizer, surgery.cuts_of(self.groups, chosen))
        self.groups = surgery.remove(self.model, self.groups, chosen, optimizer)
        self._measure_uses()
        self.scores.close()
        self.scores = self._new_scores()

    def table(self) -> "pd.DataFrame":
        """The groups: what goes together, how much of it there is, and its share of the network.

        A group's share is what would go with all of its filters but one.
        """
        import pandas as pd  # what trains needs none

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict]:
        sizes, rows = self._cost(), []
        whole = sizes.without()
        none = [torch.arange(0)] * len(self.groups)
        for i, group in enumerate(self.groups):
            alone = [*none[:i], torch.arange(group.units - 1), *none[i + 1 :]]
            less = sizes.without(alone)
            rows.append(
                {
                    "first layer": group.root,
                    "filters": group.units,
                    "made by": ", ".join(m.name for m in group.producers),
                    "read by": ", ".join(m.name for m in group.members if not m.produces),
                    **{name: 1 - less[name] / whole[name] for name in ("parameters", "macs")},
                }
            )
        return rows

    def __repr__(self) -> str:
        size = ", ".join(f"{count:,} {name}" for name, count in self.size().items())
        groups = [
            f"{row['filters']} filters of {row['made by']}: {row['parameters']:.1%} of the "
            f"parameters, {row['macs']:.1%} of the macs"
            for row in self._rows()
        ]
        left = [f"left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        head = f"Pruner by {self.criterion.name} of {type(self.model).__name__}: {size}"
        return "\n".join([head, *groups, *left])


def _groups(
    model: nn.Module,
    inputs: tuple,
    trunk: nn.Module | str | None,
    leave: tuple[nn.Module | str, ...],
) -> tuple[list[Group], dict[str, str]]:
    """What can be pruned, and why the rest of the trunk cannot. Raises `Untraceable`."""
    try:
        groups, reasons = trace(model, inputs, trunk, leave)
        _check_outputs_in_training(model, inputs)
        with _StaysDouble():
            unsound = surgery.unsound(model, groups, tuple(map(_varied, inputs)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise Untraceable(f"the network cannot be copied or run by itself ({reason})") from error
    if len(unsound) == len(groups):
        root, reason = next(iter(unsound.items()))
        raise Untraceable(f"nothing of the trunk can be pruned ({root}: {reason})")
    return [group for group in groups if group.root not in unsound], reasons | unsound


def _check_trainable(read: dict[str, nn.Parameter]) -> None:
    frozen = sorted(name for name, parameter in read.items() if not parameter.requires_grad)
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters of what is pruned are frozen (requires_grad is False), "
            f"{frozen[0]} among them: set requires_grad for as long as you prune, or leave them"
        )


def _check_outputs_in_training(model: nn.Module, inputs: tuple) -> None:
    """Raises Untraceable for outputs that there are in training only: nobody traces those."""
    tried, names = copy.deepcopy(model), []
    with torch.no_grad():
        for mode in (False, True):
            try:
                names.append(set(outputs_of(tried.train(mode)(*inputs))))
            except ValueError:  # batch norm takes no single value in training
                return
    if odd := sorted(names[0] ^ names[1]):
        raise Untraceable(
            f"output {odd[0]} is not there both in training and in evaluation: switch it off, or "
            "give it in both"
        )


def _varied(value):
    """An example input as it is, but noise where all its numbers are the same."""
    constant = torch.is_tensor(value) and value.is_floating_point() and value.numel() > 1
    if not constant or value.min() < value.max():
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(value)


class _StaysDouble(TorchFunctionMode):
    """Casts to other floating-point types become casts to float64, in which removal is checked."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        casts = (Tensor.float, Tensor.half, Tensor.bfloat16)
        if function in casts and arguments[0].is_floating_point():
            return arguments[0].double()

        def double(value):
            floating = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if floating else value

        if function in (Tensor.to, Tensor.type):
            arguments = (arguments[0], *map(double, arguments[1:]))
            options = {name: double(value) for name, value in options.items()}
        return function(*arguments, **options)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its state, but what is no tensor (`get_extra_state`)."""
    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}


def _expect(name: str, value, kind: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}, got a {type(value).__name__}")


@contextmanager
def _empty_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No `.grad` to begin with; what was there is added in the end."""
    before = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before.items():
            if parameter.grad is not None:
                grad += parameter.grad
            parameter.grad = grad
