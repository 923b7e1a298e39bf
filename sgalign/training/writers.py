"""Callbacks that write a model's predictions to files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from sgalign.data.predictions import PredictionFile
from sgalign.errors import InputError
from sgalign.files import check_writable, write_json, written_whole
from sgalign.training.evaluation import RelationModule
from sgalign.viewing import describe


class FileWriter(BasePredictionWriter):
    """The base class of callbacks that write predictions for the test split. The file appears only when it is complete.

    Args:
        path: the file to write. An existing file is replaced.

    Raises:
        ValueError: if the trainer has several processes, which would all write the same file.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self._stack = ExitStack()

    def open(self, module: pl.LightningModule) -> None:
        """Prepare the output. Raise InputError if the module does not make the needed predictions.

        A file that is opened here is registered with `self._stack`, which closes it.
        """
        raise NotImplementedError(f"{type(self).__name__} must override open")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_one_process(trainer)
        self.open(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stack.__exit__(type(exception), exception, None)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stack.close()
        print(f"wrote {self.path}")


class TripletWriter(FileWriter):
    """A callback that writes triplets as one line of JSON per image.

    Each line has these fields, which `describe` makes:

    - `image_id`
    - `objects`, each with `label`, `box` (x1, y1, x2, y2 in pixels) and `score`
    - `triplets` in descending order of score, each with `subject` and `object` (indices of objects), `predicate` and
      `score`

    Args:
        path: the file to write. An existing file is replaced.
        top_k: largest number of triplets per image.
        all_predicates: if True, a pair may have several triplets with different predicates.
    """

    _file: TextIO

    def __init__(self, path: str = "predictions.jsonl", top_k: int = 100, all_predicates: bool = False) -> None:
        super().__init__(path)
        self.top_k, self.all_predicates = top_k, all_predicates

    def open(self, module: pl.LightningModule) -> None:
        check_relates(module)
        partial = self._stack.enter_context(written_whole(self.path))
        self._file = self._stack.enter_context(partial.open("w", encoding="utf-8"))

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        assert isinstance(pl_module, RelationModule)
        for image in prediction:
            names = pl_module.object_names, pl_module.predicate_names
            graph = describe(image, *names, self.top_k, all_predicates=self.all_predicates)
            self._file.write(json.dumps(graph) + "\n")


class DetectionWriter(FileWriter):
    """A callback that writes the objects that a detector finds in the test split.

    `sgalign.data.read_detections` reads the file. Write one with this command:

        sgalign predict --config CONFIG --ckpt_path CHECKPOINT --trainer.callbacks+=sgalign.training.DetectionWriter

    Args:
        path: the file to write. An existing file is replaced.
    """

    def __init__(self, path: str = "detections.json") -> None:
        super().__init__(path)

    def open(self, module: pl.LightningModule) -> None:
        check_writable(self.path)
        self._found: dict[str, Any] = {}

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        for image in prediction:
            self._found[image["image_id"]] = {
                "boxes_xyxy": image["boxes"].tolist(),
                "labels": (image["labels"] - 1).tolist(),
                "scores": image["scores"].tolist(),
            }

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_json(self.path, self._found)
        super().on_predict_end(trainer, pl_module)


class PredictionWriter(FileWriter):
    """A callback that writes complete predictions for `sgalign evaluate`, in the HDF5 format of `PredictionFile`.

    Args:
        path: the file to write. An existing file is replaced.
    """

    _file: PredictionFile

    def __init__(self, path: str = "predictions.h5") -> None:
        super().__init__(path)

    def open(self, module: pl.LightningModule) -> None:
        check_relates(module)
        self._file = self._stack.enter_context(PredictionFile(self.path))

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        for image in prediction:
            self._file.write(image["image_id"], image)


def check_one_process(trainer: pl.Trainer) -> None:
    """Raise InputError if the trainer has several processes."""
    if trainer.world_size > 1:
        raise InputError(
            f"trainer must predict in one process (--trainer.devices 1), got {trainer.world_size} processes"
        )


def check_relates(module: pl.LightningModule) -> None:
    """Raise InputError unless the module predicts scene graphs."""
    if not isinstance(module, RelationModule):
        raise InputError(
            f"{type(module).__name__} predicts no relations: train a relation model with this checkpoint as "
            "detector_weights and predict with that model, or write the detected boxes with "
            "sgalign.training.DetectionWriter"
        )
