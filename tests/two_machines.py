"""Two machines that train one model: two network namespaces on this computer with a cable between them.

    PYTHONPATH=. python tests/two_machines.py FOLDER

trains twice, kills one process in the middle of the second run, and prints how the runs compare. It needs root and `ip`
(Debian's package iproute2). docs/training.md, "Several processes", explains the command that each machine runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from sgalign.commands.main import main

ROOT = Path(__file__).resolve().parent.parent
INTERFACE = "eth0"  # name of both ends of the cable
EPOCHS, STEPS_PER_EPOCH = 4, 5  # a step has 2 x 4 of the 40 images
LIMIT = 400.0  # seconds after which a run counts as stuck
CALLBACKS = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: best, monitor: val/R@50, mode: max, enable_version_counter: false}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: last, enable_version_counter: false}
    - class_path: two_machines.Steps
"""
OPTIONS = f"""--trainer.strategy ddp --trainer.devices 1 --trainer.num_nodes 2 --trainer.accelerator cpu
    --trainer.max_epochs {EPOCHS} --trainer.enable_progress_bar false --data.batch_size 4
    --model.embed_dim 12 --model.hidden_dim 8 --model.relation_dim 16 --ckpt_path last"""


class Machine(NamedTuple):
    """A network namespace with one network interface."""

    namespace: str
    address: str


class Line(NamedTuple):
    """A step of one process, as `Steps` writes it."""

    rank: int
    process: int  # id of the process
    step: int  # number of steps done, those before the checkpoint included
    time: float  # seconds since 1970


class Steps(pl.Callback):
    """A callback that writes each step to a file, and once kills its process as SGALIGN_KILL = "RANK STEP" says."""

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """Write the step. SIGKILL then ends the process if this is its step to die and no process has died yet."""
        line = Line(trainer.global_rank, os.getpid(), trainer.global_step, time.time())
        with Path("steps.txt").open("a") as file:
            file.write(" ".join(map(str, line)) + "\n")
        if os.environ.get("SGALIGN_KILL") == f"{line.rank} {line.step}" and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def ip(*arguments: str) -> str:
    """Run `ip` and return its output. Raise PermissionError if it is missing or refuses."""
    if shutil.which("ip") is None:
        raise PermissionError("ip is not in PATH (apt install iproute2)")
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise PermissionError(f"ip {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Yield two machines that reach each other. In the end, kill their processes and remove them.

    Raise PermissionError if this computer does not allow network namespaces.
    """
    machines = [Machine(f"sgalign-{os.getpid()}-{number}", f"10.77.0.{number}") for number in (1, 2)]
    cable = ["type", "veth", "peer", "name", INTERFACE, "netns", machines[1].namespace]
    try:
        for machine in machines:
            ip("netns", "add", machine.namespace)
        ip("link", "add", "name", INTERFACE, "netns", machines[0].namespace, *cable)
        for namespace, address in machines:
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                ip("-n", namespace, "link", "set", interface, "up")
        yield machines
    finally:
        existing = ip("netns", "list") if shutil.which("ip") else ""
        for machine in machines:
            if machine.namespace in existing:
                for process in ip("netns", "pids", machine.namespace).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)
                ip("netns", "delete", machine.namespace)  # with its end of the cable


def start(machine: Machine, first: Machine, folder: Path, data: Path, kill: str) -> subprocess.Popen[bytes]:
    """Start torchrun on a machine. Its output goes to `folder`, into a text file named after the machine's address.

    `first` is the machine on which the processes meet. `train` describes the other arguments.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1", "SGALIGN_KILL": kill,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": INTERFACE,
    }  # fmt: skip
    torchrun = f"""-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 2 --rdzv-backend c10d
        --rdzv-id sgalign --rdzv-endpoint {first.address}:29400 --rdzv-conf is_host={int(machine == first)}
        --local-addr {machine.address}"""
    fit = ["-m", "sgalign", "fit", "--config", str(ROOT / "configs" / "align_motifs_small.yaml")]
    fit += ["--config", "callbacks.yaml", "--data.root", str(data), *OPTIONS.split()]
    command = ["ip", "netns", "exec", machine.namespace, sys.executable, *torchrun.split(), *fit]
    with (folder / f"{machine.address}.txt").open("wb") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def train(machines: Sequence[Machine], folder: Path, data: Path, kill: str = "") -> list[Line]:
    """Train one model over both machines and return the steps of all processes. Raise RuntimeError if this fails.

    Args:
        machines: the two machines.
        folder: new folder, in which both machines run. It takes the place of a shared folder.
        data: folder of the data set.
        kill: rank and step of the process that dies, such as "1 8". If empty, none dies.
    """
    folder.mkdir()
    (folder / "callbacks.yaml").write_text(CALLBACKS)
    runs = [start(machine, machines[0], folder, data, kill) for machine in machines]
    try:
        until = time.monotonic() + LIMIT
        codes = [run.wait(max(until - time.monotonic(), 0)) for run in runs]
    except subprocess.TimeoutExpired:
        codes = []
    finally:
        for run in runs:
            run.terminate()  # torchrun then ends its processes
            run.wait()
    if codes != [0, 0]:
        ends = [(folder / f"{machine.address}.txt").read_text(errors="replace")[-3000:] for machine in machines]
        raise RuntimeError("\n".join([f"torchrun ended with {codes or 'nothing'} in {LIMIT:.0f} s", *ends]))
    lines = [line.split() for line in (folder / "steps.txt").read_text().splitlines()]
    return [Line(int(rank), int(process), int(step), float(when)) for rank, process, step, when in lines]


def by_process(lines: Sequence[Line], rank: int) -> list[list[Line]]:
    """Return the steps of a rank, one list per process."""
    own = [line for line in lines if line.rank == rank]
    processes = dict.fromkeys(line.process for line in own)
    return [[line for line in own if line.process == process] for process in processes]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    """Return a checkpoint of a run."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)


if __name__ == "__main__":
    out = Path(sys.argv[1]).resolve()
    main(["make-dataset", str(out / "data"), "--format", "coco", "--sizes", "40", "8", "12"])
    with two_machines() as both:
        train(both, out / "undisturbed", out / "data")
        dead, after = by_process(train(both, out / "killed", out / "data", "1 8"), rank=1)
    whole, resumed = (checkpoint(out / name) for name in ("undisturbed", "killed"))
    same = all(torch.equal(whole["state_dict"][name], weight) for name, weight in resumed["state_dict"].items())
    print(f"killed after step {dead[-1].step}, then steps {after[0].step} to {resumed['global_step']}")
    print(f"{after[0].time - dead[-1].time:.1f} s from the last step before the kill to the first one after it")
    print(f"the undisturbed run has {whole['global_step']} steps and {'the same' if same else 'other'} weights")
