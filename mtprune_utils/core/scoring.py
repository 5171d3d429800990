"""What a criterion is given of a group of filters, and the running mean of its scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mtprune_utils.core.groups import Group, Member

WEIGHTS, GRADIENT, TASK_GRADIENTS = "weights", "gradient", "task_gradients"
NEEDS = (WEIGHTS, GRADIENT, TASK_GRADIENTS)
TaskGradients = dict[str, dict[nn.Parameter, Tensor]]  # task: trunk's parameter: gradient


@dataclass(frozen=True)
class Criterion:
    """One score per unit; the lowest go first.

    needs: "weights" (scored once, when filters are chosen), "gradient" (the training gradient in
    `.grad`; scored on every minibatch and averaged since the last removal) or "task_gradients" (one
    gradient per task besides; likewise). score(signals, generator) -> (units,).
    """

    name: str
    needs: str
    score: Callable[["Signals", torch.Generator], Tensor]

    def __post_init__(self):
        if self.needs not in NEEDS:
            choice = f"choose one of {', '.join(NEEDS)}"
            raise ValueError(f"the criterion {self.name!r} needs {self.needs!r}: {choice}")


class Signals:
    """A group's tensors, one row per unit: what criteria read."""

    def __init__(self, group: Group, tensors: dict[str, nn.Parameter]):
        self.group, self.units = group, group.units
        self._tensors = tensors
        self.gradients: TaskGradients = {}  # of this minibatch, if asked for

    @cached_property
    def _weights(self) -> list[tuple[Member, nn.Parameter]]:
        return [(m, self._tensors[m.slices[0][0]]) for m in self.group.producers]

    @cached_property
    def _gates(self) -> list[tuple[Member, nn.Parameter, nn.Parameter | None]]:
        by_name = {m.name: m for m in self.group.members if m.produces}
        members = [by_name[name] for name in self.group.gates]
        return [
            (m, self._tensors[f"{m.name}.weight"], self._tensors.get(f"{m.name}.bias"))
            for m in members if f"{m.name}.weight" in self._tensors
        ]

    def weights(self) -> list[Tensor]:
        """(units, numbers) of each layer that produces the channels."""
        return [_rows(weight.detach(), m, self.units) for m, weight in self._weights]

    def weight_gradients(self) -> list[Tensor]:
        """Their training gradients, likewise."""
        return [_rows(weight.grad, m, self.units) for m, weight in self._weights]

    def task_gradients(self) -> Tensor:
        """(units, tasks, numbers): each task's gradient of all weights that make the channels."""
        rows = [
            torch.stack([_rows(of[weight], m, self.units) for of in self.gradients.values()], 1)
            for m, weight in self._weights
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    def gate_gradients(self) -> list[Tensor]:
        """(units, channels) of dL/dgate, for a gate of value 1 on each feature map, by layer.

        A rectified affine map is homogeneous in its weight and bias together, so that it is
        <W, dL/dW> + b dL/db of the layer before the activation (Molchanov et al., CVPR 2019).
        """
        found = []
        for m, weight, bias in self._gates:
            dim = m.slices[0][1]
            product = weight * weight.grad
            if product.dim() > 1:
                product = product.movedim(dim, 0).flatten(1).sum(1)
            if bias is not None:
                product = product + bias * bias.grad
            found.append(_rows(product.detach(), m, self.units, dim=0))
        if not found:
            raise ValueError(
                f"{self.group.root}: no layer's scale stands before its activation, so that gates "
                "cannot be read: leave it alone, or take another criterion"
            )
        return found


def _rows(tensor: Tensor, member: Member, units: int, dim: int | None = None) -> Tensor:
    """A tensor's parts that belong to each unit: (units, numbers)."""
    tensor = tensor.movedim(member.slices[0][1] if dim is None else dim, 0)
    if not (member.identical and len(tensor) == len(member.positions)):
        order = member.units.argsort(stable=True)
        tensor = tensor[member.positions[order].to(tensor.device)]
    return tensor.reshape(units, -1)


class Scores:
    """Running mean over minibatches of one criterion's scores, by group.

    Call `update` after the backward pass and before the optimizer's step; `mean` when filters are
    to be chosen. Start a new one after every removal.
    """

    def __init__(
        self, criterion: Criterion, groups: list[Group], model: nn.Module,
        generator: torch.Generator | None = None,
    ):
        tensors = dict(model.named_parameters())
        self.criterion = criterion
        self.signals = [Signals(group, tensors) for group in groups]
        self.generator = generator or torch.Generator().manual_seed(0)
        self.sums: list[Tensor] = []
        self.batches = 0

    @torch.no_grad()
    def _score(self, gradients: TaskGradients | None) -> list[Tensor]:
        scores = []
        for signals in self.signals:
            signals.gradients = gradients or {}
            scores.append(self._checked(self.criterion.score(signals, self.generator), signals))
            signals.gradients = {}
        return scores

    def _checked(self, score: Tensor, signals: Signals) -> Tensor:
        units = signals.units
        if not torch.is_tensor(score) or score.shape != (units,) or score.is_complex():
            is_tensor = torch.is_tensor(score)
            got = f"shape {tuple(score.shape)}" if is_tensor else type(score).__name__
            raise ValueError(
                f"the criterion {self.criterion.name} must return one score per filter, a tensor "
                f"of shape ({units},), got {got}"
            )
        return score

    def update(self, gradients: TaskGradients | None = None) -> None:
        """Score one minibatch; gradients: of the tasks, if the criterion needs them."""
        if self.criterion.needs == WEIGHTS:
            return
        scores = self._score(gradients)
        self.sums = [a + b for a, b in zip(self.sums, scores)] if self.sums else scores
        self.batches += 1

    def mean(self) -> list[Tensor]:
        """One (units,) tensor per group.

        Raises RuntimeError if no minibatch was scored, ValueError if a score is NaN.
        """
        name = self.criterion.name
        if self.criterion.needs == WEIGHTS:
            means = self._score(None)
        elif self.batches:
            means = [total / self.batches for total in self.sums]
        else:
            raise RuntimeError(
                f"{name} scores minibatches, and has seen none: train before choosing"
            )
        if torch.cat(means).isnan().any():
            raise ValueError(
                f"the criterion {name} gave a score that is NaN: has the loss diverged?"
            )
        return means

    def state(self) -> dict:
        """What goes on from here, for a checkpoint."""
        generator = self.generator.get_state()
        return {"sums": self.sums, "batches": self.batches, "generator": generator}

    def restore(self, state: dict) -> None:
        """The inverse of `state`."""
        device = next(iter(self.signals[0]._tensors.values())).device
        self.sums = [total.to(device) for total in state["sums"]]
        self.batches = state["batches"]
        self.generator.set_state(state["generator"])
