"""What all Lightning modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from sgalign.data import GraphBatch
from sgalign.errors import InputError
from sgalign.metrics import SceneGraphEvaluator
from sgalign.models import (
    Prediction,
    predicate_counts,
)
from sgalign.training.checkpoints import (
    WholeCheckpointIO,
    random_states,
    read_checkpoint,
    restore_random_states,
)


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
            raise InputError("data must have no detections for protocol sgdet: the model finds objects itself")
        if stage == "fit" and data.instance_drop and not self.learns_from_targets:
            raise InputError(
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
                raise InputError(
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
            raise InputError("checkpoint must be one that this package saved, got one without its class names")
        # Motifs or SGTR may be made of what has a mirror.
        kind = type(self) if saved["module"] == type(self).__name__ else module_named(saved["module"])
        if kind is None or not issubclass(kind, type(self)):
            raise InputError(f"checkpoint must be of {type(self).__name__}, as asked for, is of {saved['module']}")
        self._set_classes(saved["object_names"], saved["predicate_names"], "the checkpoint")
        self.run_seed, self.random_states = saved["run_seed"], saved.get("random_states", [])
        if self.network is None:
            classes, predicates = len(self.object_names), len(self.predicate_names)
            self.make_network(torch.ones(classes, classes, predicates))  # the weights follow
        weights, of_model = checkpoint["state_dict"], self.state_dict()
        # A mirror exists in training alone: a model without one leaves it out.
        mirror = [name for name in weights if name.startswith("mirrored_") and name not in of_model]
        if mirror and self._trainer is not None and self.trainer.training:
            raise InputError(f"checkpoint has a mirror: {type(self).__name__} can be tested with it, not go on from it")
        for name in mirror:
            del weights[name]
        for name, own in of_model.items():
            if name in weights and weights[name].shape != own.shape:
                shapes = f"{name} is {list(weights[name].shape)}, not {list(own.shape)}"
                raise InputError(f"checkpoint must be of a model with the same options: {shapes}")

    def on_train_start(self) -> None:
        # What dropout and the detector's sampling go on from. Of several processes one has saved its states.
        if self.trainer.ckpt_path and self.trainer.world_size == 1:
            restore_random_states(self.random_states)

    def finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The loss of a step, which says what it is made of where it cannot be learned from."""
        if not loss.isfinite():
            values = ", ".join(f"{name} {part.item():.3g}" for name, part in parts.items())
            raise InputError(f"the loss must be finite, got {values} at step {self.global_step}: lower learning_rate")
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


def pixels_of(batch: GraphBatch) -> list[Tensor]:
    if batch.pixels is None:
        raise InputError("data must have images: true for a model that looks at images")
    return batch.pixels


def module_named(name: str) -> type[RelationModule] | None:
    """The class of that name among all that have been imported."""
    kinds: list[type[RelationModule]] = [RelationModule]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == name), None)


def load_module(path: str | Path) -> RelationModule:
    """The module of a checkpoint, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    name = read_checkpoint(path)["sgalign"].get("module", "")
    kind = module_named(name)
    if kind is None:
        raise InputError(f"{path}: must be of a module of this package, got {name!r}")
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
