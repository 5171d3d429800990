"""ResNet-50."""

from torch import Tensor, nn

from mtprune_utils.backbones._resnet import resnet, torchvision_state


def build(stride: int = 32) -> nn.Module:
    return resnet("resnet50", stride)


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import ResNet50_Weights

    return torchvision_state(ResNet50_Weights.IMAGENET1K_V1)
