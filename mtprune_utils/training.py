"""Training, evaluation and the iterative-pruning loop. Nothing here knows of files: runs.py and stages.py do."""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtprune_utils.checkpoints import Checkpoints, random_state, set_random_state
from mtprune_utils.criteria import CRITERIA, Scores, dead_filters
from mtprune_utils.data import Dataset, RandomBatches, Split, augment, image_to_float
from mtprune_utils.gradients import TaskGradients, backward, task_backward
from mtprune_utils.models import MultiTaskNet, complexity, count_parameters, evaluation_mode
from mtprune_utils.profiles import Optimization, Profile, Pruning
from mtprune_utils.pruning import Pruner, check_sizes, removal_plan, select_filters
from mtprune_utils.tasks import Task, numbers, task_losses

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
EVALUATION_BATCH = 32  # or a training batch, if that is larger: it takes less memory, as nothing is kept for a backward pass
SCHEDULES = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


class Diverged(RuntimeError):
    """A task's loss became NaN or infinite."""


class Trainer:
    """One optimizer on one network: takes steps on augmented minibatches, and keeps each task's mean loss.

    The minibatches depend on `seed` alone, so that runs with equal seeds see the same images in the same order.
    """

    def __init__(
        self, model: MultiTaskNet, dataset: Dataset, profile: Profile, settings: Optimization | Pruning, steps: int,
        seed: int,
    ):
        # Channels-last convolutions train a quarter faster on the CPU, and feed the tensor cores of a GPU.
        self.model = model.to(memory_format=torch.channels_last)
        self.tasks, self.mirror, self.profile = dataset.tasks, dataset.mirror, profile
        self.optimizer = OPTIMIZERS[settings.optimizer](
            model.parameters(), settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        schedule = SCHEDULES[settings.schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: schedule(step / steps))
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = RandomBatches(dataset.train, profile.batch_size, self.generator)
        self.step_count = 0
        self.losses: dict[str, list[Tensor]] = {task: [] for task in self.tasks}  # of each step since they were last asked for

    def step(self, scores: list[Scores] = ()) -> None:
        """One forward pass, one optimizer step; `scores` are updated in between from the gradients they need."""
        profile = self.profile
        images, targets = augment(
            next(self.batches), self.tasks, profile.image_height, profile.crop, profile.scale, profile.depth_follows_scale,
            self.generator, self.mirror, profile.stride,
        )
        self.optimizer.zero_grad()
        losses = task_losses(self.tasks, forward(self.model, images, profile), targets)
        task_gradients: TaskGradients | None = None
        if any(score.criterion.needs == "task_gradients" for score in scores):
            task_gradients = task_backward(losses, self.model)
        else:
            backward(losses)
        for score in scores:
            score.update(task_gradients)
        self.optimizer.step()
        self.scheduler.step()
        self.step_count += 1
        for task, loss in losses.items():
            self.losses[task].append(loss.detach())

    def check(self) -> None:
        """Raises Diverged, naming task and step, if a loss since the last `mean_losses` is not finite."""
        for task, losses in self.losses.items():
            for i in (~torch.stack(losses).isfinite()).nonzero().flatten()[:1].tolist() if losses else ():
                step = self.step_count - len(losses) + i + 1
                raise Diverged(f"the loss of {task} is {losses[i].item()} at step {step}: lower the learning rate")

    def mean_losses(self) -> dict[str, float]:
        """Mean training loss of each task since the last call. Raises Diverged if one is not finite."""
        self.check()
        means = {f"train.{task}.loss": float(sum(losses)) / len(losses) for task, losses in self.losses.items()}
        for losses in self.losses.values():
            losses.clear()
        return means

    def state(self) -> dict:
        """Everything that the next steps depend on, between two of them. Raises Diverged rather than to keep a broken one."""
        self.check()
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(), "batches": self.batches.state(), "step": self.step_count,
            "losses": {task: torch.stack(losses) if losses else None for task, losses in self.losses.items()},
            "random": random_state(),
        }

    def restore(self, state: dict) -> None:
        """The inverse of `state`, on a network of the same widths."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.batches.restore(state["batches"])
        self.step_count = state["step"]
        device = next(self.model.parameters()).device
        self.losses = {task: [] if kept is None else list(kept.to(device)) for task, kept in state["losses"].items()}
        set_random_state(state["random"])


def forward(network: torch.nn.Module, images: Tensor, profile: Profile):
    """What a network, or its backbone, makes of images, computed in the profile's precision.

    A network's outputs come back in float32; weights, and so gradients and scores, are float32 in either precision.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=profile.precision == "bf16"):
        outputs = network(images.contiguous(memory_format=torch.channels_last))
    return {task: output.float() for task, output in outputs.items()} if isinstance(outputs, dict) else outputs


def describe(model: MultiTaskNet, profile: Profile) -> dict[str, int | str]:
    """The network's size: filters, parameters, MACs for one image as evaluated, and widths as "8 8 16 ..."."""
    architecture = model.architecture
    return {**complexity(architecture, (profile.crop, profile.crop)), "widths": " ".join(map(str, architecture.widths))}


def evaluation_batches(split: Split, tasks: dict[str, Task], profile: Profile) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Whole images, at crop x crop, as float, and their targets."""
    for batch in split.resized((profile.crop, profile.crop), tasks).batches(max(profile.batch_size, EVALUATION_BATCH)):
        targets = {name: target.float() if target.is_floating_point() else target for name, target in batch.targets.items()}
        yield image_to_float(batch.image), targets


@torch.no_grad()
def evaluate(model: MultiTaskNet, split: Split, tasks: dict[str, Task], profile: Profile) -> dict[str, float]:
    """Every metric of every task over all pixels of the split, as {"task.metric": value}, and each "task.loss".

    Outputs are resized (bilinear) to the images for the metrics. Where depth follows the scale, a network sees images
    that were made smaller as farther away, and its depths are brought back. Leaves train/eval mode as it was.
    Raises ValueError where there is nothing to measure: no image, or no valid pixel for a task.
    """
    for name, task in tasks.items():
        if not any(task.valid(target).any() for target in split.targets[name].split(64)):
            raise ValueError(f"no pixel of {len(split)} images has a valid {name}: take more")
    scale = output_scale(profile)
    meters = {name: task.meter() for name, task in tasks.items()}
    loss_sums: dict[str, Tensor | float] = dict.fromkeys(tasks, 0.0)
    with evaluation_mode(model):
        for images, targets in evaluation_batches(split, tasks, profile):
            found = forward(model, images, profile)
            outputs = {name: tasks[name].unscaled(output, scale) for name, output in found.items()}
            for name, loss in task_losses(tasks, outputs, targets).items():
                loss_sums[name] = loss_sums[name] + loss * len(images)
            for name, meter in meters.items():
                meter.update(tasks[name].output_at(outputs[name], images.shape[-2:]), targets[name])
    return numbers({
        **{f"{name}.{metric}": value for name, meter in meters.items() for metric, value in meter.compute().items()},
        **{f"{name}.loss": total / len(split) for name, total in loss_sums.items()},
    })


def output_scale(profile: Profile) -> float:
    """How many times as large the evaluated images are as those that depths are true of."""
    return profile.crop / profile.image_height if profile.depth_follows_scale else 1.0


def evaluate_afresh(model: MultiTaskNet, dataset: Dataset, split: Split, profile: Profile) -> dict[str, float]:
    """`evaluate` on a split of the data set, with batch statistics that fit the weights as they are."""
    return evaluate(refreshed(model, dataset, profile), split, dataset.tasks, profile)


def refreshed(model: MultiTaskNet, dataset: Dataset, profile: Profile) -> MultiTaskNet:
    """A copy with batch statistics taken anew from the first training images.

    Running statistics lag behind a removal by dozens of steps. A network without batch norm is
    given back as it is.
    """
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        return model
    fresh = copy.deepcopy(model).train()
    for module in fresh.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
    with torch.no_grad():
        for images, _ in evaluation_batches(dataset.calibration, {}, profile):
            forward(fresh.backbone, images, profile)
    return fresh


def trivial_predictors(dataset: Dataset, profile: Profile) -> dict[str, dict[str, float]]:
    """Test metrics of predictors that do not look at the image: a network has to beat them to have learnt anything.

    "constant" predicts the training images' most frequent class, median depth and mean normal; "position prior" the
    same for each pixel position (and for the image as a whole, where that is what a task is about).
    """
    train, test = (
        [targets for _, targets in evaluation_batches(split, dataset.tasks, profile)] for split in (dataset.train, dataset.test)
    )
    scores: dict[str, dict[str, float]] = {"constant": {}, "position prior": {}}
    for task in dataset.tasks.values():
        target = torch.cat([targets[task.name] for targets in train])
        position = constant = task.prior(target)
        if task.geometry != "image":
            pixels = target.movedim((-2, -1), (0, 1)).flatten(0, 2)[..., None, None]  # every pixel an image of its own
            constant = task.prior(pixels).expand_as(position)
        for name, output in (("constant", constant), ("position prior", position)):
            meter = task.meter()
            for targets in test:
                meter.update(output.expand(len(targets[task.name]), -1, -1, -1), targets[task.name])
            scores[name] |= numbers({f"{task.name}.{metric}": value for metric, value in meter.compute().items()})
    return scores


def total_loss(metrics: dict[str, float]) -> float:
    """What models are selected by, on validation images: the sum of the tasks' losses, as in training."""
    return sum(value for name, value in metrics.items() if name.endswith(".loss") and not name.startswith("train."))


def train(
    model: MultiTaskNet, dataset: Dataset, profile: Profile, settings: Optimization, seed: int,
    report: Callable[[str], None] = print, watch: Callable[[int, float], None] = lambda step, loss: None,
    checkpoints: Checkpoints | None = None,
) -> list[dict]:
    """Train in place; the weights of the evaluation with the lowest validation loss are kept.

    Returns the training curve: one row per evaluation, with the training loss since the last one and every validation
    metric. `selected` marks the row whose weights were kept. `watch` is told the step and summed validation loss of each.
    With `checkpoints` an interrupted training goes on where it was. Raises Diverged if a loss is not finite.
    """
    model.train()
    trainer = Trainer(model, dataset, profile, settings, settings.steps, seed)
    curve, best_state = [], None
    if checkpoints and (state := checkpoints.load()):
        trainer.restore(state["trainer"])
        curve, best_state = state["curve"], state["best"]
        for row in curve:
            watch(row["step"], total_loss(row))
    marks = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    while trainer.step_count < settings.steps:
        if checkpoints:
            checkpoints.keep(
                trainer.step_count, lambda: {"trainer": trainer.state(), "curve": curve, "best": best_state}
            )
        trainer.step()
        if (step := trainer.step_count) not in marks:
            continue
        losses = trainer.mean_losses()
        metrics = evaluate(model, dataset.validation, dataset.tasks, profile)
        for task in dataset.tasks:
            if not math.isfinite(loss := metrics[f"{task}.loss"]):
                raise Diverged(f"the validation loss of {task} is {loss} at step {step}: lower the learning rate")
        total = total_loss(metrics)
        report(f"step {step}/{settings.steps}: validation loss {total:.3f}")
        if total < min(map(total_loss, curve), default=math.inf):
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        curve.append({"step": step, "lr": trainer.scheduler.get_last_lr()[0], **losses, **metrics, "selected": 0})
        watch(step, total)
    model.load_state_dict(best_state)
    min(curve, key=total_loss)["selected"] = 1
    return curve


def prune_iteratively(
    model: MultiTaskNet, dataset: Dataset, profile: Profile, settings: Pruning, criterion: str, seed: int,
    measure: Callable[[MultiTaskNet], dict[str, float]], last_rank: int | None = None,
    landed: Callable[[int], None] = lambda rank: None, report: Callable[[str], None] = lambda line: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[dict], list[dict]]:
    """The paper's loop, in place: train and score, remove the lowest filters, go on, down to the floor.

    On its way it lands on each of the profile's sizes: a removal that would pass one takes only the filters that bring
    the parameter count nearest to it, and the rest goes after one more recovery; `landed` is then told the size's rank.
    `last_rank`: stop at that size. With `checkpoints` an interrupted run goes on where it was.

    Returns evaluations and layers. There is one evaluation of the dense network, and one right after every removal and
    after the recovery that follows it, whose `landing` is the rank of the size that it has landed on, else None. Before
    every removal `layers` has one row per layer: its width, the mean cosine similarity of its filters' task gradients over
    the last minibatches, the share of dead filters, and how many go next. Raises ValueError if a size lies under the
    floor, Diverged if a loss is not finite.
    """
    dense = model.architecture
    plan = removal_plan(dense.widths, settings)
    check_sizes(dense, profile.sizes, settings.floor)
    targets = {rank: round(size * count_parameters(dense)) for rank, size in enumerate(profile.sizes)}
    model.train()
    trainer = Trainer(model, dataset, profile, settings, (len(plan) + len(targets) + 1) * settings.every, seed)
    pruner = Pruner(model)
    free = CRITERIA[criterion].needs != "task_gradients"  # to score
    generator = torch.Generator().manual_seed(seed)
    evaluations: list[dict] = []
    layers: list[dict] = []
    removal, landing, state = 0, None, checkpoints.load() if checkpoints else None
    if state:
        # Any filters do: the kept ones' weights and moments come from the checkpoint.
        pruner.remove([torch.arange(old - new) for old, new in zip(dense.widths, state["widths"])], trainer.optimizer)
        trainer.restore(state["trainer"])
        evaluations, layers, metrics = state["evaluations"], state["layers"], state["metrics"]
        removal, landing = state["removal"], state["landing"]
        targets = {rank: target for rank, target in targets.items() if rank in state["targets"]}
    else:
        metrics = measure(model)
    size = describe(model, profile)

    def row(phase: str, landing: int | None = None) -> dict:
        step = trainer.step_count if phase != "dense" else 0
        return {"removal": removal, "phase": phase, "landing": landing, "step": step, **size, **metrics, **losses}

    while True:
        scores, cosine = Scores(criterion, model.layers, generator), Scores("cosprune", model.layers)
        if state:
            scores.restore(state["scores"])
            cosine.restore(state["cosine"])
            state = None
        end = (removal + 1) * settings.every
        while trainer.step_count < end:
            if checkpoints:
                checkpoints.keep(trainer.step_count, lambda: {
                    "trainer": trainer.state(), "scores": scores.state(), "cosine": cosine.state(), "removal": removal,
                    "widths": model.architecture.widths, "landing": landing, "targets": list(targets), "metrics": metrics,
                    "evaluations": evaluations, "layers": layers,
                })
            round_, offset = divmod(end - 1 - trainer.step_count, settings.score_every)  # counted back from the removal
            observed = not offset and round_ < settings.cosine_batches
            trainer.step([scores] * (free or not offset) + [cosine] * observed)
        losses = trainer.mean_losses()
        if removal:
            metrics = measure(model)
        chosen, next_landing = _next_removal(model, scores.mean(), plan, targets, settings)
        similarities, dead = cosine.mean(), dead_filters(model.layers)
        layers += [
            {"removal": removal, "layer": i, "width": len(similarity), "cosine": similarity.mean().item(),
             "dead_share": d.float().mean().item(), "removed_next": len(indices)}
            for i, (similarity, d, indices) in enumerate(zip(similarities, dead, chosen))
        ]
        evaluations.append(row("recovered" if removal else "dense", landing))
        if removal:
            report(f"removal {removal}: {model.architecture.filters} filters left")
        if landing is not None:
            landed(landing)
        if landing is not None and landing == last_rank or not sum(map(len, chosen)):
            return evaluations, layers
        pruner.remove(chosen, trainer.optimizer)
        size = describe(model, profile)
        removal, landing, metrics = removal + 1, next_landing, measure(model)
        targets.pop(landing, None)
        evaluations.append(row("removed"))


def _next_removal(
    model: MultiTaskNet, scores: list[Tensor], plan: list[int], targets: dict[int, int], settings: Pruning
) -> tuple[list[Tensor], int | None]:
    """The filters that go next, down to the plan's next count or to the next size; and the rank of that size, if so."""
    filters = model.architecture.filters
    count = filters - next((left for left in plan if left <= filters - settings.multiple), filters)  # 0 at the floor
    choose = partial(select_filters, scores, floor=settings.floor, multiple=settings.multiple)
    chosen = choose(count)
    rank = min(targets, default=None)
    if rank is None or _parameters_without(model, chosen) > targets[rank]:
        return chosen, None
    return _nearest_to(targets[rank], model, choose, count), rank


def _parameters_without(model: MultiTaskNet, chosen: list[Tensor]) -> int:
    architecture = model.architecture
    widths = tuple(width - len(indices) for width, indices in zip(architecture.widths, chosen))
    return count_parameters(replace(architecture, widths=widths))


def _nearest_to(target: int, model: MultiTaskNet, choose: Callable[[int], list[Tensor]], count: int) -> list[Tensor]:
    """Of the `count` lowest filters, as many as bring the network's parameter count nearest to the target, at least one."""
    def without(number: int) -> int:
        return _parameters_without(model, choose(number))

    at = bisect_left(range(1, count), -target, key=lambda number: -without(number)) + 1
    best = min((max(at - 1, 1), at), key=lambda number: abs(without(number) - target))
    return choose(best)
