"""Training and evaluation with Lightning: one module for each system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou

from sgalign.alignment import DIRECTIONS, REDUCTIONS, relation_alignment_loss
from sgalign.data import GraphBatch, Objects, read_word_vectors
from sgalign.files import read_tensors, written_whole
from sgalign.longtail import PredicateWeights, RelationLoss
from sgalign.metrics import SceneGraphEvaluator
from sgalign.models import (
    Detector,
    FrequencyBaseline,
    ImageFeatures,
    Motifs,
    Prediction,
    RegionFeatures,
    predicate_counts,
)
from sgalign.random_mask import random_attention_mask
from sgalign.sampling import match_detections, sample_pairs, step_seed


class RelationModule(pl.LightningModule):
    """What all systems share: the network is made for the data's classes, evaluated, and saved with their names.

    Subclasses say how the network is made from the training part (`make_network`), and how it is trained.
    """

    recall: SceneGraphEvaluator
    protocol = "predcls"

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self.object_names: list[str] = []
        self.predicate_names: list[str] = []
        self.run_seed = 0
        self.random_states: list[Tensor] = []  # of the checkpoint that is gone on from

    @property
    def options(self) -> Any:
        """The arguments, by name."""
        return self.hparams

    def make_network(self, counts: Tensor) -> None:
        """Sets `self.network`, and modules beside it, for the classes that `predicate_counts` tells of."""
        raise NotImplementedError(f"{type(self).__name__} must override make_network")

    def forward(self, batch: GraphBatch) -> Prediction:
        """What the network says of a batch that `see` has completed."""
        assert self.network is not None, "the network is made when a trainer or a checkpoint tells the classes"
        return self.network(batch)

    @property
    def learns_from_targets(self) -> bool:
        """Whether training reads the batch's targets, not relations of objects that it finds itself."""
        return self.protocol != "sgdet"

    def see(self, batch: GraphBatch, batch_index: int = 0) -> GraphBatch:
        """The batch with what a model finds in it before it relates anything: objects, features, sampled pairs."""
        return batch

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        data = self._data
        if self.protocol == "sgdet" and data.detections is not None:
            raise ValueError("data must have no detections for protocol sgdet: the model finds objects itself")
        if stage == "fit" and data.instance_drop and not self.learns_from_targets:
            raise ValueError(
                f"instance_drop must be 0 for {type(self).__name__} of protocol {self.protocol}, which does not learn "
                f"from the annotated pairs' labels, got {data.instance_drop}"
            )
        self._set_classes(data.object_names, data.predicate_names, f"the data, {data.name},")
        if self.network is None:
            self.make_network(predicate_counts(data.train, len(self.object_names) - 1, len(self.predicate_names) - 1))

    def _set_classes(self, object_names: Sequence[str], predicate_names: Sequence[str], whose: str) -> None:
        if self.network is None:
            self.object_names, self.predicate_names = list(object_names), list(predicate_names)
        for kind, ours, theirs in (
            ("object", self.object_names, object_names),
            ("predicate", self.predicate_names, predicate_names),
        ):
            if ours != list(theirs):
                differ = sorted(set(ours) ^ set(theirs))[:3] or "their order"
                raise ValueError(
                    f"{kind} classes of the model and of {whose} must be the same; they differ in {differ}"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sgalign"] = {
            "object_names": self.object_names,
            "predicate_names": self.predicate_names,
            "run_seed": self.run_seed,
            "random_states": random_states(),
            "module": type(self).__name__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("sgalign")
        if saved is None:
            raise ValueError("checkpoint must be one that this package saved, got one without its class names")
        # Motifs or SGTR may be made of what has a mirror.
        kind = type(self) if saved["module"] == type(self).__name__ else module_named(saved["module"])
        if kind is None or not issubclass(kind, type(self)):
            raise ValueError(f"checkpoint must be of {type(self).__name__}, as asked for, is of {saved['module']}")
        self._set_classes(saved["object_names"], saved["predicate_names"], "the checkpoint")
        self.run_seed, self.random_states = saved["run_seed"], saved.get("random_states", [])
        if self.network is None:
            classes, predicates = len(self.object_names), len(self.predicate_names)
            self.make_network(torch.ones(classes, classes, predicates))  # the weights follow
        weights, of_model = checkpoint["state_dict"], self.state_dict()
        # A mirror exists in training alone: a model without one leaves it out.
        mirror = [name for name in weights if name.startswith("mirrored_") and name not in of_model]
        if mirror and self._trainer is not None and self.trainer.training:
            raise ValueError(f"checkpoint has a mirror: {type(self).__name__} can be tested with it, not go on from it")
        for name in mirror:
            del weights[name]
        for name, own in of_model.items():
            if name in weights and weights[name].shape != own.shape:
                shapes = f"{name} is {list(weights[name].shape)}, not {list(own.shape)}"
                raise ValueError(f"checkpoint must be of a model with the same options: {shapes}")

    def on_train_start(self) -> None:
        # What dropout and the detector's sampling go on from. Of several processes one has saved its states.
        if self.trainer.ckpt_path and self.trainer.world_size == 1:
            restore_random_states(self.random_states)

    def finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The loss of a step, which says what it is made of where it cannot be learned from."""
        if not loss.isfinite():
            values = ", ".join(f"{name} {part.item():.3g}" for name, part in parts.items())
            raise ValueError(f"the loss must be finite, got {values} at step {self.global_step}: lower learning_rate")
        return loss

    def on_fit_start(self) -> None:
        if not self.trainer.ckpt_path:
            self.run_seed = torch.initial_seed()

    def on_validation_epoch_start(self) -> None:
        self.recall = self._evaluator(self.protocol, self._data.zero_shot_validation)

    def on_test_epoch_start(self) -> None:
        protocol = self.protocol if self._data.detections is None else "sgdet"
        self.recall = self._evaluator(protocol, self._data.zero_shot_test)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _evaluator(self, protocol: str, zero_shot: Tensor) -> SceneGraphEvaluator:
        evaluator = SceneGraphEvaluator(
            protocol,
            len(self.predicate_names) - 1,
            zero_shot=zero_shot,
            groups=self._data.predicate_groups,
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
        """What `SceneGraphEvaluator` and `TripletWriter` read, a dict for each image of the batch.

        A decoded object's score is the probability of its class, its box the detector's for that class.
        """
        batch = self.see(batch)
        prediction = self(batch)
        labels, boxes, scores = prediction.labels, batch.boxes, batch.scores
        if prediction.object_logits is not None:
            scores = prediction.object_logits.float().softmax(1).gather(1, labels[:, None])[:, 0]
        elif scores is None:
            scores = torch.ones_like(labels, dtype=torch.float32)
        if batch.boxes_per_class is not None:
            boxes = batch.boxes_per_class[torch.arange(len(labels), device=labels.device), labels]
        probabilities = prediction.logits.float().softmax(1)
        lengths = batch.lengths.tolist()
        pairs = batch.pairs_by_image()
        images = zip(
            batch.image_ids,
            boxes.split(lengths),
            labels.split(lengths),
            scores.split(lengths),
            pairs,
            probabilities.split([len(of_image) for of_image in pairs]),
            strict=True,
        )
        fields = "image_id", "boxes", "labels", "scores", "pairs", "predicate_scores"
        return [dict(zip(fields, image, strict=True)) for image in images]


def random_states() -> list[Tensor]:
    """Of torch's generators, of the CPU and of each GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def restore_random_states(states: Sequence[Tensor]) -> None:
    """As far as there are states and GPUs."""
    for number, state in enumerate(states):
        if number == 0:
            torch.set_rng_state(state)
        elif number <= torch.cuda.device_count():
            torch.cuda.set_rng_state(state, number - 1)


def module_named(name: str) -> type[RelationModule] | None:
    """The class of that name among all that have been imported."""
    kinds: list[type[RelationModule]] = [RelationModule]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == name), None)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place first, so that a full disk or a kill leaves the one before as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(path) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that this package saved; nothing but tensors and plain values is unpickled from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is cut short, or another program wrote it.
    """
    checkpoint = read_tensors(path, "checkpoint")
    if not isinstance(checkpoint, dict) or "sgalign" not in checkpoint:
        raise ValueError(f"{path}: must be a checkpoint that sgalign fit has written, has no class names")
    return checkpoint


class FrequencyModule(RelationModule):
    """The frequency baseline: nothing to train, so `sgalign test --model FrequencyModule` is all it takes."""

    def make_network(self, counts: Tensor) -> None:
        self.network = FrequencyBaseline(counts)

    def forward(self, batch: GraphBatch) -> Prediction:
        assert self.network is not None
        return Prediction(self.network(batch), batch.labels)


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


class MotifsModule(RelationModule):
    """Neural Motifs: the mean cross-entropy over pairs, and over objects where classes are decoded.

    Args:
        protocol: "predcls" (boxes and classes are given), "sgcls" (boxes are given) or "sgdet" (nothing is).
        vision: what is seen of images. "none": nothing, boxes and classes are all; "cached": features that
            `sgalign cache-features` wrote; "images": a detector, which is not trained, and region features of
            `relation_dim` channels, which are.
        embed_dim, hidden_dim, relation_dim: as in `sgalign.models.Motifs`.
        word_vectors: text file of word vectors of `embed_dim` numbers, the class embeddings' initial values; None for
            random ones. Read when training starts, not when a checkpoint is loaded.
        backbone, min_size, max_size, head_dim, detections_per_image: of `sgalign.models.Detector`.
        detector_weights: as `weights` of `sgalign.models.Detector`, read when training starts.
        relations_per_image: pairs sampled in training, a quarter of them related, as in the public code.
        optimizer: "adam", or "sgd" as published: momentum 0.9, weight decay 1e-4 but for biases, a tenth of the
            learning rate after three epochs without a better validation R@100.
        learning_rate: for batches of `learning_rate_images` images over all processes, and in proportion for others.
        learning_rate_images: None for a learning rate that no batch size changes.
        warmup_steps: over which the learning rate grows from a tenth.
        predicate_weights, predicate_weight_power, effective_number_beta, logit_adjustment, logit_adjustment_test: of
            `sgalign.longtail.RelationLoss`.
    """

    network: Motifs

    def __init__(
        self,
        protocol: Literal["predcls", "sgcls", "sgdet"] = "predcls",
        vision: Literal["none", "cached", "images"] = "none",
        embed_dim: int = 200,
        hidden_dim: int = 128,
        relation_dim: int = 512,
        word_vectors: str | None = None,
        backbone: Literal["resnet18", "resnet50", "resnext101_32x8d"] = "resnet50",
        min_size: int = 600,
        max_size: int = 1000,
        head_dim: int = 1024,
        detections_per_image: int = 80,
        detector_weights: str | None = None,
        relations_per_image: int = 1024,
        optimizer: Literal["adam", "sgd"] = "adam",
        learning_rate: float = 1e-3,
        learning_rate_images: int | None = None,
        warmup_steps: int = 0,
        predicate_weights: PredicateWeights = "none",
        predicate_weight_power: float = 0.5,
        effective_number_beta: float = 0.999,
        logit_adjustment: float = 0.0,
        logit_adjustment_test: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        options = self.options
        sizes = ["embed_dim", "hidden_dim", "relation_dim", "relations_per_image"]
        sizes += ["min_size", "max_size", "head_dim", "detections_per_image"]
        if learning_rate_images is not None:
            sizes.append("learning_rate_images")
        check_at_least(1, options, sizes)
        check_at_least(
            0, options, ("warmup_steps", "predicate_weight_power", "logit_adjustment", "logit_adjustment_test")
        )
        check_learning_rate("learning_rate", learning_rate)
        if not 0 <= effective_number_beta < 1:
            raise ValueError(f"effective_number_beta must be in [0, 1), got {effective_number_beta}")
        check_choice("predicate_weights", predicate_weights, ("none", "inverse_frequency", "effective_number"))
        check_choice("protocol", protocol, ("predcls", "sgcls", "sgdet"))
        check_choice("vision", vision, ("none", "cached", "images"))
        check_choice("optimizer", optimizer, ("adam", "sgd"))
        needed = {"predcls": ("none", "cached", "images"), "sgcls": ("cached", "images"), "sgdet": ("images",)}
        if vision not in needed[protocol]:
            raise ValueError(f"vision must be {' or '.join(needed[protocol])} for {protocol}, got {vision!r}")
        self.protocol = protocol
        self.features: str | None = None  # `FeatureCache.source` of what it was trained on

    def make_network(self, counts: Tensor) -> None:
        options = self.options
        sizes = {name: options[name] for name in ("embed_dim", "hidden_dim", "relation_dim")}
        object_dim = 0 if options.vision == "none" else options.relation_dim
        self.network = Motifs(counts, **sizes, object_dim=object_dim, decodes_labels=self.protocol != "predcls")
        self.relation_loss = RelationLoss(
            counts.sum((0, 1)),
            weights=options.predicate_weights,
            power=options.predicate_weight_power,
            beta=options.effective_number_beta,
            adjustment=options.logit_adjustment,
            adjustment_test=options.logit_adjustment_test,
        )
        if options.vision == "images":
            sizes = {
                name: options[name] for name in ("backbone", "min_size", "max_size", "head_dim", "detections_per_image")
            }
            self.detector = Detector(len(counts), **sizes)
            self.detector.freeze()
            self.regions = RegionFeatures(dim=options.relation_dim)

    def setup(self, stage: str) -> None:
        is_new = self.network is None
        super().setup(stage)
        options = self.options
        if options.vision == "cached" and self._data.cache is not None:
            self._set_features(self._data.cache.source)
        if not is_new or stage != "fit" or self.trainer.ckpt_path:
            return
        if options.word_vectors is not None:
            self.network.load_class_vectors(read_word_vectors(options.word_vectors, self.object_names))
        if options.vision == "images" and options.detector_weights is None:
            rank_zero_info(
                "detector_weights is null: the detector is random and stays so, which is of use for tests only"
            )
        elif options.vision == "images":
            self.detector.load_weights(options.detector_weights)
            self.regions.load_box_head(self.detector)

    def _set_features(self, source: str | None) -> None:
        """Of the data and of the checkpoint, whichever comes first; they must be the same."""
        if source is not None and self.features not in (None, source):
            raise ValueError(
                f"data.features must be those that the model was trained on, got {source} and {self.features}: "
                "sgalign cache-features must have read the same checkpoint for both"
            )
        self.features = source or self.features

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sgalign"]["features"] = self.features

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._set_features(checkpoint["sgalign"].get("features"))

    def forward(self, batch: GraphBatch) -> Prediction:
        prediction = self.network(batch)
        return prediction._replace(logits=self.relation_loss.adjusted(prediction.logits))

    # ---- what is seen

    @property
    def vision(self) -> str:
        return self.options.vision

    def see(self, batch: GraphBatch, batch_index: int = 0) -> GraphBatch:
        if self.options.vision == "cached":
            if batch.object_features is None:
                raise ValueError("data must have features: FOLDER for a model whose vision is 'cached'")
            if (dim := batch.object_features.shape[1]) != self.options.relation_dim:
                raise ValueError(f"relation_dim must be that of the features, {dim}, got {self.options.relation_dim}")
        if self.options.vision != "images":
            return self._sample(batch, batch_index) if self.training else batch
        features = self.detector.features(pixels_of(batch))
        if self.protocol == "sgcls":
            boxes = batch.boxes.split(batch.lengths.tolist())
            batch = batch._replace(logits=self.detector.classify(features, boxes))
        elif self.protocol == "sgdet":
            batch = self._detect(batch, features, batch_index)
        if self.training and self.protocol != "sgdet":
            batch = self._sample(batch, batch_index)
        boxes = batch.boxes.split(batch.lengths.tolist())
        return batch._replace(
            object_features=self.regions.objects(features, boxes),
            union_features=self.regions.pairs(features, boxes, batch.pairs_by_image()),
        )

    def _sample(self, batch: GraphBatch, batch_index: int) -> GraphBatch:
        rows = sample_pairs(
            batch.targets[:, 1:].any(1),
            batch.images[batch.pairs[:, 0]],
            limit=self.options.relations_per_image,
            generator=self._generator(batch_index),
        )
        return batch if len(rows) == len(batch.pairs) else batch.keep_pairs(rows)

    def _detect(self, batch: GraphBatch, features: ImageFeatures, batch_index: int) -> GraphBatch:
        """The batch of what the detector finds; in training the annotated boxes are among its proposals."""
        found = self.detector.detect(features)
        boxes, logits = [d.boxes for d in found], [d.logits for d in found]
        if self.training:
            annotated = batch.boxes.split(batch.lengths.tolist())
            annotated_logits = self.detector.classify(features, annotated).split(batch.lengths.tolist())
            boxes = [torch.cat(both) for both in zip(boxes, annotated, strict=True)]
            logits = [torch.cat(both) for both in zip(logits, annotated_logits, strict=True)]
        objects = Objects.of(torch.tensor([len(b) for b in boxes], device=batch.boxes.device))
        pairs, targets, labels = objects.pairs, batch.targets[:0], torch.cat([d.labels for d in found])
        if self.training:
            generator = self._generator(batch_index)
            matched = [
                match_detections(
                    image_boxes,
                    truth["boxes"],
                    truth["labels"],
                    truth["relations"],
                    generator=generator,
                    limit=self.options.relations_per_image,
                    num_predicates=batch.targets.shape[1] - 1,
                )
                for image_boxes, truth in zip(boxes, batch.truth, strict=True)
            ]
            pairs = torch.cat([m[0] + start for m, start in zip(matched, objects.starts.tolist())])
            targets, labels = torch.cat([m[1] for m in matched]), torch.cat([m[2] for m in matched])
        else:
            targets = targets.new_zeros(len(pairs), targets.shape[1])
        return batch._replace(
            lengths=objects.lengths,
            images=objects.images,
            positions=objects.positions,
            boxes=torch.cat(boxes),
            labels=labels,
            logits=torch.cat(logits),
            boxes_per_class=None if self.training else torch.cat([d.boxes_per_class for d in found]),
            pairs=pairs,
            targets=targets,
        )

    def _generator(self, batch_index: int) -> torch.Generator:
        """Of the step's samples; as the mask, it repeats in a resumed run and differs between ranks."""
        seed = step_seed(self.run_seed, self.global_step, batch_index, self.global_rank, purpose="samples")
        return torch.Generator().manual_seed(seed)

    # ---- training

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts by name."""
        batch = self.see(batch, batch_index)
        return self.supervised_loss(self.network(batch), batch)

    def supervised_loss(self, prediction: Prediction, batch: GraphBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Of relations, and of objects where their classes are decoded."""
        loss, labelled = self.relation_loss(prediction.logits, batch.targets)
        loss = loss * self.share(labelled)
        parts = {"loss": loss}
        if prediction.object_logits is not None:
            objects = functional.cross_entropy(prediction.object_logits, batch.labels, reduction="sum")
            parts["objects"] = objects / max(len(batch.labels), 1) * self.share(len(batch.labels))
            loss = loss + parts["objects"]
        return loss, parts

    def share(self, count: float | Tensor) -> float | Tensor:
        """This process's part of all elements, times the processes: makes the mean of their means that of them all."""
        world = self.trainer.world_size if self._trainer is not None else 1
        if world == 1:
            return 1.0
        own = torch.as_tensor(count, dtype=torch.float32, device=self.device)
        total = own.clone()
        torch.distributed.all_reduce(total)
        return world * own / total.clamp(min=1e-12)

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        loss, parts = self.losses(batch, batch_index)
        parts = {f"train/{name}": part for name, part in parts.items()}
        self.log_dict(parts, batch_size=len(batch.image_ids), prog_bar=True)
        return self.finite(loss, parts)

    def make_optimizer(self) -> torch.optim.Optimizer:
        options, rate = self.options, self.options.learning_rate
        if options.learning_rate_images is not None and self._trainer is not None:
            images = self.trainer.datamodule.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
            rate *= images / options.learning_rate_images
            rank_zero_info(f"learning rate {rate:g}: {options.learning_rate:g} for {options.learning_rate_images} "
                           f"images, {images} a step here")  # fmt: skip
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if options.optimizer == "adam":
            return torch.optim.Adam([p for _, p in trained], lr=rate, fused=True)
        groups = [
            {"params": [p for name, p in trained if "bias" not in name], "weight_decay": 1e-4},
            {"params": [p for name, p in trained if "bias" in name], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)

    def configure_optimizers(self) -> Any:
        options, optimizer = self.options, self.make_optimizer()
        schedulers: list[dict[str, Any]] = []
        if options.warmup_steps:
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=options.warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step"})
        if options.optimizer == "sgd":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", factor=0.1, patience=2, threshold=1e-3, threshold_mode="abs"
            )
            schedulers.append({"scheduler": plateau, "monitor": "val/R@100", "strict": False})
        return [optimizer], schedulers


class AlignMotifsModule(MotifsModule):
    """Align-Motifs (Xu, Liao, Sigal, WACV 2024): Motifs trained with a mirrored, masked branch.

    L = L_supervised + alignment_weight * L_align, where the mirror shares every weight but its predicate head, and what
    its edge context reads is randomly set to 0. At evaluation the mirror does not exist: `network` is Motifs. The
    defaults are the paper's where it says something; docs/training.md has the reasons for the others.

    Args:
        mask_ratio: p, the probability of masking.
        alignment_weight: lambda.
        mask_granularity: "row" masks whole objects, "feature" single numbers of them, "union" the union features of
            whole pairs instead.
        tied_head: the mirror has the supervised head instead of its own.
        reduction, direction: of `relation_alignment_loss`.
        aligned_relations: "all" pairs, annotated ("foreground") ones, or those with a "masked" object or union.
        alignment_warmup: steps over which the weight grows from 0 to `alignment_weight`.
        supervise_mirror: adds the supervised loss of the mirror's logits.
        motifs: the arguments of `MotifsModule`.
    """

    def __init__(
        self,
        mask_ratio: float = 0.1,
        alignment_weight: float = 10.0,
        mask_granularity: Literal["row", "feature", "union"] = "row",
        tied_head: bool = False,
        reduction: Literal["element", "relation"] = "element",
        direction: Literal["teacher_to_student", "student_to_teacher", "symmetric"] = "teacher_to_student",
        aligned_relations: Literal["all", "foreground", "masked"] = "all",
        alignment_warmup: int = 0,
        supervise_mirror: bool = False,
        **motifs: Any,
    ) -> None:
        super().__init__(**motifs)
        check_mirror(self.options)
        check_choice("mask_granularity", mask_granularity, ("row", "feature", "union"))
        check_choice("aligned_relations", aligned_relations, ("all", "foreground", "masked"))

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        self.mirrored_head = self.network.predicate if self.options.tied_head else self.network.new_predicate_head()

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        batch = self.see(batch, batch_index)
        dropped = self.draw_mask(batch, batch_index)
        mask = {"dropped_union" if options.mask_granularity == "union" else "dropped": dropped}
        prediction, mirrored_logits = self.network.dual_branch(batch, self.mirrored_head, **mask)
        loss, parts = self.supervised_loss(prediction, batch)
        weight = self._weights(batch, dropped)
        alignment = relation_alignment_loss(
            prediction.logits,
            mirrored_logits,
            reduction=options.reduction,
            direction=options.direction,
            weight=weight,
        )
        counted = len(batch.pairs) if weight is None else weight.sum().item()
        parts["alignment"] = alignment * self.share(counted)
        loss = loss + alignment_weight(options, self.global_step) * parts["alignment"]
        if options.supervise_mirror:
            mirrored_loss, labelled = self.relation_loss(mirrored_logits, batch.targets)
            loss = loss + mirrored_loss * self.share(labelled)
        return loss, parts

    @property
    def mask_ratio(self) -> float:
        """p of this step."""
        return self.options.mask_ratio

    def draw_mask(self, batch: GraphBatch, batch_index: int) -> Tensor:
        """What this step's mirror does not see, drawn as attention masks are: bool `[T, 1]` (row), `[T, F]` (feature)
        or `[R, 1]` (union)."""
        seed = step_seed(self.run_seed, self.global_step, batch_index, self.global_rank)
        images, objects = len(batch.lengths), int(batch.lengths.max())
        draw = partial(random_attention_mask, ratio=self.mask_ratio, seed=seed, device=batch.boxes.device)
        if self.options.mask_granularity == "row":
            return draw(images, 1, 1, objects)[batch.images, 0, 0, batch.positions, None]
        if self.options.mask_granularity == "feature":
            return draw(images, 1, objects, self.network.edge_input_dim)[batch.images, 0, batch.positions]
        subject, object_ = batch.positions[batch.pairs].unbind(1)
        return draw(images, 1, objects, objects)[batch.images[batch.pairs[:, 0]], 0, subject, object_, None]

    def _weights(self, batch: GraphBatch, dropped: Tensor) -> Tensor | None:
        if self.options.aligned_relations == "foreground":
            return batch.targets[:, 1:].sum(1)
        if self.options.aligned_relations == "masked":
            if self.options.mask_granularity == "union":
                return dropped[:, 0].float()
            return dropped.any(1)[batch.pairs].any(1).float()
        return None


def pixels_of(batch: GraphBatch) -> list[Tensor]:
    if batch.pixels is None:
        raise ValueError("data must have images: true for a model that looks at images")
    return batch.pixels


def check_mirror(options: Any) -> None:
    """Of the options that Align-Motifs and Align-SGTR share."""
    if not 0 <= options.mask_ratio <= 1:
        raise ValueError(f"mask_ratio must be in [0, 1], got {options.mask_ratio}")
    check_at_least(0, options, ("alignment_weight", "alignment_warmup"))
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("direction", options.direction, DIRECTIONS)


def alignment_weight(options: Any, step: int) -> float:
    """lambda, or during `alignment_warmup` its share that the steps so far have reached."""
    warmup = options.alignment_warmup
    return options.alignment_weight * (min(1.0, step / warmup) if warmup else 1.0)


def check_at_least(least: int, options: Any, names: Sequence[str]) -> None:
    for name in names:
        if not least <= options[name] < float("inf"):
            raise ValueError(f"{name} must be at least {least} and finite, got {options[name]}")


def check_learning_rate(name: str, rate: float) -> None:
    if not 0 < rate < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {rate}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")
