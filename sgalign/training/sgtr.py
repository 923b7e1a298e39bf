"""Training and evaluation of SGTR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_convert

from sgalign.data import GraphBatch
from sgalign.data.transfer import send
from sgalign.models.entity_detector import DetectedEntities
from sgalign.models.graph_assembly import Entities, assemble, assign, relation_costs, relation_losses
from sgalign.models.sgtr import SGTR, RelationOutputs
from sgalign.training.detr import DetrModule, found_objects
from sgalign.training.evaluation import RelationModule
from sgalign.training.options import SGTROptions
from sgalign.training.starting import OF_SGTR, ClassRows


class SGTRModule(DetrModule, RelationModule):
    """SGTR on images, with the entity detector and the relations trained together.

    Args:
        options: the fields of `SGTROptions`.
    """

    options: SGTROptions
    options_type = SGTROptions
    class_rows: ClassVar[ClassRows] = OF_SGTR
    network: SGTR

    def __init__(self, **options: Any) -> None:
        super().__init__(SGTROptions(**options))

    def make_network(self, counts: Tensor) -> None:
        if self.start is not None and self.options.detector_weights is None:
            self.set_detector(self.start)
        super().make_network(counts)
        options, (classes, _, predicates) = self.options, counts.shape
        self.network = SGTR(
            classes - 1,
            predicates - 1,
            dim=options.dim,
            layers=options.layers,
            encoder_layers=options.encoder_layers,
            num_queries=options.queries,
            focal=options.focal,
            heads=options.heads,
            ffn_dim=options.ffn_dim,
            dropout=options.dropout,
        )
        if options.detector_weights is not None:
            detr = self.detector.detr
            self.network.start_heads(detr.class_labels_classifier, list(detr.bbox_predictor.layers))

    @property
    def protocol(self) -> str:
        return self.options.protocol

    @property
    def looks_at_images(self) -> bool:
        return True

    # ---- evaluation

    def validation_step(self, batch: GraphBatch) -> dict[str, Any]:
        pixels, entities = self.detect(batch)
        self.log_found(entities, batch)
        predictions = self._graphs(batch, pixels, entities)
        self.recall.update(predictions, batch.truth)
        return {"predictions": predictions}

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return one dict per image of the batch, with ranked `triplets`, in the format of `SceneGraphEvaluator`."""
        return self._graphs(batch, *self.detect(batch))

    def _graphs(self, batch: GraphBatch, pixels: list[Tensor], entities: DetectedEntities) -> list[dict[str, Any]]:
        lengths, options = batch.lengths.tolist(), self.options
        # These are the given objects, either annotated or from a separate detector.
        labels, boxes, scores = (field.split(lengths) for field in (batch.labels, batch.boxes, batch.scores))
        in_units = box_convert(batch.boxes / batch.sizes[batch.images].repeat(1, 2), "xyxy", "cxcywh").split(lengths)
        candidates = self._candidates(entities, labels, in_units, scores)
        outputs = self.network(entities.last()).at(-1)
        graphs = assemble(outputs, candidates, sizes_of(pixels), focal=options.focal, pairs=options.pairs)
        predictions = []
        for image, (triplets, triplet_scores) in enumerate(graphs):
            relations = {"triplets": triplets, "triplet_scores": triplet_scores}
            if self.protocol == "predcls":  # given boxes stay unchanged, even where they exceed the image
                told = {"boxes": boxes[image], "labels": labels[image], "scores": scores[image]}
                predictions.append({"image_id": batch.image_ids[image], **told, **relations})
            else:
                predictions.append(found_objects(batch, candidates, image) | relations)
        return predictions

    def _candidates(
        self,
        entities: DetectedEntities,
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor],
        scores: Sequence[Tensor] | None = None,
    ) -> Entities:
        """Return the detected entities or, under PredCls, the given objects of each image."""
        if self.protocol == "predcls":
            given = Entities.given(labels, boxes, self.network.num_objects, scores)
            return Entities(*(send(field, self.device) for field in given))
        return Entities.detected(entities.logits[-1], entities.boxes[-1])

    # ---- training

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        options = self.options
        pixels, objects, annotations = self.training_images(batch, batch_index)
        trains_detector = "detector" not in options.frozen
        with torch.set_grad_enabled(trains_detector):
            entities = self.detector(pixels)
        if "decoder" in options.frozen:
            entities = entities._replace(memory=entities.memory.detach(), features=entities.features.detach())
        outputs, alignment = self.decode(entities, batch_index)
        candidates, sizes = self._candidates(entities, *zip(*objects, strict=True)), sizes_of(pixels)
        costs = relation_costs(outputs, candidates, sizes, annotations, distinct=options.distinct_matching)
        if trains_detector:  # `read_costs` copies both kinds of costs together
            costs += self.entity_loss.costs(entities.logits, entities.boxes, objects)
        costs = self.read_costs(costs, {"largest predicate logit": outputs.logits.abs().max()})
        losses: dict[str, Tensor] = {}
        if trains_detector:
            entity_losses = self.entity_losses(entities, objects, costs[len(annotations) :])
            losses |= {f"entity {name}": loss for name, loss in entity_losses.items()}
        relations = torch.full((), float(sum(len(image.predicates) for image in annotations)), device=self.device)
        relations = self.trainer.strategy.reduce(relations, reduce_op="mean").clamp(min=1)
        matches = assign(costs[: len(annotations)])
        losses |= relation_losses(outputs, annotations, matches, focal=options.focal, relations=relations)
        return self.report_sum(losses | alignment)

    def decode(self, entities: DetectedEntities, batch_index: int) -> tuple[RelationOutputs, dict[str, Tensor]]:
        """Return the outputs of the supervised branch, and any additional losses by name."""
        return self.network(entities.last()), {}


def sizes_of(pixels: list[Tensor]) -> Tensor:
    """Return the widths and heights of images `[3, H, W]`, float32 `[B, 2]` on their device."""
    sizes = [(image.shape[2], image.shape[1]) for image in pixels]
    return send(torch.tensor(sizes, dtype=torch.float32), pixels[0].device)
