"""The suite's multi-task network: a trunk, one head per task, and the record that rebuilds it."""

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mtprune_utils.backbones import get_backbone, pretrained_state
from mtprune_utils.core import cost, surgery
from mtprune_utils.core.data import IMAGENET_MEAN, IMAGENET_SD, Split, image_to_float
from mtprune_utils.core.groups import Group, trace
from mtprune_utils.core.heads import ASPPHead
from mtprune_utils.core.targets import resize_output

TRACED = 64  # pixels of the image that a network is traced with: two cells of the coarsest features


@dataclass(frozen=True)
class Architecture:
    """All that is needed to rebuild a network.

    tasks: output channels by task; stride: input pixels per output pixel; widths: the filters of
    each of the trunk's groups, by its first layer, where they are not the backbone's own.
    """

    tasks: dict[str, int]
    backbone: str = "vgg16"
    stride: int = 32
    head_width: int = 1024
    dropout: float = 0.5
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        counts = (self.stride, self.head_width, *self.tasks.values(), *self.widths.values())
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError(f"widths and channels must be whole numbers from 1, got {counts}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {self.dropout}")
        full = plan_of(self).full_widths
        for layer, width in self.widths.items():
            if layer not in full or width > full[layer]:
                most = full.get(layer, "none")
                raise ValueError(f"{self.backbone} has {most} filters in {layer}, not {width}")
        object.__setattr__(self, "widths", full | self.widths)

    @property
    def filters(self) -> int:
        """All filters that can be pruned."""
        return sum(self.widths.values())

    @property
    def width_list(self) -> list[int]:
        """The filters of each group, in the trunk's order."""
        return list(self.widths.values())

    def with_widths(self, widths: list[int]) -> "Architecture":
        """Other filters in each group, in the trunk's order."""
        return replace(self, widths=dict(zip(self.widths, widths, strict=True)))

    def narrowed(self, share: float, least: int = 1) -> "Architecture":
        """Every group with that share of its filters, and at least so many, if it has as many."""
        widths = [max(min(least, width), round(share * width)) for width in self.width_list]
        return self.with_widths(widths)


class Plan:
    """What a backbone with its heads is made of at full width, without weights: traced once."""

    def __init__(self, tasks: dict[str, int], backbone: str, stride: int, head_width: int):
        with torch.device("meta"):
            self.model = MultiTaskModel(get_backbone(backbone)(stride), tasks, head_width, 0.0)
            image = torch.zeros(1, 3, TRACED, TRACED)
        self.groups, _ = trace(self.model, (image,), self.model.trunk)
        self.full_widths = {group.root: group.width for group in self.groups}
        self._uses: dict[tuple[int, int], dict[str, float]] = {}

    def chosen(self, widths: dict[str, int]) -> list[Tensor]:
        """The last units of every group, so many that it comes down to its width."""
        return [
            torch.arange(group.units * widths[group.root] // group.width, group.units)
            for group in self.groups
        ]

    def cost(self, widths: dict[str, int], size: tuple[int, int] | None = None) -> dict[str, int]:
        """{"parameters", "backbone_parameters", "macs"}, the latter on an (H, W) image."""
        uses = {} if size is None else self.uses(size)
        chosen = self.chosen(widths)
        whole = cost.Cost(self.model, self.groups, uses).without(chosen)
        trunk = cost.Cost(self.model.trunk, [], {})
        trunk.shapes = {f"trunk.{name}": shape for name, shape in trunk.shapes.items()}
        trunk.groups = self.groups
        whole["backbone_parameters"] = trunk.without(chosen)["parameters"]
        return whole

    def uses(self, size: tuple[int, int]) -> dict[str, float]:
        """`cost.uses_of_weights` on an (H, W) image."""
        if size not in self._uses:
            image = torch.zeros(1, 3, *size, device="meta")
            self._uses[size] = cost.uses_of_weights(self.model, (image,))
        return self._uses[size]


def plan_of(architecture: Architecture) -> Plan:
    """Raises ValueError for an unknown backbone, or a stride that it does not have."""
    if not architecture.tasks:
        raise ValueError("a network has at least one task")
    a = architecture
    return _plan(tuple(a.tasks.items()), a.backbone, a.stride, a.head_width)


@lru_cache(maxsize=16)
def _plan(tasks: tuple, backbone: str, stride: int, head_width: int) -> Plan:
    return Plan(dict(tasks), backbone, stride, head_width)


@dataclass(frozen=True)
class Interface:
    """What stands beside a saved network's weights, so that others get the same predictions.

    Images are RGB, 0 to 1, resized to side x side, and normalised by mean and sd. A task's output
    is multiplied by its scale (depths are in metres then), and enlarged to the image where the
    task is about pixels. classes: the names of each task's classes, if it has such.
    """

    side: int
    classes: dict[str, tuple[str, ...]]
    scales: dict[str, float]
    pixels: tuple[str, ...]  # tasks about pixels, not about the image as a whole
    mean: tuple[float, ...] = IMAGENET_MEAN
    sd: tuple[float, ...] = IMAGENET_SD

    def __post_init__(self):
        for name in ("pixels", "mean", "sd"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        classes = {task: tuple(names) for task, names in self.classes.items()}
        object.__setattr__(self, "classes", classes)
        numbers = (*self.scales.values(), *self.mean, *self.sd)
        fine = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        texts = (*(name for names in classes.values() for name in names), *self.pixels)
        sound = fine and all(type(text) is str for text in texts)
        if not (sound and type(self.side) is int and self.side >= 1):
            raise ValueError(f"what it says of images and classes is not sound: {self}"[:200])


class MultiTaskModel(nn.Module):
    """One trunk, one head per task: (B, 3, H, W) images to {task: (B, channels, h, w)}."""

    def __init__(self, trunk: nn.Module, tasks: dict[str, int], head_width: int, dropout: float):
        super().__init__()
        self.trunk = trunk
        channels = _features(trunk)
        self.heads = nn.ModuleDict(
            {
                task: ASPPHead(channels, head_width, out_channels, dropout)
                for task, out_channels in tasks.items()
            }
        )
        self.dense: Architecture | None = None  # as it was built
        self.groups: list[Group] = []
        self.interface: Interface | None = None  # of a network that was saved with one

    @property
    def architecture(self) -> Architecture:
        """The record of the network as it is now, after whatever has been removed."""
        return replace(self.dense, widths={group.root: group.width for group in self.groups})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {task: output}."""
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Each task's output for uint8 RGB images (B, 3, H, W) of any size, as it was evaluated.

        (B, channels, H, W) of tasks about pixels: class scores, depths in metres, normals that are
        not yet of unit length. Raises ValueError for a network that was saved without `interface`.
        """
        if self.interface is None:
            raise ValueError("the network says nothing about its images: it was saved without that")
        side, size = self.interface.side, tuple(images.shape[-2:])
        resized = Split(images, {}).resized((side, side), {}).image
        with evaluation_mode(self):
            outputs = self(image_to_float(resized))
        scales = self.interface.scales
        scaled = {task: output * scales.get(task, 1.0) for task, output in outputs.items()}
        return {
            task: resize_output(output, size) if task in self.interface.pixels else output
            for task, output in scaled.items()
        }

    def remove(self, chosen: list[Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove units of every group physically, from the optimizer's state too."""
        self.groups = surgery.remove(self, self.groups, chosen, optimizer)


def _features(trunk: nn.Module) -> int:
    """How many channels a trunk gives."""
    with torch.no_grad():
        device = next(trunk.parameters()).device
        return trunk.eval()(torch.zeros(1, 3, TRACED, TRACED, device=device)).shape[1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the context lasts; then each module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def skeleton(architecture: Architecture) -> MultiTaskModel:
    """The network without weights, on the meta device."""
    plan, a = plan_of(architecture), architecture
    with torch.device("meta"):
        model = MultiTaskModel(get_backbone(a.backbone)(a.stride), a.tasks, a.head_width, a.dropout)
    model.dense, model.groups = a, plan.groups
    model.remove(plan.chosen(a.widths))
    return model.train()


def build(architecture: Architecture, seed: int) -> MultiTaskModel:
    """A network with random weights: Kaiming normal, fan-out, zero bias (the paper's).

    But the last convolution of each head branch, which no ReLU follows, is drawn with standard
    deviation 0.01, as DeepLab does: by fan-out, a one-channel output would start out tens of metres
    wrong.
    """
    model = skeleton(architecture).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()  # also the running statistics
    for head in model.heads.values():
        for branch in head.branches:
            nn.init.normal_(branch[-1].weight, std=0.01, generator=generator)
    return model


def check_fits_imagenet(architecture: Architecture) -> None:
    """Raises ValueError for widths other than those that ImageNet weights are of."""
    if architecture.widths != plan_of(architecture).full_widths:
        raise ValueError(
            "ImageNet weights fit the full widths only: override pretrained with false, or width"
        )


def load_imagenet_trunk(model: MultiTaskModel) -> None:
    """Copy ImageNet weights into a full-width trunk, as the paper starts from.

    Raises ValueError as `check_fits_imagenet` and `pretrained_state` do.
    """
    check_fits_imagenet(model.architecture)
    model.trunk.load_state_dict(pretrained_state(model.dense.backbone), strict=False)


def count_parameters(architecture: Architecture) -> int:
    """Parameters of a network of this architecture, heads included; none is built."""
    return plan_of(architecture).cost(architecture.widths)["parameters"]


def complexity(architecture: Architecture, size: tuple[int, int]) -> dict[str, int]:
    """Filters, parameters (all and backbone) and multiply-accumulates on one (H, W) image."""
    found = plan_of(architecture).cost(architecture.widths, size)
    order = ("parameters", "backbone_parameters", "macs")
    return {"filters": architecture.filters, **{name: found[name] for name in order}}


def uniform_widths(dense: Architecture, parameters: int, floor: int) -> Architecture:
    """The control without a criterion: every group keeps the same share, and at least `floor`.

    The share is the one whose parameter count comes nearest to `parameters`.
    """
    # The shares at which a width changes.
    counts = {(count + 0.5) / width for width in dense.width_list for count in range(width)}
    shares = sorted(counts | {1.0})

    def size(share: float) -> int:
        return count_parameters(dense.narrowed(share, floor))

    at = bisect_left(shares, parameters, key=size)
    nearest = min(shares[max(at - 1, 0) : at + 1], key=lambda s: abs(size(s) - parameters))
    return dense.narrowed(nearest, floor)


def activation_bytes(architecture: Architecture, size: tuple[int, int]) -> int:
    """What one (H, W) image leaves in memory from forward to backward pass, in float32."""
    kept: dict[int, int] = {}  # by storage: what two operations need is stored once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    model = skeleton(architecture)
    with torch.device("meta"):
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(torch.empty(1, 3, *size))
    assert outputs  # alive until here: a freed storage's address could be given out again
    return sum(count for storage, count in kept.items() if storage not in weights)


TRAINING = "training."  # begins the names of batch statistics as training left them


def model_bytes(model: MultiTaskModel, trained: MultiTaskModel | None = None) -> bytes:
    """The network as a safetensors file that carries its architecture and interface.

    Nothing in it is ever unpickled. trained: the same weights with the batch statistics that
    training left and goes on from, where `model` has fresh ones.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in trained.named_buffers() if trained else ():
        tensors[TRAINING + name] = tensor.clone()
    record = asdict(model.architecture)
    if model.interface:
        record["interface"] = asdict(model.interface)
    # One entry: safetensors writes several in any order, and equal networks are equal files.
    return save(tensors, metadata={"architecture": json.dumps(record)})


def load_model(path: Path | str, to_train: bool = False) -> MultiTaskModel:
    """The inverse of `model_bytes`, from a file: in evaluation mode, ready to predict.

    to_train: with the batch statistics that training left, from which it goes on to the same
    numbers. Raises ValueError if the file is no such network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["architecture"])
            interface = record.pop("interface", None)
            model = skeleton(Architecture(**record))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        left = {name: state.pop(TRAINING + name) for name in [*state] if TRAINING + name in state}
        for part in (state, left):
            _check_tensors(part, model.state_dict())
        model.load_state_dict(state | left if to_train else state, assign=True)
        if interface is not None:
            model.interface = Interface(**interface)
    except OSError:  # it is not there, or cannot be read: the error says so
        raise
    except Exception as error:  # safetensors, json, key, shape errors: one line, with its name
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a network written by mtprune: {reason[:300]}") from error
    return model.eval()


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor of another type, shape or range than the network has."""
    for name, tensor in tensors.items():
        own = expected.get(name)
        if own is None or tensor.dtype != own.dtype or tensor.shape != own.shape:
            wanted = "none" if own is None else f"{own.dtype} {tuple(own.shape)}"
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if name.endswith(("running_var", "num_batches_tracked")) and (tensor < 0).any():
            raise ValueError(f"{name} is negative")
