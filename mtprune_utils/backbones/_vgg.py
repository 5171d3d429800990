"""VGG-16's thirteen convolutions (Simonyan and Zisserman, 2015)."""

import re

from torch import Tensor, nn

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOL_AFTER = (1, 3, 6, 9, 12)  # index of the convolution, from 0
STRIDES = (2, 4, 8, 16, 32)


def vgg(stride: int, batch_norm: bool) -> nn.Sequential:
    """stride: input pixels per output pixel; the first log2(stride) max-pools are kept."""
    if stride not in STRIDES:
        raise ValueError(f"stride must be one of {STRIDES}, got {stride}")
    pools = POOL_AFTER[: stride.bit_length() - 1]
    layers: list[nn.Module] = []
    channels = 3
    for i, width in enumerate(WIDTHS):
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        if i in pools:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers)


def torchvision_state(weights, model: nn.Module) -> dict[str, Tensor]:
    """torchvision's weights under our names: convolution by convolution, norm by norm."""
    source = weights.get_state_dict(check_hash=True, weights_only=True)  # runs no code of the file
    names = [name for name in source if name.startswith("features.")]
    theirs = list(dict.fromkeys(re.sub(r"\.[a-z_]+$", "", name) for name in names))
    ours = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(False), None) is not None
    ]
    return {
        f"{own}.{name.rpartition('.')[2]}": source[name]
        for own, other in zip(ours, theirs, strict=True)
        for name in names
        if name.startswith(f"{other}.")
    }
