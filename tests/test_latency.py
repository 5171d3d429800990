"""Costs at inference: the ONNX file, the counts behind the figure, which networks are measured."""

import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from conftest import narrow
from mtprune_utils.core.model import Architecture, build, complexity, count_parameters
from mtprune_utils.study import latency
from mtprune_utils.study.figures import fig4_speedup

TASKS = {"segmentation": 13, "normals": 3, "depth": 1}
WIDTHS = (8,) * 4 + (16,) * 9
DENSE = narrow(Architecture(TASKS, "vgg16_bn", stride=8, head_width=8), WIDTHS)
PRUNED = (7, 8, 5, 8, 13, 11, 16, 9, 15, 5, 6, 12, 10)
SIZE = (40, 32)


def lived_in(architecture, seed=0):
    """A network with batch norm statistics to fold, and outputs that are not all near zero."""
    model = build(architecture, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (
                module.running_mean,
                module.running_var,
                module.weight.data,
                module.bias.data,
            ):
                tensor.uniform_(0.5, 1.5, generator=generator)
    for head in model.heads.values():
        for branch in head.branches:
            branch[-1].weight.data *= 30
    return model


@pytest.fixture(scope="module")
def exported():
    """Exporting takes seconds: once for all tests."""
    return latency.export_onnx(lived_in(DENSE), SIZE)


@pytest.fixture(scope="module")
def measured():
    return latency.measure(
        DENSE, [WIDTHS, PRUNED, latency.rounded_up(PRUNED, DENSE, 8)], SIZE, seconds=0.0
    )


# --- ONNX ---


@pytest.mark.parametrize("widths", [WIDTHS, PRUNED])
def test_onnx_runtime_gives_what_pytorch_gives_for_any_batch(exported, widths):
    model = lived_in(narrow(DENSE, widths), seed=1)
    session = latency.onnx_session(latency.with_weights(exported, model))
    assert [output.name for output in session.get_outputs()] == ["segmentation", "normals", "depth"]
    for batch in (1, 3, 16):
        images = torch.rand(batch, 3, *SIZE)
        latency.check_outputs(model, session, images)
        with torch.inference_mode():
            expected = model(images)
        for values, output in zip(expected.values(), session.run(None, {"images": images.numpy()})):
            assert values.shape == output.shape and values.abs().max() > 0.1
            np.testing.assert_allclose(values, output, atol=1e-4, rtol=0)


def test_a_pruned_networks_own_export_is_the_dense_ones_with_its_weights(exported):
    model = lived_in(narrow(DENSE, PRUNED))
    own, exchanged = (
        onnx.load_from_string(file).graph
        for file in (latency.export_onnx(model, SIZE), latency.with_weights(exported, model))
    )
    assert list(own.node) == list(exchanged.node) and list(own.output) == list(exchanged.output)
    assert {
        weight.name: onnx.numpy_helper.to_array(weight).tolist() for weight in own.initializer
    } == {
        weight.name: onnx.numpy_helper.to_array(weight).tolist() for weight in exchanged.initializer
    }


def test_the_file_tells_nothing_of_this_machine(exported):
    assert b"site-packages" not in exported and b"mtprune_utils" not in exported


@pytest.mark.parametrize("scale", [1.0, 0.01])  # outputs near one, and all of them small
def test_a_perturbed_network_is_refused(exported, scale):
    model = lived_in(DENSE)
    for branch in model.heads["normals"].branches:
        branch[-1].weight.data *= scale
    session = latency.onnx_session(latency.with_weights(exported, model))
    images = torch.rand(2, 3, *SIZE)
    latency.check_outputs(model, session, images)
    model.heads["normals"].branches[0][-1].weight.data *= 1.01
    with pytest.raises(ValueError, match="normals: ONNX Runtime's output is .* away"):
        latency.check_outputs(model, session, images)


# --- counts ---


def test_the_mac_ratio_of_the_papers_networks():
    """The full network and an architecture that the paper reports: 38.28 and 21.47 GMACs.

    These are at 321 x 321.
    """
    full = Architecture({"segmentation": 40, "depth": 1, "normals": 3})
    found = narrow(full, (19, 60, 113, 122, 236, 243, 223, 451, 419, 299, 173, 60, 6))
    macs = [complexity(architecture, (321, 321))["macs"] for architecture in (full, found)]
    assert macs[0] / macs[1] == pytest.approx(38.28 / 21.47, abs=1e-3)


def test_peak_memory_is_what_is_alive_at_once():
    """At the first batch norm: weights, images, the convolution's output and the batch norm's."""
    batch, pixels = 4, SIZE[0] * SIZE[1]
    buffers = sum(2 * width + 2 for width in WIDTHS)  # running statistics, and an int64 counter
    alive = count_parameters(DENSE) + buffers + batch * pixels * (3 + 8 + 8)
    assert latency.peak_bytes(DENSE, batch, SIZE) == 4 * alive
    assert latency.peak_bytes(narrow(DENSE, PRUNED), batch, SIZE) < 4 * alive


# --- which networks ---

RUN = pd.DataFrame(
    {
        "criterion": "taylor",
        "phase": [
            "dense",
            "removed",
            "recovered",
            "removed",
            "recovered",
            "recovered",
            "recovered",
        ],
        "macs": [1000, 500, 500, 120, 120, 100, 10],
        "widths": [
            " ".join(map(str, WIDTHS)),
            *(" ".join([str(width)] * 13) for width in (7, 7, 6, 6, 5, 3)),
        ],
    }
)


def test_networks_lie_evenly_along_the_run_down_to_its_end():
    assert latency.widths_along(RUN, 2) == [(5,) * 13, (3,) * 13]
    assert latency.widths_along(RUN, 1) == [(3,) * 13]
    assert latency.widths_along(RUN, 50) == [(7,) * 13, (6,) * 13, (5,) * 13, (3,) * 13], (
        "no more than there are"
    )


def test_widths_are_rounded_up_to_a_multiple_but_not_beyond_the_dense_network():
    assert latency.rounded_up(PRUNED, DENSE, 8) == (8, 8, 8, 8, 16, 16, 16, 16, 16, 8, 8, 16, 16)
    assert latency.rounded_up(PRUNED, DENSE, 1) == PRUNED
    assert latency.rounded_up((7,) * 13, narrow(DENSE, (12,) * 13), 8) == (8,) * 13
    assert latency.rounded_up((9,) * 13, narrow(DENSE, (12,) * 13), 8) == (12,) * 13
    networks = latency.networks_along(RUN, DENSE, 2, 8)
    assert networks["network"].tolist() == ["found", "rounded up"] * 2
    assert networks["size"].tolist() == [0, 0, 1, 1]
    assert networks["widths"].tolist() == [(5,) * 13, (8,) * 13, (3,) * 13, (8,) * 13]


# --- the table and the figure ---


def networks_of(*criteria):
    kept = {"found": PRUNED, "rounded up": latency.rounded_up(PRUNED, DENSE, 8)}
    return pd.DataFrame(
        [
            {"criterion": criterion, "size": 0, "network": network, "widths": widths}
            for criterion in criteria
            for network, widths in kept.items()
        ]
    )


def test_every_network_is_measured_in_both_runtimes_and_batches(measured):
    cpu = measured[measured["device"] == "cpu"]
    assert cpu.groupby(["runtime", "batch"], sort=False)["widths"].nunique().to_dict() == {
        ("PyTorch", 1): 3,
        ("ONNX Runtime", 1): 3,
        ("PyTorch", 16): 3,
        ("ONNX Runtime", 16): 3,
    }
    assert (measured["milliseconds"] > 0).all()
    assert (cpu["peak_mib"].notna() == (cpu["runtime"] == "PyTorch")).all()


def test_ratios_are_to_the_dense_network_in_the_same_setting(measured):
    # As if latency followed MACs.
    known = measured.assign(milliseconds=measured["macs"] / 1000 * measured["batch"])
    table = latency.speedups(networks_of("taylor", "cosprune"), known, DENSE)
    assert len(table) == 4 * len(measured) / 3
    np.testing.assert_allclose(table["speedup"], table["theoretical"])
    macs = [complexity(narrow(DENSE, widths), SIZE)["macs"] for widths in (WIDTHS, PRUNED)]
    assert (table.loc[table["network"] == "found", "theoretical"] == macs[0] / macs[1]).all()
    rounding = latency.cost_of_rounding(table)
    assert (rounding["macs_ratio"] > 1).all()
    np.testing.assert_allclose(rounding["latency_ratio"], rounding["macs_ratio"])


def test_figure_4_draws_each_setting_and_returns_what_it_drew(measured):
    table = latency.speedups(networks_of("taylor", "cosprune"), measured, DENSE)
    figure, plotted = fig4_speedup(table)
    titles = [axis.get_title() for axis in figure.axes]
    cpu = f"CPU (threads: {torch.get_num_threads()})"
    assert {
        f"{cpu}, PyTorch, batch 1",
        f"{cpu}, ONNX Runtime, batch 16",
        "CPU, peak memory, batch 16",
    } <= set(titles)
    line = figure.axes[0].get_lines()[1]
    assert line.get_xdata()[0] == line.get_ydata()[0] == 1, "from the dense network on"
    assert plotted["widths"].iloc[0] == " ".join(map(str, PRUNED))
    assert {"theoretical", "speedup", "memory_ratio", "processor", "threads"} <= set(plotted)
