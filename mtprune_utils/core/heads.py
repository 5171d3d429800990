"""Task heads."""

from torch import Tensor, nn

RATES = (1, 2, 4, 6)


class ASPPHead(nn.Module):
    """Four parallel branches with dilation 1, 2, 4 and 6, summed: the paper's head.

    (B, channels, h, w) features to (B, out_channels, h, w). DeepLab v2's classifier (Chen et al.,
    TPAMI 2018).
    """

    def __init__(self, channels: int, width: int, out_channels: int, dropout: float):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=rate, dilation=rate),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Conv2d(width, width, 1),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Conv2d(width, out_channels, 1),
            )
            for rate in RATES
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) features to (B, channels, H, W), the sum of all branches."""
        return sum(branch(features) for branch in self.branches)
