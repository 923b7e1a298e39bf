"""Evaluation of all systems that relate objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgalign.data import GraphBatch, SeenBatch
from sgalign.errors import InputError
from sgalign.metrics import SceneGraphEvaluator
from sgalign.models import Prediction
from sgalign.training.base import SavedModule


class RelationModule(SavedModule):
    """A module that predicts scene graphs: it is evaluated by their recall, and predicts what the writers write."""

    recall: SceneGraphEvaluator

    @property
    def protocol(self) -> str:
        return "predcls"

    @property
    def looks_at_images(self) -> bool:
        """True if batches must have their images' pixels."""
        return False

    @property
    def described(self) -> str:
        return f"{type(self).__name__} of protocol {self.protocol}"

    def setup(self, stage: str) -> None:
        if self.protocol == "sgdet" and self.data.detections is not None:
            raise InputError("data must have no detections for protocol sgdet: the model finds objects itself")
        super().setup(stage)

    def see(self, batch: GraphBatch, batch_index: int = 0) -> SeenBatch:
        """Return the batch with what the model finds in it before it relates anything."""
        return SeenBatch(batch)

    def forward(self, seen: SeenBatch) -> Prediction:
        """Return what the network predicts for a batch that `see` has looked at."""
        assert self.network is not None, "the network is made when a trainer or a checkpoint tells the classes"
        return self.network(seen)

    def on_validation_epoch_start(self) -> None:
        self.recall = self._evaluator(self.protocol, self.data.zero_shot_validation)

    def on_test_epoch_start(self) -> None:
        protocol = self.protocol if self.data.detections is None else "sgdet"
        self.recall = self._evaluator(protocol, self.data.zero_shot_test)

    def _evaluator(self, protocol: str, zero_shot: Tensor) -> SceneGraphEvaluator:
        evaluator = SceneGraphEvaluator(
            protocol,
            len(self.predicate_names) - 1,
            zero_shot=zero_shot,
            groups=self.data.predicate_groups,
            predicate_names=self.predicate_names,
        )
        return evaluator.to(self.device)

    def validation_step(self, batch: GraphBatch) -> None:
        self.recall.update(self.predictions(batch), batch.truth)

    def on_validation_epoch_end(self) -> None:
        part = "test" if self.trainer.testing else "val"
        for name, value in self.recall.compute().items():
            if name.partition("/")[2] not in self.predicate_names:
                self.log(f"{part}/{name}", value.float(), prog_bar=name in ("R@50", "mR@50"), sync_dist=True)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: GraphBatch) -> list[dict[str, Any]]:
        return self.predictions(batch)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return what `SceneGraphEvaluator` and `TripletWriter` read, a dict for each image of the batch.

        A decoded object's score is the probability of its class, its box the detector's for that class.
        """
        seen = self.see(batch)
        graph, prediction = seen.graph, self(seen)
        labels, boxes, scores = prediction.labels, graph.boxes, graph.scores
        if prediction.object_logits is not None:
            scores = prediction.object_logits.float().softmax(1).gather(1, labels[:, None])[:, 0]
        if seen.boxes_per_class is not None:
            boxes = seen.boxes_per_class[torch.arange(len(labels), device=labels.device), labels]
        probabilities = prediction.logits.float().softmax(1)
        lengths, pairs = graph.lengths.tolist(), graph.pairs_by_image()
        images = zip(
            graph.image_ids,
            boxes.split(lengths),
            labels.split(lengths),
            scores.split(lengths),
            pairs,
            probabilities.split([len(of_image) for of_image in pairs]),
            strict=True,
        )
        fields = "image_id", "boxes", "labels", "scores", "pairs", "predicate_scores"
        return [dict(zip(fields, image, strict=True)) for image in images]
