"""Training: one optimizer on one network, and a training phase with its evaluations."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtprune_utils.core.checkpoints import Checkpoints, random_state, set_random_state
from mtprune_utils.core.data import Dataset, RandomBatches, augment
from mtprune_utils.core.evaluation import evaluate, forward, total_loss
from mtprune_utils.core.model import MultiTaskModel
from mtprune_utils.core.scoring import TASK_GRADIENTS, Scores, TaskGradients, score_minibatch
from mtprune_utils.core.settings import Optimization, Profile, Pruning
from mtprune_utils.core.signals import aggregation_of, backward, task_backward
from mtprune_utils.core.task import task_losses
from mtprune_utils.weightings import get_weighting

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
LR_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


class Diverged(RuntimeError):
    """A task's loss became NaN or infinite."""


class Trainer:
    """Takes steps on augmented minibatches, and keeps each task's mean loss, unweighted.

    The minibatches depend on `seed` alone, so that runs with equal seeds see the same images in the
    same order.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        dataset: Dataset,
        profile: Profile,
        settings: Optimization | Pruning,
        steps: int,
        seed: int,
    ):
        # Channels-last convolutions train a quarter faster on the CPU and feed GPU tensor cores.
        self.model = model.to(memory_format=torch.channels_last)
        self.tasks, self.mirror, self.profile = dataset.tasks, dataset.mirror, profile
        epoch = len(dataset.train) // profile.batch_size  # in minibatches
        weighting = get_weighting(profile.weighting)(list(self.tasks), epoch)
        self.weighting = weighting.to(next(model.parameters()).device)
        self.optimizer = OPTIMIZERS[settings.optimizer](
            model.parameters(),
            settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if weights := list(self.weighting.parameters()):
            self.optimizer.add_param_group({"params": weights, "weight_decay": 0.0})
        schedule = LR_SCHEDULES[settings.lr_schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / steps)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = RandomBatches(dataset.train, profile.batch_size, self.generator)
        self.step_count = 0
        # Of each step since they were last asked for.
        self.losses: dict[str, list[Tensor]] = {task: [] for task in self.tasks}

    def step(self, scores: Sequence[Scores] = ()) -> None:
        """One forward pass, one optimizer step; `scores` read the gradients in between."""
        losses = self.read(scores)
        self.optimizer.step()
        self.scheduler.step()
        self.step_count += 1
        for task, loss in losses.items():
            self.losses[task].append(loss.detach())

    def read(self, scores: Sequence[Scores]) -> dict[str, Tensor]:
        """The next minibatch's losses and gradients, which `scores` read; nothing is trained.

        The tasks' gradients are those of the weighted losses; the training gradient, in `.grad`, is
        what the optimizer takes: their sum, or what the weighting aggregates them to.
        """
        profile = self.profile
        images, targets = augment(
            next(self.batches),
            self.tasks,
            profile.image_height,
            profile.crop,
            profile.scale,
            profile.depth_follows_scale,
            self.generator,
            self.mirror,
            profile.stride,
        )
        self.optimizer.zero_grad()
        losses = task_losses(self.tasks, forward(self.model, images, profile), targets)
        weighted = self.weighting(losses)
        gradients: TaskGradients | None = None
        read = any(score.criterion.needs == TASK_GRADIENTS for score in scores)
        if read or aggregation_of(self.weighting):
            shared = self.model.trunk.parameters()
            gradients = task_backward(weighted, self.model, shared, self.weighting)
        else:
            backward(weighted)
        score_minibatch(scores, gradients)
        return losses

    def check(self) -> None:
        """Raises Diverged if a loss since `mean_losses` is not finite: first task, and its step."""
        first = {}
        for task, losses in self.losses.items():
            if losses and (broken := (~torch.stack(losses).isfinite()).nonzero().tolist()):
                first[task] = broken[0][0]
        if first:
            task = min(first, key=first.get)
            losses, i = self.losses[task], first[task]
            step = self.step_count - len(losses) + i + 1
            what = f"the loss of {task} is {losses[i].item()} at step {step}"
            raise Diverged(f"{what}: lower the learning rate")

    def mean_losses(self) -> dict[str, float]:
        """Mean training loss of each task since the last call. Raises Diverged as `check` does."""
        self.check()
        means = {
            f"train.{task}.loss": float(sum(losses)) / len(losses)
            for task, losses in self.losses.items()
        }
        for losses in self.losses.values():
            losses.clear()
        return means

    def state(self) -> dict:
        """What the next steps depend on. Raises Diverged rather than keep a broken one."""
        self.check()
        return {
            "model": self.model.state_dict(),
            "weighting": self.weighting.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "batches": self.batches.state(),
            "step": self.step_count,
            "losses": {
                task: torch.stack(losses) if losses else None
                for task, losses in self.losses.items()
            },
            "random": random_state(),
        }

    def restore(self, state: dict) -> None:
        """The inverse of `state`, on a network of the same widths."""
        self.model.load_state_dict(state["model"])
        self.weighting.load_state_dict(state["weighting"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.batches.restore(state["batches"])
        self.step_count = state["step"]
        device = next(self.model.parameters()).device
        self.losses = {
            task: [] if kept is None else list(kept.to(device))
            for task, kept in state["losses"].items()
        }
        set_random_state(state["random"])


def train(
    model: MultiTaskModel,
    dataset: Dataset,
    profile: Profile,
    settings: Optimization,
    seed: int,
    report: Callable[[str], None] = print,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    checkpoints: Checkpoints | None = None,
) -> list[dict]:
    """Train in place; the weights of the evaluation with the lowest validation loss are kept.

    Returns the training curve: one row per evaluation, with the training loss since the last one
    and every validation metric. `selected` marks the row whose weights were kept. `watch` is told
    the step and summed validation loss of each. With `checkpoints` an interrupted training goes on
    where it was. Raises Diverged if a loss is not finite.
    """
    model.train()
    trainer = Trainer(model, dataset, profile, settings, settings.steps, seed)
    curve, best_state = [], None
    if checkpoints and (state := checkpoints.load()):
        trainer.restore(state["trainer"])
        curve, best_state = state["curve"], state["best"]
        for row in curve:
            watch(row["step"], total_loss(row))
    count = settings.evaluations
    marks = {round(settings.steps * (i + 1) / count) for i in range(count)}
    while trainer.step_count < settings.steps:
        if checkpoints:
            checkpoints.keep(
                trainer.step_count,
                lambda: {"trainer": trainer.state(), "curve": curve, "best": best_state},
            )
        trainer.step()
        if (step := trainer.step_count) not in marks:
            continue
        losses = trainer.mean_losses()
        metrics = evaluate(model, dataset.validation, dataset.tasks, profile)
        for task in dataset.tasks:
            if not math.isfinite(loss := metrics[f"{task}.loss"]):
                what = f"the validation loss of {task} is {loss} at step {step}"
                raise Diverged(f"{what}: lower the learning rate")
        total = total_loss(metrics)
        report(f"step {step}/{settings.steps}: validation loss {total:.3f}")
        if total < min(map(total_loss, curve), default=math.inf):
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        lr = trainer.scheduler.get_last_lr()[0]
        curve.append({"step": step, "lr": lr, **losses, **metrics, "selected": 0})
        watch(step, total)
    model.load_state_dict(best_state)
    min(curve, key=total_loss)["selected"] = 1
    return curve
