"""mtprune: structured pruning of multi-task networks (Garg, Zhang, Guan, 2023), reproduced and extended.

The modules lie in the order in which data flows through them, each importing only from those before it:
tasks, data, models, gradients, criteria, pruning, profiles, training, runs, stages, stats, plots; execution and batch run
the notebooks, readme writes the README's tables.
"""

__version__ = "0.1.0"
