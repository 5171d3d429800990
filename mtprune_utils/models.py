"""Backbones, heads and the multi-task network. An `Architecture` is a small record that rebuilds any of them.

Only backbone filters are pruned. A backbone lists what can be pruned as `layers`: one `PrunableLayer` per convolution.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mtprune_utils.data import IMAGENET_MEAN, IMAGENET_SD, Split, image_to_float
from mtprune_utils.tasks import resize_output

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_POOL_AFTER = (1, 3, 6, 9, 12)  # index of the convolution, from 0


class PrunableLayer(NamedTuple):
    """A convolution whose filters can be removed, and the layer whose output a filter's gate would scale."""

    conv: nn.Conv2d
    affine: nn.Module  # the batch norm behind the convolution, or the convolution itself


@dataclass(frozen=True)
class Architecture:
    """All that is needed to rebuild a network: backbone and its widths, heads and their width, output stride."""

    tasks: dict[str, int]  # output channels by task
    backbone: str = "vgg16"
    widths: tuple[int, ...] = VGG16_WIDTHS
    stride: int = 32  # input pixels per output pixel: the first log2(stride) max-pools are kept
    head_width: int = 1024
    dropout: float = 0.5

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}: choose one of {', '.join(BACKBONES)}")
        if len(self.widths) != len(VGG16_WIDTHS) or min(self.widths) < 1:
            raise ValueError(f"widths must be {len(VGG16_WIDTHS)} positive numbers, got {self.widths}")
        if self.stride not in (2, 4, 8, 16, 32):
            raise ValueError(f"stride must be 2, 4, 8, 16 or 32, got {self.stride}")
        counts = (*self.widths, self.head_width, *self.tasks.values())
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError(f"widths and channels must be whole numbers from 1, got {counts}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {self.dropout}")

    @property
    def filters(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Interface:
    """What stands beside a saved network's weights, so that others get the same predictions.

    Images are RGB, 0 to 1, resized to side x side, and normalised by mean and sd. A task's output
    is multiplied by its scale (depths are in metres then), and enlarged to the image where the
    task is about pixels.
    """

    side: int
    classes: tuple[str, ...]
    scales: dict[str, float]
    pixels: tuple[str, ...]  # tasks about pixels, not about the image as a whole
    mean: tuple[float, ...] = IMAGENET_MEAN
    sd: tuple[float, ...] = IMAGENET_SD

    def __post_init__(self):
        for name in ("classes", "pixels", "mean", "sd"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = (*self.scales.values(), *self.mean, *self.sd)
        fine = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        texts = all(type(text) is str for text in (*self.classes, *self.pixels))
        if not (fine and texts and type(self.side) is int and self.side >= 1):
            raise ValueError(f"what it says of images and classes is not sound: {self}"[:200])


class VGG(nn.Sequential):
    """VGG-16's thirteen convolutions (Simonyan and Zisserman, 2015), at any widths, with or without batch norm."""

    def __init__(self, widths: Iterable[int], stride: int, batch_norm: bool):
        super().__init__()
        self.layers: list[PrunableLayer] = []
        pools = VGG16_POOL_AFTER[: stride.bit_length() - 1]
        channels = 3
        for i, width in enumerate(widths):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            norm = nn.BatchNorm2d(width) if batch_norm else None
            self.layers.append(PrunableLayer(conv, norm or conv))
            self.extend([conv, norm, nn.ReLU(inplace=True)] if norm else [conv, nn.ReLU(inplace=True)])
            if i in pools:
                self.append(nn.MaxPool2d(2))
            channels = width
        self.out_channels = channels


BACKBONES = {
    "vgg16": lambda widths, stride: VGG(widths, stride, batch_norm=False),
    "vgg16_bn": lambda widths, stride: VGG(widths, stride, batch_norm=True),
}


class ASPPHead(nn.Module):
    """Four parallel branches with dilation 1, 2, 4 and 6, summed (the paper's head; DeepLab v2's classifier)."""

    def __init__(self, channels: int, width: int, out_channels: int, dropout: float):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=rate, dilation=rate), nn.ReLU(inplace=True), nn.Dropout(dropout),
                nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Dropout(dropout),
                nn.Conv2d(width, out_channels, 1),
            )
            for rate in (1, 2, 4, 6)
        )

    def forward(self, features: Tensor) -> Tensor:
        return sum(branch(features) for branch in self.branches)


class MultiTaskNet(nn.Module):
    """One backbone, one head per task: (B, 3, H, W) images to {task: (B, channels, H / stride, W / stride)}."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.backbone = BACKBONES[architecture.backbone](architecture.widths, architecture.stride)
        self.heads = nn.ModuleDict({
            task: ASPPHead(self.backbone.out_channels, architecture.head_width, channels, architecture.dropout)
            for task, channels in architecture.tasks.items()
        })
        self._dense = architecture
        self.interface: Interface | None = None  # of a network that was saved with one

    @property
    def layers(self) -> list[PrunableLayer]:
        return self.backbone.layers

    @property
    def architecture(self) -> Architecture:
        """The record of the network as it is now, after whatever has been removed."""
        return Architecture(**{**asdict(self._dense), "widths": tuple(layer.conv.out_channels for layer in self.layers)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
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
        scaled = {task: out * self.interface.scales.get(task, 1.0) for task, out in outputs.items()}
        return {
            task: resize_output(output, size) if task in self.interface.pixels else output
            for task, output in scaled.items()
        }


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


def build(architecture: Architecture, seed: int) -> MultiTaskNet:
    """A network with random weights: Kaiming normal, fan-out, zero bias (the paper's re-initialisation).

    But the last convolution of each head branch, which no ReLU follows, is drawn with standard deviation 0.01, as DeepLab
    does: by fan-out, a one-channel output would start out tens of metres wrong.
    """
    with torch.device("meta"):
        model = MultiTaskNet(architecture)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()  # also the running statistics
    for head in model.heads.values():
        for branch in head.branches:
            nn.init.normal_(branch[-1].weight, std=0.01, generator=generator)
    return model


def load_imagenet_backbone(model: MultiTaskNet) -> None:
    """Copy the convolutions of torchvision's ImageNet VGG-16 into a full-width backbone, as the paper starts from.

    Raises ValueError for other widths, and RuntimeError where the weights cannot be had (no network and no copy in
    torch's hub folder).
    """
    if model.architecture.widths != VGG16_WIDTHS:
        raise ValueError("ImageNet weights fit the full widths only: override pretrained with false, or widths")
    from torchvision.models import VGG16_Weights  # not needed on the training path otherwise

    try:
        source = VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)  # which runs no code of the file
    except OSError as error:  # urllib's URLError is one
        raise RuntimeError(f"no ImageNet weights ({error}): override pretrained with false to start at random") from error
    convolutions = [name.removesuffix(".weight") for name in source if re.fullmatch(r"features\.\d+\.weight", name)]
    for layer, name in zip(model.layers, convolutions, strict=True):
        layer.conv.load_state_dict({kind: source[f"{name}.{kind}"] for kind in ("weight", "bias")})


def count_parameters(architecture: Architecture) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MultiTaskNet(architecture).parameters())


def uniform_widths(dense: Architecture, parameters: int, floor: int) -> Architecture:
    """The control without a criterion: every layer keeps the same share of its filters, and at least `floor`.

    The share is the one whose parameter count comes nearest to `parameters`.
    """
    def narrowed(share: float) -> Architecture:
        return replace(dense, widths=tuple(max(min(floor, width), round(share * width)) for width in dense.widths))

    shares = sorted({(count + 0.5) / width for width in dense.widths for count in range(width)} | {1.0})  # where a width changes
    at = bisect_left(shares, parameters, key=lambda share: count_parameters(narrowed(share)))
    return min(map(narrowed, shares[max(at - 1, 0) : at + 1]), key=lambda a: abs(count_parameters(a) - parameters))


def activation_bytes(architecture: Architecture, size: tuple[int, int]) -> int:
    """What one (H, W) image leaves in memory from forward to backward pass, in float32: training memory per image."""
    kept: dict[int, int] = {}  # by storage: what two operations need is stored once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        model = MultiTaskNet(architecture)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(torch.empty(1, 3, *size))
    assert outputs  # alive until here: a freed storage's address could be given out again
    return sum(count for storage, count in kept.items() if storage not in weights)


def complexity(architecture: Architecture, size: tuple[int, int]) -> dict[str, int]:
    """Filters, parameters (all and backbone) and multiply-accumulates of its convolutions on one (H, W) image."""
    macs = 0

    def count(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * conv.weight[0].numel()

    with torch.device("meta"), torch.no_grad():
        model = MultiTaskNet(architecture).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, *size))
    return {
        "filters": architecture.filters,
        "parameters": sum(p.numel() for p in model.parameters()),
        "backbone_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "macs": macs,
    }


TRAINING = "training."  # begins the names of batch statistics as training left them


def model_bytes(model: MultiTaskNet, trained: MultiTaskNet | None = None) -> bytes:
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


def load_model(path: Path | str, to_train: bool = False) -> MultiTaskNet:
    """The inverse of `model_bytes`, from a file: in evaluation mode, ready to predict.

    to_train: with the batch statistics that training left, from which it goes on to the same
    numbers. Raises ValueError if the file is no such network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["architecture"])
            interface = record.pop("interface", None)
            architecture = Architecture(**record)
            if not architecture.tasks:
                raise ValueError("it has no task")
            state = {name: file.get_tensor(name) for name in file.keys()}
        left = {name: state.pop(TRAINING + name) for name in [*state] if TRAINING + name in state}
        with torch.device("meta"):
            model = MultiTaskNet(architecture)
        for part in (state, left):
            _check_tensors(part, model.state_dict())
        model.load_state_dict(state | left if to_train else state, assign=True)
        if interface is not None:
            model.interface = Interface(**interface)
    except OSError:  # it is not there, or cannot be read: the error says so
        raise
    except Exception as error:  # safetensors, json, key, shape errors: one line, with the file's name
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
