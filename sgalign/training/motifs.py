"""Training and evaluation of Neural Motifs."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sgalign.data import GraphBatch, SeenBatch, read_word_vectors
from sgalign.data.findings import warn
from sgalign.models import Motifs, Prediction
from sgalign.training.longtail import RelationLoss
from sgalign.training.options import MotifsOptions
from sgalign.training.pairs import PairModule
from sgalign.training.saved_states import check_form
from sgalign.training.schedules import adam, warmup
from sgalign.training.starting import OF_MOTIFS, ClassRows
from sgalign.training.vision import CachedVision, Vision, make_vision

PLATEAU = "val/R@100"  # figure whose plateau lowers the learning rate of SGD


class MotifsModule(PairModule):
    """Neural Motifs (Zellers, Yatskar, Thomson, Choi, CVPR 2018).

    The loss is the mean cross-entropy over pairs. If object classes are decoded, the mean cross-entropy over objects is
    added.

    Args:
        options: the fields of `MotifsOptions`.
    """

    options: MotifsOptions
    options_type = MotifsOptions
    class_rows: ClassVar[ClassRows] = OF_MOTIFS
    network: Motifs
    vision: Vision
    new_figure: Tensor | None = None  # PLATEAU of the last validation, until an epoch has ended

    def __init__(self, **options: Any) -> None:
        super().__init__(MotifsOptions(**options))

    def make_network(self, counts: Tensor) -> None:
        options = self.options
        self.network = Motifs(
            counts,
            embed_dim=options.embed_dim,
            hidden_dim=options.hidden_dim,
            relation_dim=options.relation_dim,
            object_dim=0 if options.vision == "none" else options.relation_dim,
            decodes_labels=options.protocol != "predcls",
        )
        self.relation_loss = self.make_relation_loss(counts)
        self.vision = make_vision(options, len(counts))

    def make_relation_loss(self, counts: Tensor) -> RelationLoss:
        """Return the loss of the relations for a result of `predicate_counts`."""
        options = self.options
        return RelationLoss(
            counts.sum((0, 1)),
            weights=options.predicate_weights,
            power=options.predicate_weight_power,
            beta=options.effective_number_beta,
            adjustment=options.logit_adjustment,
            adjustment_test=options.logit_adjustment_test,
        )

    def load_initial_weights(self) -> None:
        if self.options.word_vectors is not None:
            self.network.load_class_vectors(read_word_vectors(self.options.word_vectors, self.object_names))
        self.vision.load_initial_weights(self.object_names)

    @property
    def protocol(self) -> str:
        return self.options.protocol

    @property
    def looks_at_images(self) -> bool:
        return self.options.vision == "images"

    @property
    def learns_from_targets(self) -> bool:
        return self.protocol != "sgdet"  # sgdet makes its pairs from detections

    @property
    def overlapping_only(self) -> bool:
        return self.protocol == "sgdet"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.vision, CachedVision):
            self.vision.read_from(self.data.features_source)
        elif self.data.cache is not None:
            warn(f"data.features is not used, because only a model with vision 'cached' reads {self.data.cache.folder}")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path:  # the checkpoint has replaced the weights of predicates, which are options
            self.relation_loss.load_state_dict(self.make_relation_loss(self.training_counts()).state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Callbacks save at the end of a validation before `on_validation_end`.
        ends_validation = self._trainer is not None and self.trainer.validating
        figure = self.trainer.callback_metrics.get(PLATEAU) if ends_validation else self.new_figure
        checkpoint["sgalign"]["plateau_figure"] = figure
        if isinstance(self.vision, CachedVision):
            checkpoint["sgalign"]["features"] = self.vision.source

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.new_figure = checkpoint["sgalign"].get("plateau_figure")
        if self.new_figure is not None:
            check_form(self.new_figure, torch.tensor(0.0), "plateau_figure")
        if isinstance(self.vision, CachedVision):
            self.vision.read_from(checkpoint["sgalign"].get("features"))

    def see(self, batch: GraphBatch, batch_index: int = 0) -> SeenBatch:
        """Return the objects, pairs and features that `vision` makes from the batch. In training, pairs are sampled."""
        generator = torch.Generator().manual_seed(self.step_seed(batch_index, purpose="samples"))
        return self.vision(batch, generator)

    def forward(self, seen: SeenBatch) -> Prediction:
        prediction = self.network(seen)
        return prediction._replace(logits=self.relation_loss.adjusted(prediction.logits))

    # ---- training

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimize and its parts by name."""
        seen = self.see(batch, batch_index)
        return self.supervised_loss(self.network(seen), seen.graph)

    def supervised_loss(self, prediction: Prediction, batch: GraphBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the supervised loss and its parts by name.

        The parts are `loss` for relations and, if classes are decoded, `objects`.
        """
        loss, labelled = self.relation_loss(prediction.logits, batch.targets)
        loss = loss * self.share(labelled)
        parts = {"loss": loss}
        if prediction.object_logits is not None:
            objects = functional.cross_entropy(prediction.object_logits, batch.labels, reduction="sum")
            parts["objects"] = objects / max(len(batch.labels), 1) * self.share(len(batch.labels))
            loss = loss + parts["objects"]
        return loss, parts

    def share(self, count: float | Tensor) -> float | Tensor:
        """Return the factor that makes DDP's average of per-process means the mean over all elements.

        Multiply a mean over this process's elements by the factor. For N processes, it is N * count / (sum of `count`
        over all processes).
        """
        if self.processes == 1:
            return 1.0
        own = torch.as_tensor(count, dtype=torch.float32, device=self.device)
        return self.processes * own / self.over_processes(own).clamp(min=1e-12)

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        loss, parts = self.losses(batch, batch_index)
        return self.report(loss, parts, shown=parts)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer from the options. If `learning_rate_images` is given, scale the learning rate."""
        options, rate = self.options, self.options.learning_rate
        if options.learning_rate_images is not None and self._trainer is not None:
            images = self.data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
            rate *= images / options.learning_rate_images
            rank_zero_info(f"learning rate {rate:g}: {options.learning_rate:g} for {options.learning_rate_images} "
                           f"images, scaled to {images} images per step")  # fmt: skip
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if options.optimizer == "adam":
            return adam([p for _, p in trained], rate, self._trainer)
        groups = [
            {"params": [p for name, p in trained if "bias" not in name], "weight_decay": 1e-4},
            {"params": [p for name, p in trained if "bias" in name], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)

    def on_validation_end(self) -> None:
        self.new_figure = self.trainer.callback_metrics.get(PLATEAU)

    def on_train_epoch_end(self) -> None:
        """Update the schedule that waits for a plateau, before the epoch's checkpoints are written.

        Lightning would update it afterwards, and a resumed run would skip the update. It would also count the figures
        of an earlier validation again.
        """
        # If max_steps ends an epoch before its last batch, a longer run may complete it.
        if self.new_figure is None or not self.trainer.is_last_batch:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(self.new_figure)
        self.new_figure = None

    def configure_optimizers(self) -> Any:
        options, optimizer = self.options, self.make_optimizer()
        schedulers = warmup(optimizer, options.warmup_steps)
        if options.optimizer == "sgd":
            plateau = ReduceLROnPlateau(
                optimizer, mode="max", factor=0.1, patience=2, threshold=1e-3, threshold_mode="abs"
            )
            # `on_train_epoch_end` steps it. Lightning only saves its state.
            schedulers.append({"scheduler": plateau, "monitor": PLATEAU, "strict": False, "frequency": sys.maxsize})
        return [optimizer], schedulers
