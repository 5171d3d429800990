"""ResNet-18."""

from torch import Tensor, nn

from mtprune_utils.backbones._resnet import resnet, torchvision_state


def build(stride: int = 32) -> nn.Module:
    return resnet("resnet18", stride)


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights

    return torchvision_state(ResNet18_Weights.IMAGENET1K_V1)
