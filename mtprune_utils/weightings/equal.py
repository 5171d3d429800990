"""Losses as they are: their plain sum is trained."""

from torch import Tensor, nn


class Equal(nn.Module):
    """All losses as they are."""

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: scalar}, unchanged."""
        return losses


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Equal()
