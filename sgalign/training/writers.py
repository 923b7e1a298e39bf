"""Callbacks that write what a model predicts into files."""

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
from sgalign.metrics.matching import rank_triplets
from sgalign.training.evaluation import RelationModule


class FileWriter(BasePredictionWriter):
    """Writes what a model predicts for the test part into a file, which appears when the prediction is complete.

    Args:
        path: the file; what was there is replaced.

    Raises:
        ValueError: the trainer has several processes, which would write one file.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self._stack = ExitStack()

    def open(self, module: pl.LightningModule) -> None:
        """Open the file, with `self._stack` to close it; refuse modules whose predictions do not fit."""
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
    """Writes what `sgalign predict` finds, an image a line of JSON.

    A line has `image_id`, `objects` (`label`, `box` x1, y1, x2, y2 in pixels) and `triplets` by falling score
    (`subject` and `object`, indices of objects; `predicate`; `score`), as `describe` chooses them.

    Args:
        path: of `FileWriter`.
        top_k: triplets an image.
        all_predicates: of `describe`.
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
    """Writes the objects that a detector finds in the test part, as `sgalign.data.read_detections` reads them.

        sgalign predict --config CONFIG --ckpt_path CHECKPOINT --trainer.callbacks+=sgalign.training.DetectionWriter

    Args:
        path: of `FileWriter`.
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
    """Writes what `sgalign predict --config` finds, whole, for `sgalign evaluate`: `PredictionFile`'s HDF5.

    Args:
        path: of `FileWriter`.
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
    """Raise an error if the trainer has several processes."""
    if trainer.world_size > 1:
        raise InputError(f"trainer must predict in one process (--trainer.devices 1), got {trainer.world_size}")


def check_relates(module: pl.LightningModule) -> None:
    """Raise an error unless the module predicts scene graphs."""
    if not isinstance(module, RelationModule):
        raise InputError(
            f"{type(module).__name__} relates nothing: predict with a model that has it as detector_weights, or write "
            "its boxes with sgalign.training.DetectionWriter"
        )


def describe(
    prediction: dict[str, Any],
    object_names: list[str],
    predicate_names: list[str],
    top_k: int,
    *,
    all_predicates: bool = False,
) -> dict[str, Any]:
    """Return a prediction of `RelationModule.predictions` in names and plain numbers, best triplets first.

    A triplet's score is that of both objects and of the predicate, multiplied. Each pair has its best predicate (the
    graph constraint), or with `all_predicates` all of them; SGTR ranks triplets itself, some of them of one pair.
    """
    best = rank_triplets(prediction, top_k, len(predicate_names) - 1 if all_predicates else 1)
    return {
        "image_id": prediction["image_id"],
        "objects": [
            {"label": object_names[label], "box": box, "score": round(score, 6)}
            for label, box, score in zip(
                prediction["labels"].tolist(), prediction["boxes"].tolist(), prediction["scores"].tolist(), strict=True
            )
        ],
        "triplets": [
            {
                "subject": subject,
                "predicate": predicate_names[predicate],
                "object": object_,
                "score": round(score, 6),
            }
            for (subject, object_), predicate, score in zip(*(field.tolist() for field in best), strict=True)
        ],
    }
