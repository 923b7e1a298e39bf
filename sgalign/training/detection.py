"""The evaluation of detections that Faster R-CNN and DETR share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgalign.data import GraphBatch
from sgalign.data.detections import NOTHING
from sgalign.metrics import DetectionEvaluator
from sgalign.training.base import SavedModule

LOGGED = ("mAP", "mAP_50")


class DetectionModule(SavedModule):
    """The base class of modules that only detect objects. It evaluates them by COCO's mean average precision.

    Subclasses call `count_detections` for each batch.
    """

    needs_relations = False
    average_precision: DetectionEvaluator

    def on_validation_epoch_start(self) -> None:
        self.average_precision = DetectionEvaluator()

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def count_detections(self, batch: GraphBatch, found: Sequence[Mapping[str, Any]]) -> None:
        """Add the detections of a batch to the metric.

        Args:
            batch: the batch.
            found: one dict per image, as `DetectionEvaluator` expects them.
        """
        images = self.data.validation if self.part == "val" else self.data.test
        if self.global_rank >= len(images):  # this process has a copy of another one's image, see `with_idle_images`
            found = [NOTHING._asdict() for _ in found]
        self.average_precision.update(found, batch.truth)

    def on_validation_epoch_end(self) -> None:
        figures = self.average_precision.compute()
        for name in LOGGED:
            if name in figures:
                self.log(f"{self.part}/{name}", figures[name].to(self.device), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
