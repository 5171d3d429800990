"""SLURM on this machine alone: a controller and two nodes on the loopback, for `make test-slurm`.

Needs root (a node's daemon starts jobs as their user, and has a host name of its own) and Debian's
slurm-wlm and munge. Nothing outside one folder is read or written; what is started ends with it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mtprune_utils.processes import end_with_parent

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=defer,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
GresTypes=gpu
NodeName=n1 NodeAddr=127.0.0.1 Port={n1} CPUs={cores} RealMemory={memory} Gres=gpu:2
NodeName=n2 NodeAddr=127.0.0.1 Port={n2} CPUs={cores} RealMemory={memory} Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Why there can be none here; "" if there can."""
    if os.getuid():
        return "only root can start node daemons"
    missing = [program for program in PROGRAMS if not _path(program)]
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def slurm(folder: Path, cores: int = 2, memory: int = 6000) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and its like speak to it, while it runs.

    cores, memory: of a node; memory in MB.
    """
    for name in ("munge", "state", "bin", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, mode=0o700)
    # Debian's are links to names that end in -wlm, under which the daemons take no GRES.
    for program in ("slurmctld", "slurmd"):
        (folder / "bin" / program).symlink_to(Path(_path(program)).resolve())
    ports = dict(zip(("controller", *NODES), _free_ports(3)))
    text = CONFIGURATION.format(
        host=socket.gethostname(), folder=folder, cores=cores, memory=memory, **ports
    )
    (folder / "slurm.conf").write_text(text)
    for gpu in "01":  # pretended: there is no device behind them
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "munge/key").write_bytes(secrets.token_bytes(128))
    (folder / "munge/key").chmod(0o600)
    # Snakemake's plugin takes all of SLURM's variables away from `srun`.
    wrapper = folder / "bin/srun"
    wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {_path("srun")} "$@"\n')
    wrapper.chmod(0o755)
    search = f"{folder}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": search}
    munge = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    commands = {
        "munged": [_path("munged"), "--foreground", "--force", *options],
        "slurmctld": [f"{folder}/bin/slurmctld", "-D"],
        # On one host, each with a host name of its own.
        **{
            node: [
                "unshare",
                "--uts",
                "sh",
                "-c",
                'hostname "$1"; exec "$2" -D -N "$1"',
                "sh",
                node,
                f"{folder}/bin/slurmd",
            ]
            for node in NODES
        },
    }
    with contextlib.ExitStack() as stack:
        # Also where this process is asked to end.
        before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
        stack.callback(signal.signal, signal.SIGTERM, before)
        for name, command in commands.items():
            log = stack.enter_context(open(folder / f"{name}.log", "w"))
            daemon = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: end_with_parent(signal.SIGKILL),
            )
            stack.callback(_end, daemon)
            if name == "munged":
                _wait_for((munge / "socket").exists, folder)

        def states(state: str, command: str = "sinfo") -> bool:
            return _said(environment, command, "-h", "-o", "%T").split() == [state]

        stack.callback(_cancel_all, environment, folder)
        _wait_for(lambda: states("idle"), folder)
        yield environment


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _cancel_all(environment: dict[str, str], folder: Path) -> None:
    """Before the node daemons end, so that no job outlives them."""
    subprocess.run(["scancel", "--me"], env=environment, capture_output=True)
    _wait_for(lambda: not _said(environment, "squeue", "-h"), folder)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def _wait_for(condition, folder: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in folder.glob("*.log"))
            raise TimeoutError(f"SLURM does not do what it should; its logs:\n{logs}")
        time.sleep(0.2)
