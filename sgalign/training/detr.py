"""Training of DETR, alone and as the entity detector of SGTR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision.ops import box_convert

from sgalign.data import GraphBatch
from sgalign.data.transfer import send, to_host
from sgalign.errors import InputError, is_lack_of_memory, packages_of
from sgalign.matching import find_objects
from sgalign.models.entity_detector import BACKBONES, DetectedEntities, EntityDetector, resize
from sgalign.models.entity_loss import EntityLoss, TrueObjects
from sgalign.models.graph_assembly import Entities, assign
from sgalign.training.augmentation import TrainingImages, annotations_of, augment
from sgalign.training.base import SavedModule
from sgalign.training.checkpoints import check_same_weights, only_shapes, read_checkpoint, some_of
from sgalign.training.detection import DetectionModule
from sgalign.training.options import DetrOptions
from sgalign.training.pretrained import is_pretrained
from sgalign.training.schedules import warmup
from sgalign.training.starting import OF_DETR, carry_classes, check_trained, layer_of, tell_new


class DetrModule(SavedModule):
    """The base class of modules that contain DETR.

    It builds DETR, computes DETR's losses and logs the share of found objects.


    Args:
        options: the options of DETR and of the subclass.
    """

    options: DetrOptions
    detector: EntityDetector

    def __init__(self, options: DetrOptions) -> None:
        super().__init__(options)
        self._detector_saved: dict[str, Any] = {}  # from the checkpoint that is being loaded

    def make_network(self, counts: Tensor) -> None:
        num_objects = len(counts) - 1
        self.detector = make_detector(self.options, num_objects, self.object_names, self._detector_saved)
        self.entity_loss = EntityLoss(num_objects)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        saved = {"config": self.detector.config, "trains_norms": self.detector.trains_norms}
        checkpoint["sgalign"]["detector"] = saved

    def set_detector(self, checkpoint: Mapping[str, Any]) -> None:
        """Build the detector as in a checkpoint, if the network is built after this call."""
        self._detector_saved = checkpoint.get("sgalign", {}).get("detector", {})
        # Without the config, `detector_weights` would be read, which may be a name that is downloaded.
        if not isinstance(self._detector_saved, dict) or (
            self.network is None and "config" not in self._detector_saved
        ):
            raise InputError("checkpoint must have the config of its detector, but has none")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.set_detector(checkpoint)
        # A network that exists already was built from the options, so they must agree with the checkpoint. A network
        # that is built now follows the checkpoint.
        trains_norms = self._detector_saved.get("trains_norms")
        if self.network is not None and trains_norms not in (None, self.detector.trains_norms):
            raise InputError(
                "batch normalization must be trained in both the checkpoint and the model, or in neither: set "
                "detector_weights as in the first run, or load the model with load_from_checkpoint"
            )
        super().on_load_checkpoint(checkpoint)

    def detect(self, batch: GraphBatch) -> tuple[list[Tensor], DetectedEntities]:
        """Return the batch's images, resized for evaluation, and the entities that DETR finds in them."""
        options = self.options
        pixels = [resize(image, options.short_sides[-1], options.long_side) for image in batch.require_pixels()]
        entities = self.detector(pixels, options.padded_size)
        if not torch.stack([entities.logits[-1].isfinite().all(), entities.boxes[-1].isfinite().all()]).all():
            raise InputError(
                "DETR's logits and boxes must be finite, got infinity or NaN in this batch of images: "
                f"{some_of(batch.image_ids)}"
            )
        return pixels, entities

    def log_found(self, entities: DetectedEntities, batch: GraphBatch) -> None:
        """Log the share of objects that are found, and the share of relations whose subject and object are both found.

        The logged names are `found` and `relations_found`. An annotated object is found if its class is the most
        probable class of a query and the query's box has an IoU of at least 0.5 with it. The share of relations is the
        mean over images. It is an upper bound of SGDet recall, apart from boxes near the threshold, because recall
        treats boxes as one pixel wider.
        """
        labels = entities.logits[-1][..., :-1].argmax(-1) + 1
        hits, both = [], []
        for image, (objects, truth) in enumerate(zip(annotations_of(batch)[0], batch.truth, strict=True)):
            true_labels, true_boxes = (send(field, self.device) for field in objects)
            boxes = [box_convert(b, "cxcywh", "xyxy").clamp(0, 1) for b in (entities.boxes[-1, image], true_boxes)]
            hit = find_objects(boxes[0], labels[image], boxes[1], true_labels)
            hits.append(hit)
            if len(truth["relations"]):
                both.append(hit[send(truth["relations"][:, :2], self.device)].all(1).float().mean())
        relations_found = torch.stack(both) if both else torch.zeros(0)
        for name, found in (("found", torch.cat(hits).float()), ("relations_found", relations_found)):
            self.log_share(name, found)

    # ---- training

    def training_images(self, batch: GraphBatch, batch_index: int) -> TrainingImages:
        """Return this step's augmented images and annotations."""
        options = self.options
        return augment(
            batch,
            self.predicate_names,
            torch.Generator().manual_seed(self.step_seed(batch_index, purpose="samples")),
            short_sides=options.short_sides,
            long_side=options.long_side,
            flip=options.flip,
        )

    def entity_losses(
        self, entities: DetectedEntities, objects: Sequence[TrueObjects], costs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return DETR's losses by name, weighted and summed over its layers.

        Args:
            entities: the detector's output.
            objects: the annotated objects of each image.
            costs: results of `EntityLoss.costs`, on the host.
        """
        losses = self.entity_loss(entities.logits, entities.boxes, objects, assign(costs))
        weights = zip(losses.items(), self.options.entity_loss_weights, strict=True)
        return {name: weight * loss for (name, loss), weight in weights}

    def read_costs(self, costs: Sequence[Tensor], others: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return the matching costs on the host. One copy transfers all of them, so the host waits only once.

        `others` contains further numbers by name. Raise InputError unless the costs and these numbers are finite in all
        processes. The error shows the sum of the costs and the numbers.
        """
        checked = {**(others or {}), "costs of matching": torch.stack([cost.sum() for cost in costs]).sum()}
        numbers = torch.stack([number.float() for number in checked.values()])
        total = self.over_processes(numbers.sum())
        total, numbers, *costs = to_host([total, numbers, *costs])
        self.check_finite(total, dict(zip(checked, numbers)))
        return costs

    def report_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the sum of the losses, and log the sum and each loss."""
        loss = torch.stack(list(losses.values())).sum()
        return self.report(loss, losses | {"loss": loss}, shown=["loss"])

    def configure_optimizers(self) -> Any:
        options = self.options
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        of_backbone = [p for name, p in trained if name.startswith("detector.detr.model.backbone")]
        others = [p for name, p in trained if not name.startswith("detector.detr.model.backbone")]
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": of_backbone, "lr": options.backbone_learning_rate},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, weight_decay=1e-4)
        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(options.learning_rate_drops))
        schedulers = [{"scheduler": drops, "interval": "step"}, *warmup(optimizer, options.warmup_steps)]
        return [optimizer], schedulers


class EntityDetectorModule(DetrModule, DetectionModule):
    """DETR trained alone, as the detector that SGTR starts from.

    To use the trained detector, pass its checkpoint to SGTR as `detector_weights`. Validation logs the share of
    annotated objects that are found, the share of relations whose subject and object are both found, and the mean
    average precision.

    Args:
        options: the fields of `DetrOptions`.
    """

    options_type = DetrOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(DetrOptions(**options))

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        self.network = self.detector

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        pixels, objects, _ = self.training_images(batch, batch_index)
        entities = self.detector(pixels)
        costs = self.read_costs(self.entity_loss.costs(entities.logits, entities.boxes, objects))
        return self.report_sum(self.entity_losses(entities, objects, costs))

    def validation_step(self, batch: GraphBatch) -> None:
        entities = self.detect(batch)[1]
        self.log_found(entities, batch)
        self.count_detections(batch, _described(batch, entities))

    def predict_step(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return one dict per image for `DetectionWriter`, with one object of the best class for each query."""
        return _described(batch, self.detect(batch)[1])


def _described(batch: GraphBatch, entities: DetectedEntities) -> list[dict[str, Any]]:
    candidates = Entities.detected(entities.logits[-1], entities.boxes[-1])
    return [found_objects(batch, candidates, image) for image in range(len(batch.image_ids))]


def found_objects(batch: GraphBatch, candidates: Entities, image: int) -> dict[str, Any]:
    """Return the detected entities of one image, with boxes in pixels of the original image."""
    boxes = box_convert(candidates.boxes[image], "cxcywh", "xyxy")
    confidence, labels = candidates.probabilities[image].max(-1)
    return {
        "image_id": batch.image_ids[image],
        "boxes": boxes.clamp(0, 1) * batch.sizes[image].to(boxes.device).repeat(2),
        "labels": labels + 1,
        "scores": confidence,
    }


def make_detector(
    options: DetrOptions, num_objects: int, object_names: Sequence[str], saved: dict[str, Any]
) -> EntityDetector:
    """Return DETR with its initial weights.

    Args:
        options: the options of DETR.
        num_objects: number of object classes, without the class for no object.
        object_names: object classes of the data, the background first. Classes that `detector_weights` lacks start
            anew, unless the whole detector is frozen.
        saved: `config` and `trains_norms` from a checkpoint of this module whose weights are loaded next. If there is
            no such checkpoint, it is empty.

    Raises:
        FileNotFoundError: if `detector_weights` does not exist.
        ValueError: if `detector_weights` does not fit the options or the data, or is missing although parts are frozen.
    """
    weights: dict[str, Tensor] = {}
    theirs: list[str] = []
    new_run = not saved
    if new_run:
        saved, weights, theirs = read_detector(options)
    build = partial(
        EntityDetector,
        num_objects,
        backbone=options.backbone,
        stride=options.stride,
        dim=options.dim,
        heads=options.heads,
        ffn_dim=options.ffn_dim,
        layers=options.entity_layers,
        num_queries=options.entity_queries,
        dropout=options.dropout,
        weights=options.detector_weights,
        **saved,
    )
    if not new_run or options.detector_weights is None:
        detector = build()
    else:
        with _source_named(options.detector_weights):
            if saved:
                detector, new = _of_checkpoint(build, weights, object_names, theirs)
            else:
                detector = build()
                new = list(object_names[1:]) if detector.reset_other_classes(object_names[1:]) else []
        if "detector" in options.frozen:
            command = "--config configs/detr_small.yaml --model.detector_weights"
            check_trained("detector_weights", options.detector_weights, new, command)
        tell_new(options.detector_weights, new, num_objects)
    if detector.dim != options.dim:
        raise InputError(f"dim must be {detector.dim}, as in detector_weights, got {options.dim}")
    if options.detector_weights is not None:
        tell_sizes(options, detector)
    detector.freeze(tuple(options.frozen))
    return detector


@contextmanager
def _source_named(source: Any) -> Iterator[None]:
    """Name the source of a detector in the errors of the block. Errors of the file system name it already.

    An error that our own code raises by mistake stays as it is.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:  # for a wrong config or a damaged file, transformers raises many kinds of error
        if (
            is_lack_of_memory(error)
            or isinstance(error, ModuleNotFoundError | OSError)
            or packages_of(error)[-1] == "sgalign"
        ):
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{source}: must be a DETR that can be loaded ({type(error).__name__}: {text})") from error


def _of_checkpoint(
    build: Callable[[], EntityDetector], weights: dict[str, Tensor], ours: Sequence[str], theirs: list[str]
) -> tuple[EntityDetector, list[str]]:
    """Return DETR with the weights of a checkpoint, and the names of the classes that the checkpoint lacks.

    Args:
        build: makes a detector with the config of the checkpoint and the classes of the data.
        weights: the checkpoint's weights of the detector.
        ours, theirs: object classes of the data and of the checkpoint, the background first.

    Raises:
        ValueError: if the config is not one of DETR, or the weights do not fit it.
    """

    def of_no_class(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if layer_of(name, OF_DETR) is None}

    with only_shapes(weights):
        check_same_weights(of_no_class(weights), of_no_class(build().state_dict()), "the DETR of its config")
    detector = build()
    weights, new = carry_classes(detector.state_dict(), weights, OF_DETR, ours, theirs)
    check_same_weights(weights, detector.state_dict(), "the DETR of its config")
    detector.load_state_dict(weights)
    return detector, new


def read_detector(options: DetrOptions) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the config, weights and object classes of `detector_weights`, if it is a checkpoint of this package.

    All are empty if the option is None, or if it names weights for `transformers`, which `EntityDetector` reads.
    """
    source = options.detector_weights
    if source is None:
        if options.frozen:
            raise InputError(f"detector_weights must be given if frozen is {list(options.frozen)}, got None")
        return {}, {}, []
    if not Path(source).exists() and (Path(source).suffix == ".ckpt" or len(Path(source).parts) > 2):
        raise FileNotFoundError(f"detector_weights: no such file or folder, {source}")  # nor a name for `transformers`
    if not Path(source).is_file() and not is_pretrained(source):
        return {}, {}, []
    checkpoint = read_checkpoint(source)
    saved = checkpoint["sgalign"]
    if not isinstance(saved.get("detector"), dict) or not isinstance(saved["detector"].get("config"), str):
        raise InputError(f"{source}: must be a checkpoint of EntityDetectorModule or SGTRModule, but it has no DETR")
    if not saved["object_names"]:
        raise InputError(f"{source}: object_names must have the background and the classes, got none")
    state, prefix = checkpoint["state_dict"], "detector."
    # `trains_norms` is left out, so batch normalization keeps its trained statistics and stays frozen, as with weights
    # for `transformers`. Frozen normalization has no `num_batches_tracked`.
    weights = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }
    return {"config": saved["detector"]["config"]}, weights, saved["object_names"]


def tell_sizes(options: DetrOptions, detector: EntityDetector) -> None:
    """Print the options that `detector_weights` overrides."""
    config = detector.detr.config
    stages = list(getattr(config.backbone_config, "depths", None) or ())
    if stages != BACKBONES[options.backbone]["depths"][: 4 if options.stride == 32 else 3]:
        rank_zero_info(f"the backbone comes from detector_weights and has {stages} blocks per stage")
    sizes = {
        "entity_layers": config.decoder_layers,
        "entity_queries": config.num_queries,
        "heads": config.encoder_attention_heads,
        "ffn_dim": config.encoder_ffn_dim,
    }
    differ = [(name, size) for name, size in sizes.items() if size != getattr(options, name)]
    if told := [f"{name} is {size} instead of {getattr(options, name)}" for name, size in differ]:
        rank_zero_info(f"detector_weights overrides these options: {'; '.join(told)}")
