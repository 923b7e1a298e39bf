"""Training and evaluation of Neural Motifs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional

from sgalign.data import GraphBatch, Objects, read_word_vectors
from sgalign.errors import InputError
from sgalign.models import (
    Detector,
    ImageFeatures,
    Motifs,
    Prediction,
    RegionFeatures,
)
from sgalign.training.base import RelationModule, pixels_of
from sgalign.training.longtail import PredicateWeights, RelationLoss
from sgalign.training.options import check_at_least, check_choice, check_learning_rate
from sgalign.training.sampling import match_detections, sample_pairs, step_seed


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
            `sgalign.training.longtail.RelationLoss`.
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
            raise InputError(f"effective_number_beta must be in [0, 1), got {effective_number_beta}")
        check_choice("predicate_weights", predicate_weights, ("none", "inverse_frequency", "effective_number"))
        check_choice("protocol", protocol, ("predcls", "sgcls", "sgdet"))
        check_choice("vision", vision, ("none", "cached", "images"))
        check_choice("optimizer", optimizer, ("adam", "sgd"))
        needed = {"predcls": ("none", "cached", "images"), "sgcls": ("cached", "images"), "sgdet": ("images",)}
        if vision not in needed[protocol]:
            raise InputError(f"vision must be {' or '.join(needed[protocol])} for {protocol}, got {vision!r}")
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
            raise InputError(
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
                raise InputError("data must have features: FOLDER for a model whose vision is 'cached'")
            if (dim := batch.object_features.shape[1]) != self.options.relation_dim:
                raise InputError(f"relation_dim must be that of the features, {dim}, got {self.options.relation_dim}")
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
