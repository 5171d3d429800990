"""TorchJD's aggregators (Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024).

torchjd is no requirement of this package, and imported when one of them is used.
"""

from torch import Tensor, nn

VERSION = "0.18.0"


class Aggregation(nn.Module):
    """Losses as they are, and one gradient of the tasks' by an aggregator of TorchJD.

    name: the aggregator's in `torchjd.aggregation`; extra: of torchjd's extras the one that it
    needs. Aggregators read numbers on the CPU, so that each step waits for the device. Raises
    ImportError, with what to install.
    """

    def __init__(self, name: str, extra: str = ""):
        super().__init__()
        try:
            from torchjd import aggregation

            self.aggregator = getattr(aggregation, name)()
        except ImportError as error:
            package = f"torchjd[{extra}]" if extra else "torchjd"
            install = f"pip install '{package}=={VERSION}'"
            raise ImportError(
                f"{name} is TorchJD's: {install}, or take another weighting"
            ) from error

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses

    def aggregate(self, rows: Tensor) -> Tensor:
        # Solvers fail on NaN, before it can be said which loss it comes from.
        return self.aggregator(rows) if rows.isfinite().all() else rows.sum(0)
