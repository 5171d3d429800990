"""mtprune: structured pruning of multi-task networks (Garg, Zhang, Guan, 2023), for any network.

In a training loop of your own, for a network whose outputs have names:

    import mtprune_utils

    pruner = mtprune_utils.Pruner(model, example_inputs=(images,), criterion="cosprune")
    for step, (images, targets) in enumerate(loader):
        losses = compute_losses(model(images), targets)     # {task: scalar}
        pruner.backward(losses)                             # in place of sum(...).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 499:
            pruner.prune(filters=100, optimizer=optimizer)  # or macs=0.3, parameters=0.3, ...
    mtprune_utils.save_pretrained(model, "pruned")
    model = mtprune_utils.load_pretrained("pruned", MyModel)  # also in a fresh process

The experiments of the paper are the notebooks of the repository; docs/code.md is their map.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Pruner", "__version__", "load_pretrained", "save_pretrained"]

_PLACES = {
    "Pruner": "core.pruner",
    "save_pretrained": "core.pretrained",
    "load_pretrained": "core.pretrained",
}


def __getattr__(name: str):
    """Imported when it is asked for: the package itself needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
