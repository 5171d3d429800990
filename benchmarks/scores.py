"""What scores lose when they are taken from fewer minibatches, or in bf16: make bench-scores.

CosPrune's scores before the first removal against those of every minibatch in float32: Spearman's rank correlation over all
filters, and the share of the filters chosen by both (of the profile's number, and of 100). For fewer minibatches also what
the networks pruned so keep: each task's endpoint at the profile's sizes and at the floor. Mean and standard deviation over
seeds. Writes benchmarks/scores.csv.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from mtprune_utils import stages, training
from mtprune_utils.criteria import Scores
from mtprune_utils.files import write_atomically
from mtprune_utils.profiles import PROFILES
from mtprune_utils.pruning import select_filters
from mtprune_utils.runs import Experiment, Run

RESULTS = Path(__file__).with_name("scores.csv")


def first_scores(run: Run, precision: str, every: int) -> list[torch.Tensor]:
    """The mean scores before a run's first removal, of weights that stand still, so that only the scoring differs."""
    profile = replace(run.profile, precision=precision)
    still = replace(profile.prune, lr=1e-12)
    model = stages.network(run.source, "model.safetensors").train()
    trainer = training.Trainer(model, stages.load_data(run), profile, still, 10_000, run.seed)
    scores = Scores(run.criterion, trainer.model.layers)
    for left in reversed(range(profile.prune.every)):
        trainer.step([scores] * (left % every == 0))
    return scores.mean()


def agreement(run: Run, scores: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    ranks = [pd.Series(torch.cat(each)).rank() for each in (scores, reference)]
    shares = {}
    for count in (run.profile.prune.filters, 100):
        chosen = [
            {(i, f) for i, layer in enumerate(select_filters(each, count, run.profile.prune.floor)) for f in layer.tolist()}
            for each in (scores, reference)
        ]
        shares[f"chosen by both, of {count}"] = len(chosen[0] & chosen[1]) / count
    return {"rank correlation": ranks[0].corr(ranks[1]), **shares}


def kept(run: Run) -> dict[str, float]:
    table = pd.read_csv(run.path("evaluations.csv"))
    rows = {f"size {rank}": table[table["landing"] == rank].iloc[0] for rank in range(len(run.profile.sizes))}
    rows["floor"] = table.iloc[-1]
    columns = [f"{task.name}.{task.endpoint}" for task in run.experiment.tasks.values()]
    return {f"{name}: {column}": row[column] for name, row in rows.items() for column in columns}


def measure(profile: str, steps: list[int], seeds: int) -> pd.DataFrame:
    rows = []
    for seed in range(seeds):
        runs = {k: Experiment.open(profile, "rooms", "", "runs", {"prune.score_every": k}).prune("cosprune", seed) for k in steps}
        for run in runs.values():
            stages.execute(run, lambda line: print(line, flush=True))
        first = runs[steps[0]]
        reference = first_scores(first, "float32", 1)
        for k, run in runs.items():
            scores = first_scores(run, "float32", k)
            rows.append({"scores": f"every {k}", "seed": seed, **agreement(run, scores, reference), **kept(run)})
        rows.append({"scores": "bf16", "seed": seed, **agreement(first, first_scores(first, "bf16", 1), reference)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="score every so-many-th minibatch")
    options = parser.parse_args()
    if min(options.seeds, *options.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    torch.set_num_threads(1)
    table = measure(options.profile, options.steps, options.seeds)
    summary = table.drop(columns="seed").groupby("scores", sort=False).agg(["mean", "std"])
    summary.columns = [" ".join(column) for column in summary.columns]
    summary = summary.assign(seeds=options.seeds).T.rename_axis("quantity")
    write_atomically(RESULTS, summary.to_csv(float_format="%.4f").encode())
    print(summary.round(3).to_string())


if __name__ == "__main__":
    main()
