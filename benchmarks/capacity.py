"""Whether the data can tell networks apart: the dense one, and one with a quarter of its filters.

make bench-capacity; both are trained alike. Writes benchmarks/capacity.csv: test metrics as mean
and standard deviation over the profile's seeds. Dense networks that `make figures` has trained
before are taken as they are.
"""

from pathlib import Path

import pandas as pd
import torch

from mtprune_utils.files import PROJECT, write_atomically
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES

RESULTS = Path(__file__).with_name("capacity.csv")
PROFILE = PROFILES["quick"]
QUARTER = {
    "width": PROFILE.width / 4,
    "least_width": 1,
    # What pruning would come down to has to fit, and plays no part.
    "prune.min_filters": 1,
    "sizes": [0.9],
    "controls.levels": [0],
}
NETWORKS = {"dense": {}, "a quarter of the filters": QUARTER}


def main() -> None:
    torch.set_num_threads(1)
    tables = []
    for name, overrides in NETWORKS.items():
        experiment = Experiment.open(PROFILE.name, "rooms", "", str(PROJECT / "runs"), overrides)
        for run in map(experiment.dense, range(PROFILE.seeds)):
            execute(run, lambda line: print(line, flush=True))
            tables.append(pd.read_csv(run.path("evaluations.csv")).assign(network=name))
    table = pd.concat(tables)
    of_tasks = [column for column in table if column.split(".")[0] in experiment.tasks]
    metrics = [column for column in of_tasks if not column.endswith(".loss")]
    networks = table.groupby(["network", "filters", "macs"], sort=False)
    summary = networks[metrics].agg(["mean", "std"]).round(4)
    summary.columns = [" ".join(column) for column in summary.columns]
    summary = summary.assign(seeds=PROFILE.seeds).reset_index().T
    write_atomically(RESULTS, summary.to_csv(header=False).encode())
    print(summary.to_string(header=False))


if __name__ == "__main__":
    main()
