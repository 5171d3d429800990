"""The absolute scale of the normalisation behind a filter.

    |gamma|

Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, which
trains with an L1 penalty on gamma; there is none here. Of coupled layers, the mean over their
norms. Not defined where no norm has a scale. Cost: nothing.
"""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals

NEEDS = WEIGHTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    scales = signals.norm_scales()
    if not scales:
        raise ValueError(
            f"bn_scale reads norms, and no norm scales the filters of {signals.group.root}: leave "
            "it alone, or take another criterion"
        )
    return torch.cat(scales, 1).abs().mean(1)
