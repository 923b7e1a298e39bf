"""The base of systems that score every pair of a batch's objects: Motifs and the frequency baseline."""

from __future__ import annotations

from typing import Any

import torch

from sgalign.data import GraphBatch, SeenBatch
from sgalign.models import Prediction
from sgalign.training.evaluation import RelationModule


class PairModule(RelationModule):
    """A module that looks at a batch (`see`) and then predicts for all pairs of its objects at once (`forward`)."""

    def see(self, batch: GraphBatch, batch_index: int = 0) -> SeenBatch:
        """Return the batch with what the model finds in it before it relates anything.

        Args:
            batch_index: of the step, which tells what training draws.
        """
        return SeenBatch(batch)

    def forward(self, seen: SeenBatch) -> Prediction:
        """Return what the network predicts for a batch that `see` has looked at."""
        assert self.network is not None, "the network is made when a trainer or a checkpoint tells the classes"
        return self.network(seen)

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
