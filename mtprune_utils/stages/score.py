"""All criteria on one pass over minibatches of the dense network: how far they agree.

Nothing is trained: every criterion scores the same network on the same minibatches.
"""

from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.selection import select
from mtprune_utils.core.settings import Pruning
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.stages._training import DENSE, device_of, network

TABLES = ("agreement.csv",)
SETTINGS = ("agreement_batches", "criteria", "prune")
NOTEBOOK = "12_score_filters"


def source(run):
    return run.experiment.dense(run.seed)


def search(run) -> None:
    return None


def settings(run) -> Pruning:
    return run.profile.prune


def weights(run) -> str:
    return DENSE


def entries(run) -> list[str]:
    criteria = [f"criteria.{name}" for name in run.profile.criteria]
    return [*criteria, f"rankings.{settings(run).ranking}"]


def perform(run, dataset, report, checkpoints) -> None:
    found = score_dense(run, dataset)
    pairs = combinations(found, 2)
    ranking = settings(run).ranking
    rows = [
        {"first": one, "second": two} | agreement(found[one], found[two], ranking)
        for one, two in pairs
    ]
    run.write_table("agreement.csv", rows)


def score_dense(run, dataset) -> dict[str, list[Tensor]]:
    """{criterion: one (units,) tensor of scores per group} of the dense network."""
    profile, seed = run.profile, run.random_seed
    model = network(run.source, DENSE).to(device_of(profile)).train()
    batches = profile.agreement_batches
    trainer = Trainer(model, dataset, profile, settings(run), batches, seed)
    scores = [
        Scores(get_criterion(name), model.groups, model, torch.Generator().manual_seed(seed))
        for name in profile.criteria
    ]
    for _ in range(batches):
        trainer.read(scores)
    return {of.criterion.name: of.mean() for of in scores}


def agreement(one: list[Tensor], two: list[Tensor], ranking: str = "global") -> dict[str, float]:
    """How far two criteria agree on one network: one (units,) tensor of scores per group each.

    spearman: the rank correlation over all filters; within_layers: its mean over layers, of which
    criteria that differ in widths alone have 1; overlap: the share of the lower half of all filters
    that is in both lower halves (half of it by chance). None for a correlation of scores that are
    all equal.
    """
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(one, two, strict=True)]
    layers = [rho for a, b in pairs if (rho := _spearman(a, b)) is not None]
    half = sum(map(len, one)) // 2
    lower = [
        {(i, unit) for i, units in enumerate(lowest) for unit in units.tolist()}
        for lowest in (select(scores, half, 0, ranking=ranking) for scores in (one, two))
    ]
    return {
        "spearman": _spearman(*(torch.cat(of) for of in zip(*pairs))),
        "within_layers": sum(layers) / len(layers) if layers else None,
        "overlap": len(lower[0] & lower[1]) / half,
    }


def _spearman(one: Tensor, two: Tensor) -> float | None:
    ranks = [pd.Series(of.tolist()).rank() for of in (one, two)]
    return None if any(of.nunique() < 2 for of in ranks) else ranks[0].corr(ranks[1])
