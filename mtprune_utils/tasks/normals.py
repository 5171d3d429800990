"""Surface normals: 1 - cosine similarity; angles in degrees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune_utils.core.targets import Normals
from mtprune_utils.core.task import Meter, Task, masked_mean

LIMITS = (11.25, 22.5, 30)  # degrees


def normals(name: str = "normals") -> Task:
    """The surface normal of each pixel; one less the cosine to it on valid pixels."""
    return Task(
        name,
        3,
        Normals(),
        normal_cosine,
        NormalMeter,
        prior=lambda target: target.sum(0, keepdim=True),
        endpoint="mean_angle",
        shown="mean_angle",
        higher_is_better=frozenset(f"within_{limit}" for limit in LIMITS),
    )


def normal_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity over pixels with a normal. Both (B, 3, h, w)."""
    valid = target.square().sum(1) > 0
    return masked_mean(1 - F.cosine_similarity(output, target, dim=1), valid)


class NormalMeter(Meter):
    """Mean and median angle in degrees, and the shares of pixels under 11.25, 22.5 and 30."""

    def __init__(self):
        self.angles: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        # F.cosine_similarity takes norms over a strided dimension, which is slow on the CPU.
        squares = output.square().sum(1), target.square().sum(1)
        scale = (squares[0] * squares[1]).clamp(min=1e-30).rsqrt()
        cosine = (output * target).sum(1) * scale
        angle = cosine.clamp(-1, 1).acos().rad2deg()
        self.angles.append(torch.where(squares[1] > 0, angle, -1.0).flatten())  # -1: no normal

    def compute(self) -> dict[str, Tensor]:
        angles = torch.cat(self.angles)
        angles = angles[angles != -1]
        count = len(angles)
        shares = {f"within_{limit}": (angles < limit).sum().double() / count for limit in LIMITS}
        mean = median = angles.mean(dtype=torch.double)  # NaN without a normal
        if count:
            # kthvalue selects without sorting; torch.quantile refuses over 16 million values.
            middle = {(count + 1) // 2, count // 2 + 1}  # one, or two
            values = torch.stack([angles.kthvalue(k).values for k in middle])
            median = values.mean(dtype=torch.double)
        return {"mean_angle": mean, "median_angle": median, **shares}
