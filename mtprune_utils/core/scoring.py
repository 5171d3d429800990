"""What a criterion is given of a group of filters, and the running means of what it makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps

import torch
from torch import Tensor, nn

from mtprune_utils.core.activations import FeatureMap, Watch
from mtprune_utils.core.groups import Group, Member

WEIGHTS, GRADIENT, TASK_GRADIENTS = "weights", "gradient", "task_gradients"
ACTIVATIONS = "activations"
NEEDS = (WEIGHTS, GRADIENT, TASK_GRADIENTS, ACTIVATIONS)
TaskGradients = dict[str, dict[nn.Parameter, Tensor]]  # task: trunk's parameter: gradient
Statistics = Tensor | dict[str, Tensor]  # (units, ...), or several of them by name


@dataclass(frozen=True)
class Criterion:
    """One score per unit; the lowest go first.

    needs: "weights" (read once, when filters are chosen), "gradient" (the training gradient in
    `.grad`; read on every minibatch), "task_gradients" (one gradient per task besides; likewise) or
    "activations" (of the forward pass; likewise).

    statistics(signals, generator) -> what is averaged over the minibatches since the last removal:
    one tensor (units, ...), or several by name. combine(means, signals) -> one (units,) tensor per
    group, of all groups' averages at once, so that it can rank, vote or normalise; the signals are
    those of the moment when filters are chosen. Without it the averages are the scores.
    """

    name: str
    needs: str
    statistics: Callable[["Signals", torch.Generator], Statistics]
    combine: Callable[[list[Statistics], list["Signals"]], list[Tensor]] | None = None

    def __post_init__(self):
        if self.needs not in NEEDS:
            choice = f"choose one of {', '.join(NEEDS)}"
            raise ValueError(f"the criterion {self.name!r} needs {self.needs!r}: {choice}")


def _kept(method: Callable) -> Callable:
    """What is computed once for all criteria that read it. They must not change it."""

    @wraps(method)
    def kept(self):
        if method not in self._known:
            self._known[method] = method(self)
        return self._known[method]

    return kept


class Signals:
    """A group's tensors on one minibatch, one row per unit: what criteria read."""

    def __init__(
        self,
        group: Group,
        tensors: dict[str, nn.Parameter],
        gradients: TaskGradients | None = None,
        maps: list[FeatureMap] | None = None,
    ):
        self.group, self.units = group, group.units
        self.tensors, self._gradients, self._maps = tensors, gradients or {}, maps or []
        self._known: dict[Callable, Tensor] = {}

    @cached_property
    def _weights(self) -> list[tuple[Member, nn.Parameter]]:
        return [(m, self.tensors[m.slices[0][0]]) for m in self.group.producers]

    @cached_property
    def _gates(self) -> list[tuple[Member, nn.Parameter, nn.Parameter | None]]:
        by_name = {m.name: m for m in self.group.members if m.produces}
        members = [by_name[name] for name in self.group.gates]
        gates = [
            (m, self.tensors[f"{m.name}.weight"], self.tensors.get(f"{m.name}.bias"))
            for m in members
            if f"{m.name}.weight" in self.tensors
        ]
        if not gates:
            raise ValueError(
                f"{self.group.root}: no layer's scale stands before its activation, so that gates "
                "cannot be read: leave it alone, or take another criterion"
            )
        return gates

    def weights(self) -> list[Tensor]:
        """(units, numbers) of each layer that produces the channels."""
        return [_rows(weight.detach(), m, self.units) for m, weight in self._weights]

    def weight_gradients(self) -> list[Tensor]:
        """Their training gradients, likewise."""
        return [_rows(weight.grad, m, self.units) for m, weight in self._weights]

    def norm_scales(self) -> list[Tensor]:
        """(units, channels) of each normalisation's scale; empty if there is none."""
        norms = [m for m in self.group.members if m.kind == "norm" and m.name in self.group.gates]
        scales = [(m, self.tensors.get(f"{m.name}.weight")) for m in norms]
        return [_rows(of.detach(), m, self.units) for m, of in scales if of is not None]

    def _of_tasks(self) -> list[dict[nn.Parameter, Tensor]]:
        if not self._gradients:
            raise ValueError("there is no gradient of any task: give `update` those of the tasks")
        return list(self._gradients.values())

    def task_gradients(self) -> Tensor:
        """(units, tasks, numbers): each task's gradient of all weights that make the channels."""
        tasks = self._of_tasks()
        rows = [
            torch.stack([_rows(of[weight], m, self.units) for of in tasks], 1)
            for m, weight in self._weights
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    @_kept
    def task_cosines(self) -> Tensor:
        """(units, tasks, tasks): the cosine of each two of them; 0 where one is zero."""
        grads = self.task_gradients()
        if grads.shape[1] < 2:
            raise ValueError("a criterion that compares tasks needs at least two, and there is one")
        products = grads @ grads.mT
        norms = products.diagonal(dim1=1, dim2=2).sqrt()
        scale = norms.unsqueeze(1) * norms.unsqueeze(2)
        return torch.where(scale > 0, products / scale, 0)

    @_kept
    def gate_gradients(self) -> list[Tensor]:
        """(units, channels) of dL/dgate, for a gate of value 1 on each feature map, by layer.

        A rectified affine map is homogeneous in its weight and bias together, so that it is
        <W, dL/dW> + b dL/db of the layer before the activation (Molchanov et al., CVPR 2019).
        """
        return self._gate_gradients(lambda parameter: parameter.grad)

    @_kept
    def task_gate_gradients(self) -> Tensor:
        """(units, tasks, channels) of dL_k/dgate, likewise of each task's loss."""
        by_task = [torch.cat(self._gate_gradients(of.__getitem__), 1) for of in self._of_tasks()]
        return torch.stack(by_task, 1)

    def _gate_gradients(self, gradient: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        found = []
        for m, weight, bias in self._gates:
            dim = m.slices[0][1]
            product = weight * gradient(weight)
            if product.dim() > 1:
                product = product.movedim(dim, 0).flatten(1).sum(1)
            if bias is not None:
                product = product + bias * gradient(bias)
            found.append(_rows(product.detach(), m, self.units, dim=0))
        return found

    @_kept
    def reader_products(self) -> list[Tensor]:
        """(units,) of <W, dL/dW> over the slice that reads a unit, of each layer that reads it."""
        found = []
        for m in [m for m in self.group.members if not m.produces]:
            name, dim = m.slices[0]
            weight = self.tensors[name]
            if weight.grad is None:  # the loss does not depend on it
                found.append(weight.new_zeros(self.units))
                continue
            product = (weight * weight.grad).detach().movedim(dim, 0).flatten(1).sum(1)
            if not (m.identical and len(product) == self.units):
                at, of = m.positions.to(product.device), m.units.to(product.device)
                product = product.new_zeros(self.units).index_add(0, of, product[at])
            found.append(product)
        return found

    def mean_activations(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """(units,) means of the function over a unit's feature maps, as layers behind read them."""
        if not self._maps:
            raise ValueError(
                f"{self.group.root}: no layer was seen to read its filters: make the scores before "
                "the forward pass; if they were, leave it alone or take another criterion"
            )
        means, reads = zip(*(of.mean(function, self.units) for of in self._maps))
        return sum(means) / sum(read.to(means[0].dtype) for read in reads).clamp(min=1)


def _rows(tensor: Tensor, member: Member, units: int, dim: int | None = None) -> Tensor:
    """A tensor's parts that belong to each unit: (units, numbers)."""
    tensor = tensor.movedim(member.slices[0][1] if dim is None else dim, 0)
    if not (member.identical and len(tensor) == len(member.positions)):
        order = member.units.argsort(stable=True)
        tensor = tensor[member.positions[order].to(tensor.device)]
    return tensor.reshape(units, -1)


class Scores:
    """Running means over minibatches of one criterion's statistics, by group.

    Call `update` after the backward pass and before the optimizer's step; `mean` when filters are
    to be chosen. Start a new one after every removal. A criterion of activations watches the
    network from here on, until `close`, at the latest until this object goes.
    """

    def __init__(
        self,
        criterion: Criterion,
        groups: list[Group],
        model: nn.Module,
        generator: torch.Generator | None = None,
    ):
        self.criterion, self.groups = criterion, groups
        self.generator = generator or torch.Generator().manual_seed(0)
        self.sums: list[Statistics] = []
        self.batches = 0
        self.tensors = dict(model.named_parameters())
        self._watch = Watch(model, groups) if criterion.needs == ACTIVATIONS else None

    def close(self) -> None:
        """Watch the network no longer."""
        if self._watch:
            self._watch.close()

    def update(self, gradients: TaskGradients | None = None) -> None:
        """Score one minibatch; gradients: of the tasks, if the criterion needs them."""
        score_minibatch([self], gradients)

    def _signals(
        self, gradients: TaskGradients | None = None, maps: list[list[FeatureMap]] | None = None
    ) -> list[Signals]:
        return [
            Signals(group, self.tensors, gradients, maps[i] if maps else None)
            for i, group in enumerate(self.groups)
        ]

    @torch.no_grad()
    def _statistics(self, signals: list[Signals]) -> list[Statistics]:
        criterion, generator = self.criterion, self.generator
        return [self._checked(criterion.statistics(of, generator), of.units) for of in signals]

    def _checked(self, given: Statistics, units: int) -> Statistics:
        what = f"the criterion {self.criterion.name} must return"
        if self.criterion.combine is None:
            return _check(given, (units,), f"{what} one score per filter, a tensor")
        if isinstance(given, dict) and given:
            for name, tensor in given.items():
                _check(tensor, (units, ...), f"{what} statistics per filter, as {name} a tensor")
            return given
        return _check(given, (units, ...), f"{what} statistics per filter, a tensor")

    def _add(self, signals: list[Signals]) -> None:
        # Sums of hundreds of minibatches lose small ones in half precision.
        found = [_each(_at_least_float32, of) for of in self._statistics(signals)]
        both = zip(self.sums, found, strict=True)
        self.sums = [_each(torch.add, *pair) for pair in both] if self.sums else found
        self.batches += 1

    def mean(self) -> list[Tensor]:
        """One (units,) tensor of scores per group.

        Raises RuntimeError if no minibatch was scored, ValueError if a score is NaN.
        """
        criterion, signals = self.criterion, self._signals()
        if criterion.needs == WEIGHTS:
            means = self._statistics(signals)
        elif self.batches:
            means = [_each(lambda total: total / self.batches, of) for of in self.sums]
        else:
            raise RuntimeError(
                f"{criterion.name} scores minibatches, and has seen none: train before choosing"
            )
        self._refuse_nan(means)  # which ranks would hide
        if criterion.combine is None:
            return means
        with torch.no_grad():
            scores = criterion.combine(means, signals)
        if len(scores) != len(self.groups):
            of = f"{len(self.groups)} groups, got {len(scores)}"
            raise ValueError(f"the criterion {criterion.name} must combine scores of {of}")
        what = f"the criterion {criterion.name} must combine one score per filter, a tensor"
        scores = [_check(of, (g.units,), what) for of, g in zip(scores, self.groups)]
        self._refuse_nan(scores)
        return scores

    def _refuse_nan(self, found: list[Statistics]) -> None:
        tensors = [t for of in found for t in ([of] if torch.is_tensor(of) else of.values())]
        if torch.stack([tensor.isnan().any() for tensor in tensors]).any():
            raise ValueError(
                f"the criterion {self.criterion.name} gave a score that is NaN: has the loss "
                "diverged?"
            )

    def state(self) -> dict:
        """What goes on from here, for a checkpoint."""
        generator = self.generator.get_state()
        return {"sums": self.sums, "batches": self.batches, "generator": generator}

    def restore(self, state: dict) -> None:
        """The inverse of `state`."""
        device = next(iter(self.tensors.values())).device
        self.sums = [_each(lambda total: total.to(device), of) for of in state["sums"]]
        self.batches = state["batches"]
        self.generator.set_state(state["generator"])


def score_minibatch(scores: Sequence[Scores], gradients: TaskGradients | None = None) -> None:
    """Score one minibatch by several criteria of one network; what they share is computed once.

    gradients: of the tasks, if a criterion needs them.
    """
    scores = [of for of in scores if of.criterion.needs != WEIGHTS]
    if not scores:
        return
    taken = [of._watch.take() for of in scores if of._watch]
    signals = scores[0]._signals(gradients, taken[0] if taken else None)
    for of in scores:
        of._add(signals)


def _each(function: Callable[..., Tensor], first: Statistics, *others: Statistics) -> Statistics:
    """The function of the tensor, or of each by name."""
    if torch.is_tensor(first):
        return function(first, *others)
    return {name: function(of, *(other[name] for other in others)) for name, of in first.items()}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(tensor: Tensor, shape: tuple, what: str) -> Tensor:
    """The tensor itself. Raises ValueError for another shape; ...: any number of dimensions."""
    is_tensor = torch.is_tensor(tensor)
    found = tuple(tensor.shape) if is_tensor else ()
    fits = found[:1] == shape[:1] if ... in shape else found == shape
    if not is_tensor or not fits or tensor.is_complex():
        got = f"shape {found}" if is_tensor else type(tensor).__name__
        wanted = str(shape).replace("Ellipsis", "...")
        raise ValueError(f"{what} of shape {wanted}, got {got}")
    return tensor
