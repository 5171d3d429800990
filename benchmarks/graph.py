"""How large a batch one driver carries: Snakemake's graph and polling, with jobs that do nothing.

    python benchmarks/graph.py 100 1000 10000

The grid is that of `quick` with so many seeds that it has as many runs. SLURM is pretended: an
`sbatch` that leaves a job's files at once, an `squeue` that calls all finished; so what is timed is
the driver alone. Writes benchmarks/graph.csv, a row for each size as it comes:
grid_seconds: to name every run; read_seconds: to read the Snakefile and find one job, as each job
of a cluster does before it begins; graph_seconds: until the whole graph stands; drive_seconds: from
there until the last job has been seen to finish. These are seconds of a processor, so that what
else runs on the machine counts little. wall_seconds: of graph and jobs, by the clock, of which
some are waits between polls; peak_gib: of the driver's memory.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from mtprune_utils import events
from mtprune_utils.files import PROJECT, csv_text, write_atomically
from mtprune_utils.run import launch
from mtprune_utils.stages import get_stage, stage_names
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment

OWN = {"controls.seeds": 0, "tuning.seed": 10**6}  # which no seed may be
RUNS_A_SEED = 7  # dense, two pruned, four re-trained
PRETENDED = {
    "sbatch": """\
set -- $(printf '%s' "$*" |
    sed -n "s/.*--target-jobs '*\\([a-z]*\\):\\([a-z]*\\)=\\([^' ]*\\).*/\\1 \\3/p")
case $1 in
FILES
esac
echo x >> HERE/submitted
wc -l < HERE/submitted
""",
    "squeue": """\
echo x >> HERE/polled
seq 1 $(wc -l < HERE/submitted 2>/dev/null || echo 0) | sed 's/$/|COMPLETED/'
""",
    "scontrol": "echo 'MinJobAge = 3000 sec'",
    "sinfo": "echo main",
    "scancel": ":",
    "sacct": "exit 1",
    "sacctmgr": "exit 1",
}


def pretend_slurm(place: Path) -> Path:
    """A folder with SLURM's commands, whose jobs are done when they are submitted."""
    runs, figures = place / "runs" / "quick", place / "figures" / "quick-custom"
    cases = []
    for stage in stage_names():
        files = " ".join(f'"$d/{file}"' for file in (*get_stage(stage).TABLES, store.DONE))
        cases.append(f'{stage}) d={runs}/{stage}/$2; mkdir -p "$d"; touch {files};;')
    files = " ".join(f"{figures}/$2.{kind}" for kind in store.FIGURE_KINDS)
    cases.append(f"figure) mkdir -p {figures}; touch {files};;")
    folder = place / "bin"
    folder.mkdir()
    for name, text in PRETENDED.items():
        text = text.replace("FILES", "\n".join(cases)).replace("HERE", str(place))
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def measure(runs: int) -> dict:
    """One row of the table."""
    overrides = OWN | {"seeds": round(runs / RUNS_A_SEED)}
    start = time.process_time()
    found = Experiment.open("quick", "rooms", "", "runs", overrides).runs()
    names = [run.name for run in found]
    row = {"runs": len(names), "grid_seconds": time.process_time() - start}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        path = f"{pretend_slurm(place)}:{os.environ['PATH']}"
        config = place / "batch.json"
        settings = {"profile": "quick", "overrides": overrides}
        folders = {"runs": str(place / "runs"), "figures": str(place / "figures")}
        config.write_text(json.dumps(settings | folders))
        (place / "events").mkdir()
        environment = os.environ | {"PATH": path, events.FOLDER: str(place / "events")}
        where = [
            "--executor",
            "slurm",
            "--jobs",
            "1000",
            "--cores",
            "1",
            "--latency-wait",
            "0",
            "--slurm-init-seconds-before-status-checks",
            "1",
            "--slurm-status-command",
            "squeue",
            "--slurm-logdir",
            str(place / "logs"),
            "--profile",
            "none",
            "--max-jobs-per-timespan",
            "1000/1s",
            *launch.SHARED_FILES,
        ]
        command = launch.snakemake_command(config, where)
        target = f"dense:name={names[0]}"
        one = [*command, "--target-jobs", target, "--allowed-rules", "dense"]
        one += ["--dry-run", "--mode", "remote"]
        row["read_seconds"], _, _ = spent(one, environment)
        start = time.monotonic()
        total, graph, usage = spent(command, environment, until="Select jobs")
        row |= {"graph_seconds": graph, "drive_seconds": total - graph}
        row["wall_seconds"] = time.monotonic() - start
        row["jobs"] = len((place / "submitted").read_text().splitlines())
        row["polls"] = len((place / "polled").read_text().splitlines())
    return row | {"peak_gib": usage.ru_maxrss / 2**20}


def spent(
    command: list[str], environment: dict, until: str = ""
) -> tuple[float, float, resource.struct_rusage]:
    """Processor seconds of a command: all, with what it starts, and until a line begins so.

    (0 if none does.) Also the system's account of it.
    """
    then, lines = 0.0, []
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if until and not then and line.startswith(until):
                stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                then = sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (until and not then):
        raise RuntimeError("".join(lines[-20:]))
    return usage.ru_utime + usage.ru_stime, then, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks/graph.csv")
    options = parser.parse_args()
    rows = []
    for runs in options.runs:
        row = measure(runs)
        rows.append({name: round(value, 2) for name, value in row.items()})
        write_atomically(options.out, csv_text(rows).encode())
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
