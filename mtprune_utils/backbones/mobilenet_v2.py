"""MobileNetV2 (Sandler et al., CVPR 2018), torchvision's, without its classifier."""

from torch import Tensor, nn

STRIDES = (8, 16, 32)


def build(stride: int = 32) -> nn.Module:
    """stride: where a layer would pass it, it is dilated instead."""
    from torchvision.models import mobilenet_v2

    if stride not in STRIDES:
        raise ValueError(f"stride must be one of {STRIDES}, got {stride}")
    features = mobilenet_v2(weights=None).features
    reached, dilation = 1, 1
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            rate = dilation
            if module.stride == (2, 2):
                if reached == stride:
                    module.stride = (1, 1)
                    dilation *= 2
                else:
                    reached *= 2
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (rate, rate)
    return features


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import MobileNet_V2_Weights

    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    source = weights.get_state_dict(check_hash=True, weights_only=True)  # runs no code of the file
    prefix = "features."
    return {name.removeprefix(prefix): t for name, t in source.items() if name.startswith(prefix)}
