"""Whether the data can tell networks apart: the dense network and one with a quarter of its filters, trained alike.

make bench-capacity; writes benchmarks/capacity.csv: test metrics as mean and standard deviation over the profile's seeds.
Dense networks that `make figures` has trained before are taken as they are.
"""

from pathlib import Path

import pandas as pd
import torch

from mtprune_utils import stages
from mtprune_utils.files import write_atomically
from mtprune_utils.profiles import PROFILES
from mtprune_utils.runs import PROJECT, Experiment

RESULTS = Path(__file__).with_name("capacity.csv")
PROFILE = PROFILES["quick"]
QUARTER = {"widths": [width // 4 for width in PROFILE.widths], "prune.floor": 1, "sizes": [0.9], "controls.ranks": [0]}
NETWORKS = {"dense": {}, "a quarter of the filters": QUARTER}  # a pruning run's floor and sizes have to fit, and play no part


def main() -> None:
    torch.set_num_threads(1)
    tables = []
    for name, overrides in NETWORKS.items():
        experiment = Experiment.open(PROFILE.name, "rooms", "", str(PROJECT / "runs"), overrides)
        for run in map(experiment.dense, range(PROFILE.seeds)):
            stages.execute(run, lambda line: print(line, flush=True))
            tables.append(pd.read_csv(run.path("evaluations.csv")).assign(network=name))
    table = pd.concat(tables)
    metrics = [column for column in table if column.split(".")[0] in experiment.tasks and not column.endswith(".loss")]
    summary = table.groupby(["network", "filters", "macs"], sort=False)[metrics].agg(["mean", "std"]).round(4)
    summary.columns = [" ".join(column) for column in summary.columns]
    summary = summary.assign(seeds=PROFILE.seeds).reset_index().T
    write_atomically(RESULTS, summary.to_csv(header=False).encode())
    print(summary.to_string(header=False))


if __name__ == "__main__":
    main()
