"""Places within the layer as shares of its width: every layer loses the same share of its filters.

Uniform pruning, in the literature's words; which filters of a layer go is the criterion's choice.
"""

from torch import Tensor

from mtprune_utils.core.selection import ranks


def comparable(scores: list[Tensor]) -> list[Tensor]:
    return [ranks(of) / len(of) for of in scores]
