"""ResNet-34."""

from torch import Tensor, nn

from mtprune_utils.backbones._resnet import resnet, torchvision_state


def build(stride: int = 32) -> nn.Module:
    return resnet("resnet34", stride)


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import ResNet34_Weights

    return torchvision_state(ResNet34_Weights.IMAGENET1K_V1)
