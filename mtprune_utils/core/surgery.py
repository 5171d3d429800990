"""Removing units of coupled groups from a network and its optimizer, in one pass over tensors."""

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from mtprune_utils.core.groups import Group, outputs_of

Cuts = dict[tuple[str, int], Tensor]  # (tensor's name, dimension): indices that go, sorted
SLACK = 1e-9  # relative, in float64: what masked and removed may differ by


def check_choice(groups: list[Group], chosen: list[Tensor]) -> list[Tensor]:
    """The chosen units as int64 tensors, one per group.

    Raises ValueError for units that a group has not, or that leave it without any.
    """
    if len(chosen) != len(groups):
        raise ValueError(f"{len(chosen)} index tensors for {len(groups)} groups")
    chosen = [torch.as_tensor(units) for units in chosen]
    for group, units in zip(groups, chosen):
        whole = not (units.is_floating_point() or units.is_complex() or units.dtype == torch.bool)
        if units.dim() != 1 or len(units) and not whole:
            got = f"{units.dtype} of shape {tuple(units.shape)}"
            raise ValueError(
                f"{group.root}: expected indices of filters, whole numbers in one row, got {got}"
            )
        found = sorted(units.tolist())
        out_of_range = found and not 0 <= found[0] <= found[-1] < group.units
        if len(set(found)) < len(found) or out_of_range:
            rule = f"expected distinct indices from 0 to {group.units - 1}"
            raise ValueError(f"{group.root}: {rule}, got {found}"[:200])
        if len(found) == group.units:
            raise ValueError(f"{group.root}: one of its {group.units} filters has to stay")
    return [units.long().cpu() for units in chosen]


def cuts_of(groups: list[Group], chosen: list[Tensor]) -> Cuts:
    """What goes of each tensor with the chosen units (one int64 tensor per group)."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    for group, units in zip(groups, chosen):
        if not len(units):
            continue
        gone = torch.zeros(group.units, dtype=torch.bool)
        gone[units] = True
        for member in group.members:
            positions = member.positions[gone[member.units]]
            for at in member.slices:
                parts.setdefault(at, []).append(positions)
    return {at: torch.cat(positions).unique() for at, positions in parts.items()}


def sliced(tensor: Tensor, cuts: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The tensor without those indices along those dimensions, laid out as it was."""
    channels_last = _is_channels_last(tensor)
    for dim, gone in cuts:
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[gone] = False
        tensor = tensor.index_select(dim, keep.nonzero().flatten().to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def remove(
    model: nn.Module,
    groups: list[Group],
    chosen: list[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Group]:
    """Cut the chosen units out of the network and the optimizer's state. Returns what is left.

    chosen: one tensor of distinct units per group. Gradients are dropped. Raises ValueError, before
    anything is cut, as `check_choice` does, and for an optimizer that cannot follow.
    """
    chosen = check_choice(groups, chosen)
    cuts = cuts_of(groups, chosen)
    by_tensor: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), gone in cuts.items():
        by_tensor.setdefault(name, []).append((dim, gone))
    replaced: dict[nn.Parameter, tuple[nn.Parameter, list]] = {}
    own = model.state_dict(keep_vars=True)
    if optimizer is not None:
        _check_follows(optimizer, {name: own[name] for name in by_tensor})
    with torch.no_grad():
        for name, parts in by_tensor.items():
            old = own[name]
            new = sliced(old, parts)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
                replaced[old] = new, parts
            _assign(model, name, new)
        fit_to_tensors(model)
        if optimizer is not None:
            _follow(optimizer, replaced)
    return [_without(group, units, cuts) for group, units in zip(groups, chosen)]


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    kind = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    kind[key] = tensor


def fit_to_tensors(model: nn.Module) -> None:
    """Set what layers say of their own size to what their tensors have."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None:  # of a norm without a scale
            weight = getattr(module, "running_mean", None)
        if not torch.is_tensor(weight):
            continue
        if isinstance(module, _ConvNd):
            rows, columns = weight.shape[:2]
            if 1 < module.groups == module.in_channels == module.out_channels:
                module.groups = module.in_channels = module.out_channels = rows
            elif module.transposed:
                module.in_channels, module.out_channels = rows, columns * module.groups
            else:
                module.out_channels, module.in_channels = rows, columns * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, _NormBase):
            module.num_features = len(weight)
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(weight)


def _check_follows(optimizer: torch.optim.Optimizer, cut: dict[str, Tensor]) -> None:
    """Raises ValueError for an optimizer of another network, or with moments of another shape."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if cut and not held & set(cut.values()):
        raise ValueError(
            "the optimizer has none of the pruned parameters: give the one that trains them"
        )
    for name, parameter in cut.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's {key} of {name} is {tuple(value.shape)}, not of its shape: "
                    "prune without optimizer, and make a new one"
                )


def _follow(optimizer: torch.optim.Optimizer, replaced: dict) -> None:
    """The same place in the optimizer's groups, and the same slice of its moments."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(p, (p,))[0] for p in group["params"]]
    for old, (new, parts) in replaced.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == old.shape:
                    state[key] = sliced(value, parts)
            optimizer.state[new] = state


def _without(group: Group, units: Tensor, cuts: Cuts) -> Group:
    """The group with units and positions numbered anew."""
    left = torch.ones(group.units, dtype=torch.bool)
    left[units] = False
    number = left.cumsum(0) - 1
    members, width = [], group.width
    for member in group.members:
        stays = left[member.units]
        positions = member.positions[stays]
        gone = cuts.get(member.slices[0])
        if gone is not None:
            positions = positions - torch.searchsorted(gone, positions)
        if member.name == group.root and member.produces:
            width = int(stays.sum())
        members.append(replace(member, positions=positions, units=number[member.units[stays]]))
    return replace(group, width=width, units=int(left.sum()), members=tuple(members))


# --- whether removing is what masking is ---


def unsound(model: nn.Module, groups: list[Group], example_inputs: tuple) -> dict[str, str]:
    """Groups of which removing some units is not the same as silencing them, and why.

    Tried on copies in float64: all groups at once, then halves of what does not go. Layer
    normalisation sees the channels that are left, in both. Parameters that begin at zero would hide
    what they scale: there they do not.
    """
    inputs = tuple(
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in example_inputs
    )
    generator = torch.Generator().manual_seed(0)
    chosen = [
        torch.randperm(group.units, generator=generator)[: (group.units + 1) // 3]
        for group in groups
    ]

    def search(some: list[int]) -> dict[str, str]:
        tried = copy.deepcopy(model).eval().double()
        for parameter in tried.parameters():
            if not parameter.any():
                nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
        parts = [units if i in set(some) else units[:0] for i, units in enumerate(chosen)]
        reason = _difference(tried, groups, parts, inputs)
        if not reason or len(some) == 1:
            return {groups[i].root: reason for i in some} if reason else {}
        half = len(some) // 2
        found = search(some[:half]) | search(some[half:])
        return found or {groups[i].root: "together, the groups do not go" for i in some}

    found: dict[str, str] = {}
    while rest := [i for i, group in enumerate(groups) if group.root not in found]:
        more = search(rest)
        if not more:
            break
        found |= more
    return found


def _difference(model: nn.Module, groups: list[Group], chosen: list[Tensor], inputs: tuple) -> str:
    """How the network without these units differs from itself with them silenced, or "".

    The network is cut.
    """
    cuts = cuts_of(groups, chosen)
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for (name, dim), gone in cuts.items():
            tensors[name].index_fill_(dim, gone.to(tensors[name].device), 0.0)
        kept = {
            id(tensors[name]): gone for (name, _), gone in cuts.items() if name.endswith(".weight")
        }
        try:
            with _KeptStatistics(kept):
                expected = outputs_of(model(*inputs))
            remove(model, groups, chosen)
            found = outputs_of(model(*inputs))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"the network does not run without some of its filters ({reason})"[:300]
    for name, output in expected.items():
        if found[name].shape != output.shape:
            return f"without some of its filters, output {name} has another shape"
        scale = output.abs().max().clamp(min=1e-30)
        if not ((found[name] - output).abs().max() / scale <= SLACK):
            return "to remove a filter is not the same as to silence it"
    return ""


class _KeptStatistics(TorchFunctionMode):
    """Layer normalisation as if some channels were not there. gone: {id of its weight: indices}."""

    def __init__(self, gone: dict[int, Tensor]):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is not F.layer_norm:
            return function(*arguments, **options)
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = dict(zip(names, arguments)) | options
        gone = self.gone.get(id(given.get("weight")))
        if gone is None:
            return function(*arguments, **options)
        features = given["input"]
        keep = torch.ones(features.shape[-1], dtype=torch.bool)
        keep[gone] = False
        parts = (given[name][keep] for name in ("weight", "bias"))
        left = features[..., keep]
        output = torch.zeros_like(features)
        output[..., keep] = F.layer_norm(left, left.shape[-1:], *parts, given.get("eps", 1e-5))
        return output
