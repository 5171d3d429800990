"""Choosing filters by their scores, and removing them physically from the network and from the optimizer."""

import math
from dataclasses import replace
from numbers import Integral

import torch
import torch_pruning as tp
from torch import Tensor, nn

from mtprune_utils.gradients import laid_out_like
from mtprune_utils.models import Architecture, MultiTaskNet, count_parameters, evaluation_mode
from mtprune_utils.profiles import Pruning


def removable_filters(widths: list[int], floor: int) -> int:
    """How many filters can go before every layer is at its floor."""
    return sum(max(width - floor, 0) for width in widths)


def removal_plan(widths: list[int], settings: Pruning) -> list[int]:
    """How many filters are left after each removal, down to the floor.

    "fixed" takes the same number each time, so that the last removals are large beside what is left; "geometric" takes
    an equal share of what is left, in as many removals.
    """
    total = sum(widths)
    spare = removable_filters(widths, settings.floor)
    removals = math.ceil(spare / settings.filters)
    if settings.removal == "fixed":
        return [total - min(settings.filters * (i + 1), spare) for i in range(removals)]
    return [round(total * ((total - spare) / total) ** ((i + 1) / removals)) for i in range(removals)]


def check_sizes(dense: Architecture, sizes: tuple[float, ...], floor: int) -> None:
    """Raises ValueError if one of the sizes, shares of the dense network's parameters, lies under the floor."""
    whole = count_parameters(dense)
    least = count_parameters(replace(dense, widths=tuple(min(width, floor) for width in dense.widths)))
    if any(round(size * whole) < least for size in sizes):
        share = math.ceil(least / whole * 1000) / 1000
        raise ValueError(f"sizes: at the floor of {floor} filters per layer a share of {share} is left: ask for more")


def select_filters(scores: list[Tensor], budget: int, floor: int, multiple: int = 1) -> list[Tensor]:
    """The `budget` filters with the lowest scores over all layers, none of which goes under `floor` filters.

    scores: one (filters,) tensor per layer. multiple: kept widths are rounded up to a multiple of this, and the next lowest
    go in place of the filters that this gives back; up to multiple - 1 more than the budget may go. Returns the sorted
    indices to remove, one int64 tensor per layer. Ties break by (score, layer, filter). Raises ValueError if there are fewer
    than `budget` to remove, the budget is no whole number from 0, or a score is NaN.
    """
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 0:
        raise ValueError(f"the budget is a number of filters, a whole number from 0, got {budget!r}")
    widths = [len(score) for score in scores]
    available = removable_filters(widths, floor)
    if budget > available:
        raise ValueError(f"asked to remove {budget} filters, but only {available} are above the floor of {floor} per layer")
    flat = torch.cat(scores).cpu()  # one transfer
    if flat.isnan().any():
        raise ValueError("a score is NaN: the loss diverged; lower the learning rate")
    ranks = [score.argsort(stable=True).argsort() for score in flat.split(widths)]
    # A filter may go only if enough better ones of its layer stay.
    may_go = torch.cat([rank < width - floor for rank, width in zip(ranks, widths)])
    order = flat.argsort(stable=True)  # stable: ties stay in (layer, filter) order
    order = order[may_go[order]]
    for count in range(budget, available + 1):
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[order[:count]] = False
        left = [math.ceil(int(part.sum()) / multiple) * multiple for part in kept.split(widths)]
        removed = [max(width - new, 0) for width, new in zip(widths, left)]
        if sum(removed) >= budget:
            break
    return [(rank < number).nonzero().flatten() for rank, number in zip(ranks, removed)]


class Pruner:
    """Removes filters and everything that depends on them, by Torch-Pruning's dependency graph (Fang et al., CVPR 2023).

    The graph is traced once; it stays valid as filters go.
    """

    def __init__(self, model: MultiTaskNet, example_size: tuple[int, int] = (64, 64)):
        self.model = model
        self._check_trainable()
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        with evaluation_mode(model):  # tracing in train mode would move batch statistics
            self.graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=(torch.zeros(1, 3, *example_size, device=device, dtype=dtype),),
                output_transform=lambda outputs: list(outputs.values()),
            )

    def _check_trainable(self) -> None:
        """The graph is found by autograd, and what is pruned becomes trainable again."""
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"{len(frozen)} parameters are frozen (requires_grad is False), {frozen[0]} among "
                "them: prune before you freeze, or set requires_grad for as long as you prune"
            )

    def remove(self, filters: list[Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove filters from the model and from the optimizer's state.

        filters: one tensor of distinct indices, int64, per layer. Raises ValueError, before
        anything is removed, for indices that a layer has not, or that leave it without a filter,
        and for frozen parameters.
        """
        self._check_trainable()
        filters = [torch.as_tensor(indices) for indices in filters]
        if len(filters) != len(self.model.layers):
            raise ValueError(f"{len(filters)} index tensors for {len(self.model.layers)} layers")
        for i, (layer, indices) in enumerate(zip(self.model.layers, filters)):
            _check_indices(f"layer {i}", indices, layer.conv.out_channels)
        for layer, indices in zip(self.model.layers, filters):
            if len(indices):
                group = self.graph.get_pruning_group(layer.conv, tp.prune_conv_out_channels, indices.tolist())
                for dependency, removed in group:
                    self._apply(dependency, removed, optimizer)
        self.model.to(memory_format=torch.channels_last)  # as in training; slicing loses the layout
        for parameter, state in optimizer.state.items() if optimizer else ():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[key] = laid_out_like(parameter, value)

    def _apply(self, dependency, removed: list[int], optimizer) -> None:
        """Prune one module, and let the optimizer follow: same place in its groups, same slice of its moments."""
        before = dict(dependency.target.module.named_parameters(recurse=False))
        dependency(removed)
        for name, new in dependency.target.module.named_parameters(recurse=False):
            if optimizer is not None and new is not before[name]:
                _replace_parameter(optimizer, before[name], new, removed)


def _check_indices(layer: str, indices: Tensor, width: int) -> None:
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.dim() != 1 or len(indices) and not whole:
        got = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise ValueError(f"{layer}: expected indices of filters, whole numbers in one row, got {got}")
    found = sorted(indices.tolist())
    if len(set(found)) < len(found) or found and not 0 <= found[0] <= found[-1] < width:
        raise ValueError(f"{layer}: expected distinct indices from 0 to {width - 1}, got {found}"[:200])
    if len(found) == width:
        raise ValueError(f"{layer}: one of its {width} filters has to stay")


def _replace_parameter(optimizer, old: nn.Parameter, new: nn.Parameter, removed: list[int]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == old.shape:
            for dim in (d for d in range(old.dim()) if old.shape[d] != new.shape[d]):
                keep = torch.ones(old.shape[dim], dtype=torch.bool, device=value.device)
                keep[removed] = False
                value = value.index_select(dim, keep.nonzero().flatten())
            state[key] = value
    optimizer.state[new] = state
