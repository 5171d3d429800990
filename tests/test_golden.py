"""Losses, scores and chosen filters agree with the canonical scores of the authors' released code.

The file is read from MTPRUNE_GOLDEN, or from shared/golden beside the checkout; nothing here
depends on its sizes.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import backward_by_task, convs, scores_of
from mtprune_utils.core.model import Architecture, MultiTaskModel, build
from mtprune_utils.core.selection import select
from mtprune_utils.core.task import Task, task_losses
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.normals import normals
from mtprune_utils.tasks.segmentation import segmentation

BESIDE = Path(__file__).parents[2] / "shared" / "golden" / "author_scores.npz"
PATH = Path(os.environ.get("MTPRUNE_GOLDEN", BESIDE))
FLOOR = 5


@pytest.fixture(scope="module")
def golden():
    if not PATH.exists():
        assert "MTPRUNE_GOLDEN" not in os.environ, (
            f"MTPRUNE_GOLDEN names {PATH}, which does not exist"
        )
        pytest.skip(f"no golden scores: set MTPRUNE_GOLDEN or put them at {BESIDE}")
    return dict(np.load(PATH))


def task_of(name: str, channels: int) -> Task:
    classes = segmentation([str(i) for i in range(channels)])
    return {"segment_semantic": classes, "normal": normals(), "depth_zbuffer": depth()}[name]


def network(golden) -> tuple[MultiTaskModel, dict[str, Task]]:
    names = [key.split(".")[3] for key in golden if key.startswith("r0.b0.loss.")]
    channels = {name: len(golden[f"heads.{name}.0.3.bias"]) for name in names}
    widths = [int(width) for width in golden["widths"]]
    head_width = len(golden[f"heads.{names[0]}.0.1.bias"])
    full = Architecture(channels, head_width=head_width, dropout=0.0)
    model = build(full.with_widths(widths), seed=0)
    with torch.no_grad():
        for i, layer in enumerate(convs(model)):
            layer.weight.copy_(torch.from_numpy(golden[f"backbone.{i}.weight"]))
            layer.bias.copy_(torch.from_numpy(golden[f"backbone.{i}.bias"]))
        for name in names:
            for b, branch in enumerate(model.heads[name].branches):
                own = [module for module in branch if isinstance(module, torch.nn.Conv2d)]
                for c, conv in enumerate(own, start=1):
                    conv.weight.copy_(torch.from_numpy(golden[f"heads.{name}.{b}.{c}.weight"]))
                    conv.bias.copy_(torch.from_numpy(golden[f"heads.{name}.{b}.{c}.bias"]))
    return model, {name: task_of(name, channels[name]) for name in names}


def test_losses_scores_and_choice_agree_in_every_round(golden):
    model, task_set = network(golden)
    alive = [np.ones(len(layer.weight), bool) for layer in convs(model)]
    rounds = sorted(
        {key.split(".")[0] for key in golden if key.startswith("r")}, key=lambda name: int(name[1:])
    )
    assert len(rounds) >= 2
    for number in rounds:
        cosine = scores_of("cosprune", model)
        batches = sorted({key.split(".")[1] for key in golden if key.startswith(f"{number}.b")})
        for batch in batches:
            prefix = f"{number}.{batch}"
            model.zero_grad()
            outputs = model(torch.from_numpy(golden[f"{prefix}.input"]))
            targets = {name: torch.from_numpy(golden[f"{prefix}.{name}"]) for name in task_set}
            targets = {
                name: t[:, 0] if name == "segment_semantic" else t for name, t in targets.items()
            }
            losses = task_losses(task_set, outputs, targets)
            for name, loss in losses.items():
                assert loss.item() == pytest.approx(
                    float(golden[f"{prefix}.loss.{name}"]), rel=1e-5
                )
            gradients = backward_by_task(losses, model)
            cosine.update(gradients)
            taylor = scores_of("taylor", model)
            taylor.update()
            for i, ours in enumerate(taylor.mean()):
                reference = golden[f"{prefix}.taylor.{i}"][alive[i]]
                assert np.all(
                    np.abs(ours.numpy() - reference) <= 1e-3 * reference + 1e-6 * reference.max()
                )
        for i, ours in enumerate(cosine.mean()):
            reference = golden[f"{number}.cosine.{i}"]
            np.testing.assert_allclose(ours.numpy(), reference[alive[i]], rtol=0, atol=1e-5)
            assert np.all(reference[~alive[i]] == -1)
        kept = [golden[f"{number}.kept_after.{i}"].astype(bool) for i in range(len(alive))]
        budget = sum(int((a & ~k).sum()) for a, k in zip(alive, kept))
        chosen = select(cosine.mean(), budget, FLOOR)
        for i, indices in enumerate(chosen):
            expected = np.flatnonzero(~kept[i][alive[i]])
            assert indices.tolist() == expected.tolist(), f"layer {i} of {number}"
        model.remove(chosen)
        alive = kept
        assert [len(layer.weight) for layer in convs(model)] == [int(a.sum()) for a in alive]
