"""Uncertainty: each task's loss over twice its noise's variance, which is learned with the network.

    1/2 (exp(-s) L + s), with s = log sigma^2 of the task, at first 0

Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
and Semantics, CVPR 2018, Section 3.2, Equation 7. That is their form for regression; here it is
every task's, so that a classification's loss has the factor 1/2, too, where theirs has 1.

The log-variances learn at the network's own rate: a phase with a low one hardly leaves equal
weights.
"""

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """Learns the logarithm of each task's variance, from 0."""

    def __init__(self, tasks: list[str]):
        super().__init__()
        self.tasks = tasks
        self.log_variances = nn.Parameter(torch.zeros(len(tasks)))

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: scalar}, each weighted by what has been learnt."""
        return {
            task: ((-s).exp() * losses[task] + s) / 2
            for task, s in zip(self.tasks, self.log_variances)
        }


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Uncertainty(tasks)
