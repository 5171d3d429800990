"""Coupled groups: which filters of a network can only go together, and what goes with them.

A filter of one convolution is a row of its weight, an entry of the batch norm behind it and a
column of every layer that reads it. Where feature maps are added (a residual sum) or multiplied,
filters of several layers go together; a group holds all of them. Torch-Pruning (Fang et al., CVPR
2023) traces the network and says how indices map from layer to layer; the rest is done here.

A group's filters are counted in units: a unit is what can go by itself. Most units are one filter;
of a grouped convolution one unit takes the same filter of every block, of a gated linear unit both
halves' filters.
"""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

PRODUCERS = (_ConvNd, nn.Linear)  # modules whose weight makes channels, rather than scales them


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    slices: (tensor's name, dimension) of every tensor that is cut where units go; positions, units:
    (n,) which index along that dimension belongs to which unit. The first slice is the weight's.
    """

    name: str  # the module's, or a bare parameter's
    kind: str  # "conv", "linear", "norm" or "parameter"
    produces: bool  # it makes or scales the group's channels; else it reads them
    slices: tuple[tuple[str, int], ...]
    positions: Tensor
    units: Tensor

    @cached_property
    def identical(self) -> bool:
        """Whether each index is the unit of that number, so that nothing needs to be gathered."""
        size = len(self.positions)
        return all(torch.equal(of, torch.arange(size)) for of in (self.positions, self.units))


@dataclass(frozen=True)
class Group:
    """Filters that go together.

    root: the first layer that produces them; width: its filters; units: see the module.
    """

    root: str
    width: int
    units: int
    members: tuple[Member, ...]
    gates: tuple[str, ...] = ()  # members that produce: what stands last before each activation

    @property
    def producers(self) -> list[Member]:
        """The convolutions and linear layers whose weight makes the channels."""
        return [m for m in self.members if m.produces and m.kind in ("conv", "linear")]


class Untraceable(ValueError):
    """The network cannot be traced, for a reason in one line."""


# --- what a network gives ---


def outputs_of(output) -> dict[str, Tensor]:
    """The tensors of a network's output by name: of a tensor, dictionary, sequence or dataclass.

    Raises ValueError for anything else.
    """
    if torch.is_tensor(output):
        return {"output": output}
    if dataclasses.is_dataclass(output):
        fields = dataclasses.fields(output)
        output = {field.name: getattr(output, field.name) for field in fields}
    if isinstance(output, (list, tuple)):
        names = getattr(output, "_fields", map(str, range(len(output))))
        output = dict(zip(names, output))
    if not isinstance(output, dict):
        kind = type(output).__name__
        raise ValueError(f"the network's output must be tensors with names, got a {kind}")
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if value is not None:
            inner = outputs_of(value)
            named = {f"{name}.{key}": tensor for key, tensor in inner.items()}
            found |= {str(name): value} if torch.is_tensor(value) else named
    return found


# --- tracing ---


def trace(
    model: nn.Module,
    example_inputs: tuple,
    trunk: nn.Module | str | None = None,
    leave: tuple[nn.Module | str, ...] = (),
) -> tuple[list[Group], dict[str, str]]:
    """The trunk's groups, in the order in which the network is built, and what is left alone.

    example_inputs: what the network is called with; its outputs may be a dictionary, a sequence or
    a dataclass. trunk: the part that all outputs share; None: every layer that all outputs depend
    on. leave: layers to leave alone. Returns the groups, and for each layer of the trunk that is
    left alone the reason. The network is not touched. Raises `Untraceable`, which says why, if it
    cannot be traced, its trunk is not shared, or nothing can be pruned.
    """
    names = {module: name for name, module in model.named_modules()}
    left = {_name_of(layer, names, model) for layer in leave}
    # A copy: tracing leaves hooks behind where a network fails, and does not see frozen layers.
    model, kept = copy.deepcopy(model).eval().requires_grad_(True), model
    prefix = None if trunk is None else _name_of(trunk, names, kept)
    names = {module: name for name, module in model.named_modules()}
    with torch.enable_grad():
        fed = _fed(model, _run(model, example_inputs))
        shared = {names[model.get_submodule(_layer_of(p))] for p in _shared(fed, prefix)}
        graph = trace_graph(model, example_inputs)
    tied = _tied(names)
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for module in [m for m in model.modules() if isinstance(m, PRODUCERS)]:
        name = names[module]
        if module in seen or name not in shared:
            continue
        if module not in graph.module2node:
            used = any(fed[f"{name}.{key}"] for key, _ in module.named_parameters())
            reasons[name] = (
                "the network takes its weight without calling it (as attention does)"
                if used
                else "the example inputs do not reach it"
            )
            continue
        closure = _closure(graph, module)
        made = [m for m, out in closure if out and isinstance(m, PRODUCERS)]
        seen.update(made)
        named = [names[m] for m in made]
        reason = next(
            (f"{n} is to be left alone" for n in named if _left(n, left)), ""
        ) or _reason_to_leave(closure, graph, names, shared, tied)
        if reason:
            reasons |= dict.fromkeys((n for n in named if n in shared), reason)
            continue
        group = _group(module, closure, graph, names)
        shares = [m.units.bincount(minlength=group.units) for m in group.producers]
        if any(len(share.unique()) > 1 for share in shares):
            reasons |= dict.fromkeys(named, "its layers are tied by unequal numbers of filters")
        elif group.units == 1 < group.width:
            reasons |= dict.fromkeys(named, "its filters could only go all together")
        else:
            groups.append(group)
    if not groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Untraceable(f"nothing of the trunk can be pruned ({why or 'it has no layer'})"[:500])
    return groups, reasons


def _name_of(layer: nn.Module | str, names: dict[nn.Module, str], model: nn.Module) -> str:
    """Raises Untraceable for a layer that the network does not have."""
    shown = repr(layer) if isinstance(layer, str) else type(layer).__name__
    if isinstance(layer, str):  # of a layer under several names, the first counts
        layer = dict(model.named_modules(remove_duplicate=False)).get(layer)
    if layer not in names:
        raise Untraceable(f"{shown} is no part of the {type(model).__name__}")
    return names[layer]


def _left(name: str, left: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in left)


def _run(model: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    if not isinstance(inputs, tuple):
        raise Untraceable("example_inputs must be a tuple of what the network is called with")
    try:
        outputs = outputs_of(model(*inputs))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Untraceable(f"the network does not run on example_inputs ({reason})"[:500]) from error
    if not outputs or not any(tensor.requires_grad for tensor in outputs.values()):
        raise Untraceable("no output of the network depends on its parameters")
    return outputs


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """What autograd reaches from a tensor: each parameter that it depends on, nearest first."""
    waiting, seen = deque([tensor.grad_fn]), {None, tensor.grad_fn}
    while waiting:
        node = waiting.popleft()
        if hasattr(node, "variable"):
            yield node.variable
        after = [function for function, _ in getattr(node, "next_functions", ())]
        waiting.extend(function for function in dict.fromkeys(after) if function not in seen)
        seen.update(after)


def _fed(model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, set[str]]:
    """{parameter: the outputs that depend on it}."""
    reached = {output: set(map(id, leaves(tensor))) for output, tensor in outputs.items()}
    return {
        name: {output for output, ids in reached.items() if id(parameter) in ids}
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _shared(fed: dict[str, set[str]], prefix: str | None) -> set[str]:
    """The trunk's parameters: by their name, or those that all outputs depend on."""
    outputs = set().union(*fed.values())
    if prefix is None:
        shared = {name for name, on in fed.items() if on == outputs}
        if not shared:
            raise Untraceable("the network has no layer that all outputs depend on: no trunk")
    else:
        shared = {name for name in fed if name.startswith(f"{prefix}.") or not prefix}
        on = set().union(*(fed[name] for name in shared))
        if len(outputs) > 1 and len(on) < 2:
            only = f"only {on.pop()} depends" if on else "no output depends"
            raise Untraceable(f"the trunk {prefix} is not shared: {only} on it")
    return shared


def _layer_of(parameter: str) -> str:
    """Its name, also where a parametrization computes the weight."""
    layer, computed, _ = parameter.partition(".parametrizations.")
    return layer if computed else parameter.rpartition(".")[0]


def _tied(names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Layers whose parameters are another's as well, with the name of one such."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {
        module: names[next(other for other in among if other is not module)]
        for among in owners.values()
        if len(among) > 1
        for module in among
    }


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bare parameters, whose dimension it guesses
        yield


class _PlainGates(TorchFunctionMode):
    """Gated linear units as the operations that they are made of, which Torch-Pruning knows."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is not F.glu:
            return function(*arguments, **options or {})

        def halves(input: Tensor, dim: int = -1) -> Tensor:
            values, gate = input.chunk(2, dim)
            return values * gate.sigmoid()

        return halves(*arguments, **options or {})


def trace_graph(model: nn.Module, inputs: tuple) -> tp.DependencyGraph:
    """Torch-Pruning's graph of a network. Raises Untraceable, with its reason, if there is none."""
    try:
        with _quiet(), _PlainGates():
            return tp.DependencyGraph().build_dependency(
                model,
                inputs,
                verbose=False,
                # A product is an operation that makes outputs: it protects what feeds them.
                output_transform=lambda output: [t * 1 for t in outputs_of(output).values()],
            )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Untraceable(f"Torch-Pruning cannot trace the network ({reason})"[:500]) from error


# --- what goes with a filter ---

Closure = dict[tuple[object, bool], dict[int, set[int]]]  # (module, makes channels): {index: roots}


def _start(graph: tp.DependencyGraph, module: nn.Module) -> Callable:
    """What prunes the module's own filters, in Torch-Pruning's words."""
    depthwise = isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels
    if depthwise:
        return tp.prune_depthwise_conv_out_channels
    return graph.get_pruner_of_module(module).prune_out_channels


def _closure(graph: tp.DependencyGraph, root: nn.Module) -> Closure:
    """Everything that is cut if the root's filters go: which index goes with which of them.

    Torch-Pruning's own walk merges what is reached twice, and forgets which filters that ties.
    """
    node, start = graph.module2node[root], _start(graph, root)
    pair = tp._helpers._HybridIndex
    filters = graph.get_pruner_of_module(root).get_out_channels(root)
    stack = [(node, start, [pair(i, i) for i in range(filters)])]
    reached: dict[tuple, set] = {}
    whole: dict[tuple, list] = {}  # the list that was last taken in: most come again and again
    while stack:
        node, handler, pairs = stack.pop()
        if whole.get((node, handler)) is pairs:
            continue
        whole[node, handler] = pairs
        known = reached.setdefault((node, handler), set())
        new = [index for index in dict.fromkeys(pairs) if index not in known]
        if not new:
            continue
        pairs = pairs if len(new) == len(pairs) else new
        known.update(new)
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                mapped = pairs
                for mapping in dependency.index_mapping:
                    mapped = mapping(mapped) if mapping is not None else mapped
                if mapped:
                    stack.append((dependency.target, dependency.handler, mapped))
    closure: Closure = {}
    for (node, handler), pairs in reached.items():
        part = closure.setdefault((node.module, graph.is_out_channel_pruning_fn(handler)), {})
        for index, of_root in pairs:
            part.setdefault(index, set()).add(of_root)
    return closure


KINDS = {
    _ConvNd: "conv",
    nn.Linear: "linear",
    _NormBase: "norm",
    nn.LayerNorm: "norm",
    nn.PReLU: "norm",
    nn.Parameter: "parameter",
}
OPERATIONS = (  # of Torch-Pruning: what has no tensors of its own
    "_ElementWiseOp",
    "_ConcatOp",
    "_SplitOp",
    "_ReshapeOp",
    "_ExpandOp",
    "_UnbindOp",
    "_SliceOp",
)


def _kind(module) -> str:
    return next((kind for type_, kind in KINDS.items() if isinstance(module, type_)), "")


def _reason_to_leave(
    closure: Closure,
    graph: tp.DependencyGraph,
    names: dict,
    shared: set[str],
    tied: dict[nn.Module, str],
) -> str:
    """Why these filters cannot go; "" if they can."""
    for (module, makes), indices in closure.items():
        kind, what = _kind(module), type(module).__name__
        name = names.get(module, what)
        if what == "_OutputOp":
            return "it makes an output"
        if what in OPERATIONS or _one_for_all(module):
            continue
        if not kind:
            return f"its filters reach {name}, a {what}, which cannot be cut"
        if kind != "parameter" and "weight" not in module._parameters:
            return f"the weight of {name} is computed, as a parametrization does"
        if module in tied:
            return f"the parameters of {name} are {tied[module]}'s as well"
        if makes and isinstance(module, PRODUCERS) and name not in shared:
            return f"it is tied to {name}, which is not the trunk's"
        if isinstance(module, _ConvTransposeNd) and 1 < module.groups != module.out_channels:
            return f"{name} is a transposed convolution in blocks"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"{name} normalises over more than channels"
        if isinstance(module, nn.LayerNorm) and module.weight is None:
            return f"{name} normalises without a scale"
        if kind == "parameter":
            size = module.shape[graph.module2node[module].pruning_dim]
        else:
            pruner = graph.get_pruner_of_module(module)
            size = pruner.get_out_channels(module) if makes else pruner.get_in_channels(module)
        if not 0 <= min(indices) <= max(indices) < size:
            return f"which of its filters are which of {name}'s is not known"
    return ""


def _group(root: nn.Module, closure: Closure, graph: tp.DependencyGraph, names: dict) -> Group:
    filters = len(closure[(root, True)])
    ties = list(range(filters))  # a union-find forest

    def find(i: int) -> int:
        while ties[i] != i:
            ties[i] = i = ties[ties[i]]
        return i

    def tie(roots) -> None:
        first, *others = sorted(map(find, roots))
        for other in others:
            ties[other] = first

    for (module, makes), indices in closure.items():
        for roots in indices.values():
            if len(roots) > 1:
                tie(roots)
        blocks = getattr(module, "groups", 1)
        if blocks > 1 and not is_depthwise(module):  # the same filters of every block go
            size = (module.out_channels if makes else module.in_channels) // blocks
            of_position: dict[int, set[int]] = {}
            for index, roots in indices.items():
                of_position.setdefault(index % size, set()).update(roots)
            for roots in of_position.values():
                tie(roots)
    unit_of = {first: unit for unit, first in enumerate(sorted({find(i) for i in range(filters)}))}
    units = torch.tensor([unit_of[find(i)] for i in range(filters)])
    members, nodes = [], graph.module2node
    for (module, makes), indices in closure.items():
        if not (kind := _kind(module)) or _one_for_all(module):
            continue
        name = graph._param_to_name[module] if kind == "parameter" else names[module]
        dim = getattr(nodes[module], "pruning_dim", 0)
        slices = _slices(name, module, kind, makes, dim)
        order = sorted(indices)
        of_unit = units[[min(indices[index]) for index in order]]
        positions = torch.tensor(order)
        if kind == "conv" and not makes and module.groups > 1 and not is_depthwise(module):
            inside = positions < module.in_channels // module.groups
            positions, of_unit = positions[inside], of_unit[inside]
        produces = makes or kind in ("norm", "parameter") or is_depthwise(module)
        members.append(Member(name, kind, produces, slices, positions, of_unit))
    rank = {name: i for i, name in enumerate(names.values())}
    members.sort(key=lambda member: rank.get(member.name, -1))
    return Group(names[root], filters, len(unit_of), tuple(members), _gates(members, graph, names))


def is_depthwise(module) -> bool:
    """One filter per channel: it scales channels rather than mixing them."""
    if not isinstance(module, _ConvNd):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def _one_for_all(module) -> bool:
    """A norm or activation with nothing per channel: one number for all of them, or none."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    return isinstance(module, _NormBase) and not any(t.dim() for t in module.state_dict().values())


def _slices(name: str, module, kind: str, makes: bool, dim: int) -> tuple[tuple[str, int], ...]:
    """The tensors that are cut, and along which dimension."""
    if kind == "parameter":
        return ((name, dim),)
    transposed = isinstance(module, _ConvTransposeNd)
    if kind in ("conv", "linear") and not (makes or is_depthwise(module)):
        return ((f"{name}.weight", 0 if transposed else 1),)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple(
        (f"{name}.{key}", int(transposed and key == "weight"))
        for key, tensor in own
        if tensor.dim()
    )


def _gates(members: list[Member], graph: tp.DependencyGraph, names: dict) -> tuple[str, ...]:
    """What stands last before each activation: norms, and producers behind which there is none."""
    modules = {name: module for module, name in names.items()}
    normed = {
        member.name
        for member in members
        if member.kind in ("conv", "linear")
        and any(
            isinstance(node.module, (_NormBase, nn.LayerNorm))
            for node in graph.module2node[modules[member.name]].outputs
        )
    }
    return tuple(
        member.name
        for member in members
        if member.produces
        and member.kind != "parameter"
        and member.name not in normed
        and not isinstance(modules[member.name], nn.PReLU)
    )
