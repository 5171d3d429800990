"""Metrics of a network on whole images, and of predictors that never look at one."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mtprune_utils.core.data import Dataset, Split, image_to_float
from mtprune_utils.core.model import MultiTaskModel, complexity, evaluation_mode
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.task import Task, numbers, task_losses

# Or a training batch, if that is larger: it takes less memory, as nothing is kept to go backward.
EVALUATION_BATCH = 32


def forward(network: nn.Module, images: Tensor, profile: Profile):
    """What a network, or its trunk, makes of images, computed in the profile's precision.

    A network's outputs come back in float32; weights, and so gradients and scores, are float32 in
    either precision.
    """
    half = profile.precision == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        outputs = network(images.contiguous(memory_format=torch.channels_last))
    if isinstance(outputs, dict):
        return {task: output.float() for task, output in outputs.items()}
    return outputs


def describe(model: MultiTaskModel, profile: Profile) -> dict[str, int | str]:
    """Filters, parameters, MACs for one image as evaluated, and widths as "8 8 16 ..."."""
    architecture = model.architecture
    size = complexity(architecture, (profile.crop, profile.crop))
    return {**size, "widths": " ".join(map(str, architecture.width_list))}


def evaluation_batches(
    split: Split, tasks: dict[str, Task], profile: Profile
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Whole images, at crop x crop, as float, and their targets."""
    size = (profile.crop, profile.crop)
    batch_size = max(profile.batch_size, EVALUATION_BATCH)
    for batch in split.resized(size, tasks).batches(batch_size):
        targets = {
            name: target.float() if target.is_floating_point() else target
            for name, target in batch.targets.items()
        }
        yield image_to_float(batch.image), targets


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, tasks: dict[str, Task], profile: Profile
) -> dict[str, float]:
    """Every metric of every task over all pixels, {"task.metric": value}, and each "task.loss".

    Outputs are resized (bilinear) to the images for the metrics. Where depth follows the scale, a
    network sees images that were made smaller as farther away, and its depths are brought back.
    Leaves train/eval mode as it was. Raises ValueError where there is nothing to measure: no image,
    or no valid pixel for a task.
    """
    for name, task in tasks.items():
        if not any(task.target.valid(part).any() for part in split.targets[name].split(64)):
            raise ValueError(f"no pixel of {len(split)} images has a valid {name}: take more")
    scale = output_scale(profile)
    meters = {name: task.meter() for name, task in tasks.items()}
    loss_sums: dict[str, Tensor | float] = dict.fromkeys(tasks, 0.0)
    with evaluation_mode(model):
        for images, targets in evaluation_batches(split, tasks, profile):
            found = forward(model, images, profile)
            outputs = {
                name: tasks[name].target.unscaled(output, scale) for name, output in found.items()
            }
            for name, loss in task_losses(tasks, outputs, targets).items():
                loss_sums[name] = loss_sums[name] + loss * len(images)
            size = images.shape[-2:]
            for name, meter in meters.items():
                output = tasks[name].target.resize_output(outputs[name], size)
                meter.update(output, targets[name])
    metrics = {
        f"{name}.{metric}": value
        for name, meter in meters.items()
        for metric, value in meter.compute().items()
    }
    losses = {f"{name}.loss": total / len(split) for name, total in loss_sums.items()}
    return numbers(metrics | losses)


def output_scale(profile: Profile) -> float:
    """How many times as large the evaluated images are as those that depths are true of."""
    return profile.crop / profile.image_height if profile.depth_follows_scale else 1.0


def evaluate_with_recalibrated_bn(
    model: nn.Module, dataset: Dataset, split: Split, profile: Profile
) -> dict[str, float]:
    """`evaluate` on a split, with batch statistics that fit the weights as they are."""
    return evaluate(recalibrated(model, dataset, profile), split, dataset.tasks, profile)


def recalibrated(model: nn.Module, dataset: Dataset, profile: Profile) -> nn.Module:
    """A copy with batch statistics taken anew from the first training images.

    Running statistics lag behind a removal by dozens of steps. A network without batch norm is
    given back as it is.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    fresh = copy.deepcopy(model).train()
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
    with torch.no_grad():
        for images, _ in evaluation_batches(dataset.calibration, {}, profile):
            forward(fresh.trunk, images, profile)
    return fresh


def trivial_predictors(dataset: Dataset, profile: Profile) -> dict[str, dict[str, float]]:
    """Test metrics of predictors that do not look at the image: what a network has to beat.

    "constant" predicts the training images' most frequent class, median depth and mean normal;
    "position prior" the same for each pixel position (and for the image as a whole, where that is
    what a task is about).
    """
    train, test = (
        [targets for _, targets in evaluation_batches(split, dataset.tasks, profile)]
        for split in (dataset.train, dataset.test)
    )
    scores: dict[str, dict[str, float]] = {"constant": {}, "position prior": {}}
    for task in dataset.tasks.values():
        target = torch.cat([targets[task.name] for targets in train])
        position = constant = task.prior(target)
        if task.target.of_pixels:
            pixels = target.movedim((-2, -1), (0, 1)).flatten(0, 2)  # each an image of its own
            constant = task.prior(pixels[..., None, None]).expand_as(position)
        for name, output in (("constant", constant), ("position prior", position)):
            meter = task.meter()
            for targets in test:
                truth = targets[task.name]
                meter.update(output.expand(len(truth), -1, -1, -1), truth)
            metrics = meter.compute().items()
            scores[name] |= numbers({f"{task.name}.{metric}": value for metric, value in metrics})
    return scores


def total_loss(metrics: dict[str, float]) -> float:
    """What models are selected by, on validation images: the sum of the tasks' losses."""
    return sum(
        value
        for name, value in metrics.items()
        if name.endswith(".loss") and not name.startswith("train.")
    )
