"""The paper's counts, and networks that survive a round trip through a file."""

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save

from conftest import TASKS, convs, gated, narrow
from mtprune_utils.backbones._vgg import WIDTHS as VGG16_WIDTHS
from mtprune_utils.core.data import image_to_float
from mtprune_utils.core.model import (
    Architecture,
    Interface,
    activation_bytes,
    build,
    complexity,
    count_parameters,
    evaluation_mode,
    load_imagenet_trunk,
    load_model,
    model_bytes,
    uniform_widths,
)

NYU = {"segmentation": 40, "normals": 3, "depth": 1}


@pytest.mark.parametrize(
    "widths, parameters, backbone_parameters, giga_macs",
    [
        (VGG16_WIDTHS, 84_125_680, 14_714_688, 38.28),
        (
            (19, 60, 113, 122, 236, 243, 223, 451, 419, 299, 173, 60, 6),
            19_208_302,
            5_756_862,
            21.47,
        ),
        (
            (36, 60, 119, 123, 248, 252, 247, 494, 492, 439, 318, 175, 21),
            23_746_774,
            8_636_454,
            26.65,
        ),
    ],
)
def test_counts_are_the_papers(widths, parameters, backbone_parameters, giga_macs):
    counts = complexity(narrow(Architecture(NYU), widths), (321, 321))
    assert counts["parameters"] == parameters
    assert counts["backbone_parameters"] == backbone_parameters
    assert counts["filters"] == sum(widths)
    assert counts["macs"] / 1e9 == pytest.approx(giga_macs, abs=0.005)


def test_macs_of_the_backbone_alone():
    shared = complexity(Architecture(NYU), (321, 321))["macs"]
    narrow_heads = complexity(Architecture(NYU, head_width=1), (321, 321))["macs"]
    assert narrow_heads / 1e9 == pytest.approx(31.34, abs=0.02)
    assert (shared - narrow_heads) / 1e9 == pytest.approx(6.94, abs=0.02)


@pytest.mark.parametrize("stride", [8, 32])
@pytest.mark.parametrize("backbone", ["vgg16", "vgg16_bn"])
def test_output_shapes(architecture, backbone, stride):
    model = build(narrow(architecture, backbone=backbone, stride=stride), seed=0)
    outputs = model(torch.zeros(2, 3, 64, 96))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        name: (2, channels, 64 // stride, 96 // stride)
        for name, channels in architecture.tasks.items()
    }


def test_build_is_seeded_kaiming_fan_out():
    architecture = Architecture(NYU, head_width=16)
    one, same, other = build(architecture, 1), build(architecture, 1), build(architecture, 2)
    weights = [convs(model)[5].weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    fan_out = weights[0].shape[0] * 9
    assert weights[0].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert all(layer.bias.abs().sum() == 0 for layer in convs(one))


@pytest.mark.parametrize("backbone", ["vgg16", "vgg16_bn"])
def test_round_trip_through_a_file(architecture, backbone, tmp_path):
    model = build(narrow(architecture, backbone=backbone), seed=3).eval()
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model))
    loaded = load_model(path).eval()
    images = torch.randn(1, 3, 32, 32)
    assert loaded.architecture == model.architecture
    for task, output in model(images).items():
        assert torch.equal(loaded(images)[task], output)


def test_a_broken_file_is_one_clear_line(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model)[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a network written by mtprune"):
        load_model(path)


def test_imagenet_weights_fill_the_backbone(monkeypatch):
    import torchvision.models

    source = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(
        torchvision.models.VGG16_Weights,
        "get_state_dict",
        lambda self, **safely: source.state_dict(),
    )
    model = build(Architecture(NYU, head_width=8), seed=0)
    load_imagenet_trunk(model)
    assert torch.equal(convs(model)[12].weight, source.features[28].weight)


def test_no_imagenet_weights_is_one_clear_line(monkeypatch):
    from urllib.error import URLError

    import torchvision.models

    def refuse(self, **safely):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.VGG16_Weights, "get_state_dict", refuse)
    with pytest.raises(RuntimeError, match="override pretrained with false"):
        load_imagenet_trunk(build(Architecture(NYU, head_width=8), seed=0))


def test_uniform_widths_keep_the_same_share_of_every_layer_and_hit_the_size():
    dense = Architecture({"a": 3}, stride=8, head_width=16).narrowed(1 / 8)
    for size in (0.7, 0.3, 0.1):
        target = round(size * count_parameters(dense))
        found = uniform_widths(dense, target, floor=5)
        assert abs(count_parameters(found) - target) <= 0.05 * target
        shares = [
            width / whole for width, whole in zip(found.width_list, dense.width_list) if width > 5
        ]
        assert max(shares) - min(shares) <= 1 / 16 and min(found.width_list) >= 5
    assert uniform_widths(dense, count_parameters(dense), floor=5) == dense


def test_activation_memory_is_what_the_backward_pass_needs():
    """Of one convolution and its ReLU, kept once each; twice the side takes four times as much."""
    small = narrow(Architecture({"a": 3}, stride=8, head_width=8, dropout=0.0), [8] * 13)
    one, four = activation_bytes(small, (32, 32)), activation_bytes(small, (64, 64))
    assert four == pytest.approx(4 * one, rel=0.02)
    first_maps = (
        4 * 32 * 32 * (3 + 8 + 8)
    )  # the image and two feature maps, which ReLU overwrites in place
    assert first_maps < one < 4 * first_maps
    two_tasks = activation_bytes(replace(small, tasks={"a": 3, "b": 3}), (32, 32))
    assert one < two_tasks < 2 * one, "the trunk's are shared"


def saved(tmp_path, model, architecture=None, interface=None, without=(), **tensors):
    """A model file with single things changed."""
    record = asdict(model.architecture) | (architecture or {})
    sound = asdict(Interface(32, {"segmentation": ("a", "b")}, {"depth": 1.0}, ("depth",)))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    record |= {"interface": sound | (interface or {})}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({**state, **tensors}, metadata={"architecture": json.dumps(record)}))
    return path


NORM = "trunk.1."  # the first batch norm
WEIGHT = "trunk.0.weight"


@pytest.mark.parametrize(
    "changed",
    [
        {NORM + "running_mean": torch.zeros(8, dtype=torch.int64)},
        {NORM + "running_var": torch.ones(8, dtype=torch.bool)},
        {NORM + "running_var": -torch.ones(8)},
        {NORM + "num_batches_tracked": torch.tensor(1.0)},
        {NORM + "num_batches_tracked": torch.tensor(-1)},
        {WEIGHT: torch.zeros(8, 3, 3, 3, dtype=torch.complex64)},
        {WEIGHT: torch.zeros(8, 3, 3, 3, dtype=torch.float16)},
        {WEIGHT: torch.full((8, 3, 3, 3), torch.nan)},
        {WEIGHT: torch.zeros(9, 3, 3, 3)},
        {"trunk.99.weight": torch.zeros(1)},
        {"training." + NORM + "running_var": -torch.ones(8)},
        {"without": (WEIGHT,)},
        *(
            {"architecture": {key: value}}
            for key, value in (
                ("tasks", {}),
                ("tasks", {"depth": 0}),
                ("tasks", {"depth": True}),
                ("dropout", math.nan),
                ("dropout", 1.0),
                ("widths", {"trunk.0": 0}),
                ("widths", {"trunk.0": 8.0}),
                ("widths", {"trunk.0": 65}),
                ("widths", {"trunk.1": 8}),
                ("widths", [8] * 13),
                ("head_width", 0),
                ("stride", 7),
                ("backbone", "os.system"),
                ("more", 1),
            )
        ),
        *(
            {"interface": {key: value}}
            for key, value in (
                ("side", 0),
                ("side", 1.5),
                ("scales", {"depth": math.inf}),
                ("scales", {"depth": "1"}),
                ("classes", [1]),
                ("classes", {"segmentation": [1]}),
                ("mean", [math.nan] * 3),
                ("more", 1),
            )
        ),
    ],
)
def test_a_file_that_no_network_is_in_is_one_clear_line(architecture, tmp_path, changed):
    model = build(narrow(architecture, backbone="vgg16_bn"), 0)
    load_model(saved(tmp_path, model))
    with pytest.raises(ValueError, match="is not a network written by mtprune") as error:
        load_model(saved(tmp_path, model, **changed))
    assert "\n" not in str(error.value)


def test_a_network_is_loaded_ready_to_predict_and_says_how(architecture, dataset, tmp_path):
    model = build(narrow(architecture, backbone="vgg16_bn"), 0)
    fresh, path = copy.deepcopy(model), tmp_path / "model.safetensors"
    gated(fresh)[0].running_mean += 1
    fresh.interface = Interface(
        32, {"segmentation": ("a", "b")}, {"depth": 0.5}, ("segmentation", "depth", "normals")
    )
    path.write_bytes(model_bytes(fresh, trained=model))
    loaded, to_train = load_model(path), load_model(path, to_train=True)
    assert not loaded.training and loaded.interface == fresh.interface
    assert torch.equal(gated(loaded)[0].running_mean, torch.ones(8))
    assert torch.equal(gated(to_train)[0].running_mean, torch.zeros(8))
    images = dataset.test.image[:2]
    loaded.train()
    predicted = loaded.predict(images)
    assert loaded.training, "the mode is as it was"
    plain = loaded.eval()(image_to_float(images))
    assert torch.equal(
        predicted["depth"], TASKS["depth"].target.resize_output(plain["depth"] * 0.5, (32, 32))
    )
    assert loaded.predict(images[:, :, :20, :24])["normals"].shape == (2, 3, 20, 24)
    with pytest.raises(ValueError, match="says nothing about its images"):
        model.predict(images)


def test_a_mode_is_as_it_was_whatever_happens(model):
    model.heads["depth"].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
