"""Training and evaluation of SGTR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import box_convert

from sgalign.data import GraphBatch
from sgalign.models.entity_detector import Backbone, DetectedEntities
from sgalign.models.graph_assembly import PAIRS, Entities, assemble, match, relation_losses
from sgalign.models.sgtr import SGTR, RelationOutputs
from sgalign.training.detr import PARTS, _DetectingModule, sizes_of
from sgalign.training.options import check_at_least, check_choice
from sgalign.training.sampling import step_seed


class SGTRModule(_DetectingModule):
    """SGTR on images: entity detector and relations trained together.

    Args:
        protocol: "sgdet"; or "predcls", where the annotated boxes and classes take the place of the detected entities
            when graphs are assembled, in training too.
        backbone, stride, dim, heads, ffn_dim, dropout: of `sgalign.models.entity_detector.EntityDetector`; all but the
            first two of `sgalign.models.sgtr.SGTR` as well.
        entity_layers, entity_queries: of the detector's transformer.
        encoder_layers, layers, queries, focal: of `SGTR`.
        distinct_matching: as `distinct` of `sgalign.models.graph_assembly.match`; false as in the public code.
        pairs: of entities that a query and predicate may join at evaluation, best first.
        detector_weights: as `weights` of `EntityDetector`, or a checkpoint of `EntityDetectorModule` or of SGTR; read
            when training starts. They tell the detector's sizes. Subjects' and objects' heads start as the detector's.
        frozen: parts of the detector that are not trained: "backbone", "encoder", "decoder". With a frozen decoder
            nothing that is learned about relations changes what relations read of the detector. Input projection,
            queries and heads are still trained then, as in the public code; "detector" is all of it, and the cheapest.
        entity_loss_weights: of the detector's classes, box L1 and box generalised IoU, in all its layers.
        short_sides: of training images, one drawn for each step; test images have the last one.
        long_side: at most.
        flip: probability of mirroring a training image; predicates of "left" and "right" are exchanged.
        learning_rate: of AdamW with a weight decay of 1e-4.
        backbone_learning_rate: of the backbone.
        warmup_steps: over which the learning rate grows from a tenth.
        learning_rate_drops: steps at which it falls to a tenth.
    """

    network: SGTR

    def __init__(
        self,
        protocol: Literal["sgdet", "predcls"] = "sgdet",
        backbone: Backbone = "resnet101",
        stride: Literal[16, 32] = 32,
        dim: int = 256,
        heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        entity_layers: int = 6,
        entity_queries: int = 100,
        encoder_layers: int = 3,
        layers: int = 6,
        queries: int = 180,
        focal: bool = True,
        distinct_matching: bool = False,
        pairs: int = PAIRS,
        detector_weights: str | None = None,
        frozen: Sequence[str] = (),
        entity_loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        short_sides: Sequence[int] = (480, 500, 520, 540, 560, 580, 600),
        long_side: int = 1000,
        flip: float = 0.5,
        learning_rate: float = 8e-5,
        backbone_learning_rate: float = 8e-6,
        warmup_steps: int = 100,
        learning_rate_drops: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_choice("protocol", protocol, ("sgdet", "predcls"))
        self._check_detector(PARTS)
        check_at_least(1, self.options, ("layers", "queries", "pairs"))
        check_at_least(0, self.options, ("encoder_layers",))
        self.protocol = protocol

    def make_network(self, counts: Tensor) -> None:
        options, (classes, _, predicates) = self.options, counts.shape
        self._make_detector(classes - 1)
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

    # ---- evaluation

    def validation_step(self, batch: GraphBatch) -> None:
        pixels, entities = self.detect(batch)
        self.log_found(entities, batch)
        self.recall.update(self._graphs(batch, pixels, entities), batch.truth)

    test_step = validation_step

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        return self._graphs(batch, *self.detect(batch))

    def _graphs(self, batch: GraphBatch, pixels: list[Tensor], entities: DetectedEntities) -> list[dict[str, Any]]:
        lengths = batch.lengths.tolist()
        # What the model is told: annotated objects, or another detector's.
        labels, boxes = batch.labels.split(lengths), batch.boxes.split(lengths)
        in_units = box_convert(batch.boxes / batch.sizes[batch.images].repeat(1, 2), "xyxy", "cxcywh").split(lengths)
        sure = torch.ones_like(batch.boxes[:, 0]) if batch.scores is None else batch.scores
        scores = sure.split(lengths)
        candidates = self._candidates(entities, labels, in_units, scores)
        options = {name: self.options[name] for name in ("focal", "pairs")}
        graphs = assemble(self.network(entities).at(-1), candidates, sizes_of(pixels), **options)
        predictions = []
        for image, (triplets, triplet_scores) in enumerate(graphs):
            relations = {"triplets": triplets, "triplet_scores": triplet_scores}
            if self.protocol == "predcls":  # as they are, even where a box ends beyond its image
                told = {"boxes": boxes[image], "labels": labels[image], "scores": scores[image]}
                predictions.append({"image_id": batch.image_ids[image], **told, **relations})
            else:
                predictions.append(self._objects(batch, candidates, image) | relations)
        return predictions

    def _candidates(
        self,
        entities: DetectedEntities,
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor],
        scores: Sequence[Tensor] | None = None,
    ) -> Entities:
        """What was detected, or under PredCls what the model was told of each image."""
        if self.protocol == "predcls":
            return Entities.given(labels, boxes, self.network.num_objects, scores)
        return Entities.detected(entities.logits[-1], entities.boxes[-1])

    # ---- training

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        seed = step_seed(self.run_seed, self.global_step, batch_index, self.global_rank, purpose="samples")
        pixels, objects, annotations = self._augmented(batch, torch.Generator().manual_seed(seed))
        losses: dict[str, Tensor] = {}
        if "detector" in self.options.frozen:
            with torch.no_grad():
                entities = self.detector(pixels)
        else:
            entities = self.detector(pixels)
            losses |= {f"entity {name}": loss for name, loss in self._entity_losses(entities, objects).items()}
        if "decoder" in self.options.frozen:
            entities = entities._replace(memory=entities.memory.detach(), features=entities.features.detach())
        outputs, alignment = self._outputs(entities, batch_index)
        self.finite(outputs.logits.abs().max(), losses)  # or matching fails without a word about why
        candidates, sizes = self._candidates(entities, *zip(*objects, strict=True)), sizes_of(pixels)
        relations = torch.tensor(float(sum(len(image.predicates) for image in annotations)), device=self.device)
        relations = self.trainer.strategy.reduce(relations, reduce_op="mean")
        losses |= relation_losses(
            outputs,
            annotations,
            match(outputs, candidates, sizes, annotations, distinct=self.options.distinct_matching),
            focal=self.options.focal,
            relations=max(float(relations), 1.0),
        )
        return self._log_losses(losses | alignment, len(pixels))

    def _outputs(self, entities: DetectedEntities, batch_index: int) -> tuple[RelationOutputs, dict[str, Tensor]]:
        """Of the supervised branch, and what else is minimised."""
        return self.network(entities), {}
