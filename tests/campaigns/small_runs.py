"""Runs of commands in one or two seconds, in forked processes, for campaigns that disturb them.

Importing the packages takes much longer than such a run, so `load` imports them once, and each run is a fork.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import hashlib
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONFIGS = ROOT / "configs"
TEMPORARY = "temporary"  # folder for temporary files, within the folder of a run
LOG = "log.txt"
LIMIT = 120.0  # seconds that a run may take
MOTIFS = {"embed_dim": 12, "hidden_dim": 8, "relation_dim": 16}
SGTR = {
    "backbone": "resnet10", "stride": 16, "dim": 32, "heads": 4, "ffn_dim": 32, "entity_layers": 2,
    "entity_queries": 12, "short_sides": [48, 64], "long_side": 96, "encoder_layers": 1, "layers": 2, "queries": 9,
}  # fmt: skip
QUIET = {"trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}
# What differs between two undisturbed runs of any command: its output, and sockets of Python's module multiprocessing.
ALWAYS_IGNORED = (LOG, f"{TEMPORARY}/pymp-*")
TIMES = {"cost", "digest"}  # keys of JSON files whose values are times, or depend on times


class Command(NamedTuple):
    """A command that a campaign disturbs.

    Attributes:
        arguments: the arguments of `sgalign`. `{inputs}` stands for the folder of `make_inputs`.
        imports: modules to import before the fork.
        shorter: function that shortens waiting times in the process of the run.
        ignored: patterns of files that differ between two undisturbed runs.
        refuses: error of the command if its output is there already, and whole.
        processes: number of processes. With several, a resumed run has other states of random generators.
    """

    arguments: str
    imports: str
    shorter: Callable[[], None] = lambda: None
    ignored: tuple[str, ...] = ()
    refuses: str | None = None
    processes: int = 1


def _parts_at_once() -> None:
    from sgalign.prediction import outputs

    outputs.PART_SECONDS = 0.02


def _two_images_a_file() -> None:
    from sgalign.commands import cache_features

    cache_features.IMAGES_A_FILE = 2


def _forked_workers() -> None:
    """Let `ablate` fork the processes of its runs, with a checkpoint after each step."""
    from sgalign.studies import launch, plan, recording

    launch.PAUSE, plan.MINUTES, recording.EVERY = 0.05, 0, 1
    launch.start = lambda folder, slot: Forked(folder)  # type: ignore[assignment, return-value]


def _two_processes() -> None:
    """Fork a second process of a distributed run, as `torchrun` starts two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    rank = "0" if os.fork() else "1"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0"}


class Forked:
    """A forked process that does a run of a study, with the part of the interface of Popen that `launch` uses."""

    def __init__(self, folder: Path) -> None:
        from sgalign.studies import execute

        self.code: int | None = None
        self.pid = fork(lambda: execute.main([str(folder)]), folder / "log.txt")

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)


def _fit(system: str, limit: str) -> str:
    return (
        f"fit --config {CONFIGS}/{system}_small.yaml --config {{inputs}}/{system}.yaml --data.root {{inputs}}/data "
        f"--ckpt_path last {limit}"
    )


TRAINING = "sgalign.training.lightning_cli lightning.pytorch.loggers"
NOT_EMPTY = "must be a new or an empty folder"
LOGS = ("runs/**",)  # one folder of logs for each start
COMMANDS = {
    "predict": Command(
        "predict {inputs}/data/images --checkpoint {inputs}/sgtr.ckpt --out out/g.jsonl --hdf5 out/p.h5 --html",
        "sgalign.commands.predict",
        _parts_at_once,
    ),
    "make-dataset": Command(
        "make-dataset data --format coco --sizes 3 3 4",
        "sgalign.commands.make_dataset",
        refuses=NOT_EMPTY,
    ),
    "make-dataset-vg150": Command(
        "make-dataset data --format vg150 --sizes 3 3 4",
        "sgalign.commands.make_dataset",
        refuses=NOT_EMPTY,
    ),
    "export": Command(
        "export {inputs}/motifs.ckpt out/model",
        "sgalign.commands.export safetensors.torch",
        refuses=NOT_EMPTY,
    ),
    "evaluate": Command(
        "evaluate {inputs}/predictions.h5 --annotations {inputs}/data --protocol predcls --json out/f.json --csv "
        "out/f.csv",
        "sgalign.commands.evaluate",
    ),
    "cache-features": Command(
        "cache-features --checkpoint {inputs}/images.ckpt --data {inputs}/data --out features",
        "sgalign.commands.cache_features torchvision",
        _two_images_a_file,
    ),
    "fit-motifs": Command(_fit("motifs", "--trainer.max_epochs 3"), f"{TRAINING} sgalign.training", ignored=LOGS),
    "fit-sgtr": Command(
        _fit("sgtr", "--trainer.max_steps 8"), f"{TRAINING} sgalign.training transformers", ignored=LOGS
    ),
    "fit-two-processes": Command(
        f"{_fit('motifs', '--trainer.max_epochs 3')} --trainer.strategy ddp --trainer.devices 2",
        f"{TRAINING} sgalign.training",
        _two_processes,
        LOGS,
        processes=2,
    ),
    "ablate": Command(
        "ablate {inputs}/study.yaml --out out --set data.root={inputs}/data",
        f"{TRAINING} sgalign.commands.ablate sgalign.studies.execute matplotlib.figure",
        _forked_workers,
        # logs; tables with times, whose other numbers are in the results of the runs; configs with the run's folder
        (*(f"out/runs/*/{name}" for name in ("log/**", "tensorboard/**", "log.txt", "config.yaml")), "out/re*.*"),
    ),
}


def options(description: str | None, count: str, default: int, out: str) -> argparse.Namespace:
    """Return the options of a campaign: `commands`, `count`, `seed` and `out`. From now on, SIGTERM raises SystemExit.

    Args:
        description: of the campaign, for `--help`.
        count: what `count` counts. It is the name of this option, too.
        default: default of `count`.
        out: default folder for failed runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(COMMANDS)
    help_ = f"any of {known} (default: all)"
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), metavar="COMMAND", help=help_)
    help_ = f"{count} of each command (default: %(default)s)"
    parser.add_argument(f"--{count}", dest="count", type=int, default=default, help=help_)
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for failed runs (default: %(default)s)")
    given = parser.parse_args()
    if unknown := set(given.commands) - set(COMMANDS):
        parser.error(f"unknown command: {', '.join(sorted(unknown))}; known: {known}")
    if given.count < 1:
        parser.error(f"--{count} must be at least 1, got {given.count}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, but is a file: {given.out}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return given


def load(names: list[str]) -> None:
    """Import what the commands need."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000", "MPLBACKEND": "agg"}
    for name in names:
        for module in ("sgalign_command", "sgalign.commands.main", *COMMANDS[name].imports.split()):
            importlib.import_module(module)


def make_inputs(work: Path, names: list[str]) -> Path:
    """Make a folder with 12 annotated images, and with what else the commands need, in a process of its own."""
    folder = work / "inputs"
    folder.mkdir()
    pid = fork(lambda: _fill(folder, names), work / LOG)
    assert wait(pid) == 0, (work / LOG).read_text()
    return folder


def _fill(folder: Path, names: list[str]) -> int:
    from sgalign.commands.main import main

    arguments = " ".join(COMMANDS[name].arguments for name in names)
    assert main(["make-dataset", str(folder / "data"), "--format", "coco", "--sizes", "6", "2", "4"]) == 0
    if "predictions.h5" in arguments:
        _write_predictions(folder)
    if ".ckpt" in arguments:
        _write_checkpoints(folder)
    if ".yaml" in arguments:
        _write_options(folder)
    return 0


def _write_predictions(folder: Path) -> None:
    """Write random predictions for the test images."""
    import torch

    from sgalign.data import open_dataset
    from sgalign.data.predictions import PredictionFile

    torch.manual_seed(0)
    dataset = open_dataset(folder / "data", "test")
    with PredictionFile(folder / "predictions.h5") as file:
        for graph in dataset:
            pairs = torch.cartesian_prod(*[torch.arange(len(graph.labels))] * 2)
            pairs = pairs[pairs[:, 0] != pairs[:, 1]]
            scores = torch.rand(len(pairs), len(dataset.predicate_names))
            found = {"boxes": graph.boxes, "labels": graph.labels, "scores": torch.ones(len(graph.labels))}
            file.write(graph.image_id, found | {"pairs": pairs, "predicate_scores": scores})


def _write_checkpoints(folder: Path) -> None:
    """Write checkpoints of untrained models."""
    import torch

    from sgalign.data.scenes import OBJECT_NAMES, PREDICATE_NAMES
    from sgalign.training import MotifsModule, SGTRModule

    torch.manual_seed(0)
    vision = {"vision": "images", "backbone": "resnet18", "min_size": 64, "max_size": 96, "head_dim": 32}
    for name, module in {
        "motifs": MotifsModule(**MOTIFS),
        "images": MotifsModule(**MOTIFS, **vision),
        "sgtr": SGTRModule(**SGTR, protocol="sgdet"),
    }.items():
        module._set_classes(OBJECT_NAMES, PREDICATE_NAMES, "the campaign")
        module.make_network(torch.ones(len(OBJECT_NAMES), len(OBJECT_NAMES), len(PREDICATE_NAMES)))
        checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 0}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, folder / f"{name}.ckpt")


def _write_options(folder: Path) -> None:
    """Write the options of `fit`, and a study of two arms."""
    import yaml

    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    common = {"dirpath": "checkpoints", "enable_version_counter": False}
    callbacks = [
        {"class_path": kind, "init_args": common | {"filename": "best", "monitor": "val/R@50", "mode": "max"}},
        {"class_path": kind, "init_args": common | {"filename": "last"}},
    ]
    for name, options in {"motifs": MOTIFS, "sgtr": SGTR | {"warmup_steps": 2}}.items():
        trainer = {name.removeprefix("trainer."): value for name, value in QUIET.items()}
        content = {"model": {"init_args": options}, "trainer": trainer | {"callbacks": callbacks}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | {"data": {"batch_size": 2}}))
    study = {
        "title": "A study",
        "config": str(CONFIGS / "motifs_small.yaml"),
        "choose": "val/mR@50",
        "set": {f"model.{k}": v for k, v in MOTIFS.items()} | QUIET | {"trainer.max_epochs": 2, "data.batch_size": 2},
        "arms": [{"name": "Motifs"}, {"name": "slow", "base": "Motifs", "set": {"model.learning_rate": 1e-4}}],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def fork(do: Callable[[], int], log: Path, folder: Path | None = None) -> int:
    """Call a function in a forked process of its own session, and return the process's number.

    Args:
        do: the function, which returns the exit code.
        log: file to which the output is added.
        folder: the current folder of the process.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if folder is not None:
            os.chdir(folder)
        code = do()
        atexit._run_exitfuncs()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    name: str, inputs: Path, folder: Path, disturb: Callable[[], None] = lambda: None, beside: Path | None = None
) -> int:
    """Start a command in a folder, and return the number of its process.

    Args:
        name: name of the command.
        inputs: the folder of `make_inputs`.
        folder: folder of the run, which is made.
        disturb: function that the process calls before the command.
        beside: folder for the log and temporary files. If None, the folder of the run.
    """
    command, beside = COMMANDS[name], beside or folder
    for made in (folder, beside / TEMPORARY):
        made.mkdir(parents=True, exist_ok=True)

    def run() -> int:
        import sgalign_command

        tempfile.tempdir = str(beside / TEMPORARY)
        os.environ["TMPDIR"] = tempfile.tempdir
        command.shorter()
        sys.argv = ["sgalign", *command.arguments.format(inputs=inputs).split()]
        disturb()
        return sgalign_command.main()

    return fork(run, beside / LOG, folder)


def wait(pid: int) -> int | None:
    """Return the exit code of a process. After `LIMIT` seconds, kill it and return None."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def differences(name: str, folder: Path, whole: dict[str, Any]) -> list[str]:
    """Return how the files that a command has left differ from the contents of an undisturbed run."""
    try:
        left = contents(name, folder)
    except Exception as error:  # a damaged file
        return [f"{type(error).__name__}: {error}"]
    return [
        *(f"{path} is missing" for path in sorted(whole.keys() - left.keys())),
        *(f"{path} is left" for path in sorted(left.keys() - whole.keys())),
        *(f"{path} differs" for path in sorted(whole.keys() & left.keys()) if left[path] != whole[path]),
    ]


def contents(name: str, folder: Path) -> dict[str, Any]:
    """Return the content of all files that a command has left in a folder, except for those that are ignored."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = str(path.relative_to(folder))
        ignored = any(fnmatch(relative, pattern) for pattern in (*ALWAYS_IGNORED, *COMMANDS[name].ignored))
        if not ignored and not path.is_dir():
            found[relative] = content(path)
            if COMMANDS[name].processes > 1 and path.suffix == ".ckpt":
                del found[relative]["sgalign"]["random_states"]
    return found


def content(path: Path) -> Any:
    """Return the content of a file without times: values of JSON, HDF5 and checkpoints, or a digest of other files."""
    import h5py

    from sgalign.files import read_tensors

    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".csv":
        with path.open() as file:
            return list(csv.reader(file))
    if path.suffix == ".h5":
        values: dict[str, str] = {}
        with h5py.File(path, "r") as file:
            file.visititems(lambda key, item: values.update({key: digest(item) if hasattr(item, "dtype") else ""}))
            return values, {key: str(value) for key, value in file.attrs.items()}
    if path.suffix == ".ckpt":
        checkpoint = read_tensors(path, "checkpoint")
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "sgalign")
        return {key: hashed(checkpoint[key]) for key in kept if key in checkpoint}
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def digest(item: Any) -> str:
    values = item[()]
    return f"{item.dtype} {item.shape} {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


def hashed(value: Any) -> Any:
    """Return nested values with digests in place of tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        return digest(value.detach().contiguous().numpy()[None])
    if isinstance(value, dict):
        return {str(key): hashed(part) for key, part in value.items()}
    return [hashed(part) for part in value] if isinstance(value, list | tuple) else repr(value)
