"""The command `mtprune`: what `make` does, networks in and out, completion for the shell.

    mtprune figures --profile quick
    mtprune evaluate runs/quick/prune/NAME --csv metrics.csv
    mtprune export runs/quick/prune/NAME pruned.onnx
    mtprune completion bash > ~/.local/share/bash-completion/completions/mtprune

Only what a command needs is imported: torch takes seconds. Completion is a script that is written
once (by shtab): a shell that asked this program at every press of Tab would wait as long.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import mtprune_utils
from mtprune_utils import registry
from mtprune_utils.files import csv_text, write_atomically
from mtprune_utils.run import launch

if TYPE_CHECKING:
    from mtprune_utils.study import networks

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    """All commands with their options. `perform` of what it gives is the function to call."""
    told = argparse.ArgumentParser(prog="mtprune", description=__doc__.splitlines()[0])
    told.add_argument("--version", action="version", version=mtprune_utils.__version__)
    commands = told.add_subparsers(dest="command", metavar="COMMAND", required=True)
    launch.add_commands(commands)
    for command in list(commands.choices.values()):
        command.set_defaults(perform=launch.perform)

    def add(perform, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(perform.__name__, help=about, description=about)
        command.set_defaults(perform=perform)
        return command

    add(check, "name each figure whose code, numbers or data have changed since it was made")

    one = add(vouch, "repeat committed runs by the code as it is: does it give the same numbers?")
    launch.add_experiment(one)
    compared = "what to compare with; default: the tables, or the code that made them"
    one.add_argument("--base", metavar="COMMIT", help=compared)

    one = add(plan, "how long a batch will take, on how many workers, and what limits it")
    launch.add_experiment(one)
    launch.add_overrides(one)
    counts = "how many; default: several"
    one.add_argument("--workers", type=launch.job_count, nargs="+", metavar="N", help=counts)

    one = add(export, "write a pruned network as an ONNX file, or as a save_pretrained folder")
    _add_network(one)
    one.add_argument("target", help="*.onnx, or a folder")
    launch.add_plugin(one)
    size = "of the ONNX file's images; default: as the network was measured"
    one.add_argument("--size", nargs=2, type=launch.job_count, metavar=("H", "W"), help=size)

    one = add(evaluate, "metrics of a pruned network on a data set")
    _add_network(one)
    launch.add_experiment(one, profile="", data="")
    launch.add_overrides(one)
    from_images = "images to measure on; default: test"
    one.add_argument(
        "--split", choices=("test", "validation", "train"), default="test", help=from_images
    )
    one.add_argument("--csv", metavar="FILE", help="write the table there too")

    one = add(completion, "print the script that completes this command's words in a shell")
    one.add_argument("shell", choices=SHELLS)
    return told


def _add_network(command: argparse.ArgumentParser) -> None:
    what = "run folder, one of its .safetensors files, or a folder that save_pretrained wrote"
    command.add_argument("network", help=what)
    of_own = "what makes the dense network, for a save_pretrained folder of a network of your own"
    command.add_argument("--builder", default="", metavar="MODULE:NAME", help=of_own)


# --- one function for each command ---


def check(options: argparse.Namespace) -> int:
    from mtprune_utils.study import stale

    launch.need_repository("check")
    os.environ["MTPRUNE_OFFLINE"] = "1"  # data that is not here stays where it is
    return stale.check()


def vouch(options: argparse.Namespace) -> int:
    from mtprune_utils.study.grid import Experiment
    from mtprune_utils.study.vouch import vouch

    experiment = Experiment.open(options.profile, options.data, options.root, "runs")
    for stamp in vouch(experiment, options.base):
        print(f"{stamp['stage']}: {stamp['to']} gives what {', '.join(stamp['from'])} gave")
    return 0


def plan(options: argparse.Namespace) -> int:
    from mtprune_utils.run.plan import WORKERS, report
    from mtprune_utils.study.grid import Experiment

    launch.need_repository("plan")
    where = (options.profile, options.data, options.root, "runs")
    numbers = launch.with_plugin(options.overrides, options.plugin)
    experiment = Experiment.open(*where, numbers)
    experiment.check()
    print(report(experiment, options.workers or WORKERS))
    return 0


def _network(options: argparse.Namespace) -> "networks.Network":
    """The network that a command is given; its backbone or tasks may be a plugin's."""
    from mtprune_utils.study import networks

    if options.plugin:
        registry.load_plugin(options.plugin)
    return networks.open_network(options.network, options.builder)


def export(options: argparse.Namespace) -> int:
    from mtprune_utils.study import networks

    network = _network(options)
    size = tuple(options.size) if options.size else None
    print(f"Written: {networks.export(network, options.target, size)}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from mtprune_utils.study import networks

    network = _network(options)
    where = (options.data, options.root, options.split, options.profile, options.overrides)
    rows = networks.evaluate(network, *where)
    wide = [max(len(row[column]) for row in rows) for column in ("task", "metric")]
    for row in rows:
        print(f"{row['task']:{wide[0]}}  {row['metric']:{wide[1]}}  {row['value']:10.4f}")
    if options.csv:
        write_atomically(Path(options.csv), csv_text(rows).encode())
    return 0


def completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(parser(), options.shell))
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return launch.guarded(options.perform, options)


if __name__ == "__main__":
    sys.exit(main())
