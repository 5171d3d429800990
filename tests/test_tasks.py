"""Losses and metrics against NumPy, with every kind of invalid pixel."""

import numpy as np
import pytest
import torch

from mtprune_utils.core.targets import IGNORE, resize_output, resize_target
from mtprune_utils.core.task import delta_m, numbers
from mtprune_utils.tasks.classification import classification
from mtprune_utils.tasks.depth import depth as depth_task
from mtprune_utils.tasks.normals import normals as normals_task
from mtprune_utils.tasks.segmentation import segmentation

NAMES = ("a", "b", "c", "d", "e")


def metrics(task, batches):
    meter = task.meter()
    for output, target in batches:
        meter.update(output, target)
    return numbers(meter.compute())


def test_segmentation_accumulates_pixels_and_skips_classes_that_never_occur():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, (3, 6, 7)).astype(np.uint8)  # class 4 is absent
    target[rng.random(target.shape) < 0.2] = IGNORE
    target[2] = IGNORE  # an image without a label
    predicted = rng.integers(0, 4, target.shape)
    output = torch.nn.functional.one_hot(torch.from_numpy(predicted), 5).permute(0, 3, 1, 2).float()
    truth = torch.from_numpy(target)
    ours = metrics(segmentation(NAMES), [(output[:2], truth[:2]), (output[2:], truth[2:])])
    valid = target != IGNORE
    assert ours["pixel_accuracy"] == pytest.approx((predicted == target)[valid].mean())
    ious = [
        ((predicted == c) & (target == c))[valid].sum()
        / (((predicted == c) | (target == c))[valid]).sum()
        for c in range(4)
    ]
    assert ours["miou"] == pytest.approx(np.mean(ious))


def test_depth_masks_missing_readings_and_a_negative_prediction_fails_every_share():
    target = torch.tensor([2.0, 4.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 5)
    output = torch.tensor([2.2, 2.0, 9.0, -1.0, 1.3]).view(1, 1, 1, 5)
    ours = metrics(depth_task(), [(output, target)])
    assert ours["absolute_error"] == pytest.approx((0.2 + 2 + 2 + 0.3) / 4)
    assert ours["relative_error"] == pytest.approx((0.1 + 0.5 + 2 + 0.3) / 4)
    assert [ours[f"delta{k}"] for k in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.5])


def test_normals_skip_the_zero_vector_and_do_not_need_unit_predictions():
    target = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 4)
    output = torch.tensor([[0.0, 0, 9], [0, 2, 2], [1, 0, 0], [0, 0, 5]]).T.reshape(1, 3, 1, 4)
    ours = metrics(normals_task(), [(output, target)])
    assert ours["mean_angle"] == pytest.approx((0 + 45 + 90) / 3, abs=1e-3)
    assert ours["median_angle"] == pytest.approx(45, abs=1e-3)
    assert [ours[f"within_{limit}"] for limit in (11.25, 22.5, 30)] == pytest.approx([1 / 3] * 3)


def test_meters_count_pixels_of_the_whole_set_not_means_of_batches():
    """Against NumPy: batches of unequal size, an image without any valid pixel, negative depths,
    outputs that are no number.
    """
    rng = np.random.default_rng(0)
    sizes, (height, width) = (3, 1, 2), (5, 7)
    count = sum(sizes)
    depth, normals = (
        rng.uniform(0.5, 5, (count, 1, height, width)),
        rng.normal(size=(count, 3, height, width)),
    )
    depths, angles = rng.normal(2, 2, depth.shape), rng.normal(size=normals.shape)
    invalid = rng.random((count, height, width)) < 0.3
    invalid[3] = True  # a batch of its own
    depth[:, 0][invalid], normals[np.broadcast_to(invalid[:, None], normals.shape)] = 0, 0
    depths[:, 0][invalid] = np.nan

    def batches(output, target):
        edges = np.cumsum((0, *sizes))
        output, target = (torch.from_numpy(array).float() for array in (output, target))
        return [(output[a:b], target[a:b]) for a, b in zip(edges, edges[1:])]

    ours = metrics(depth_task(), batches(depths, depth))
    p, t = depths[:, 0][~invalid], depth[:, 0][~invalid]
    ratio = np.where(p > 0, np.maximum(p / t, t / p), np.inf)
    expected = {"absolute_error": abs(p - t).mean(), "relative_error": (abs(p - t) / t).mean()}
    expected |= {f"delta{k}": (ratio < 1.25**k).mean() for k in (1, 2, 3)}
    assert ours == pytest.approx(expected, rel=1e-5)

    ours = metrics(normals_task(), batches(angles, normals))
    p, t = (np.moveaxis(array, 1, -1)[~invalid] for array in (angles, normals))
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    angle = np.degrees(np.arccos(cosine))
    expected = {"mean_angle": angle.mean(), "median_angle": np.median(angle)}
    expected |= {f"within_{limit}": (angle < limit).mean() for limit in (11.25, 22.5, 30)}
    assert ours == pytest.approx(expected, rel=1e-4)


def test_a_position_without_any_reading_gets_the_median_of_all():
    target = torch.tensor([[0.0, 1, 2], [0, 3, 4]]).view(2, 1, 1, 3)
    assert depth_task().prior(target).flatten().tolist() == [2.0, 1.0, 2.0], (
        "nanmedian takes the lower of two"
    )


@pytest.mark.parametrize(
    "task, output, valid, invalid",
    [
        (segmentation(NAMES[:3]), torch.randn(1, 3, 1, 2), 1, 255),
        (depth_task(), torch.randn(1, 1, 1, 2), 2.0, 0.0),
        (normals_task(), torch.randn(1, 3, 1, 2), 0.577, 0.0),
    ],
    ids=["segmentation", "depth", "normals"],
)
def test_losses_average_over_valid_pixels_only(task, output, valid, invalid):
    shape = (1, 1, 2) if task.name == "segmentation" else output.shape
    target = torch.full(shape, valid)
    both = target.clone()
    both[..., 1] = invalid
    assert task.loss(output, both) == pytest.approx(
        task.loss(output[..., :1], target[..., :1]).item(), rel=1e-5
    )
    assert task.loss(output, torch.full(shape, invalid)) == 0


def test_targets_are_resized_by_nearest_neighbour():
    target = torch.arange(7 * 9, dtype=torch.float32).view(1, 1, 7, 9)
    expected = torch.nn.functional.interpolate(target, (3, 4), mode="nearest")
    assert torch.equal(resize_target(target, (3, 4)), expected)
    assert torch.equal(resize_target(target[:, 0].long(), (3, 4)), expected[:, 0].long())


@pytest.mark.parametrize("size", [(96, 96), (321, 321)])
def test_outputs_are_placed_where_they_were_trained(size):
    """Labels taken at the trained pixels come back at those pixels, and in between as if drawn from
    cell to cell.
    """
    ramp = torch.arange(size[1], dtype=torch.float32).expand(1, 1, *size)
    cells = resize_target(ramp, (size[0] // 8, size[1] // 8))
    back = resize_output(cells, size)
    inside = back[..., : size[1] - 9]  # beyond the last cell there is nothing to draw to
    assert (inside - ramp[..., : size[1] - 9]).abs().max() <= 1


def test_a_prediction_that_is_not_a_number_is_not_overlooked():
    target = torch.tensor([[0.0, 0, 1], [0, 0, 1]]).T.reshape(1, 3, 1, 2)
    output = target.clone()
    output[..., 1] = float("nan")
    assert np.isnan(metrics(normals_task(), [(output, target)])["mean_angle"])


def test_a_set_without_a_single_valid_pixel_has_no_metric():
    nothing = {
        segmentation(NAMES[:3]): torch.full((2, 4, 4), 255),
        depth_task(): torch.zeros(2, 1, 4, 4),
        normals_task(): torch.zeros(2, 3, 4, 4),
    }
    for task, target in nothing.items():
        assert np.isnan(
            list(metrics(task, [(torch.randn(2, task.channels, 4, 4), target)]).values())
        ).all()


def test_medians_are_over_all_valid_pixels_not_means_of_batches():
    rng = np.random.default_rng(0)
    target, output = (
        torch.from_numpy(rng.normal(size=(5, 3, 6, 7)).astype(np.float32)) for _ in range(2)
    )
    target[0, :, :3] = 0
    cosine = torch.nn.functional.cosine_similarity(output, target, dim=1).clamp(-1, 1)
    angles = cosine.acos().rad2deg()[target.square().sum(1) > 0].numpy()
    for count in (len(angles), len(angles) - 1):  # even and odd
        if count < len(angles):
            target[0, :, 3, 0] = 0
            angles = cosine.acos().rad2deg()[target.square().sum(1) > 0].numpy()
        ours = metrics(normals_task(), [(output[:2], target[:2]), (output[2:], target[2:])])
        assert ours["median_angle"] == pytest.approx(np.median(angles), rel=1e-4)
        assert ours["mean_angle"] == pytest.approx(angles.mean(), rel=1e-4)


def test_classification_averages_the_map_and_counts_images():
    task = classification("garment", NAMES[:3])
    output, target = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8)
    mean = output.mean((2, 3))
    assert task.loss(output, target) == pytest.approx(
        torch.nn.functional.cross_entropy(mean, target.long()).item()
    )
    ours = metrics(task, [(output[:4], target[:4]), (output[4:], target[4:])])
    assert ours["accuracy"] == pytest.approx((mean.argmax(1) == target).float().mean().item())
    corner = classification("corner", NAMES[:3], (0.5, 0, 1, 0.5))  # the lower left quarter
    assert corner.loss(output, target) == pytest.approx(
        torch.nn.functional.cross_entropy(output[:, :, 1, 0], target.long()).item()
    )
    assert corner.loss(output[:, :, :1, :1], target).isfinite(), "a map of one cell has one corner"
    prior = task.prior(torch.tensor([1, 1, 2], dtype=torch.uint8))
    assert metrics(task, [(prior.expand(6, -1, -1, -1), target)])["accuracy"] == pytest.approx(
        2 / 6
    )


def test_delta_m_is_the_mean_signed_relative_change():
    task_set = {task.name: task for task in (segmentation(NAMES[:3]), depth_task())}
    reference = {"segmentation.miou": 0.5, "depth.relative_error": 0.2}
    better = {"segmentation.miou": 0.55, "depth.relative_error": 0.18}
    assert delta_m(task_set, better, reference) == pytest.approx(0.1)
    assert delta_m(task_set, reference, reference) == 0
