"""mtprune: structured pruning of multi-task networks (Garg, Zhang, Guan, 2023), reproduced and extended.

The modules lie in the order in which data flows through them, each importing only from those before it:
data, tasks, models, gradients, criteria, pruning, training, runs, stages, stats, plots (and batch beside them).
"""

__version__ = "0.1.0"
