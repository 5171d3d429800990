"""Feature maps, watched while a network is trained: what the layers that read a group are given."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtprune_utils.core.groups import Group, Member, is_depthwise


@dataclass(frozen=True)
class FeatureMap:
    """What one layer was given: behind the activation, and behind pooling and sums if there are.

    values: a minibatch with the channels at dim, counted from the end; blocks: of the layer, if it
    is a grouped convolution, else 1.
    """

    reader: Member
    values: Tensor
    dim: int
    blocks: int

    def mean(self, function: Callable[[Tensor], Tensor], units: int) -> tuple[Tensor, Tensor]:
        """(units,) means of the function over minibatch, space and channels of a unit; and a
        boolean, whether the layer reads the unit."""
        values, reader = function(self.values), self.reader
        others = [i for i in range(-values.dim(), 0) if i != self.dim]
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        means = values.mean(others, dtype=dtype) if others else values.to(dtype)
        if self.blocks > 1:  # a unit is the same filter of every block
            means = means.view(self.blocks, -1).mean(0)
        reads = means.new_ones(units, dtype=torch.bool)
        if not (reader.identical and len(means) == units):
            at, of = reader.positions.to(means.device), reader.units.to(means.device)
            counts = of.bincount(minlength=units)
            means = means.new_zeros(units).index_add(0, of, means[at]) / counts.clamp(min=1)
            reads = counts > 0
        return means, reads


class Watch:
    """The groups' feature maps in the last forward pass.

    Hooks stand on the layers that read a group until `close`, at the latest until this object goes.
    They note only passes that a gradient is wanted of, so that evaluation leaves no trace, and
    change nothing. Of a layer that is called several times the last call counts.
    """

    def __init__(self, model: nn.Module, groups: list[Group]):
        modules = dict(model.named_modules())
        self._modules, found = modules, {}
        self._found: dict[str, Tensor] = found
        self._readers = [[m for m in g.members if _reads(m, modules.get(m.name))] for g in groups]

        def hook_of(name: str) -> Callable:
            own = weakref.ref(modules[name])

            def hook(module: nn.Module, inputs: tuple) -> None:
                # A copy of the network has the hook as well, and is not watched.
                if inputs and torch.is_grad_enabled() and module is own():
                    found[name] = inputs[0].detach()

            return hook

        names = {m.name for readers in self._readers for m in readers}
        hooks = [modules[n].register_forward_pre_hook(hook_of(n)) for n in sorted(names)]
        self.close = weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    def take(self) -> list[list[FeatureMap]]:
        """Of each group the distinct maps since this was last asked for.

        What several layers read is one map.
        """
        maps = []
        for readers in self._readers:
            distinct: dict[tuple, FeatureMap] = {}
            for m in readers:
                module, values = self._modules[m.name], self._found.get(m.name)
                if values is None:
                    continue
                blocks = 1 if m.kind == "linear" or is_depthwise(module) else module.groups
                seen = values.data_ptr(), values.shape, values.stride(), blocks
                distinct.setdefault(seen, FeatureMap(m, values, 1 - module.weight.dim(), blocks))
            maps.append(list(distinct.values()))
        self._found.clear()
        return maps


def _reads(member: Member, module: nn.Module | None) -> bool:
    """A depthwise convolution of the group reads what the group has made before it."""
    return not member.produces or module is not None and is_depthwise(module)
