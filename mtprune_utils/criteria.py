"""Pruning criteria: one score per filter, the lowest are removed first. The one place to add a criterion.

A criterion is a function that scores the filters of one layer, and a word for what it needs:

- "weights": scored once, when filters are to be chosen;
- "gradient": the training gradient in `.grad`; scored on every minibatch and averaged since the last pruning;
- "task_gradients": one gradient per task besides; scored and averaged likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune_utils.gradients import TaskGradients
from mtprune_utils.models import PrunableLayer


NEEDS = ("weights", "gradient", "task_gradients")


@dataclass(frozen=True)
class Criterion:
    name: str
    needs: str
    score: Callable[..., Tensor]  # (layer, task gradients or None, generator) -> (filters,)

    def __post_init__(self):
        if self.needs not in NEEDS:
            raise ValueError(f"the criterion {self.name!r} needs {self.needs!r}: choose one of {', '.join(NEEDS)}")


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, needs: str):
    """Enter the decorated function into CRITERIA. Raises ValueError if it needs what nothing provides."""

    def register(score):
        CRITERIA[name] = Criterion(name, needs, score)
        return score

    return register


@criterion("taylor", needs="gradient")
def taylor(layer: PrunableLayer, task_gradients: None, generator: torch.Generator) -> Tensor:
    """(gate x dL/dgate)^2 for a gate of value 1 on the feature map behind the activation (Molchanov et al., CVPR 2019).

    A rectified affine map is homogeneous in its weight and bias together, so dL/dgate = <W, dL/dW> + b dL/db of the
    layer before the activation: the training gradient already holds it.
    """
    weight, bias = layer.affine.weight, layer.affine.bias
    gate_gradient = (weight * weight.grad).flatten(1).sum(1) if weight.dim() > 1 else weight * weight.grad
    return (gate_gradient + bias * bias.grad).square()


@criterion("cosprune", needs="task_gradients")
def cosprune(layer: PrunableLayer, task_gradients: TaskGradients, generator: torch.Generator) -> Tensor:
    """Mean over pairs of tasks of the cosine similarity of a filter's weight gradients (Garg et al., 2023, CosPrune).

    A zero gradient has similarity 0 with everything. Low: the tasks pull the filter apart.
    """
    grads = torch.stack([grads[layer.conv.weight].flatten(1) for grads in task_gradients.values()], 1)
    tasks = grads.shape[1]
    if tasks < 2:
        raise ValueError("cosprune compares tasks: it needs at least two")
    products = grads @ grads.mT  # (filters, tasks, tasks)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms.unsqueeze(1) * norms.unsqueeze(2)
    cosines = torch.where(scale > 0, products / scale, 0)
    return (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (tasks * (tasks - 1))


@criterion("magnitude", needs="weights")
def magnitude(layer: PrunableLayer, task_gradients: None, generator: torch.Generator) -> Tensor:
    """Mean absolute weight of the filter, so that layers with different fan-in compare (Li et al., ICLR 2017, L1)."""
    return layer.conv.weight.detach().abs().flatten(1).mean(1)


@criterion("random", needs="weights")
def random(layer: PrunableLayer, task_gradients: None, generator: torch.Generator) -> Tensor:
    """Uniform random scores: the control that any criterion has to beat."""
    weight = layer.conv.weight
    return torch.rand(len(weight), generator=generator).to(weight)


def dead_filters(layers: list[PrunableLayer]) -> list[Tensor]:
    """Which filters got no gradient from the last backward pass: one (filters,) boolean tensor per layer."""
    return [(layer.conv.weight.grad == 0).flatten(1).all(1) for layer in layers]


class Scores:
    """Running mean over minibatches of one criterion's scores, per layer.

    Call `update` after the backward pass and before the optimizer's step; `mean` when filters are to be chosen. Start
    a new one after every removal.
    """

    def __init__(self, criterion_name: str, layers: list[PrunableLayer], generator: torch.Generator | None = None):
        self.criterion = CRITERIA[criterion_name]
        self.layers = layers
        self.generator = generator or torch.Generator().manual_seed(0)
        self.sums: list[Tensor] = []
        self.batches = 0

    @torch.no_grad()
    def _score(self, task_gradients: TaskGradients | None) -> list[Tensor]:
        return [
            self._checked(self.criterion.score(layer, task_gradients, self.generator), layer)
            for layer in self.layers
        ]

    def _checked(self, score: Tensor, layer: PrunableLayer) -> Tensor:
        filters = layer.conv.out_channels
        if not torch.is_tensor(score) or score.shape != (filters,) or score.is_complex():
            got = f"shape {tuple(score.shape)}" if torch.is_tensor(score) else type(score).__name__
            raise ValueError(
                f"the criterion {self.criterion.name} must return one score per filter, a tensor "
                f"of shape ({filters},), got {got}"
            )
        return score

    def update(self, task_gradients: TaskGradients | None = None) -> None:
        if self.criterion.needs == "weights":
            return
        scores = self._score(task_gradients)
        self.sums = [total + score for total, score in zip(self.sums, scores)] if self.sums else scores
        self.batches += 1

    def mean(self) -> list[Tensor]:
        """One (filters,) tensor per layer.

        Raises RuntimeError if no minibatch was scored, ValueError if a score is NaN.
        """
        name = self.criterion.name
        if self.criterion.needs == "weights":
            means = self._score(None)
        elif self.batches:
            means = [total / self.batches for total in self.sums]
        else:
            raise RuntimeError(f"{name} scores minibatches, and has seen none: train before choosing")
        if torch.cat(means).isnan().any():
            raise ValueError(f"the criterion {name} gave a score that is NaN: has the loss diverged?")
        return means

    def state(self) -> dict:
        return {"sums": self.sums, "batches": self.batches, "generator": self.generator.get_state()}

    def restore(self, state: dict) -> None:
        self.sums = [total.to(layer.conv.weight.device) for layer, total in zip(self.layers, state["sums"])]
        self.batches = state["batches"]
        self.generator.set_state(state["generator"])
