"""The loop: what it trains, what it removes, what it records, and that it learns."""

from dataclasses import replace

import pytest
import torch

from conftest import TASKS, WIDTHS, gated, narrow, scores_of
from mtprune_utils import registry
from mtprune_utils.core.evaluation import (
    evaluate,
    evaluate_with_recalibrated_bn,
    forward,
    trivial_predictors,
)
from mtprune_utils.core.iterative import prune_iteratively, removal_plan
from mtprune_utils.core.model import build
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.settings import Optimization, Profile, Pruning
from mtprune_utils.core.trainer import Diverged, Trainer, train

PROFILE = Profile(
    "tiny",
    image_height=32,
    crop=32,
    scale=(1.0, 1.0),
    batch_size=8,
    stride=8,
    head_width=8,
    dropout=0.0,
    dense=Optimization(steps=6, evaluations=3),
    prune=Pruning(
        lr=1e-3, lr_schedule="constant", prune_interval=2, filters_per_step=25, cosine_batches=1
    ),
)


def pruning_of(model, dataset, criterion, seed=0, profile=PROFILE, **more):
    return prune_iteratively(
        model,
        dataset,
        profile,
        profile.prune,
        criterion,
        seed,
        measure=lambda model: evaluate_with_recalibrated_bn(model, dataset, dataset.test, profile),
        **more,
    )


@pytest.mark.parametrize("criterion", registry.names("criteria"))
def test_the_loop_goes_down_to_the_floor_and_records_every_step(architecture, dataset, criterion):
    normed = criterion == "bn_scale"  # which is not defined without
    model = build(narrow(architecture, backbone="vgg16_bn") if normed else architecture, 0)
    rows, layers = pruning_of(model, dataset, criterion)
    # 134 filters; 69 above the floor of 5 in 13 layers: 25 + 25 + the 19 that the floor leaves.
    assert [(row["phase"], row["filters"]) for row in rows] == [
        ("dense", 134),
        ("removed", 109),
        ("recovered", 109),
        ("removed", 84),
        ("recovered", 84),
        ("removed", 65),
        ("recovered", 65),
    ]
    assert model.architecture.width_list == [5] * 13
    assert [row["step"] for row in rows] == [0, 2, 4, 4, 6, 6, 8]
    assert rows[0]["parameters"] > rows[-1]["parameters"] and rows[0]["macs"] > rows[-1]["macs"]
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
    assert len(layers) == 4 * 13
    assert sum(row["removed_next"] for row in layers) == 69
    # Three vectors cannot all be opposed.
    assert all(-0.5 - 1e-6 <= row["cosine"] <= 1 + 1e-6 for row in layers)
    assert all(row["width"] >= 5 for row in layers)


@pytest.mark.parametrize("schedule", registry.names("schedules"))
def test_the_loop_lands_on_every_size_and_takes_what_it_left_next(architecture, dataset, schedule):
    profile = replace(
        PROFILE, sizes=(0.8, 0.5, 0.49), prune=replace(PROFILE.prune, pruning_schedule=schedule)
    )
    model = build(architecture, 0)
    rows, _ = pruning_of(model, dataset, "taylor", profile=profile)
    landed = {row["target_level"]: row for row in rows if row["target_level"] is not None}
    assert list(landed) == [0, 1, 2] and all(row["phase"] == "recovered" for row in landed.values())
    one_filter = 8 * (12 * 9 + 1)  # about what the largest filter brings with it, in this network
    for level, size in enumerate(profile.sizes):
        assert abs(landed[level]["parameters"] - size * rows[0]["parameters"]) <= one_filter
    sizes = [row["filters"] for row in rows if row["phase"] != "removed"]
    plan = [134, *removal_plan(WIDTHS, profile.prune)]
    assert set(plan) <= set(sizes)
    assert len(sizes) <= len(plan) + 3, "the plan's sizes, and the landings"
    assert model.architecture.width_list == [5] * 13


def test_the_loop_stops_at_the_size_that_is_asked_for(architecture, dataset):
    profile = replace(PROFILE, sizes=(0.8, 0.5))
    whole, _ = pruning_of(build(architecture, 0), dataset, "taylor", profile=profile)
    part, _ = pruning_of(build(architecture, 0), dataset, "taylor", profile=profile, last_level=0)
    assert part[-1]["target_level"] == 0
    assert part == whole[: len(part)], "and is the same until there"


def test_the_loop_keeps_multiples_and_ends_at_the_floor(architecture, dataset):
    wide = architecture.with_widths([8] * 6 + [12] * 7)
    profile = replace(
        PROFILE, sizes=(0.8,), prune=replace(PROFILE.prune, round_to=4, min_filters=4)
    )
    rows, _ = pruning_of(build(wide, 0), dataset, "taylor", profile=profile)
    widths = [tuple(map(int, row["widths"].split())) for row in rows]
    assert all(width % 4 == 0 for row in widths for width in row) and widths[-1] == (4,) * 13
    assert len(set(widths)) > 3 and [row["target_level"] for row in rows].count(0) == 1
    assert len(set(widths)) <= len(removal_plan(wide.width_list, profile.prune)) + 2, (
        "rounding adds no removals"
    )


@pytest.mark.parametrize("criterion, scored", [("taylor", 7), ("cosprune", 3)])
def test_criteria_that_need_task_gradients_can_score_fewer_minibatches(
    model, dataset, criterion, scored, monkeypatch
):
    settings = replace(PROFILE.prune, prune_interval=7, score_every=3, cosine_batches=2)
    updates, add = [], Scores._add
    monkeypatch.setattr(
        Scores, "_add", lambda self, signals: (updates.append(self), add(self, signals))
    )
    trained, step = [], Trainer.step

    def counting(self, scores=()):
        trained.append(any(score.criterion.needs == "task_gradients" for score in scores))
        step(self, scores)

    monkeypatch.setattr(Trainer, "step", counting)
    pruning_of(model, dataset, criterion, profile=replace(PROFILE, prune=settings))
    by_scores = {score: updates.count(score) for score in updates}

    def counts(name):
        return {count for score, count in by_scores.items() if score.criterion.name == name}

    assert counts(criterion) >= {scored} and counts("cosprune") >= {2}
    costly = [False, False, False, True, False, False, True]
    assert trained[:7] == costly if criterion == "taylor" else trained[:7] == [True, *costly[1:]]


def test_a_size_under_the_floor_is_refused_before_training(model, dataset):
    with pytest.raises(
        ValueError, match=r"sizes: at the floor of 5 filters per layer a share of 0\.\d+ is left"
    ):
        pruning_of(model, dataset, "taylor", profile=replace(PROFILE, sizes=(0.8, 0.01)))


def test_a_search_is_told_of_every_evaluation_and_can_stop_training(model, dataset):
    seen = []

    def watch(step, loss):
        seen.append((step, loss))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, dataset, PROFILE, PROFILE.dense, seed=0, report=lambda line: None, watch=watch)
    assert [step for step, _ in seen] == [2, 4]


def test_equal_seeds_give_equal_results_and_different_seeds_do_not(architecture, dataset):
    def last_row(seed):
        evaluations, _ = pruning_of(build(architecture, 0), dataset, "taylor", seed)
        return evaluations[-1]

    assert last_row(0) == last_row(0)
    assert last_row(0) != last_row(1)


def test_a_scored_step_is_a_plain_step(architecture, dataset):
    """Training with CosPrune's per-task passes ends with the weights of training on the sum."""
    ends = []
    for name in (None, "taylor", "cosprune"):
        model = build(architecture, 0)
        trainer = Trainer(
            model, dataset, PROFILE, replace(PROFILE.dense, optimizer="adamw"), 5, seed=0
        )
        for _ in range(5):
            trainer.step([scores_of(name, model)] if name else [])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-3, atol=1e-4)


def test_training_learns_and_keeps_the_best_validation_weights(architecture, dataset):
    # Eight images, seen often.
    learnable = replace(dataset, train=dataset.validation[torch.arange(16) % 8])
    model = build(architecture, 0)
    before = evaluate(model, learnable.train, TASKS, PROFILE)
    curve = train(
        model,
        learnable,
        PROFILE,
        Optimization(lr=3e-3, steps=60, evaluations=4),
        seed=0,
        report=lambda line: None,
    )
    after = evaluate(model, learnable.train, TASKS, PROFILE)
    assert [row["step"] for row in curve] == [15, 30, 45, 60]
    assert after["depth.loss"] < 0.7 * before["depth.loss"]
    totals = [sum(row[f"{task}.loss"] for task in TASKS) for row in curve]
    assert [row["selected"] for row in curve] == [int(total == min(totals)) for total in totals]
    kept = evaluate(model, dataset.validation, TASKS, PROFILE)
    assert sum(kept[f"{task}.loss"] for task in TASKS) == pytest.approx(min(totals), rel=1e-6)


def test_depth_is_measured_in_metres_whatever_the_size_of_the_images(architecture, dataset):
    """Where depth follows the scale, 1 m everywhere means 0.5 m on images made half as large."""
    model = build(architecture, 0)
    for branch in model.heads["depth"].branches:
        torch.nn.init.zeros_(branch[-1].weight)
        torch.nn.init.constant_(branch[-1].bias, 0.25)  # four branches are summed
    for follows, prediction in ((False, 1.0), (True, 0.5)):
        profile = replace(PROFILE, crop=16, depth_follows_scale=follows)
        target = dataset.test.targets["depth"][:, :, 1::2, 1::2]
        expected = (prediction - target).abs().mean().item()
        measured = evaluate(model, dataset.test, TASKS, profile)
        assert measured["depth.absolute_error"] == pytest.approx(expected, rel=1e-4)


def test_test_images_are_measured_with_statistics_of_the_weights_as_they_are(architecture, dataset):
    model = build(narrow(architecture, backbone="vgg16_bn"), 0)
    good = evaluate_with_recalibrated_bn(model, dataset, dataset.test, PROFILE)
    for layer in gated(model):
        layer.running_mean.fill_(100.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(model, dataset.test, TASKS, PROFILE)["depth.loss"] != pytest.approx(
        good["depth.loss"]
    )
    assert evaluate_with_recalibrated_bn(model, dataset, dataset.test, PROFILE) == good
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_learning_rate_follows_the_schedule(model, dataset):
    for lr_schedule, half in (("cosine", 0.5), ("constant", 1.0)):
        trainer = Trainer(
            model,
            dataset,
            PROFILE,
            Optimization(lr=1e-3, lr_schedule=lr_schedule, steps=4, evaluations=1),
            4,
            0,
        )
        for _ in range(2):
            trainer.step()
        assert trainer.scheduler.get_last_lr()[0] == pytest.approx(half * 1e-3)


def test_a_step_runs_the_network_once(model, dataset):
    forwards = []
    model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    trainer = Trainer(model, dataset, PROFILE, PROFILE.dense, 2, 0)
    trainer.step([scores_of("cosprune", model), scores_of("taylor", model)])
    assert len(forwards) == 1


def test_an_evaluation_runs_the_trunk_once_per_batch_and_transfers_once(
    model, dataset, monkeypatch
):
    forwards, transfers, tolist = [], [], torch.Tensor.tolist
    model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (transfers.append(1), tolist(self))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("waits for the device"))
    monkeypatch.setattr("mtprune_utils.core.evaluation.EVALUATION_BATCH", 1)
    evaluate(model, dataset.test, TASKS, replace(PROFILE, batch_size=2))
    assert len(forwards) == len(dataset.test) / 2 and len(transfers) == 1


def test_bf16_leaves_weights_gradients_and_outputs_in_float32(model, dataset):
    outputs = {}
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    for precision in ("float32", "bf16"):
        outputs[precision] = forward(model, images, replace(PROFILE, precision=precision))
    trainer = Trainer(model, dataset, replace(PROFILE, precision="bf16"), PROFILE.dense, 2, 0)
    scores = scores_of("cosprune", model)
    trainer.step([scores])
    for task, output in outputs["bf16"].items():
        assert output.dtype == torch.float32 and not torch.equal(output, outputs["float32"][task])
        torch.testing.assert_close(output, outputs["float32"][task], rtol=0.05, atol=0.02)
    own = list(model.parameters())
    assert {p.dtype for p in own} | {p.grad.dtype for p in own} == {torch.float32}
    assert {score.dtype for score in scores.mean()} == {torch.float32}


def test_a_diverged_loss_stops_with_step_and_task(model, dataset):
    with torch.no_grad():
        model.heads["depth"].branches[0][-1].bias.fill_(float("nan"))
    with pytest.raises(
        Diverged, match="the loss of depth is nan at step 1: lower the learning rate"
    ):
        train(model, dataset, PROFILE, PROFILE.dense, seed=0)


def test_evaluation_has_no_side_effects_and_ignores_the_batch_size(architecture, dataset):
    model = build(narrow(architecture, backbone="vgg16_bn"), 0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, large = (
        evaluate(model, dataset.test, TASKS, replace(PROFILE, batch_size=size)) for size in (3, 8)
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small == pytest.approx({**large}, rel=0.05)  # losses average images, metrics pixels
    assert small["segmentation.pixel_accuracy"] == large["segmentation.pixel_accuracy"]


def test_images_resized_once_are_evaluated_like_those_resized_each_time(architecture, dataset):
    model = build(narrow(architecture, backbone="vgg16_bn"), 0)
    small = replace(PROFILE, crop=16)
    prepared = dataset.resized_for_evaluation(16)
    assert prepared.train is dataset.train and prepared.calibration.image.shape[-2:] == (16, 16)
    once, each_time = (
        evaluate_with_recalibrated_bn(model, data, data.test, small) for data in (prepared, dataset)
    )
    assert once == each_time


def test_the_prior_of_a_segmentation_leaves_out_ignored_pixels():
    # Four images of two pixels.
    target = torch.tensor([[[2, 255]], [[255, 0]], [[2, 0]], [[1, 255]]], dtype=torch.uint8)
    assert TASKS["segmentation"].prior(target)[0, :, 0].T.tolist() == [
        [0, 1, 2, 0, 0],
        [2, 0, 0, 0, 0],
    ]


def test_the_position_prior_predicts_what_each_position_usually_is(dataset):
    constant = dataset.train.targets["depth"][:1].expand(len(dataset.train), -1, -1, -1)
    targets = {**dataset.train.targets, "depth": constant}
    same = replace(
        dataset,
        train=replace(dataset.train, targets=targets),
        test=replace(dataset.train, targets=targets),
    )
    scores = trivial_predictors(same, PROFILE)
    assert scores["position prior"]["depth.absolute_error"] == 0
    assert scores["constant"]["depth.absolute_error"] > 0.5
    assert (
        scores["position prior"]["segmentation.pixel_accuracy"]
        > scores["constant"]["segmentation.pixel_accuracy"]
    )
    assert scores["position prior"]["normals.mean_angle"] < scores["constant"]["normals.mean_angle"]
    other_test = replace(same, test=dataset.test)
    assert (
        trivial_predictors(other_test, PROFILE)["position prior"]["depth.absolute_error"] > 0.5
    ), "the prior is train's"
