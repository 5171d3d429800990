"""mtprune: structured pruning of multi-task networks (Garg, Zhang, Guan, 2023), reproduced and extended.

The modules lie in the order in which data flows through them, each importing only from those before it:
tasks, data, models, gradients, criteria, profiles, pruning, checkpoints, training, runs, stages, results, stats, claims,
inference, plots. files serves them all; execution and batch run the notebooks, readme writes the README's tables, check names
figures that are out of date.
"""

__version__ = "0.1.0"
