"""What a network costs, and what it would cost without some units: arithmetic on shapes."""

import copy
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from mtprune_utils.core.groups import Group
from mtprune_utils.core.surgery import remove

COUNTED = (_ConvNd, nn.Linear)
REST = ""  # in place of a weight's name: products that no such layer makes, as attention does


def uses_of_weights(model: nn.Module, inputs: tuple) -> dict[str, float]:
    """{name of a weight: multiply-accumulates of one sample, per number in it}.

    Convolutions and linear layers are counted; a weight that is used twice counts twice. What
    PyTorch's own counter sees besides stands under `REST`, if there is any. inputs: what the
    network is called with, samples along the first dimension of the first tensor.
    """
    uses: dict[str, float] = {}
    names = {module: name for name, module in model.named_modules()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    batch = next((len(x) for x in inputs if torch.is_tensor(x) and x.dim()), 1)

    def count(module: nn.Module, given: tuple, output: Tensor) -> None:
        at = f"{names[module]}.weight"
        linear = isinstance(module, nn.Linear)
        # A transposed convolution uses its weight at every input position.
        made = given[0] if getattr(module, "transposed", False) else output
        channels = made.shape[-1] if linear else made.shape[1]
        if at in sizes:
            uses[at] = uses.get(at, 0) + made.numel() / channels / batch

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, COUNTED)]
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # nobody sees into a fused kernel
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as all_:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    counted = sum(sizes[name] * times for name, times in uses.items())
    if rest := max(round(all_.get_total_flops() / 2 / batch - counted), 0):
        uses[REST] = rest
    return uses


class Cost:
    """Parameters and multiply-accumulates of a network, as it is or without chosen units.

    uses: see `uses_of_weights`; its `REST` is taken for constant.
    """

    def __init__(self, model: nn.Module, groups: list[Group], uses: dict[str, float]):
        self.groups, self.uses = groups, uses
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}

    def without(self, chosen: list[Tensor] | None = None) -> dict[str, int]:
        """{"parameters", "macs"}; chosen: one tensor of units per group, None: nothing goes."""
        shapes = {name: [*shape] for name, shape in self.shapes.items()}
        for group, units in zip(self.groups, chosen or ()):
            if not len(units):
                continue
            gone = torch.zeros(group.units, dtype=torch.bool)
            gone[units] = True
            for member in group.members:
                count = int(gone[member.units].sum())
                for name, dim in member.slices:
                    if name in shapes:  # a buffer is no parameter
                        shapes[name][dim] -= count
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        macs = sum(sizes.get(name, 1) * uses for name, uses in self.uses.items())
        return {"parameters": sum(sizes.values()), "macs": round(macs)}


def latency(model: nn.Module, inputs: tuple, seconds: float = 0.2) -> float:
    """Median seconds of a forward pass in evaluation mode, timed for at least so long."""
    from torch.utils.benchmark import Timer  # warns where there is a CUDA compiler and no GPU

    with torch.inference_mode():
        timer = Timer("model(*inputs)", globals={"model": model.eval(), "inputs": inputs})
        return timer.blocked_autorange(min_run_time=seconds).median


def latency_without(
    model: nn.Module, groups: list[Group], inputs: tuple
) -> Callable[[list[Tensor]], float]:
    """A function that measures copies of the network without chosen units."""

    def measure(chosen: list[Tensor]) -> float:
        smaller = copy.deepcopy(model)
        remove(smaller, groups, chosen)
        return latency(smaller, inputs)

    return measure
