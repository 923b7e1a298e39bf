"""The base class of systems that score every pair of a batch's objects: Motifs and the frequency baseline."""

from __future__ import annotations

from typing import Any

import torch

from sgalign.data import GraphBatch, SeenBatch
from sgalign.models import Prediction
from sgalign.training.evaluation import RelationModule


class PairModule(RelationModule):
    """The base class of modules that prepare a batch's inputs (`see`) and then score all pairs at once (`forward`)."""

    def see(self, batch: GraphBatch, batch_index: int = 0) -> SeenBatch:
        """Return the inputs of the model, which are the objects, pairs and features of the batch.

        Args:
            batch: the batch from the data.
            batch_index: index of the batch in the epoch. The random draws of training depend on it.
        """
        return SeenBatch(batch)

    def forward(self, seen: SeenBatch) -> Prediction:
        """Return the network's prediction for a result of `see`."""
        assert self.network is not None, (
            "the network is built only after a trainer or a checkpoint has provided the classes"
        )
        return self.network(seen)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return one dict per image of the batch, in the format of `SceneGraphEvaluator` and `TripletWriter`.

        If object classes are decoded, an object's score is the probability of its decoded class. With protocol "sgdet",
        its box is the detector's box for that class.
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
