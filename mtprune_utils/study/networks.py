"""Pruned networks on their own: out of a run or a folder of `save_pretrained`, to others.

A network is named by a place: a run folder, one of the .safetensors files in it, or a folder that
`save_pretrained` wrote. `export` gives it to others, `evaluate` measures it.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from mtprune_utils.core import evaluation
from mtprune_utils.core.model import Architecture, Interface, MultiTaskModel, build, load_model
from mtprune_utils.core.pretrained import CONFIG, load_pretrained, save_pretrained
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.task import Task, channels
from mtprune_utils.files import read_json, write_atomically
from mtprune_utils.stages._training import DENSE, device_of, set_up
from mtprune_utils.study import store
from mtprune_utils.study.execute import checked_data
from mtprune_utils.study.grid import SHARED_SETTINGS
from mtprune_utils.study.profiles import get_profile


@dataclass(frozen=True)
class Network:
    """A network, and what is known of how it was measured: {} where nothing is."""

    model: nn.Module
    settings: dict = field(default_factory=dict)  # those of a profile that all runs share
    data: str = ""


def open_network(place: str | Path, builder: str = "") -> Network:
    """The network of a place, in evaluation mode.

    builder: "module:name" of what makes the dense network; only a folder of `save_pretrained` that
    `export` did not write needs it. Raises FileNotFoundError or ValueError in one line.
    """
    place = Path(place)
    if (place / CONFIG).exists():
        return _pretrained(place, builder)
    if builder:
        raise ValueError(f"{place} says itself what it is built of: leave --builder out")
    file = place / DENSE if place.is_dir() else place
    if not file.exists():
        raise FileNotFoundError(
            f"there is no network at {place}: name a run folder, one of its .safetensors files, or "
            "a folder that save_pretrained wrote"
        )
    model, params = load_model(file), file.with_name("params.json")
    if not params.exists():
        return Network(model)
    known, origin = read_json(params), read_json(file.with_name(store.PROVENANCE))
    shared = {name: known[name] for name in SHARED_SETTINGS if name in known}
    return Network(model, shared, origin["data"])


def _pretrained(folder: Path, builder: str) -> Network:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not what save_pretrained writes")
    if builder or "architecture" not in config:
        if not builder:
            made = f"--builder module:name, what makes the dense network ({config.get('builder')})"
            raise ValueError(f"{folder} does not say what it is built of: give {made}")
        return Network(load_pretrained(folder, _imported(builder)))
    settings, data = config.get("settings"), config.get("data")
    if not (isinstance(settings, dict) and isinstance(data, str)):
        raise ValueError(f"{folder / CONFIG} was not written by `mtprune export`")
    return Network(load_pretrained(folder, builder_of(folder)), settings, data)


def builder_of(folder: str | Path) -> Callable[[], MultiTaskModel]:
    """What makes the network of a folder that `export` wrote. Raises ValueError for another one."""
    config = read_json(Path(folder) / CONFIG)
    try:
        architecture, interface = Architecture(**config["architecture"]), config["interface"]
        about = Interface(**interface) if interface else None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder) / CONFIG} was not written by `mtprune export`") from error

    def built() -> MultiTaskModel:
        model = build(architecture, 0)
        model.interface = about
        return model

    return built


def _imported(name: str) -> Callable[[], nn.Module]:
    """What "module:name" means, from the working folder or what is installed."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # a console command does not look there by itself
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--builder {name!r}: {error}; write it like my_module:MyModel") from error
    finally:
        sys.path.pop(0)


# --- to others ---


def export(network: Network, target: str | Path, size: tuple[int, int] | None = None) -> Path:
    """Write the network to `target`: an ONNX file if it ends in .onnx, else a folder.

    The folder is `save_pretrained`'s. Beside the weights goes what one needs to use them: the size
    of images, their normalisation, classes and scales (in the ONNX file as metadata). size: (H, W)
    of the ONNX file's images; by default, those that the network was measured on. An ONNX file is
    run and compared with PyTorch before it is written. Raises ValueError where they differ.
    """
    target, model = Path(target), network.model
    if target.suffix != ".onnx":
        if size:
            raise ValueError("--size is about an ONNX file: name the target *.onnx")
        return save_pretrained(model, target, **_described(network))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file")
    about = model.interface if isinstance(model, MultiTaskModel) else None
    if size is None and about is None:
        raise ValueError("the network does not say how large its images are: give --size H W")
    write_atomically(
        target,
        _onnx(model, size or (about.side, about.side), about),  # type: ignore[union-attr]
    )
    return target


def _described(network: Network) -> dict:
    """What `save_pretrained` is told of a network of the suite."""
    model = network.model
    if not isinstance(model, MultiTaskModel):
        return {}
    return {
        "builder": 'builder_of("this/folder")',
        "card": {"To use it": "`builder_of` is in `mtprune_utils.study.networks`."},
        "architecture": asdict(model.architecture),
        "interface": asdict(model.interface) if model.interface else None,
        "settings": network.settings,
        "data": network.data,
    }


def _onnx(model: nn.Module, size: tuple[int, int], about: Interface | None) -> bytes:
    import onnx

    from mtprune_utils.study import latency

    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    named = model if isinstance(model, MultiTaskModel) else _Named(model, list(_run(model, images)))
    exported = latency.export_onnx(named, size)  # type: ignore[arg-type]
    latency.check_outputs(named, latency.onnx_session(exported), images)  # type: ignore[arg-type]
    proto = onnx.load_from_string(exported)
    told = {"interface": json.dumps(asdict(about))} if about else {}
    onnx.helper.set_model_props(proto, told)
    return proto.SerializeToString()


class _Named(nn.Module):
    """A network of others, with its outputs' names where ours has them."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.heads = model, names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.model(images)


def _run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Its outputs. Raises ValueError if it is none that takes images and names its outputs."""
    try:
        with torch.inference_mode():
            outputs = model(images)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the network takes no images {tuple(images.shape)}: {reason}") from error
    if not isinstance(outputs, dict):
        kind = type(outputs).__name__
        raise ValueError(f"the network must give {{task: output}}, it gives a {kind}")
    return outputs


# --- measured ---


def evaluate(
    network: Network,
    data: str = "",
    root: str = "",
    split: str = "test",
    profile: str = "",
    overrides: dict | None = None,
) -> list[dict]:
    """Every metric of every task that the network has, as rows of task, metric and value.

    data, profile: by default, those that the network was made with, else the rooms and `quick`.
    Raises ValueError, in one line, where network and data do not fit.
    """
    chosen = _profile(network, profile, overrides or {})
    dataset = checked_data(data or network.data or "rooms", root, chosen)
    device = device_of(chosen)
    set_up(chosen, device)
    ready = dataset.resized_for_evaluation(chosen.crop).to(device)
    model = network.model.to(device)
    found = _run(model, torch.zeros(2, 3, chosen.crop, chosen.crop, device=device))
    tasks = _tasks_of({name: output.shape[1] for name, output in found.items()}, dataset.tasks)
    metrics = evaluation.evaluate(model, getattr(ready, split), tasks, chosen)
    return [
        {"task": task, "metric": name.removeprefix(f"{task}."), "value": value}
        for task in tasks
        for name, value in metrics.items()
        if name.startswith(f"{task}.")
    ]


def _profile(network: Network, name: str, overrides: dict) -> Profile:
    if name:
        return get_profile(name, overrides)
    about = network.model.interface if isinstance(network.model, MultiTaskModel) else None
    known = network.settings or ({"crop": about.side} if about else {})
    return get_profile("quick", known | overrides)


def _tasks_of(outputs: dict[str, int], tasks: dict[str, Task]) -> dict[str, Task]:
    """The data set's tasks that the network has."""
    known = channels(tasks)
    if not outputs.keys() <= known.keys() or any(known[name] != n for name, n in outputs.items()):
        raise ValueError(
            f"the network's outputs are {outputs} (channels), the data set's tasks are {known}"
        )
    return {name: task for name, task in tasks.items() if name in outputs}
