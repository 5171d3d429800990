"""An interrupted run goes on to the same bits; what is broken on disk is noticed."""

import math
import os
import signal

import pytest
import torch

import test_runs
from conftest import narrow
from mtprune_utils.core import evaluation, iterative, trainer
from mtprune_utils.core.checkpoints import Checkpoints, Interrupted, pack, unpack
from mtprune_utils.core.model import build
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.settings import Optimization, Profile, Pruning
from mtprune_utils.study.execute import execute

PROFILE = Profile(
    "tiny",
    image_height=32,
    crop=32,
    scale=(0.75, 1.0),
    batch_size=8,
    backbone="vgg16_bn",
    stride=8,
    head_width=8,
    dense=Optimization(steps=9, evaluations=3),
    sizes=(0.7,),
    prune=Pruning(lr=1e-3, prune_interval=3, filters_per_step=25, cosine_batches=2),
)


class StopsAfter(Checkpoints):
    """Writes after every step, and is asked to stop after some of them."""

    def __init__(self, folder, steps=(), code="code"):
        self.said = []
        super().__init__(folder, 0.0, code, self.said.append)
        self.stop_after = set(steps)

    def keep(self, step, state):
        self.stop = step in self.stop_after
        super().keep(step, state)


@pytest.fixture
def with_dropout(architecture):
    return narrow(architecture, backbone="vgg16_bn", dropout=0.3)


def dense(architecture, dataset, checkpoints):
    torch.manual_seed(5)
    model = build(architecture, 0)
    curve = trainer.train(
        model, dataset, PROFILE, PROFILE.dense, 0, lambda line: None, checkpoints=checkpoints
    )
    return curve, model


def pruned(criterion):
    def run(architecture, dataset, checkpoints):
        torch.manual_seed(5)
        model = build(architecture, 0)
        results = iterative.prune_iteratively(
            model,
            dataset,
            PROFILE,
            PROFILE.prune,
            criterion,
            0,
            measure=lambda model: evaluation.evaluate_with_recalibrated_bn(
                model, dataset, dataset.test, PROFILE
            ),
            checkpoints=checkpoints,
        )
        return results, model

    return run


RUNS = {
    "dense": dense,
    **{criterion: pruned(criterion) for criterion in ("taylor", "cosprune", "random")},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(run, with_dropout, dataset, tmp_path):
    results, model = run(with_dropout, dataset, None)
    # Within phases and at their edges.
    stops = [0, 1, 4, 5, 8] if run is dense else [0, 2, 3, 7, 11, 14]
    for stop in stops:
        with pytest.raises(Interrupted, match=f"after step {stop}, whose state is kept"):
            run(with_dropout, dataset, StopsAfter(tmp_path / "run", {stop}))
        torch.rand(stop)  # another process has drawn other numbers
    last = StopsAfter(tmp_path / "run")
    again, resumed = run(with_dropout, dataset, last)
    assert last.said == [f"going on after step {stops[-1]}"]
    assert repr(again) == repr(results)  # nan equals nan
    assert resumed.architecture == model.architecture
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("part", ["weights", "optimizer", "order", "random numbers", "scores"])
def test_each_part_of_the_state_matters(part, with_dropout, dataset, tmp_path, monkeypatch):
    """Negative control of the test above: leave a part out, and the results differ."""
    results, _ = pruned("taylor")(with_dropout, dataset, None)
    with pytest.raises(Interrupted):
        pruned("taylor")(with_dropout, dataset, StopsAfter(tmp_path, {5}))
    restore, score = trainer.Trainer.restore, Scores.restore

    def forgetful(self, state):
        torch.rand(3)
        fresh = self.state()
        keys = {
            "weights": ["model"],
            "optimizer": ["optimizer"],
            "order": ["generator", "batches"],
            "random numbers": ["random"],
        }
        restore(self, state | {key: fresh[key] for key in keys.get(part, [])})

    monkeypatch.setattr(trainer.Trainer, "restore", forgetful)
    monkeypatch.setattr(
        Scores, "restore", lambda self, state: None if part == "scores" else score(self, state)
    )
    again, _ = pruned("taylor")(with_dropout, dataset, StopsAfter(tmp_path))
    assert repr(again) != repr(results)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(with_dropout, dataset, tmp_path):
    results, _ = dense(with_dropout, dataset, None)
    with pytest.raises(Interrupted):
        dense(with_dropout, dataset, StopsAfter(tmp_path, {6}))
    _, newer = sorted(tmp_path.iterdir())
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newer.write_bytes(content)
    checkpoints = StopsAfter(tmp_path)
    again, _ = dense(with_dropout, dataset, checkpoints)
    assert checkpoints.said == [
        f"{newer.name} is damaged: going back to the checkpoint before it",
        "going on after step 5",
    ]
    assert again == results


def test_a_truncated_checkpoint_without_an_older_one_starts_anew(with_dropout, dataset, tmp_path):
    with pytest.raises(Interrupted):
        dense(with_dropout, dataset, StopsAfter(tmp_path, {0}))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert StopsAfter(tmp_path).load() is None


def test_a_checkpoint_of_other_code_or_another_part_is_dropped(tmp_path):
    for code, part in (("new", ""), ("old", "trial 2")):
        StopsAfter(tmp_path, code="old").keep(3, lambda: {"a": 1})
        other = StopsAfter(tmp_path, code=code)
        other.part = part
        assert other.load() is None
        assert "left by other code, another kind of machine or another part" in other.said[0]
        assert not list(tmp_path.iterdir()), "or it would outlast those with a lower step"


STATES = [{"trainer": 5}, {}, {"trainer": {}}, 5, [], None]


@pytest.mark.parametrize("state", STATES, ids=map(str, STATES))
def test_a_checkpoint_with_a_senseless_state_is_named(state, tmp_path, monkeypatch):
    run = test_runs.experiment(tmp_path, checkpoint_seconds=0).dense(0)
    keep = Checkpoints.keep

    def leaves_nonsense(self, step, made):
        keep(self, step, made if step < 2 else lambda: state)
        self.stop = step == 1

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", leaves_nonsense)
        with pytest.raises(Interrupted):
            execute(run, lambda line: None)
    file = sorted(run.path("checkpoints").iterdir())[-1]
    if state:
        with pytest.raises(ValueError, match=f"{file.name} holds no state .*: delete it"):
            execute(run, lambda line: None)
        file.unlink()
    execute(run, lambda line: None)
    assert run.done


@pytest.mark.parametrize(
    "seed, arm, overrides",
    [(0, "multitask", {}), (1, "depth", {}), (1, "multitask", {"dense.lr": 0.1})],
)
def test_a_checkpoint_of_another_run_is_not_used_and_that_is_said(seed, arm, overrides, tmp_path):
    own = test_runs.experiment(tmp_path, checkpoint_seconds=0).dense(1)
    foreign = test_runs.experiment(tmp_path, checkpoint_seconds=0, **overrides).dense(seed, arm)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "clear", lambda self: None)
        execute(foreign, lambda line: None)
    foreign.path("checkpoints").rename(own.folder.parent / "left")
    own.folder.mkdir(exist_ok=True)
    (own.folder.parent / "left").rename(own.path("checkpoints"))
    execute(own, said.append)
    assert "by another run: not used" in said[0] and not any("going on" in line for line in said)


def test_two_checkpoints_are_kept_and_the_time_adds_up(tmp_path):
    checkpoints = StopsAfter(tmp_path)
    for step in range(5):
        checkpoints.keep(step, dict)
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == [
        "step000000003",
        "step000000004",
    ]
    later = StopsAfter(tmp_path)
    later.load()
    assert later.elapsed >= later._earlier > 0 and later.step == 4
    rarely = Checkpoints(tmp_path / "rarely", 1000, "code")
    rarely.keep(1, lambda: pytest.fail("it is not time yet"))


def test_a_state_is_a_tree_whose_strides_survive(tmp_path):
    image = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {
        "numbers": [1, 2.5, math.inf, None, True, "text"],
        3: {"scalar": torch.tensor(7.0), "empty": torch.empty(0)},
        "image": image,
        "plain": torch.rand(2, 3, 4, 5),
        "none": {},
        "words": torch.tensor([2**60]),
    }
    (tmp_path / "state").write_bytes(pack(state))
    back = unpack(tmp_path / "state")
    assert back["numbers"] == state["numbers"] and back["none"] == {}
    assert back["words"].item() == 2**60
    assert back[3]["scalar"].shape == () and back[3]["empty"].shape == (0,)
    for name in ("image", "plain"):
        assert torch.equal(back[name], state[name]) and back[name].stride() == state[name].stride()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_checkpoint_and_the_second_ends_at_once(signum, tmp_path):
    before = signal.getsignal(signum)
    checkpoints = Checkpoints(tmp_path, 1000, "code")
    with pytest.raises(Interrupted, match="after step 7"), checkpoints.stopping():
        os.kill(os.getpid(), signum)
        checkpoints.keep(7, lambda: {"a": 1})
    assert Checkpoints(tmp_path, 0, "code").load() == {"a": 1}
    with checkpoints.stopping():
        os.kill(os.getpid(), signal.SIGTERM)  # asked before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signum) is before


def test_a_broken_state_is_never_kept(with_dropout, dataset, tmp_path):
    torch.manual_seed(5)
    model = build(with_dropout, 0)
    checkpoints = StopsAfter(tmp_path)
    losses = trainer.task_losses

    def breaks(*arguments):
        values = losses(*arguments)
        if checkpoints.step == 4:  # kept after four steps: this is the fifth
            values["depth"] = values["depth"] * math.nan
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "task_losses", breaks)
        with pytest.raises(
            trainer.Diverged, match="the loss of depth is nan at step 5: lower the learning rate"
        ):
            trainer.train(
                model,
                dataset,
                PROFILE,
                PROFILE.dense,
                0,
                lambda line: None,
                checkpoints=checkpoints,
            )
    assert StopsAfter(tmp_path).load()["trainer"]["step"] == 4
