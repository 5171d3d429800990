"""VGG-16 with batch norm."""

from torch import Tensor, nn

from mtprune_utils.backbones._vgg import torchvision_state, vgg


def build(stride: int = 32) -> nn.Module:
    return vgg(stride, batch_norm=True)


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import VGG16_BN_Weights

    return torchvision_state(VGG16_BN_Weights.IMAGENET1K_V1, build())
