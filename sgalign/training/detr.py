"""Training of DETR, by itself and as the entity detector of SGTR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision.ops import box_convert, box_iou
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from sgalign.data import GraphBatch
from sgalign.errors import InputError
from sgalign.models.entity_detector import BACKBONES, Backbone, DetectedEntities, EntityDetector, resize
from sgalign.models.graph_assembly import Annotations, Entities
from sgalign.training.base import RelationModule, pixels_of
from sgalign.training.checkpoints import read_checkpoint
from sgalign.training.options import check_at_least, check_choice, check_learning_rate
from sgalign.training.sampling import step_seed

PARTS = ("backbone", "encoder", "decoder", "detector")
ALIGNED = ("predicates", "subjects", "objects", "boxes")


class _DetectingModule(RelationModule):
    """What training DETR by itself and training SGTR share."""

    detector: EntityDetector
    vision = "images"
    learns_from_targets = False

    def __init__(self) -> None:
        super().__init__()
        self._detector_saved: dict[str, Any] = {}

    def _check_detector(self, parts: Sequence[str]) -> None:
        """The options of either, `parts` being what can be frozen."""
        options = self.options
        for part in options.frozen:
            check_choice("frozen", part, parts)
        check_at_least(1, options, ("dim", "heads", "ffn_dim", "entity_layers", "entity_queries"))
        check_at_least(0, options, ("warmup_steps",))
        for name in ("learning_rate", "backbone_learning_rate"):
            check_learning_rate(name, options[name])
        if options.dim % 4 or options.dim % options.heads:
            raise InputError(f"dim must be a multiple of 4 and of heads, got {options.dim} and {options.heads}")
        if not 0 <= options.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {options.dropout}")
        if len(options.entity_loss_weights) != 3:
            weights = list(options.entity_loss_weights)
            raise InputError(f"entity_loss_weights must be three, of classes, boxes and overlaps, got {weights}")
        if not options.short_sides or min(options.short_sides) < 32 or options.long_side < max(options.short_sides):
            raise InputError(
                "short_sides must be at least 32 and at most long_side, "
                f"got {list(options.short_sides)} and {options.long_side}"
            )
        if not 0 <= options.flip <= 1:
            raise InputError(f"flip must be in [0, 1], got {options.flip}")

    def _make_detector(self, num_objects: int) -> None:
        options, saved = self.options, self._detector_saved
        weights, state = options.detector_weights, None
        if saved:
            pass  # a checkpoint follows
        elif weights is None:
            if options.frozen:
                raise InputError(f"detector_weights must be given for frozen to be {list(options.frozen)}, got none")
        elif not Path(weights).exists():
            if Path(weights).suffix == ".ckpt" or len(Path(weights).parts) > 2:  # no name that the library may know
                raise FileNotFoundError(f"detector_weights: no such file or folder, {weights}")
        elif Path(weights).is_file():
            checkpoint = read_checkpoint(weights)
            if "detector" not in checkpoint["sgalign"]:
                raise InputError(f"{weights}: must be a checkpoint of EntityDetectorModule or SGTRModule, has no DETR")
            if checkpoint["sgalign"]["object_names"] != self.object_names:
                raise InputError(f"{weights}: must be of a detector of the data's object classes, is of others")
            # What another run has trained is normalised as it was there, like the library's weights.
            saved, prefix = {"config": checkpoint["sgalign"]["detector"]["config"]}, "detector."
            state = {n.removeprefix(prefix): t for n, t in checkpoint["state_dict"].items() if n.startswith(prefix)}
        self.detector = EntityDetector(
            num_objects,
            backbone=options.backbone,
            stride=options.stride,
            dim=options.dim,
            heads=options.heads,
            ffn_dim=options.ffn_dim,
            layers=options.entity_layers,
            num_queries=options.entity_queries,
            dropout=options.dropout,
            weights=weights,
            **saved,
        )
        if state is not None:
            self.detector.load_state_dict(state)
        if self.detector.dim != options.dim:
            raise InputError(f"dim must be that of detector_weights, {self.detector.dim}, got {options.dim}")
        if weights is not None:
            self._tell_sizes()
        self.detector.freeze(tuple(options.frozen))
        self.entity_loss = ImageLoss(HungarianMatcher(1, 5, 2), num_objects, 0.1, ["labels", "boxes"])

    def _tell_sizes(self) -> None:
        """Says what options `detector_weights` have overridden."""
        options, config = self.options, self.detector.detr.config
        stages = list(getattr(config.backbone_config, "depths", None) or ())
        if stages != BACKBONES[options.backbone]["depths"][: 4 if options.stride == 32 else 3]:
            rank_zero_info(f"the detector's backbone is that of detector_weights, blocks of its stages: {stages}")
        sizes = {
            "entity_layers": config.decoder_layers,
            "entity_queries": config.num_queries,
            "heads": config.encoder_attention_heads,
            "ffn_dim": config.encoder_ffn_dim,
        }
        if told := [f"{name} {size}, not {options[name]}" for name, size in sizes.items() if size != options[name]]:
            rank_zero_info(f"the detector is of the sizes of detector_weights: {'; '.join(told)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        saved = {"config": self.detector.config, "trains_norms": self.detector.trains_norms}
        checkpoint["sgalign"]["detector"] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._detector_saved = checkpoint.get("sgalign", {}).get("detector", {})
        super().on_load_checkpoint(checkpoint)
        if self.detector.trains_norms != self._detector_saved["trains_norms"]:
            raise InputError(
                "the checkpoint's batch normalisation must be that of the model that is to go on: give the same "
                "detector_weights, or make the model by load_from_checkpoint"
            )

    def detect(self, batch: GraphBatch) -> tuple[list[Tensor], DetectedEntities]:
        """The batch's images of the size for evaluation, and what is found in them."""
        options = self.options
        pixels = [resize(image, options.short_sides[-1], options.long_side) for image in pixels_of(batch)]
        return pixels, self.detector(pixels)

    def log_found(self, entities: DetectedEntities, batch: GraphBatch) -> None:
        """Logs the share of objects found, and of relations both of whose ends are, the latter as mean over images.

        An object is found if a query has its class as the likeliest and overlaps it with an IoU of at least 0.5. Under
        SGDet recall can be above the share of relations only because its boxes are a pixel wider.
        """
        labels = entities.logits[-1][..., :-1].argmax(-1) + 1
        hits, both = [], []
        for image, (objects, truth) in enumerate(zip(annotations_of(batch, self.device)[0], batch.truth, strict=True)):
            boxes = [box_convert(b, "cxcywh", "xyxy").clamp(0, 1) for b in (entities.boxes[-1, image], objects[1])]
            hit = ((box_iou(*boxes) >= 0.5) & (labels[image][:, None] == objects[0])).any(0)
            hits.append(hit)
            if len(truth["relations"]):
                both.append(hit[truth["relations"][:, :2].to(hit.device)].all(1).float().mean())
        part = "test" if self.trainer.testing else "val"
        for name, found in (("found", torch.cat(hits).float()), ("relations_found", torch.tensor(both))):
            if len(found):
                self.log(f"{part}/{name}", found.mean(), batch_size=len(found), sync_dist=True, on_epoch=True)

    def _objects(self, batch: GraphBatch, candidates: Entities, image: int) -> dict[str, Any]:
        """The detected entities of one image, in its own pixels."""
        boxes = box_convert(candidates.boxes[image], "cxcywh", "xyxy")
        confidence, labels = candidates.probabilities[image].max(-1)
        return {
            "image_id": batch.image_ids[image],
            "boxes": boxes.clamp(0, 1) * batch.sizes[image].to(boxes.device).repeat(2),
            "labels": labels + 1,
            "scores": confidence,
        }

    def _augmented(
        self, batch: GraphBatch, generator: torch.Generator
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[Annotations]]:
        """Images of one drawn size, each mirrored or not, with their objects and relations."""
        options = self.options
        short_side = options.short_sides[int(torch.randint(len(options.short_sides), (), generator=generator))]
        pixels = [resize(image, short_side, options.long_side) for image in pixels_of(batch)]
        flips = (torch.rand(len(pixels), generator=generator) < options.flip).tolist()
        objects, annotations = annotations_of(batch, self.device)
        swap = torch.tensor(mirrored_predicates(self.predicate_names), device=self.device)
        for image, flip in enumerate(flips):
            if flip:
                pixels[image] = pixels[image].flip(-1)
                objects[image] = objects[image][0], mirrored_boxes(objects[image][1])
                predicates, labels, boxes = annotations[image]
                annotations[image] = Annotations(swap[predicates + 1] - 1, labels, mirrored_boxes(boxes))
        return pixels, objects, annotations

    def _entity_losses(self, entities: DetectedEntities, objects: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """DETR's, of `transformers`, summed over its layers."""
        layers = [{"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(entities.logits, entities.boxes)]
        targets = [{"class_labels": labels - 1, "boxes": boxes} for labels, boxes in objects]
        losses = self.entity_loss({**layers[-1], "auxiliary_outputs": layers[:-1]}, targets)
        return {
            name: weight
            * torch.stack([loss for key, loss in losses.items() if key.startswith(f"loss_{key_part}")]).sum()
            for name, key_part, weight in zip(
                ("classes", "boxes", "overlaps"), ("ce", "bbox", "giou"), self.options.entity_loss_weights, strict=True
            )
        }

    def _log_losses(self, losses: dict[str, Tensor], images: int) -> Tensor:
        """Their sum, which must be finite."""
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict({f"train/{name}": part for name, part in losses.items()}, batch_size=images)
        self.log("train/loss", loss, batch_size=images, prog_bar=True)
        return self.finite(loss, losses)

    def configure_optimizers(self) -> Any:
        options = self.options
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        of_backbone = [p for name, p in trained if name.startswith("detector.detr.model.backbone")]
        others = [p for name, p in trained if not name.startswith("detector.detr.model.backbone")]
        groups = [{"params": others}, {"params": of_backbone, "lr": options.backbone_learning_rate}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, weight_decay=1e-4)
        schedulers: list[Any] = [torch.optim.lr_scheduler.MultiStepLR(optimizer, list(options.learning_rate_drops))]
        if options.warmup_steps:
            schedulers.append(torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=options.warmup_steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]


class EntityDetectorModule(_DetectingModule):
    """DETR trained by itself: the detector that SGTR starts from (`detector_weights` takes the checkpoint).

    Validation logs which share of the annotated objects is found, and of the relations both of whose ends are.

    Args:
        backbone, stride, dim, heads, ffn_dim, dropout: of `sgalign.models.entity_detector.EntityDetector`.
        entity_layers, entity_queries: `layers` and `num_queries` of it.
        detector_weights, frozen, entity_loss_weights, short_sides, long_side, flip: as in `SGTRModule`.
        learning_rate, backbone_learning_rate, warmup_steps, learning_rate_drops: as in `SGTRModule`.
    """

    def __init__(
        self,
        backbone: Backbone = "resnet101",
        stride: Literal[16, 32] = 32,
        dim: int = 256,
        heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        entity_layers: int = 6,
        entity_queries: int = 100,
        detector_weights: str | None = None,
        frozen: Sequence[str] = (),
        entity_loss_weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
        short_sides: Sequence[int] = (480, 500, 520, 540, 560, 580, 600),
        long_side: int = 1000,
        flip: float = 0.5,
        learning_rate: float = 1e-4,
        backbone_learning_rate: float = 1e-5,
        warmup_steps: int = 100,
        learning_rate_drops: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_detector(PARTS[:3])

    def make_network(self, counts: Tensor) -> None:
        self._make_detector(len(counts) - 1)
        self.network = self.detector

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        seed = step_seed(self.run_seed, self.global_step, batch_index, self.global_rank, purpose="samples")
        pixels, objects, _ = self._augmented(batch, torch.Generator().manual_seed(seed))
        return self._log_losses(self._entity_losses(self.detector(pixels), objects), len(pixels))

    def validation_step(self, batch: GraphBatch) -> None:
        self.log_found(self.detect(batch)[1], batch)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """What `DetectionWriter` reads, a dict for each image of the batch: every query with its likeliest class."""
        entities = self.detect(batch)[1]
        candidates = Entities.detected(entities.logits[-1], entities.boxes[-1])
        return [self._objects(batch, candidates, image) for image in range(len(batch.image_ids))]

    def on_validation_epoch_start(self) -> None:
        pass

    on_validation_epoch_end = on_test_epoch_start = on_test_epoch_end = on_validation_epoch_start
    test_step = validation_step


def sizes_of(pixels: list[Tensor]) -> Tensor:
    """Width and height of images `[3, H, W]`: float32 `[B, 2]`."""
    sizes = [(image.shape[2], image.shape[1]) for image in pixels]
    return torch.tensor(sizes, dtype=torch.float32, device=pixels[0].device)


def annotations_of(batch: GraphBatch, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], list[Annotations]]:
    """Labels and boxes (middle x, y, width, height in units of the image) of each image's objects, and its relations.

    Relations of an object with itself are left out: no assembled pair can be one.
    """
    objects, annotations = [], []
    for truth, size in zip(batch.truth, batch.sizes, strict=True):
        boxes = box_convert(truth["boxes"].to(device) / size.to(device).repeat(2), "xyxy", "cxcywh")
        labels, relations = truth["labels"].to(device), truth["relations"].to(device)
        ends, predicates = relations[relations[:, 0] != relations[:, 1]].split((2, 1), dim=1)
        objects.append((labels, boxes))
        annotations.append(Annotations(predicates[:, 0] - 1, labels[ends.T] - 1, boxes[ends.T]))
    return objects, annotations


def mirrored_boxes(boxes: Tensor) -> Tensor:
    """Boxes `[..., 4]`, middle x, y, width, height in units of the image, of the image mirrored left to right."""
    return torch.cat([1 - boxes[..., :1], boxes[..., 1:]], dim=-1)


def mirrored_predicates(names: Sequence[str]) -> list[int]:
    """What each predicate is in a mirrored image: the one with "left" for "right" in its name, if there is one."""
    exchange = {"left": "right", "right": "left"}
    places = {name: place for place, name in enumerate(names)}
    mirrored = (" ".join(exchange.get(word, word) for word in name.split()) for name in names)
    return [places.get(name, place) for place, name in enumerate(mirrored)]
