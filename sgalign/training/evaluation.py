"""The recall evaluation that all scene graph models share."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sgalign.data import GraphBatch
from sgalign.errors import InputError
from sgalign.metrics import SceneGraphEvaluator
from sgalign.metrics.results import is_of_class
from sgalign.training.base import SavedModule
from sgalign.training.starting import ClassRows, read_start, start


class RelationModule(SavedModule):
    """The base class of modules that predict scene graphs. It evaluates the graphs by recall.

    Subclasses implement `predictions`, which returns the predictions for a batch.
    """

    recall: SceneGraphEvaluator
    class_rows: ClassVar[ClassRows]  # layers of the network that depend on the classes, if a run can start from a model
    start: dict[str, Any] | None = None  # checkpoint that a new run starts from, while the network is made
    compiler: dict[str, Any] = {"dynamic": True}  # for `torch.compile`, because batch sizes vary

    @property
    def protocol(self) -> str:
        """The protocol, one of `sgalign.metrics.PROTOCOLS`. It determines the inputs and outputs of the model."""
        return "predcls"

    @property
    def looks_at_images(self) -> bool:
        """True if batches must contain the pixels of the images."""
        return False

    def setup(self, stage: str) -> None:
        if self.protocol == "sgdet" and self.data.detections is not None:
            raise InputError(
                "data.detections must be left out for protocol sgdet, because the model detects objects itself"
            )
        if stage == "fit" and self.network is None and not self.trainer.ckpt_path:
            self.start = read_start(self)
        super().setup(stage)
        if self.start is not None:
            start(self, self.start, self.options.start_from, self.class_rows)  # type: ignore[attr-defined]
            self.start = None
        if stage in ("validate", "test"):
            self.data.require_relations("validation" if stage == "validate" else "test")
        if stage == "fit" and getattr(self.options, "compile", False):
            assert self.network is not None
            self.network.compile(**self.compiler)

    def on_validation_epoch_start(self) -> None:
        self.recall = self._evaluator(self.protocol, self.data.zero_shot_validation)

    def on_test_epoch_start(self) -> None:
        protocol = self.protocol if self.data.detections is None else "sgdet"
        self.recall = self._evaluator(protocol, self.data.zero_shot_test)

    def _evaluator(self, protocol: str, zero_shot: Tensor | None) -> SceneGraphEvaluator:
        evaluator = SceneGraphEvaluator(
            protocol,
            len(self.predicate_names) - 1,
            zero_shot=zero_shot,
            groups=self.data.predicate_groups,
            predicate_names=self.predicate_names,
        )
        return evaluator.to(self.device)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """Return one dict per image of the batch, in the format of `SceneGraphEvaluator` and `TripletWriter`."""
        raise NotImplementedError(f"{type(self).__name__} must override predictions")

    def validation_step(self, batch: GraphBatch) -> dict[str, Any]:
        """Evaluate a batch, and return its `predictions` for callbacks."""
        predictions = self.predictions(batch)
        self.recall.update(predictions, batch.truth)
        return {"predictions": predictions}

    def on_validation_epoch_end(self) -> None:
        for name, value in self._figures().items():
            self.log(f"{self.part}/{name}", value.float(), prog_bar=name in ("R@50", "mR@50"), sync_dist=True)

    def _figures(self) -> dict[str, Tensor]:
        figures = self.recall.compute()
        if self.part == "val":  # SGTR's public code chooses its model by this mean
            figures = figures | {"mean@100": (figures["R@100"] + figures["mR@100"]) / 2}
        return {name: value for name, value in figures.items() if not is_of_class(name)}

    def validated_recalls(self) -> list[str]:
        """Return the names under which a validation logs recall, such as "val/R@50"."""
        self.on_validation_epoch_start()  # makes the evaluator
        return [f"val/{name}" for name in self._figures()]

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: GraphBatch) -> list[dict[str, Any]]:
        return self.predictions(batch)
