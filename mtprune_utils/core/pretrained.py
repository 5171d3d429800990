"""A pruned network as a folder that others can load: safetensors, config.json and a model card.

Loading runs no code of the folder: the reader's own builder makes the dense network, whose layers
then take the saved tensors' shapes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune_utils.core.surgery import fit_to_tensors
from mtprune_utils.files import read_json, write_atomically, write_json

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: nn.Module, folder: str | Path, *, builder: str = "", card: dict | None = None,
    picture: str | Path | None = None, **config,
) -> Path:
    """Write the network into a folder: weights, config.json and a model card.

    builder: how the dense network is made, in words; nothing calls it. card: what the model card
    says, {heading: text or {name: value}}. picture: an image file, copied beside it. config: more
    for config.json, e.g. classes or normalisation, as JSON values. Returns the folder.
    """
    folder = Path(folder)
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    shared = {t.untyped_storage().data_ptr() for t in state.values() if t.numel()}
    if len(shared) < sum(1 for t in state.values() if t.numel()):  # safetensors refuses shared memory
        state = {name: tensor.clone() for name, tensor in state.items()}
    widths = {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))
    }
    about = {"format": FORMAT, "builder": builder, "widths": widths, **config}
    write_json(folder / CONFIG, about)
    parts = dict(card or {})
    if picture is not None:
        image = Path(picture)
        write_atomically(folder / image.name, image.read_bytes())
        parts["Picture"] = f"![{image.stem}]({image.name})"
    parameters = sum(p.numel() for p in model.parameters())
    write_atomically(folder / CARD, _card(type(model).__name__, parameters, builder, parts).encode())
    write_atomically(folder / WEIGHTS, save(state))  # last: a folder with weights is whole
    return folder


def _card(name: str, parameters: int, builder: str, parts: dict) -> str:
    lines = [
        "---", "library_name: mtprune", "tags: [multi-task, structured-pruning]", "---", "",
        f"# {name}, pruned with mtprune", "", f"{parameters:,} parameters.", "", "```python",
        "from mtprune_utils import load_pretrained",
        f"model = load_pretrained(\"this/folder\", {builder or 'build'})"
        "  # any function that makes the dense network",
        "```",
    ]
    for heading, content in parts.items():
        lines += ["", f"## {heading}", ""]
        if isinstance(content, dict):
            lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in content.items())]
        else:
            lines.append(str(content))
    return "\n".join([*lines, ""])


def load_pretrained(folder: str | Path, builder: Callable[[], nn.Module]) -> nn.Module:
    """The network of a folder, in evaluation mode.

    builder: makes the dense network; its layers are given the saved widths. Raises ValueError, in
    one line, for what is no such folder or does not fit the network, and names what does not.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{folder / CONFIG}: expected format {FORMAT}, got {found!r}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file ({reason})") from error
    model = builder()
    check_fit(model, state, folder / WEIGHTS)
    give_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()})
    model.load_state_dict(state)
    return model.eval()


def check_fit(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raises ValueError for tensors that are not the network's, or larger than its own."""
    own = model.state_dict()
    names = sorted(set(own) ^ set(state))
    if names:
        where = "is not in it" if names[0] in own else "is not in the network"
        raise ValueError(f"{source}: {names[0]} {where} ({len(names)} names differ)")
    for name, tensor in state.items():
        dense = own[name]
        smaller = tensor.dim() == dense.dim() and all(
            1 <= n <= most for n, most in zip(tensor.shape, dense.shape)
        )
        if tensor.dtype != dense.dtype or not smaller:
            expected = f"at most {tuple(dense.shape)} of {dense.dtype}"
            raise ValueError(
                f"{source}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {expected}"
            )


def give_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give every tensor of the network its shape; what it holds then is not defined."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            empty = torch.empty(shapes[name], dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                module._parameters[key] = nn.Parameter(empty, tensor.requires_grad)
            else:
                module._buffers[key] = empty
    fit_to_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and module.in_channels % module.groups:
            raise ValueError(f"{name}: {module.in_channels} channels in {module.groups} blocks")
