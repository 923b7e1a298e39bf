"""Estimates of the time and memory of runs, from a few measured steps.

`python -m sgalign.studies.estimate CONFIG` measures one run in a process of its own, as `estimate` starts it. The
estimate assumes one validation per epoch and no limits on the number of batches.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from sgalign.data.findings import counted
from sgalign.files import read_json, write_json
from sgalign.studies import launch
from sgalign.studies.plan import Run
from sgalign.studies.recording import device_name, memory
from sgalign.training import SceneGraphData
from sgalign.training.lightning_cli import main as lightning

STEPS, BATCHES = 6, 2  # measured training steps, and measured batches of the validation
WARM_UP = 2  # first steps, which are slower and are not counted


class Measured(TypedDict):
    """The measurements of one run."""

    device: str
    step: float  # seconds per training step
    validated: float  # seconds per batch of the validation
    memory: int  # largest memory in bytes, as in `results.Cost`
    checkpoint: int  # size of a checkpoint in bytes
    parameters: int  # number of trained parameters
    steps: int  # training steps of the whole run
    batches: list[int]  # number of batches of all validations together, and of the test


class Meter(Callback):
    """A callback that measures a few steps and writes the measurements to a file.

    Args:
        path: the file.
        max_steps, max_epochs: length of the whole run, as in Lightning's trainer.
        validations: number of epochs per validation.
    """

    def __init__(self, path: str, max_steps: int, max_epochs: int | None, validations: int) -> None:
        self.path, self.max_steps, self.max_epochs, self.validations = Path(path), max_steps, max_epochs, validations
        self._times: dict[str, list[float]] = {"step": [], "validated": []}
        self._last = 0.0

    def _lap(self, kind: str) -> None:
        now = time.monotonic()
        if self._last:
            self._times[kind].append(now - self._last)
        self._last = now

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._lap("step")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._last = time.monotonic()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._lap("validated")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: SceneGraphData = trainer.datamodule  # type: ignore[attr-defined]
        per_epoch = -(-len(data.train_dataloader()) // trainer.accumulate_grad_batches)
        epochs = self.max_epochs
        if epochs is None:
            epochs = 1000 if self.max_steps < 0 else self.max_steps // per_epoch + 1  # 1000 is Lightning's default
        steps = epochs * per_epoch if self.max_steps < 0 else min(self.max_steps, epochs * per_epoch)
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(Path(folder) / "size.ckpt")
            if not trainer.is_global_zero:
                return
            size = (Path(folder) / "size.ckpt").stat().st_size
        device = trainer.strategy.root_device
        validated = steps // per_epoch // self.validations * len(data.val_dataloader())
        measured: Measured = {
            "device": device_name(device),
            "step": statistics.median(self._times["step"][WARM_UP:] or self._times["step"] or [0.0]),
            "validated": statistics.median(self._times["validated"] or [0.0]),
            "memory": memory(device),
            "checkpoint": size,
            "parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "steps": steps,
            "batches": [validated, len(data.test_dataloader())],
        }
        write_json(self.path, measured)


class Estimate(NamedTuple):
    """The estimate of one run."""

    measured: Measured
    seconds: float  # of the whole run, with validation and test


def estimate(run: Run, slot: Mapping[str, str]) -> Estimate | str:
    """Measure a few steps of a run in a process of its own. Return the estimate, or the reason why it failed.

    Args:
        run: the run.
        slot: environment variables of the process, as `launch.slots` returns them.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, out, log = (Path(folder) / name for name in ("config.yaml", "measured.json", "log.txt"))
        config.write_text(yaml.safe_dump(_shortened(run.config, out, Path(folder))), encoding="utf-8")
        command = [sys.executable, "-m", "sgalign.studies.estimate", str(config)]
        with log.open("wb") as file:
            environment, began = launch.environment(dict(slot)), time.monotonic()
            code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
        if code or not out.is_file():
            return launch.reason(code, log)
        measured: Measured = read_json(out)
    start = time.monotonic() - began - STEPS * measured["step"] - BATCHES * measured["validated"]
    seconds = max(start, 0) + measured["step"] * measured["steps"] + measured["validated"] * sum(measured["batches"])
    return Estimate(measured, seconds)


def _shortened(config: Mapping[str, Any], out: Path, folder: Path) -> dict[str, Any]:
    """Return the config with a few steps and one validation, and without checkpoints and logs."""
    trainer = config["trainer"]
    steps = STEPS * (trainer["accumulate_grad_batches"] or 1)
    meter = {
        "path": str(out),
        "max_steps": trainer["max_steps"],
        "max_epochs": trainer["max_epochs"],
        "validations": trainer["check_val_every_n_epoch"] or 1,
    }
    short: dict[str, Any] = {
        "max_steps": -1,
        "max_epochs": 1,
        "limit_train_batches": steps,
        "limit_val_batches": BATCHES,
    }
    short |= {"num_sanity_val_steps": 0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    short |= {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    short["callbacks"] = [{"class_path": "sgalign.studies.estimate.Meter", "init_args": meter}]
    return {**config, "trainer": trainer | short | {"default_root_dir": str(folder)}}


def describe(runs: Sequence[Sequence[Run]], slot: Mapping[str, str], jobs: int) -> Iterator[str]:
    """Yield one line per arm with its estimate, then a line with the sum.

    Args:
        runs: the runs to do of each arm. Arms without such runs are left out.
        slot: as for `estimate`.
        jobs: number of runs at the same time.
    """
    total, disk = 0.0, 0
    for of_arm in filter(None, runs):
        found = estimate(of_arm[0], slot)
        name = f"{of_arm[0].study} {of_arm[0].arm}"
        if isinstance(found, str):
            yield f"{name}: could not be measured: {found}"
            continue
        measured = found.measured
        total += found.seconds * len(of_arm)
        disk += 2 * measured["checkpoint"] * len(of_arm)
        yield (
            f"{name}: {counted(len(of_arm), 'run')} of {duration(found.seconds)} ({measured['steps']} steps of "
            f"{1e3 * measured['step']:.0f} ms), {measured['memory'] / 2**30:.1f} GiB, "
            f"{measured['parameters'] / 1e6:.1f} million trained parameters, on {measured['device']}"
        )
    yield (
        f"together {duration(total)} if one run follows the other, about {duration(total / jobs)} with --jobs {jobs}; "
        f"{disk / 2**30:.1f} GiB of checkpoints"
    )


def duration(seconds: float) -> str:
    """Return a duration as text, such as "3 min" or "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(lightning(["fit", "--config", sys.argv[1]]))
