"""VGG-16 without batch norm: the paper's backbone."""

from torch import Tensor, nn

from mtprune_utils.backbones._vgg import torchvision_state, vgg


def build(stride: int = 32) -> nn.Module:
    return vgg(stride, batch_norm=False)


def pretrained() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    return torchvision_state(VGG16_Weights.IMAGENET1K_V1, build())
