"""torchvision's ResNets (He et al., CVPR 2016) without their classifier."""

from collections import OrderedDict

from torch import Tensor, nn

STRIDES = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}
PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class EverySecondPixel(nn.Conv2d):
    """A 1 x 1 convolution of stride 2, as one of stride 1 on every second pixel: the same numbers.

    In PyTorch 2.14 on a CPU, channels-last, the strided one's backward pass corrupts memory where
    it has fewer than eight input channels, as pruned networks have.
    """

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features[..., ::2, ::2])


def resnet(name: str, stride: int) -> nn.Sequential:
    """stride: the last stages are dilated instead, as in DeepLab (8 and 16).

    Basic blocks know no dilation in torchvision: theirs is set here.
    """
    from torchvision import models

    if stride not in STRIDES:
        raise ValueError(f"stride must be one of {tuple(STRIDES)}, got {stride}")
    network = models.get_model(name, weights=None)
    dilation = 1
    for stage, dilated in zip((network.layer2, network.layer3, network.layer4), STRIDES[stride]):
        if dilated:
            _dilate(stage, dilation)
            dilation *= 2
        _replace_strided(stage[0])
    return nn.Sequential(OrderedDict((part, getattr(network, part)) for part in PARTS))


def _replace_strided(block: nn.Module) -> None:
    shortcut = block.downsample[0]
    if shortcut.stride == (2, 2):
        channels = shortcut.in_channels, shortcut.out_channels
        block.downsample[0] = EverySecondPixel(*channels, 1, bias=False)  # type: ignore[operator]


def _dilate(stage: nn.Module, before: int) -> None:
    """Stride 1 instead of 2: later convolutions look twice as far apart as `before`."""
    first = True
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            strided = module.stride == (2, 2)
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                rate = before if first and strided else 2 * before
                first = False
                module.dilation = module.padding = (rate, rate)


def torchvision_state(weights) -> dict[str, Tensor]:
    """torchvision's weights without the classifier's."""
    source = weights.get_state_dict(check_hash=True, weights_only=True)  # runs no code of the file
    return {name: tensor for name, tensor in source.items() if not name.startswith("fc.")}
