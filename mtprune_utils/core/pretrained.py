"""A pruned network as a folder that others can load: safetensors, config.json and a model card.

Loading runs no code of the folder: the reader's own builder makes the dense network, whose layers
then take the saved tensors' shapes.
"""

import hashlib
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

import mtprune_utils
from mtprune_utils.core.surgery import fit_to_tensors
from mtprune_utils.files import checksum, read_json, write_atomically, write_json

FORMAT = 1
WEIGHTS, CONFIG, CARD, WIDTHS = "model.safetensors", "config.json", "README.md", "widths.svg"
CHECKSUM = "SHA-256 of the weights"
LAYERS = (_ConvNd, nn.Linear)
Rows = dict[str, object]  # a table of the card: {name: value, or (before, after)}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    builder: str | Callable[[], nn.Module] = "",
    pruner=None,
    metrics: Rows | None = None,
    card: dict[str, str | Rows] | None = None,
    picture: str | Path | None = None,
    **config,
) -> Path:
    """Write the network into a folder: weights, config.json, and a model card with a picture.

    builder: what makes the dense network. If it can be called, it is, to see that the folder will
    load and to show what each layer had; else it is taken for words. pruner: the `Pruner` of the
    run, whose criterion and sizes go into the card. metrics: {name: value, or (dense, pruned)}.
    card: more for the card, {heading: text or a table like metrics}. picture: an image file, copied
    beside it. config: more for config.json, e.g. classes or normalisation, as JSON values.

    The card also says what made it, and draws the widths. Returns the folder. Raises ValueError, in
    one line and before anything is written, if the network is not one of the builder's, pruned.
    """
    folder = Path(folder)
    state = _state(model)
    if _is_of_others(folder / CARD):
        raise ValueError(f"{folder / CARD} is no model card of ours: choose another folder")
    image = None if picture is None else (Path(picture).name, Path(picture).read_bytes())
    shared = {t.untyped_storage().data_ptr() for t in state.values() if t.numel()}
    if len(shared) < sum(1 for t in state.values() if t.numel()):  # safetensors refuses shared ones
        state = {name: tensor.clone() for name, tensor in state.items()}
    dense = builder() if callable(builder) else None
    if dense is not None:
        check_fit(dense, state, "the network")
    name = _name(builder) if callable(builder) else builder
    content, widths = save(state), _widths(model)
    size, made_by = _sizes(model, dense, pruner), _made_by(pruner, content)
    about = {"format": FORMAT, "builder": name, "widths": widths}
    about |= {"size": size, "metrics": metrics or {}, "made_by": made_by}
    if taken := config.keys() & about:
        raise ValueError(f"config.json says {min(taken)} by itself: choose another name")
    write_json(folder / CONFIG, about | config)
    write_atomically(folder / WIDTHS, _drawn(widths, _widths(dense or model)).encode())
    parts: dict[str, str | Rows] = {"Size": size, **({"Metrics": metrics} if metrics else {})}
    parts |= {"Filters of each layer": f"![Dense in grey, what is left in blue]({WIDTHS})"}
    if image is not None:
        write_atomically(folder / image[0], image[1])
        parts["Picture"] = f"![{Path(image[0]).stem}]({image[0]})"
    parts |= {**(card or {}), "Made by": made_by}
    write_atomically(folder / CARD, _card(type(model).__name__, name, parts).encode())
    write_atomically(folder / WEIGHTS, content)  # last: a folder with weights is whole
    return folder


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors on the CPU. Raises ValueError for what others could not load."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    check_unwrapped(model)
    state = {}
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(f"the network's state holds {name}, which is no tensor")
        state[name] = value.detach().cpu().contiguous()
    _check_numbers(state, "the network")
    return state


def _check_numbers(state: dict[str, Tensor], source: str | Path) -> None:
    for name, tensor in state.items():
        if tensor.isnan().any():
            raise ValueError(f"{source}: {name} holds NaN")


def _is_of_others(card: Path) -> bool:
    return card.exists() and "library_name: mtprune" not in card.read_text(encoding="utf-8")


def _name(builder: Callable) -> str:
    """As one would import it; "" for a function without a name of its own."""
    name, module = (getattr(builder, f"__{of}__", "") for of in ("qualname", "module"))
    if "<" in name:  # "<lambda>", or within a function
        return ""
    return name if module == "__main__" else f"{module}.{name}".strip(".")


def _widths(model: nn.Module) -> dict[str, int]:
    """{layer: filters, or features} of every convolution and linear layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in layers.items()
    }


def _sizes(model: nn.Module, dense: nn.Module | None, pruner) -> Rows:
    """What the network takes; (dense, pruned) as far as the builder or the pruner know it."""
    now, before = _size(model), {} if dense is None else _size(dense)
    if pruner is not None:
        now, before = now | pruner.size(), before | pruner.dense
    return {name: (before[name], n) if name in before else n for name, n in now.items()}


def _size(model: nn.Module) -> dict[str, int]:
    tensors = model.state_dict().values()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "bytes of weights": sum(t.nbytes for t in tensors)}


def _made_by(pruner, content: bytes) -> Rows:
    packages = {name: metadata.version(name) for name in ("torch", "torch-pruning", "safetensors")}
    versions = {"mtprune": mtprune_utils.__version__, **packages}
    versions["python"] = platform.python_version()
    criterion = {} if pruner is None else {"criterion": pruner.criterion.name}
    return {**criterion, **versions, CHECKSUM: hashlib.sha256(content).hexdigest()}


def _card(name: str, builder: str, parts: dict[str, str | Rows]) -> str:
    lines = [
        "---",
        "library_name: mtprune",
        "tags: [multi-task, structured-pruning]",
        "---",
        "",
        f"# {name}, pruned with mtprune",
        "",
        "```python",
        "from mtprune_utils import load_pretrained",
        "",
        f'model = load_pretrained("this/folder", {builder or "build"})'
        "  # whatever makes the dense network",
        "```",
    ]
    for heading, content in parts.items():
        shown = str(content) if not isinstance(content, dict) else _table(content)
        lines += ["", f"## {heading}", "", shown]
    return "\n".join([*lines, ""])


def _table(rows: Rows) -> str:
    """In Markdown; pairs are what the dense network and the pruned one have."""
    pairs = any(isinstance(value, (tuple, list)) for value in rows.values())
    lines = ["| | dense | pruned |", "|---|---|---|"] if pairs else ["| | |", "|---|---|"]
    for name, value in rows.items():
        values = value if isinstance(value, (tuple, list)) else ("",) * pairs + (value,)
        lines.append(f"| {name} | {' | '.join(map(_shown, values))} |")
    return "\n".join(lines)


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _drawn(widths: dict[str, int], dense: dict[str, int]) -> str:
    """A picture of every layer's width, as SVG: what it had in grey, what is left in blue."""
    row, text = 16, 7 * max(map(len, widths), default=0)
    most = max(dense.values(), default=1)
    lines = []
    for i, (name, width) in enumerate(widths.items()):
        y, whole = row * i, 300 * dense[name] / most
        left = 300 * width / most
        of = f"{width} of {dense[name]}" if width < dense[name] else f"{width}"
        lines += [
            f'<text x="{text}" y="{y + 12}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{text + 8}" y="{y + 2}" width="{whole:.1f}" height="12" fill="#ccc"/>',
            f'<rect x="{text + 8}" y="{y + 2}" width="{left:.1f}" height="12" fill="#1f77b4"/>',
            f'<text x="{text + whole + 14:.1f}" y="{y + 12}">{of}</text>',
        ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{text + 420}" '
        f'height="{row * len(widths)}" font-family="monospace" font-size="11">'
    )
    white = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, white, *lines, "</svg>", ""])


def load_pretrained(folder: str | Path, builder: Callable[[], nn.Module]) -> nn.Module:
    """The network of a folder, in evaluation mode.

    builder: makes the dense network; its layers are given the saved widths. Raises ValueError, in
    one line, for what is no such folder or does not fit the network, and names what does not.
    """
    folder = Path(folder)
    if not callable(builder):
        kind = type(builder).__name__
        raise ValueError(f"builder must be callable and make the dense network, got a {kind}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{folder / CONFIG}: expected format {FORMAT}, got {found!r}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file ({reason})") from error
    made_by = config.get("made_by")
    told = made_by.get(CHECKSUM) if isinstance(made_by, dict) else None
    if told != checksum(folder / WEIGHTS):
        raise ValueError(f"{folder / WEIGHTS} is damaged, or not the file that {CONFIG} is about")
    model = builder()
    if not isinstance(model, nn.Module):
        raise ValueError(f"builder must make a torch.nn.Module, got a {type(model).__name__}")
    check_fit(model, state, folder / WEIGHTS)
    _check_numbers(state, folder / WEIGHTS)
    give_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if _widths(model) != config.get("widths"):
        raise ValueError(f"{folder}: {CONFIG} tells other widths than {WEIGHTS} has")
    model.load_state_dict(state)
    return model.eval()


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError for a network within another, as for several GPUs or compiled."""
    for inner in ("module", "_orig_mod"):
        if list(model._modules) == [inner]:
            raise ValueError(
                f"the network is wrapped in a {type(model).__name__}: give the network itself, its "
                f".{inner}, and wrap it again afterwards"
            )


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
    own = model.state_dict(keep_vars=True)
    for name, shape in shapes.items():
        tensor = own[name]
        if tuple(tensor.shape) != tuple(shape):
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                module._parameters[key] = nn.Parameter(empty, tensor.requires_grad)
            else:
                module._buffers[key] = empty
    fit_to_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and module.in_channels % module.groups:
            raise ValueError(f"{name}: {module.in_channels} channels in {module.groups} blocks")
        if isinstance(module, (*LAYERS, _NormBase)):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            lengths = {len(tensor) for tensor in own if tensor.dim() == 1}
            if len(lengths) > 1:
                raise ValueError(f"{name}: its tensors are of several lengths, {sorted(lengths)}")
