"""A SLURM cluster of one node on this machine, for the tests that need a real one.

On Debian, `apt-get install slurm-wlm munge` installs the programs. All files of the cluster are in one folder, and
nothing in /etc is used. The cluster has no accounting, so `sacct` fails, as on some small clusters.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))

# With config_overrides, the node has the CPUs that this file names, whatever the machine has. KillWait is the time in
# seconds from SIGTERM to SIGKILL. `scontrol show job` forgets a job MinJobAge seconds after its end.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
MinJobAge=300
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return the name of a program that the cluster needs and that is not installed, or None."""
    return next((program for program in PROGRAMS if shutil.which(program, path=PATH) is None), None)


@contextlib.contextmanager
def one_node(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Run a cluster of one node with the partition "main".

    Args:
        folder: folder for the cluster's files. Its path may have at most 80 characters, because sockets are in it.
        cpus: number of CPUs of the node. The machine may have fewer.

    Yields:
        the environment variables that `sbatch` and the other clients need.
    """
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    configuration, key = folder / "slurm.conf", folder / "munge.key"
    host = socket.gethostname().partition(".")[0]
    configuration.write_text(
        CONFIGURATION.format(host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(), cpus=cpus)
    )
    key.touch(mode=0o600)  # munged refuses a key that others can read
    key.write_bytes(os.urandom(128))
    clients = {"SLURM_CONF": str(configuration)}
    # without the variables of a job that this process may itself be in
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    environment = outside | clients | {"PATH": PATH}
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # --force, because munged wants a folder that all users can enter, and a folder of pytest belongs to one
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in files.items())]
    daemons: list[subprocess.Popen[bytes]] = []

    try:
        for command, condition in (
            (munged, (folder / "munge.socket").exists),
            (["slurmctld", "-D"], lambda: " is UP" in _output("scontrol ping", environment)),
            (["slurmd", "-D"], lambda: _output("sinfo --noheader --format=%T", environment) == "idle\n"),
        ):
            with (folder / f"{command[0]}.out").open("wb") as output:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            if not _wait(condition, 60, daemons[-1]):
                raise RuntimeError(f"{command[0]} did not start:\n" + (folder / f"{command[0]}.out").read_text())
        yield clients
    finally:
        own = {daemon.pid for daemon in daemons}
        if len(daemons) == 3:
            _output("scancel --partition=main", environment)
            _wait(lambda: not _processes(folder) - own, 10)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in _processes(folder):  # if the jobs could not be cancelled
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _processes(folder: Path) -> set[int]:
    """Return the processes of all jobs, and those that write to slurmd's log: slurmd and one process per job step."""
    variable = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or it belongs to another user
            environment = (process / "environ").read_bytes().split(b"\0")
            of_job = variable in environment and any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)
            if of_job or any(os.readlink(file) == f"{folder}/slurmd.log" for file in (process / "fd").iterdir()):
                found.add(int(process.name))
    return found


def _output(command: str, environment: dict[str, str]) -> str:
    """Run a command and return what it prints, or nothing if it hangs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command.split(), env=environment, capture_output=True, text=True, timeout=10).stdout
    return ""


def _wait(condition: Callable[[], bool], seconds: float, daemon: subprocess.Popen[bytes] | None = None) -> bool:
    """Wait until a condition is true. Return False if that takes too long, or if the daemon ends before."""
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end and (daemon is None or daemon.poll() is None):
        time.sleep(0.1)
    return result


def _free_ports() -> tuple[int, int]:
    """Return two ports on which no process listens."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
