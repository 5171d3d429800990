"""What scores lose when they are taken from fewer minibatches, or in bf16: make bench-scores.

CosPrune's scores before the first removal against those of every minibatch in float32: Spearman's
rank correlation over all filters, and the share of the filters chosen by both (of the profile's
number, and of 100). For fewer minibatches also what the networks pruned so keep: each task's
endpoint at the profile's sizes and at the floor. Mean and standard deviation over seeds. Writes
benchmarks/scores.csv.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from mtprune_utils.core.data import Dataset
from mtprune_utils.core.model import MultiTaskModel
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.selection import select
from mtprune_utils.core.settings import Profile, Pruning
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import write_atomically
from mtprune_utils.stages._training import DENSE, network
from mtprune_utils.study.execute import execute, load_data
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.profiles import PROFILES

RESULTS = Path(__file__).with_name("scores.csv")


def first_scores(run: Run, precision: str, every: int) -> list[torch.Tensor]:
    """The mean scores before a run's first removal, of weights that stand still."""
    profile = replace(run.profile, precision=precision)
    model = network(run.source, DENSE).train()
    steps = profile.prune.prune_interval
    return still_scores(model, load_data(run), profile, run.criterion, steps, run.seed, every)


def still_scores(
    model: MultiTaskModel,
    dataset: Dataset,
    profile: Profile,
    criterion: str,
    steps: int,
    seed: int,
    every: int = 1,
) -> list[torch.Tensor]:
    """Mean scores over so many minibatches, each or every so-many-th scored.

    The weights stand still, so that only the scoring differs.
    """
    trainer = Trainer(model, dataset, profile, replace(profile.prune, lr=1e-12), 10_000, seed)
    scores = Scores(get_criterion(criterion), model.groups, model)
    for left in reversed(range(steps)):
        trainer.step([scores] * (left % every == 0))
    return scores.mean()


def agreement(
    settings: Pruning, scores: list[torch.Tensor], reference: list[torch.Tensor]
) -> dict[str, float]:
    """Spearman's rank correlation, and the shares of the filters chosen by both."""
    ranks = [pd.Series(torch.cat(each).cpu()).rank() for each in (scores, reference)]
    shares = {}
    for count in (settings.filters_per_step, 100):
        chosen = [select(each, count, settings.min_filters) for each in (scores, reference)]
        units, others = (
            {(i, unit) for i, group in enumerate(each) for unit in group.tolist()}
            for each in chosen
        )
        shares[f"chosen by both, of {count}"] = len(units & others) / count
    return {"rank correlation": ranks[0].corr(ranks[1]), **shares}


def kept(run: Run) -> dict[str, float]:
    table = pd.read_csv(run.path("evaluations.csv"))
    rows = {
        f"size {level}": table[table["target_level"] == level].iloc[0]
        for level in range(len(run.profile.sizes))
    }
    rows["floor"] = table.iloc[-1]
    columns = [f"{task.name}.{task.endpoint}" for task in run.experiment.tasks.values()]
    return {f"{name}: {column}": row[column] for name, row in rows.items() for column in columns}


def measure(profile: str, steps: list[int], seeds: int) -> pd.DataFrame:
    rows = []
    for seed in range(seeds):
        runs = {
            k: Experiment.open(profile, "rooms", "", "runs", {"prune.score_every": k}).prune(
                "cosprune", seed
            )
            for k in steps
        }
        for run in runs.values():
            execute(run, lambda line: print(line, flush=True))
        first = runs[steps[0]]
        reference = first_scores(first, "float32", 1)
        for k, run in runs.items():
            scores = first_scores(run, "float32", k)
            found = agreement(run.profile.prune, scores, reference) | kept(run)
            rows.append({"scores": f"every {k}", "seed": seed, **found})
        found = agreement(first.profile.prune, first_scores(first, "bf16", 1), reference)
        rows.append({"scores": "bf16", "seed": seed, **found})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--seeds", type=int, default=3)
    which = "score every so-many-th minibatch"
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help=which)
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
