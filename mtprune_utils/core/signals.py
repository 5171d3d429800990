"""Gradients of several task losses from one forward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mtprune_utils.core.scoring import TaskGradients


def backward(losses: dict[str, Tensor]) -> None:
    """Set `.grad` by one backward pass of the summed loss.

    Raises ValueError, naming the task, for a loss that is no single number with a gradient.
    """
    _check(losses)
    sum(losses.values()).backward()


def _check(losses: dict[str, Tensor]) -> None:
    for task, loss in losses.items():
        if not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad:
            got = f"the loss of {task} must be one number with a gradient, got {loss!r}"
            raise ValueError(" ".join(got.split())[:200])


def task_backward(
    losses: dict[str, Tensor],
    model: nn.Module,
    shared: Iterable[nn.Parameter],
    weighting: nn.Module | None = None,
) -> TaskGradients:
    """One backward pass per task; `.grad` becomes their sum, the gradient of the summed loss.

    weighting: of these losses, see `weightings`. Its parameters get gradients too, and if it
    aggregates, `.grad` of the shared parameters becomes what it makes of the tasks' gradients.

    Returns each task's gradient of every shared parameter, those of the trunk. Costs one pass
    through each head and T through the trunk, and touches nothing but `.grad`, which must be empty
    (`optimizer.zero_grad()`). Raises ValueError, naming the task, for a loss that is no single
    number or does not depend on the trunk.
    """
    _check(losses)
    weights = weighting.parameters() if weighting else ()
    parameters = [p for p in (*model.parameters(), *weights) if p.requires_grad]
    shared = [p for p in shared if p.requires_grad]
    gradients: TaskGradients = {}
    for i, (task, loss) in enumerate(losses.items()):
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=i + 1 < len(losses), allow_unused=True
        )
        by_parameter = dict(zip(parameters, grads))  # None: the loss does not depend on it
        if all(by_parameter[parameter] is None for parameter in shared):
            raise ValueError(f"the loss of {task} does not depend on the trunk")
        for parameter, grad in by_parameter.items():
            if grad is not None:
                total = grad if parameter.grad is None else parameter.grad + grad
                # As autograd lays out what it accumulates; fused optimizers rely on it.
                parameter.grad = laid_out_like(parameter, total)
        gradients[task] = {  # zero where a head taps the trunk before this parameter
            parameter: torch.zeros_like(parameter)
            if by_parameter[parameter] is None
            else by_parameter[parameter]
            for parameter in shared
        }
    if aggregate := aggregation_of(weighting):
        reached = [parameter for parameter in shared if parameter.grad is not None]
        rows = [torch.cat([of[p].flatten() for p in reached]) for of in gradients.values()]
        parts = aggregate(torch.stack(rows)).split([p.numel() for p in reached])
        for parameter, part in zip(reached, parts):
            parameter.grad = laid_out_like(parameter, part.view(parameter.shape))
    return gradients


def aggregation_of(weighting: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """The weighting's `aggregate`, if it joins gradients."""
    return getattr(weighting, "aggregate", None)


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the parameter's strides: itself if it has them, else a copy."""
    return (
        tensor
        if tensor.stride() == parameter.stride()
        else torch.empty_like(parameter).copy_(tensor)
    )
