"""Training of Faster R-CNN, the object detector of Motifs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgalign.data import GraphBatch
from sgalign.data.transfer import send
from sgalign.matching import find_objects
from sgalign.models import Detector, ObjectDetections
from sgalign.training.detection import DetectionModule
from sgalign.training.options import DetectorOptions
from sgalign.training.schedules import adam
from sgalign.training.starting import load_detector


class DetectorModule(DetectionModule):
    """Faster R-CNN, the object detector of Motifs with vision "images". Train it before Motifs.

    Args:
        options: the fields of `DetectorOptions`.
    """

    options: DetectorOptions
    options_type = DetectorOptions
    network: Detector

    def __init__(self, **options: Any) -> None:
        super().__init__(DetectorOptions(**options))

    def make_network(self, counts: Tensor) -> None:
        options = self.options
        self.network = Detector(
            len(counts),
            backbone=options.backbone,
            min_size=options.min_size,
            max_size=options.max_size,
            head_dim=options.head_dim,
            trains_norms=options.weights is None,
        )

    def load_initial_weights(self) -> None:
        if self.options.weights is not None:
            load_detector(self.network, self.options.weights, self.object_names)

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        boxes, labels = batch.boxes_by_image(), batch.labels.split(batch.lengths.tolist())
        losses = self.network.losses(batch.require_pixels(), boxes, labels)
        losses = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
        return self.report(torch.stack(list(losses.values())).sum(), losses, shown=losses)

    def detect(self, batch: GraphBatch) -> list[ObjectDetections]:
        """Return the detected objects of each image."""
        return self.network.detect(self.network.features(batch.require_pixels()))

    def validation_step(self, batch: GraphBatch) -> None:
        """Log `found`, the share of annotated objects that a detection of their class overlaps with IoU >= 0.5."""
        detections = self.detect(batch)
        self.count_detections(batch, _described(batch, detections))
        found = [
            find_objects(
                detected.boxes, detected.labels, send(truth["boxes"], self.device), send(truth["labels"], self.device)
            ).float()
            for detected, truth in zip(detections, batch.truth, strict=True)
        ]
        self.log_share("found", torch.cat(found), prog_bar=True)

    def predict_step(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return the objects that `DetectionWriter` writes, one dict per image of the batch."""
        return _described(batch, self.detect(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.options.learning_rate, self._trainer)


def _described(batch: GraphBatch, detections: Sequence[ObjectDetections]) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "boxes": objects.boxes, "labels": objects.labels, "scores": objects.scores}
        for image_id, objects in zip(batch.image_ids, detections, strict=True)
    ]
