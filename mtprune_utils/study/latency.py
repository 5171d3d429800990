"""What a network costs at inference: latency and peak memory, in PyTorch and in ONNX Runtime.

The latter is where pruned networks are deployed. Neither cost depends on the values of the weights,
so an architecture is all that is measured: its network is built at random.
"""

import copy
import math
import platform
import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtprune_utils.core.model import (
    Architecture,
    MultiTaskModel,
    build,
    complexity,
    evaluation_mode,
    skeleton,
)
from mtprune_utils.stages.retrain import widths_of

TOLERANCE = 1e-4
ROUNDS = 3
SETTING = ["device", "runtime", "batch"]


# --- which networks ---


def widths_along(run: pd.DataFrame, count: int) -> list[tuple[int, ...]]:
    """The widths of `count` networks that a pruning run passed through.

    They are as evenly spaced in log MACs as they come. run: its evaluations.csv. The dense network
    is left out, the smallest is in; a short run has fewer.
    """
    recovered = run[run["phase"] == "recovered"]
    goals = np.geomspace(run["macs"].max(), recovered["macs"].min(), count + 1)[1:]
    nearest = dict.fromkeys(
        (np.log(recovered["macs"]) - np.log(goal)).abs().idxmin() for goal in goals
    )
    return [tuple(widths_of(widths)) for widths in recovered.loc[list(nearest), "widths"]]


def rounded_up(widths: Iterable[int], dense: Architecture, multiple: int) -> tuple[int, ...]:
    """The widths that a selector with this `multiple` would have kept.

    They are rounded up, but not beyond the dense network's.
    """
    return tuple(
        min(math.ceil(width / multiple) * multiple, most)
        for width, most in zip(widths, dense.width_list, strict=True)
    )


def networks_along(
    pruned: pd.DataFrame, dense: Architecture, count: int, multiple: int
) -> pd.DataFrame:
    """One row per network to measure.

    Columns criterion, size (from 0, falling), network ("found" or "rounded up"), widths (a tuple).
    pruned: evaluations of one run per criterion.
    """
    rows = []
    for criterion, run in pruned.groupby("criterion", sort=False):
        for size, widths in enumerate(widths_along(run, count)):
            for network, kept in (
                ("found", widths),
                ("rounded up", rounded_up(widths, dense, multiple)),
            ):
                rows.append(
                    {"criterion": criterion, "size": size, "network": network, "widths": kept}
                )
    return pd.DataFrame(rows)


# --- latency and memory ---


def latency(call: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call, over as many as fit into `seconds`, at least one.

    A warm-up comes first, and a GPU is waited for.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()  # memory is allocated, and kernels are chosen
    wait()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages: of tensors given and, until freed, of those made."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        self._count(tensors)

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:  # an operation in place, or a view, makes none
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self._count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def peak_bytes(architecture: Architecture, batch: int, size: tuple[int, int]) -> int:
    """The most that weights, images and activations take at once in a forward pass, float32.

    Of a batch of (H, W) images. Counted tensor by tensor, without running it: the same on every
    processor, and exact for networks of any size. The process's own peak would show a small network
    only as noise beside PyTorch's 200 MB. What convolutions use as workspace, which depends on the
    processor, is left out.
    """
    model = skeleton(architecture).eval()
    own = _LiveBytes([*model.parameters(), *model.buffers()])
    with torch.device("meta"), torch.inference_mode(), own as memory:
        model(torch.empty(batch, 3, *size))
    return memory.peak


def cuda_peak_bytes(model: MultiTaskModel, images: Tensor) -> int:
    """The most that a forward pass takes at once on the GPU, in bytes.

    Weights, images, activations and workspaces count. What else lies there, such as the networks
    measured before, does not.
    """
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), images))
    others = torch.cuda.memory_allocated(images.device) - own
    torch.cuda.reset_peak_memory_stats(images.device)
    with torch.inference_mode():
        model(images)
    return torch.cuda.max_memory_allocated(images.device) - others


def device_name(device: str) -> str:
    """The kind of processor, e.g. "NVIDIA H100 80GB HBM3"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpus.read_text()) if cpus.exists() else None
    return found[1] if found else platform.machine()


# --- ONNX ---


def export_onnx(model: MultiTaskModel, size: tuple[int, int]) -> bytes:
    """The network as an ONNX file.

    Input `images` (batch, 3, H, W) with any batch, one output for each task, by its name.
    Batch norm stays as it is: ONNX Runtime folds it into the convolutions as it loads the file.
    """
    with evaluation_mode(model):
        exported = torch.onnx.export(
            model,
            (torch.zeros(2, 3, *size),),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["images"],
            output_names=list(model.heads),
            dynamic_shapes=({0: "batch"},),
        ).model_proto
    for node in exported.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    return exported.SerializeToString()


def with_weights(exported: bytes, model: MultiTaskModel) -> bytes:
    """The ONNX file of a network from that of another, which differs in widths only.

    The graph is the same at any widths, and tracing it takes seconds.
    """
    proto, state = onnx.load_from_string(exported), model.state_dict()
    for weight in proto.graph.initializer:
        weight.CopyFrom(onnx.numpy_helper.from_array(state[weight.name].numpy(), weight.name))
    del proto.graph.value_info[:]  # the other's shapes
    return proto.SerializeToString()


def onnx_session(exported: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])


def check_outputs(
    model: MultiTaskModel, session: onnxruntime.InferenceSession, images: Tensor
) -> None:
    """Raises ValueError unless both give the same for (B, 3, H, W) images.

    That is within 1e-4, and where a task's outputs are all smaller than one, within 1e-4 of the
    largest.
    """
    with torch.inference_mode(), evaluation_mode(model):
        expected = model(images)
    outputs = session.run(list(expected), {"images": images.numpy()})
    for (task, values), output in zip(expected.items(), outputs):
        difference = (values - torch.from_numpy(output)).abs().max().item()
        if not difference <= TOLERANCE * min(1.0, values.abs().max().item()):
            raise ValueError(
                f"{task}: ONNX Runtime's output is {difference:.1e} away from PyTorch's"
            )


# --- the table ---


def measure(
    dense: Architecture,
    widths: Iterable[tuple[int, ...]],
    size: tuple[int, int],
    seconds: float,
    batches: tuple[int, ...] = (1, 16),
) -> pd.DataFrame:
    """Latency and peak memory at the given widths, on the CPU and, if there is one, the GPU.

    One row per widths, device, runtime and batch: complexity of one (H, W) image, milliseconds of a
    batch, peak_mib (of PyTorch). seconds: spent on each latency, in rounds over all of a runtime's,
    so that what else the machine does, or how fast it happens to run, meets every network alike.
    Raises ValueError if ONNX Runtime's outputs are not PyTorch's.
    """
    exported, rows, calls = export_onnx(build(dense, 0), size), [], []
    channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    for kept in widths:
        architecture = dense.with_widths(list(kept))
        # Channels-last as in training.
        model = build(architecture, 0).eval().to(memory_format=torch.channels_last)
        session = onnx_session(with_weights(exported, model))
        costs = {"widths": kept, **complexity(architecture, size)}

        def add(device: str, runtime: str, batch: int, call: Callable, peak: float) -> None:
            where = {"processor": device_name(device), "threads": torch.get_num_threads()}
            rows.append(
                {
                    **costs,
                    "device": device,
                    "runtime": runtime,
                    "batch": batch,
                    "peak_mib": peak / 2**20,
                    **where,
                }
            )
            calls.append(call)

        for batch in batches:
            images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
            check_outputs(model, session, images)
            add(
                "cpu",
                "PyTorch",
                batch,
                partial(model, channels_last(images)),
                peak_bytes(architecture, batch, size),
            )
            add(
                "cpu",
                "ONNX Runtime",
                batch,
                partial(session.run, None, {"images": images.numpy()}),
                math.nan,
            )
        if torch.cuda.is_available():
            model = copy.deepcopy(model).cuda()
            for batch in batches:
                images = channels_last(torch.rand(batch, 3, *size, device="cuda"))
                add(
                    "cuda", "PyTorch", batch, partial(model, images), cuda_peak_bytes(model, images)
                )
    table = pd.DataFrame(rows)
    # One runtime after the other: ONNX Runtime's threads spin on for a while after each call.
    for _, group in table.groupby(["device", "runtime"]):
        with torch.inference_mode():
            rounds = [
                [latency(calls[i], seconds / ROUNDS) for i in group.index] for _ in range(ROUNDS)
            ]
        table.loc[group.index, "milliseconds"] = [
            1000 * statistics.median(taken) for taken in zip(*rounds)
        ]
    return table


def speedups(networks: pd.DataFrame, measured: pd.DataFrame, dense: Architecture) -> pd.DataFrame:
    """Every network's costs with what they are of the dense network's in the same setting.

    A setting is a device, runtime and batch. networks: `networks_along`; measured: `measure`, the
    dense widths included. Columns theoretical (dense MACs / MACs), speedup (dense latency /
    latency) and memory_ratio (dense peak / peak).
    """
    reference = measured[measured["widths"] == tuple(dense.width_list)].set_index(SETTING)[
        ["macs", "milliseconds", "peak_mib"]
    ]
    table = networks.merge(measured, on="widths").join(reference.add_suffix("_dense"), on=SETTING)
    ratios = {"theoretical": "macs", "speedup": "milliseconds", "memory_ratio": "peak_mib"}
    table = table.assign(
        **{name: table[f"{column}_dense"] / table[column] for name, column in ratios.items()}
    )
    return table[[column for column in table if not column.endswith("_dense")]]


def cost_of_rounding(table: pd.DataFrame) -> pd.DataFrame:
    """MACs and latency of the networks with widths rounded up, over those of the ones found.

    table: `speedups`. A latency ratio under 1 says that the fuller network is the faster one.
    """
    pairs = table.set_index(["criterion", "size", *SETTING])
    found, rounded = (
        pairs.loc[pairs["network"] == network, ["macs", "milliseconds"]]
        for network in ("found", "rounded up")
    )
    return (
        (rounded / found)
        .rename(columns={"macs": "macs_ratio", "milliseconds": "latency_ratio"})
        .reset_index()
    )
