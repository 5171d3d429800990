"""Whether the present code gives the numbers of committed tables: refactoring need cost no study.

    python -m mtprune_utils.study.vouch --profile quick

Committed runs of other code are drawn at random, one of each stage, criterion and present digest (a
profile has one backbone), and repeated with all that they start from, under runs/vouch. Searches
that were not drawn are laid out from the tables. Only if every table is the same, byte for byte, is
it noted beside the tables (results/vouched.json) that the present digests are as good as theirs.
They are compared with

committed tables  where the machine is of the kind that made them: device, threads and torch;
another commit    elsewhere, where the same code gives other last digits. The runs are then repeated
                  twice, by the present code and by a commit whose digests are those of the tables.
                  That is as sound: code is compared with code on one machine, and the digests say
                  that the commit is the code that made the tables.

The draw's seed follows from the digests: nobody chooses it, and what was interrupted goes on when
it is started again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mtprune_utils.datasets import data_root
from mtprune_utils.files import PACKAGE, PROJECT, read_json, write_json
from mtprune_utils.processes import ENVIRONMENT
from mtprune_utils.stages._training import device_kind, device_of, set_up
from mtprune_utils.study import _before, store, tables
from mtprune_utils.study.grid import Experiment, Run

FIGURES = PROJECT / "figures"
# In a process of its own, in another commit's tree too: what it calls has to stay. It says the code
# of every run, {name: digest}. Then each line is a chain of runs, with the files that a run is
# given, or null for one to be made; it answers with their folders.
REPEATER = """
import json, sys
from mtprune_utils.files import write_atomically
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment, Run
answers, sys.stdout = sys.stdout, sys.stderr
experiment = Experiment.open(**json.loads(sys.argv[1]))
known = {run.name: run.code for run in experiment.runs()}
print(json.dumps(known), file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    chain = [(Run(experiment, stage, **cell), given) for stage, cell, given in asked]
    for run, given in chain:
        if given is None:
            execute(run, report=lambda line: None)
        elif not run.done:
            for file, text in given.items():
                write_atomically(run.path(file), text.encode())
            run.finish(run.code)
    print(json.dumps([str(run.folder) for run, given in chain]), file=answers, flush=True)
"""
Chain = list[tuple[Run, dict[str, str] | None]]


def vouch(experiment: Experiment, base: str | None = None) -> list[dict]:
    """Repeat, compare, and stamp. Returns the stamps: one for each digest that code has now.

    base: the commit to compare with; by default, where another machine made the tables, their own.
    Raises ValueError, and stamps nothing, if a table differs or there is nothing to compare with.
    """
    experiment.check()
    commit = store.git("rev-parse", "HEAD")
    if commit is None or store.uncommitted("mtprune_utils"):
        raise ValueError("a stamp names a commit: commit what has changed in mtprune_utils first")
    place = PROJECT / "runs" / "vouch" / experiment.label
    committed = replace(experiment, root=place / "committed")
    shutil.rmtree(committed.root, ignore_errors=True)  # since an earlier start tables may be others
    tables.restore(committed, FIGURES)
    code_of = {run: run.marker["code"] for run in committed.runs() if run.done}
    code_of = {run: code for run, code in code_of.items() if experiment.refusal(run, code)}
    if not code_of:
        print(f"{experiment.label}: nothing to vouch for, no committed run is of other code")
        return []
    # {(stage, present digest): those that it is to stand for}
    codes: dict[tuple[str, str], set[str]] = {}
    for run, code in code_of.items():
        codes.setdefault((run.stage, run.code), set()).add(code)
    stamps = [
        {"stage": stage, "from": sorted(then), "to": now} for (stage, now), then in codes.items()
    ]
    seed = int(hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:8], 16)
    drawn = draw(list(code_of), seed)
    origins = [read_json(run.path(store.PROVENANCE)) for run in code_of]
    here = _present_machine(experiment)
    with contextlib.ExitStack() as stack:
        other = None
        if base or any(_machine(origin) != here for origin in origins):
            known = store.results_folder(experiment.label) / store.RECORDS
            touched = (store.git("log", "--format=%H", "--", str(known)) or "").split()
            commits = [*touched, *(origin["commit"] for origin in origins)]
            if base:
                commits = [store.git("rev-parse", base) or base]
            base, other = stack.enter_context(_code_of(code_of, commits, place))
        compared = f"commit {base} on this machine" if other else "committed tables"
        count = f"{len(drawn)} of {len(code_of)} runs, drawn with seed {seed}"
        where = f"compared with {compared} ({here['device']})"
        print(f"{experiment.label}: {count}; {where}", flush=True)
        own = _repeater(PACKAGE.parent, experiment, place / f"{seed:08x}")
        present = stack.enter_context(own)
        _answer(present)  # its digests
        for i, run in enumerate(drawn, 1):
            _compare(_chain(run, drawn), present, other, compared)
            print(f"[{i}/{len(drawn)}] {run.stage} {run.name}: the same", flush=True)
    repeated = [f"{run.stage}/{run.name}" for run in drawn]
    more = {"commit": commit, "base": base, "compared": compared, "machine": here}
    stamps = [stamp | more | {"seed": seed, "repeated": repeated} for stamp in stamps]
    write_json(experiment.vouched_file, [*experiment.stamps(), *stamps])
    shutil.rmtree(place)
    return stamps


def draw(runs: list[Run], seed: int) -> list[Run]:
    """One run of each stage, criterion and present digest, in the given order."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.stage, run.criterion, run.code), []).append(run)
    chance = random.Random(seed)
    return sorted((chance.choice(group) for group in groups.values()), key=runs.index)


def _present_machine(experiment: Experiment) -> dict:
    device = device_of(experiment.profile)
    set_up(experiment.profile, device)
    kind = {"threads": torch.get_num_threads(), "device": device_kind(device)}
    return _machine(store.provenance("") | kind)


def _machine(origin: dict) -> dict:
    """What of a machine a run's bits depend on."""
    torch_version = {"torch": origin["packages"]["torch"]}
    return {"device": origin["device"], "threads": origin["threads"], **torch_version}


def _chain(run: Run, drawn: list[Run]) -> Chain:
    """The run after what it starts from; a search that was not drawn with the files it is given."""
    if run.stage == "tune" and run not in drawn:
        known = [file for file in run.folder.iterdir() if file.name != store.DONE]
        return [(run, {file.name: file.read_text() for file in known})]
    return [*(link for source in run.inputs for link in _chain(source, drawn)), (run, None)]


def _compare(chain: Chain, present, other, compared: str) -> None:
    """Raises ValueError for the first table that differs."""
    sides = [present, other] if other else [present]
    asked = json.dumps([(run.stage, run.cell, given) for run, given in chain])
    for side in sides:  # at the same time
        print(asked, file=side.stdin, flush=True)
    found = [_answer(side) for side in sides]
    for i, (run, given) in enumerate(chain):
        after, before = Path(found[0][i]), Path(found[1][i]) if other else run.folder
        for table in run.tables if given is None else ():
            if (after / table).read_bytes() != _before.renamed((before / table).read_bytes()):
                raise ValueError(
                    f"{run.stage} {run.name}: {table} is not that of {compared}. Numbers have "
                    f"changed, nothing is stamped. Compare {after / table} with {before / table}"
                )


@contextlib.contextmanager
def _code_of(
    code_of: dict[Run, str], commits: list[str], place: Path
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The first of the commits with these runs by this code, and a process that repeats them."""
    experiment = next(iter(code_of)).experiment
    for commit in dict.fromkeys(commits):
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            tree = Path(scratch, "base")
            if store.git("worktree", "add", "--detach", str(tree), commit) is None:
                raise ValueError(f"git has no commit {commit!r} to compare with: see --base")
            stack.callback(store.git, "worktree", "remove", "--force", str(tree))
            other = stack.enter_context(_repeater(tree, experiment, place / commit))
            known = _answer(other)
            # A run has the name of now, or the one that it had before.
            codes = {run: known.get(run.name) or known.get(run.stream) for run in code_of}
            same = {code: experiment.same_code(code) for code in {*codes.values()} if code}
            if all(code_of[run] in same.get(code, ()) for run, code in codes.items()):
                yield commit, other
                return
    digests = ", ".join(sorted({*code_of.values()}))
    raise ValueError(
        f"{', '.join(commits)}: not the code and the numbers that made the tables, by their "
        f"digests {digests}: name another commit with --base"
    )


@contextlib.contextmanager
def _repeater(tree: Path, experiment: Experiment, runs: Path) -> Iterator[subprocess.Popen]:
    """A process that repeats runs, into that folder, by the code of a working tree."""
    root = experiment.data_root and str(Path(data_root(experiment.data_root)).resolve())
    own = {"profile": experiment.profile.name, "data": experiment.data, "root": root}
    present = (tree / "mtprune_utils" / "study").is_dir()
    repeater = REPEATER if present else _before.REPEATER
    command = [sys.executable, "-c", repeater, json.dumps(own | {"runs": str(runs)})]
    with subprocess.Popen(
        command,
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | os.environ | {"PYTHONPATH": str(tree)},
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # what it is at keeps a checkpoint


def _answer(process: subprocess.Popen):
    if not (line := process.stdout.readline()):
        raise ValueError("a repetition has failed, for the reason above: nothing is stamped")
    return json.loads(line)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data", default="rooms")
    parser.add_argument("--root", default="")
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with, see above")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        experiment = Experiment.open(options.profile, options.data, options.root, "runs")
        for stamp in vouch(experiment, options.base):
            print(f"{stamp['stage']}: {stamp['to']} gives what {', '.join(stamp['from'])} gave")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
