"""Training of the Faster R-CNN that Motifs looks through."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from sgalign.data import GraphBatch
from sgalign.models import (
    Detector,
)
from sgalign.training.base import RelationModule, pixels_of
from sgalign.training.options import check_at_least, check_choice, check_learning_rate


class DetectorModule(RelationModule):
    """The object detector that the models of protocol sgdet and sgcls look through, trained first and by itself.

    Args:
        backbone, min_size, max_size, head_dim: of `sgalign.models.Detector`.
        weights: of `Detector.load_weights`, read when training starts; None starts from scratch, and then batch
            normalisation is trained too.
        learning_rate: of Adam. Another optimizer: ``--optimizer`` of the command line.
    """

    network: Detector

    def __init__(
        self,
        backbone: Literal["resnet18", "resnet50", "resnext101_32x8d"] = "resnet50",
        min_size: int = 600,
        max_size: int = 1000,
        head_dim: int = 1024,
        weights: str | None = None,
        learning_rate: float = 1e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_choice("backbone", backbone, ("resnet18", "resnet50", "resnext101_32x8d"))
        check_at_least(1, self.options, ("min_size", "max_size", "head_dim"))
        check_learning_rate("learning_rate", learning_rate)

    def make_network(self, counts: Tensor) -> None:
        options = self.options
        sizes = {name: options[name] for name in ("backbone", "min_size", "max_size", "head_dim")}
        self.network = Detector(len(counts), **sizes, trains_norms=options.weights is None)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """What `DetectionWriter` reads, a dict for each image of the batch."""
        found = self.network.detect(self.network.features(pixels_of(batch)))
        return [
            {"image_id": image_id, "boxes": objects.boxes, "labels": objects.labels, "scores": objects.scores}
            for image_id, objects in zip(batch.image_ids, found, strict=True)
        ]

    def setup(self, stage: str) -> None:
        is_new = self.network is None
        super().setup(stage)
        if is_new and stage == "fit" and not self.trainer.ckpt_path and self.options.weights is not None:
            self.network.load_weights(self.options.weights)

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        lengths = batch.lengths.tolist()
        losses = self.network.losses(pixels_of(batch), batch.boxes.split(lengths), batch.labels.split(lengths))
        losses = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(lengths), prog_bar=True)
        return self.finite(torch.stack(list(losses.values())).sum(), losses)

    def validation_step(self, batch: GraphBatch) -> None:
        """Logs `found`: annotated objects that a detection of their class overlaps with an IoU of at least 0.5."""
        found = self.network.detect(self.network.features(pixels_of(batch)))
        hits = [
            ((box_iou(d.boxes, truth["boxes"]) >= 0.5) & (d.labels[:, None] == truth["labels"])).any(0).sum()
            for d, truth in zip(found, batch.truth, strict=True)
        ]
        part = "test" if self.trainer.testing else "val"
        if objects := len(batch.labels):
            share = torch.stack(hits).sum() / objects
            self.log(f"{part}/found", share, batch_size=objects, prog_bar=True, sync_dist=True, on_epoch=True)

    def on_validation_epoch_start(self) -> None:
        pass

    on_validation_epoch_end = on_test_epoch_start = on_test_epoch_end = on_validation_epoch_start
    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.options.learning_rate, fused=True)
