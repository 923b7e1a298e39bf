"""The callback that writes the result of a run."""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import statistics
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sgalign.data import GraphBatch
from sgalign.errors import InputError, shown
from sgalign.files import read_json, write_json
from sgalign.matching import rank_triplets, relation_overlaps
from sgalign.studies.results import DEPTH, REMEDY, RESULT, Cost, Result, write_result
from sgalign.training import RelationModule, SceneGraphData
from sgalign.training.saved_states import check_form

TRAINING = "training.json"  # written when training is complete: the curve, the best epoch and the cost
PROGRESS = "progress.json"  # rewritten while the run goes on
BEST, LAST, WITHIN = "best", "last", "within"  # names of checkpoints, without ".ckpt"
PAUSE = 1.0  # seconds between two writes of the progress
EVERY = 20  # steps between two readings of the time
TIMED = 1000  # number of latest steps whose times are kept


class RunRecorder(Callback):
    """A callback that records a run: its curve and cost in training, and its figures and ranks in the test.

    The curve is part of the checkpoints, so a resumed run has the whole curve. When training is complete, the best
    checkpoint is renamed to `best.ckpt`. The test of this checkpoint then writes the result.

    Args:
        folder: folder of the run, with the file `settings.json`.
        choose: name of the logged figure that chooses the weights, such as "val/mR@50".
    """

    def __init__(self, folder: str, choose: str) -> None:
        self.folder, self.choose = Path(folder), choose
        self.curve: list[dict[str, float]] = []
        self.scores: list[float] = []  # the exact values of the figure that chooses the weights
        self.stopped = False  # True if EarlyStopping had ended the training when the checkpoint was written
        self._trainer: pl.Trainer | None = None
        self.seconds = 0.0  # of training, until the latest checkpoint
        self._steps: deque[float] = deque(maxlen=TIMED)  # seconds of the latest steps
        self._memory = 0  # largest memory before the run was resumed
        self._began = self._stepped = self._shown = 0.0
        self._device = torch.device("cpu")
        self._found: dict[str, tuple[list[int], list[int]]] = {}

    # ---- training

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.monotonic() - self._began
        cost = {"seconds": seconds, "steps": list(self._steps), "memory": max(self._memory, memory(self._device))}
        stopped = self._trainer is not None and self._trainer.should_stop
        return {"curve": self.curve, "scores": self.scores, "stopped": stopped, **cost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_form(state_dict, self.state_dict() | {"curve": [], "scores": [], "steps": []}, type(self).__name__)
        self.curve, self.scores = state_dict["curve"], state_dict["scores"]
        self.stopped, self.seconds = state_dict["stopped"], state_dict["seconds"]
        self._steps.extend(state_dict["steps"])
        self._memory = state_dict["memory"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._began, self._device = trainer, time.monotonic(), trainer.strategy.root_device
        if (self.folder / TRAINING).is_file():
            raise InputError(f"{self.folder}: the training of this run is complete. To train again, delete the folder")
        if trainer.world_size != trainer.num_devices * trainer.num_nodes:
            raise InputError(
                f"the run must have {trainer.num_devices * trainer.num_nodes} processes, one per device, got "
                f"{trainer.world_size}: check trainer.strategy, and the variables of SLURM or torchrun"
            )
        # A figure without "@" may be one that only some models log. Lightning then checks it after the first epoch.
        if "@" in self.choose and isinstance(pl_module, RelationModule):
            if self.choose not in (known := pl_module.validated_recalls()):
                raise InputError(f"choose must be one of {', '.join(known)}, got {self.choose!r}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = self.stopped  # checkpoints do not contain it

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stepped = 0.0  # the time of an epoch's first step would include the validation

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        now = time.monotonic()
        if self._stepped:
            self._steps.append(now - self._stepped)
        self._stepped = now
        if self._due(trainer):
            self._show(trainer, "training", trainer.global_step, trainer.estimated_stepping_batches)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._due(trainer):
            self._show(trainer, "validation", batch_idx + 1, sum(trainer.num_val_batches))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._stepped = 0.0
        figures = {
            name.removeprefix("val/"): round(value.item(), 5)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        score = trainer.callback_metrics.get(self.choose, torch.tensor(float("nan"))).item()
        self.scores.append(-float("inf") if math.isnan(score) else score)  # as ModelCheckpoint does
        self.curve.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **figures})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.received_sigterm:
            return
        if trainer.is_global_zero:
            self._complete(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        trainer.strategy.barrier()  # the other processes read the best checkpoint next

    def _complete(self, parameters: int) -> None:
        """Keep the best checkpoint as `best.ckpt`, and write the record of the training."""
        if not self.curve:
            raise InputError(
                "no epoch was validated: the run needs a whole epoch of steps (max_steps, max_epochs) and validation "
                "images with relations (limit_val_batches)"
            )
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        best_file = self.folder / f"{BEST}.ckpt"
        kept = self.folder / f"{BEST}-step={self.curve[best]['step']}.ckpt"
        if kept.is_file():
            kept.replace(best_file)
        elif not best_file.is_file():
            raise InputError(f"{kept}: the checkpoint of the best weights is missing: {REMEDY}")
        cost: Cost = {
            "device": device_name(self._device),
            "parameters": parameters,
            "training": round(self.seconds + time.monotonic() - self._began, 1),
            "memory": max(self._memory, memory(self._device)),
        }
        if self._steps:
            cost["step"] = round(statistics.median(self._steps), 5)
        write_json(self.folder / TRAINING, {"curve": self.curve, "epoch": best + 1, "cost": cost})

    # ---- test

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()
        self._found = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: GraphBatch,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if self._due(trainer):
            self._show(trainer, "test", batch_idx + 1, sum(trainer.num_test_batches))
        if isinstance(outputs, dict):
            for prediction, target in zip(outputs["predictions"], batch.truth, strict=True):
                relations = target["relations"][:, 2].tolist()
                if relations or target["image_id"] not in self._found:  # processes without images get empty copies
                    self._found[target["image_id"]] = relations, ranks(prediction, target)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures: dict[str, Any] = {
            k.removeprefix("test/"): v for k, v in trainer.callback_metrics.items() if k.startswith("test/")
        }
        if isinstance(pl_module, RelationModule):
            figures |= pl_module.recall.compute()
        found = self._of_all_processes(trainer)
        if not trainer.is_global_zero:
            return
        best = self.folder / f"{BEST}.ckpt"
        if (self.folder / RESULT).is_file() or Path(trainer.ckpt_path or "").resolve() != best.resolve():
            rank_zero_info(
                f"{self.folder / RESULT} is not written, because it exists or because this did not test {best.name}"
            )
            return
        training = self._read(TRAINING, "curve", "epoch", "cost")
        settings = self._read("settings.json", "seed", "settings")
        data: SceneGraphData = trainer.datamodule  # type: ignore[attr-defined]
        names = data.predicate_names
        images = [graph.image_id for graph in data.test if graph.image_id in found]
        result: Result = {
            "seed": settings["seed"],
            "settings": settings["settings"],
            "curve": training["curve"],
            "epoch": training["epoch"],
            "test": {name: round(float(value), 5) for name, value in figures.items()},
            "groups": {group: [names[p] for p in of_group] for group, of_group in data.predicate_groups.items()},
            "images": images,
            "predicates": [found[image][0] for image in images],
            "ranks": [found[image][1] for image in images],
            "cost": training["cost"] | {"test": round(time.monotonic() - self._began, 1)},
        }
        write_result(self.folder, result)
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def _read(self, name: str, *entries: str) -> dict[str, Any]:
        """Return the content of a file that this run has written."""
        content = read_json(self.folder / name, REMEDY)
        if not isinstance(content, dict) or not content.keys() >= set(entries):
            raise InputError(f"{self.folder / name}: must have {', '.join(entries)}, got {shown(content)}; {REMEDY}")
        return content

    def _of_all_processes(self, trainer: pl.Trainer) -> dict[str, tuple[list[int], list[int]]]:
        """Return the relations and ranks of the images of all processes."""
        if trainer.world_size == 1:
            return self._found
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, self._found)
        merged: dict[str, tuple[list[int], list[int]]] = {}
        for image, found in (item for part in parts for item in part.items()):
            if found[0] or image not in merged:
                merged[image] = found
        return merged

    def _due(self, trainer: pl.Trainer) -> bool:
        """Return True if the progress should be written now."""
        due = trainer.is_global_zero and not trainer.sanity_checking and time.monotonic() - self._shown > PAUSE
        if due:
            self._shown = time.monotonic()
        return due

    def _show(self, trainer: pl.Trainer, part: str, done: int, of: float) -> None:
        """Write how far the run is."""
        total = None if of == float("inf") else int(of)
        progress = {"part": part, "done": done, "of": total, "epoch": trainer.current_epoch + 1}
        (self.folder / PROGRESS).write_text(json.dumps(progress))


class CheckpointWithinEpoch(ModelCheckpoint):
    """A callback that writes `within.ckpt` at intervals of time, except right before a validation or an epoch's end.

    A run that resumed from such a checkpoint would skip the validation, or what follows the epoch's last step. Nor does
    it write while gradients are accumulated, because a checkpoint does not contain them.

    Args:
        folder: folder of the run.
        interval: time between two checkpoints.
    """

    def __init__(self, folder: str, interval: timedelta) -> None:
        super().__init__(folder, WITHIN, train_time_interval=interval, enable_version_counter=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Without a number of epochs between validations, Lightning counts the batches of all epochs.
        counted = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
        validates = (counted + 1) % (trainer.val_check_batch or float("inf")) == 0
        # Gradients that are being accumulated are not in the checkpoint. Several processes agree on the time, which
        # makes the host wait for a GPU, so the time is not read in each step.
        step, accumulated = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if step % EVERY == 0 and not (accumulated or validates or trainer.is_last_batch):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def ranks(prediction: dict[str, Any], target: dict[str, Any]) -> list[int]:
    """Return the rank of the first triplet that matches each relation of an image.

    Ranks start at 0. A relation that none of the first `DEPTH` triplets matches has rank `DEPTH`. A pair of objects has
    at most one predicate, except for SGTR, whose predictions are already ranked.

    Args:
        prediction, target: as for `SceneGraphEvaluator.update`, for one image.
    """
    prediction, target = (
        {name: value.cpu() if isinstance(value, Tensor) else value for name, value in both.items()}
        for both in (prediction, target)
    )
    finds = relation_overlaps(rank_triplets(prediction, DEPTH, 1), prediction, target, phrase=False) >= 0.5
    rank = torch.arange(len(finds))[:, None].where(finds, DEPTH)
    never = rank.new_full((1, rank.shape[1]), DEPTH)
    return torch.cat((rank, never)).amin(0).tolist()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if name := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M):
            return name[1]
    return platform.processor() or platform.machine()


def memory(device: torch.device) -> int:
    """Return the largest memory so far in bytes: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024)
