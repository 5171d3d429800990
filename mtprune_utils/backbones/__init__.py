"""Backbones, one file each: `build(stride) -> nn.Module` makes the trunk at full width.

It takes images (B, 3, H, W) to features (B, C, H / stride, W / stride). `pretrained() -> state`, if
there is one, fetches its ImageNet weights. Narrower trunks are cut from it, group by group, so that
every backbone comes at any width.
"""

from collections.abc import Callable

from torch import nn

from mtprune_utils import registry

FOLDER = "backbones"


def get_backbone(name: str) -> Callable[[int], nn.Module]:
    """A backbone's `build`. Raises ValueError, with the nearest name, for an unknown one."""
    return registry.entry(FOLDER, name, "backbone").build


def pretrained_state(name: str) -> dict:
    """A backbone's ImageNet weights, by the names of its own tensors.

    Raises ValueError if there are none, RuntimeError where they cannot be had (no network and no
    copy in torch's hub folder).
    """
    module = registry.entry(FOLDER, name, "backbone")
    if not hasattr(module, "pretrained"):
        raise ValueError(f"there are no ImageNet weights of {name}: override pretrained with false")
    try:
        return module.pretrained()
    except OSError as error:  # urllib's URLError is one
        raise RuntimeError(
            f"no ImageNet weights ({error}): override pretrained with false to start at random"
        ) from error
