"""The paper's iterative strategy: train and score, remove the lowest filters, go on."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune_utils.core.checkpoints import Checkpoints
from mtprune_utils.core.data import Dataset
from mtprune_utils.core.evaluation import describe
from mtprune_utils.core.model import Architecture, MultiTaskModel, count_parameters
from mtprune_utils.core.scoring import TASK_GRADIENTS, Scores, Signals
from mtprune_utils.core.selection import chooser
from mtprune_utils.core.settings import Profile, Pruning
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.schedules import get_schedule


@dataclass(frozen=True)
class Removal:
    """How many filters go of each group, and the level of the size that it lands on, if any."""

    counts: list[int]
    level: int | None


def removal_plan(widths: list[int], settings: Pruning) -> list[int]:
    """How many filters are left after each removal, down to the least in every group."""
    spare = sum(max(width - settings.min_filters, 0) for width in widths)
    plan = get_schedule(settings.pruning_schedule)
    return plan(sum(widths), spare, settings.filters_per_step)


def check_sizes(dense: Architecture, sizes: tuple[float, ...], min_filters: int) -> None:
    """Raises ValueError if a size, a share of the dense parameters, cannot be reached."""
    whole = count_parameters(dense)
    smallest = dense.with_widths([min(width, min_filters) for width in dense.width_list])
    least = count_parameters(smallest)
    if any(round(size * whole) < least for size in sizes):
        share = math.ceil(least / whole * 1000) / 1000
        raise ValueError(
            f"sizes: at the floor of {min_filters} filters per layer a share of {share} is left: "
            "ask for more"
        )


def prune_iteratively(
    model: MultiTaskModel,
    dataset: Dataset,
    profile: Profile,
    settings: Pruning,
    criterion: str,
    seed: int,
    measure: Callable[[MultiTaskModel], dict[str, float]],
    removals: list[Removal] | None = None,
    last_level: int | None = None,
    at_level: Callable[[int], None] = lambda level: None,
    report: Callable[[str], None] = lambda line: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[dict], list[dict]]:
    """The paper's loop, in place, down to `min_filters` filters in every group.

    On its way it lands on each of the profile's sizes: a removal that would pass one takes only the
    filters that bring the parameter count nearest to it, and the rest goes after one more recovery;
    `at_level` is then told the size's level. removals: of another run, to be repeated: of each
    group as many filters go, but those that are lowest here. last_level: stop there. With
    `checkpoints` an interrupted run goes on where it was.

    Returns evaluations and layers. There is one evaluation of the dense network, and one right
    after every removal and after the recovery that follows it, whose `target_level` is that of the
    size that it has landed on, else None. Before every removal `layers` has one row per layer: its
    width, the mean cosine similarity of its filters' task gradients over the last minibatches, the
    share of dead filters, and how many go next. Raises ValueError if a size cannot be reached,
    Diverged if a loss is not finite.
    """
    dense = model.architecture
    plan = removal_plan(dense.width_list, settings)
    check_sizes(dense, profile.sizes, settings.min_filters)
    whole = count_parameters(dense)
    targets = {level: round(size * whole) for level, size in enumerate(profile.sizes)}
    model.train()
    steps = (len(plan) + len(targets) + 1) * settings.prune_interval
    trainer = Trainer(model, dataset, profile, settings, steps, seed)
    scored = get_criterion(criterion)
    every_step = scored.needs != TASK_GRADIENTS  # scoring costs next to nothing
    generator = torch.Generator().manual_seed(seed)
    evaluations: list[dict] = []
    layers: list[dict] = []
    removal, target_level, state = 0, None, checkpoints.load() if checkpoints else None
    if state:
        # Any filters do: the kept ones' weights and moments come from the checkpoint.
        gone = [torch.arange(o - n) for o, n in zip(dense.width_list, state["widths"])]
        model.remove(gone, trainer.optimizer)
        trainer.restore(state["trainer"])
        evaluations, layers, metrics = state["evaluations"], state["layers"], state["metrics"]
        removal, target_level = state["removal"], state["target_level"]
        targets = {level: t for level, t in targets.items() if level in state["targets"]}
    else:
        metrics = measure(model)
    size = describe(model, profile)

    def row(phase: str, level: int | None = None) -> dict:
        step = trainer.step_count if phase != "dense" else 0
        place = {"removal": removal, "phase": phase, "target_level": level, "step": step}
        return {**place, **size, **metrics, **losses}

    while True:
        scores = Scores(scored, model.groups, model, generator)
        cosine = Scores(get_criterion("cosprune"), model.groups, model)
        if state:
            scores.restore(state["scores"])
            cosine.restore(state["cosine"])
            state = None
        end = (removal + 1) * settings.prune_interval
        while trainer.step_count < end:
            if checkpoints:
                checkpoints.keep(
                    trainer.step_count,
                    lambda: {
                        "trainer": trainer.state(),
                        "scores": scores.state(),
                        "cosine": cosine.state(),
                        "removal": removal,
                        "widths": model.architecture.width_list,
                        "target_level": target_level,
                        "targets": list(targets),
                        "metrics": metrics,
                        "evaluations": evaluations,
                        "layers": layers,
                    },
                )
            # Counted back from the removal.
            batch, offset = divmod(end - 1 - trainer.step_count, settings.score_every)
            reading = [scores] if every_step or not offset else []
            if not offset and batch < settings.cosine_batches:
                reading.append(cosine)
            trainer.step(reading)
        losses = trainer.mean_losses()
        if removal:
            metrics = measure(model)
        if removals is None:
            chosen, next_level = _next_removal(model, scores.mean(), plan, targets, settings)
        else:
            chosen, next_level = _repeated(removals[removal], scores.mean())
        layers += _layer_rows(model, removal, cosine.mean(), chosen)
        evaluations.append(row("recovered" if removal else "dense", target_level))
        if removal:
            report(f"removal {removal}: {model.architecture.filters} filters left")
        if target_level is not None:
            at_level(target_level)
        if target_level is not None and target_level == last_level or not sum(map(len, chosen)):
            return evaluations, layers
        model.remove(chosen, trainer.optimizer)
        size = describe(model, profile)
        removal, target_level, metrics = removal + 1, next_level, measure(model)
        targets.pop(target_level, None)
        evaluations.append(row("removed"))


def _layer_rows(
    model: MultiTaskModel, removal: int, cosines: list[Tensor], chosen: list[Tensor]
) -> list[dict]:
    return [
        {
            "removal": removal,
            "layer": i,
            "width": len(cosine),
            "cosine": cosine.mean().item(),
            "dead_share": dead.float().mean().item(),
            "removed_next": len(units),
        }
        for i, (cosine, dead, units) in enumerate(zip(cosines, dead_units(model), chosen))
    ]


def dead_units(model: MultiTaskModel) -> list[Tensor]:
    """Which units got no gradient from the last backward pass: one (units,) boolean per group."""
    tensors = dict(model.named_parameters())
    found = []
    for group in model.groups:
        gradients = Signals(group, tensors).weight_gradients()
        found.append(torch.stack([(rows == 0).all(1) for rows in gradients]).all(0))
    return found


def _next_removal(
    model: MultiTaskModel,
    scores: list[Tensor],
    plan: list[int],
    targets: dict[int, int],
    settings: Pruning,
) -> tuple[list[Tensor], int | None]:
    """The filters that go next, to the plan's next count or the next size; that size's level."""
    filters = model.architecture.filters
    left = next((left for left in plan if left <= filters - settings.round_to), filters)
    count = filters - left  # 0 at the floor
    choose = chooser(scores, settings.min_filters, settings.round_to, settings.ranking)
    chosen = choose(count)
    level = min(targets, default=None)
    if level is None or _parameters_without(model, chosen) > targets[level]:
        return chosen, None
    return _nearest_to(targets[level], model, choose, count), level


def _repeated(removal: Removal, scores: list[Tensor]) -> tuple[list[Tensor], int | None]:
    pairs = zip(scores, removal.counts, strict=True)
    lowest = [score.argsort(stable=True)[:count].sort().values.cpu() for score, count in pairs]
    return lowest, removal.level


def _parameters_without(model: MultiTaskModel, chosen: list[Tensor]) -> int:
    now = model.architecture
    widths = [width - len(units) for width, units in zip(now.width_list, chosen)]
    return count_parameters(now.with_widths(widths))


def _nearest_to(
    target: int, model: MultiTaskModel, choose: Callable[[int], list[Tensor]], count: int
) -> list[Tensor]:
    """Of the `count` lowest filters as many as bring the parameters nearest to the target.

    At least one.
    """

    def without(number: int) -> int:
        return _parameters_without(model, choose(number))

    at = bisect_left(range(1, count), -target, key=lambda number: -without(number)) + 1
    candidates = max(at - 1, 1), at
    return choose(min(candidates, key=lambda number: abs(without(number) - target)))
