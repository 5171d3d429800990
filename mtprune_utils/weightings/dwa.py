"""Dynamic weight average: more for tasks whose loss fell less from one epoch to the next.

    K exp(r / T) / (sum of the K tasks' exp(r / T)),  r = L(t - 1) / L(t - 2),  T = 2

with each epoch's mean losses L; 1 in the first two epochs. Liu, Johns and Davison, End-to-End
Multi-Task Learning with Attention, CVPR 2019. Where a mean was 0, r is 1.
"""

import torch
from torch import Tensor, nn

TEMPERATURE = 2.0


class DynamicWeightAverage(nn.Module):
    """Nothing waits for the device: minibatches are counted on the CPU."""

    def __init__(self, tasks: list[str], epoch: int):
        super().__init__()
        self.tasks, self.epoch = tasks, epoch
        self.seen = 0  # minibatches
        self.register_buffer("weights", torch.ones(len(tasks)))
        self.register_buffer("sums", torch.zeros(len(tasks)))  # of this epoch's losses
        self.register_buffer("means", torch.zeros(len(tasks)))  # of the last epoch's

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: scalar}, each times its weight."""
        weighted = {task: w * losses[task] for task, w in zip(self.tasks, self.weights)}
        self._remember(torch.stack([losses[task].detach() for task in self.tasks]))
        return weighted

    def _remember(self, losses: Tensor) -> None:
        # New tensors: the weights are still to be read by the backward pass.
        self.sums = self.sums + losses  # type: ignore[has-type]
        self.seen += 1
        if self.seen % self.epoch:
            return
        means = self.sums / self.epoch
        if self.seen > self.epoch:
            ratios = torch.where(self.means > 0, means / self.means, 1)  # type: ignore[has-type]
            self.weights = len(self.tasks) * (ratios / TEMPERATURE).softmax(0)
        self.means, self.sums = means, torch.zeros_like(means)

    def get_extra_state(self) -> int:
        """The minibatches seen, for `state_dict`."""
        return self.seen

    def set_extra_state(self, seen: int) -> None:
        """Go on after so many minibatches."""
        self.seen = seen


def build(tasks: list[str], epoch: int) -> nn.Module:
    return DynamicWeightAverage(tasks, epoch)
