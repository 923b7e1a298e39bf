"""Training and evaluation with Lightning: the data module, and one module for each system."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

from sgalign.alignment import DIRECTIONS, REDUCTIONS, relation_alignment_loss
from sgalign.data import GraphBatch, SceneGraph, ScenesDataset, VRDDataset, collate, read_word_vectors
from sgalign.metrics import SceneGraphEvaluator
from sgalign.models import FrequencyBaseline, Motifs, predicate_counts
from sgalign.random_mask import random_attention_mask


class SceneGraphData(pl.LightningDataModule):
    """Training, validation and test part of a data set; `predict` reads the test part.

    Training images without a related pair are left out, as in the public code. Graphs are kept in memory, a few
    kilobytes each.

    Args:
        root: folder of the VRD annotations (`sgalign.data.VRDDataset`); None for the generated scenes.
        batch_size: images a step and process.
        seed: of the order of training images, which depends on it and on the epoch alone, so that a resumed run goes on
            as the first would have.
        validation_images: how many of VRD's training images are held out.
    """

    def __init__(
        self, root: str | None = None, batch_size: int = 16, seed: int = 0, validation_images: int = 600
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.root, self.batch_size, self.seed, self.validation_images = root, batch_size, seed, validation_images
        self.name = "generated scenes" if root is None else f"VRD in {root}"
        train = self._read("train")
        self.train = [graph for graph in train if (graph.relations[:, 0] != graph.relations[:, 1]).any()]
        self.validation, self.test = self._read("validation"), self._read("test")

    def _read(self, split: Literal["train", "validation", "test"]) -> list[SceneGraph]:
        if self.root is None:
            dataset: ScenesDataset | VRDDataset = ScenesDataset(split)
        else:
            dataset = VRDDataset(self.root, split, validation_images=self.validation_images)
        self.object_names, self.predicate_names = dataset.object_names, dataset.predicate_names
        return [dataset[index] for index in range(len(dataset))]

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        if not self.train:
            raise ValueError(f"{self.name}: no training image has a relation between two objects, nothing to fit")
        # Also where there is one process: Lightning tells it the epoch, also after a resume.
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        images = range(len(self.train))
        sampler: DistributedSampler[int] = DistributedSampler(images, num_replicas=world, rank=rank, seed=self.seed)  # type: ignore[arg-type]
        return self._loader(self.train, sampler=sampler)

    def val_dataloader(self) -> DataLoader[GraphBatch]:
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader[GraphBatch]:
        return self._loader(self.test)

    predict_dataloader = test_dataloader

    def _loader(self, graphs: Sequence[SceneGraph], **options: Any) -> DataLoader[GraphBatch]:
        # Putting a batch together takes a millisecond: no worker processes.
        collate_fn = partial(collate, num_predicates=len(self.predicate_names) - 1)
        return DataLoader(graphs, batch_size=self.batch_size, collate_fn=collate_fn, **options)  # type: ignore[arg-type]


class RelationModule(pl.LightningModule):
    """What all systems share: the network is made for the data's classes, evaluated, and saved with their names.

    Subclasses say how the network is made from the training part (`make_network`), and how it is trained.
    """

    recall: SceneGraphEvaluator

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self.object_names: list[str] = []
        self.predicate_names: list[str] = []
        self.run_seed = 0

    def make_network(self, counts: Tensor) -> None:
        """Sets `self.network`, and modules beside it, for the classes that `predicate_counts` tells of."""
        raise NotImplementedError(f"{type(self).__name__} must override make_network")

    def forward(self, batch: GraphBatch) -> Tensor:
        """Predicate logits `[R, num_predicates + 1]` of the batch's pairs."""
        assert self.network is not None, "the network is made when a trainer or a checkpoint tells the classes"
        return self.network(batch)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._set_classes(data.object_names, data.predicate_names, f"the data, {data.name},")
        if self.network is None:
            self.make_network(predicate_counts(data.train, len(self.object_names) - 1, len(self.predicate_names) - 1))

    def _set_classes(self, object_names: Sequence[str], predicate_names: Sequence[str], whose: str) -> None:
        if self.network is None:
            self.object_names, self.predicate_names = list(object_names), list(predicate_names)
            self.recall = SceneGraphEvaluator("predcls", len(predicate_names) - 1, predicate_names=predicate_names)
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
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("sgalign")
        if saved is None:
            raise ValueError("checkpoint must be one that this package saved, got one without its class names")
        self._set_classes(saved["object_names"], saved["predicate_names"], "the checkpoint")
        self.run_seed = saved["run_seed"]
        if self.network is None:
            classes, predicates = len(self.object_names), len(self.predicate_names)
            self.make_network(torch.ones(classes, classes, predicates))  # the weights follow

    def on_fit_start(self) -> None:
        if not self.trainer.ckpt_path:
            self.run_seed = torch.initial_seed()

    def on_validation_epoch_start(self) -> None:
        self.recall.reset()

    def validation_step(self, batch: GraphBatch) -> None:
        self.recall.update(self.predictions(batch), ground_truth(batch))

    def on_validation_epoch_end(self) -> None:
        part = "test" if self.trainer.testing else "val"
        for name, value in self.recall.compute().items():
            if "/" not in name:
                self.log(f"{part}/{name}", value.float(), prog_bar=name in ("R@50", "mR@50"))

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def predict_step(self, batch: GraphBatch) -> list[dict[str, Any]]:
        return self.predictions(batch)

    def predictions(self, batch: GraphBatch) -> list[dict[str, Any]]:
        """What `SceneGraphEvaluator` and `TripletWriter` read, a dict for each image of the batch."""
        probabilities = self(batch).float().softmax(1)
        pairs_of = torch.bincount(batch.images[batch.pairs[:, 0]], minlength=len(batch.lengths)).tolist()
        starts = batch.lengths.cumsum(0) - batch.lengths
        return [
            {**image, "scores": torch.ones_like(image["labels"], dtype=torch.float32), "pairs": pairs - start,
             "predicate_scores": scores}
            for image, pairs, scores, start in zip(
                _objects(batch), batch.pairs.split(pairs_of), probabilities.split(pairs_of), starts, strict=True
            )
        ]  # fmt: skip


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that this package saved; nothing but tensors and plain values is unpickled from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is cut short, or another program wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything
        raise ValueError(f"{path}: not a checkpoint, or cut short ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or "sgalign" not in checkpoint:
        raise ValueError(f"{path}: must be a checkpoint that sgalign fit has written, has no class names")
    return checkpoint


def ground_truth(batch: GraphBatch) -> list[dict[str, Any]]:
    """The targets of `SceneGraphEvaluator`, a dict for each image of the batch."""
    return [{**image, "relations": rows} for image, rows in zip(_objects(batch), batch.relations, strict=True)]


def _objects(batch: GraphBatch) -> list[dict[str, Any]]:
    lengths = batch.lengths.tolist()
    return [
        {"image_id": image_id, "boxes": boxes, "labels": labels}
        for image_id, boxes, labels in zip(
            batch.image_ids, batch.boxes.split(lengths), batch.labels.split(lengths), strict=True
        )
    ]


class FrequencyModule(RelationModule):
    """The frequency baseline: nothing to train, so `sgalign test --model FrequencyModule` is all it takes."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise ValueError("FrequencyModule has nothing to fit: sgalign test --model FrequencyModule evaluates it")
        super().setup(stage)

    def make_network(self, counts: Tensor) -> None:
        self.network = FrequencyBaseline(counts)


class MotifsModule(RelationModule):
    """Neural Motifs: the mean cross-entropy over all pairs, Adam.

    Args:
        embed_dim, hidden_dim, relation_dim: as in `sgalign.models.Motifs`.
        word_vectors: text file of word vectors of `embed_dim` numbers, the class embeddings' initial values; None for
            random ones. Read when training starts, not when a checkpoint is loaded.
        learning_rate: of Adam. Another optimizer: ``--optimizer`` of the command line.
    """

    network: Motifs

    def __init__(
        self,
        embed_dim: int = 200,
        hidden_dim: int = 128,
        relation_dim: int = 512,
        word_vectors: str | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("hidden_dim", hidden_dim), ("relation_dim", relation_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate}")
        self.save_hyperparameters()

    @property
    def options(self) -> Any:
        """The arguments, by name."""
        return self.hparams

    def make_network(self, counts: Tensor) -> None:
        sizes = {name: self.options[name] for name in ("embed_dim", "hidden_dim", "relation_dim")}
        self.network = Motifs(counts, **sizes)

    def setup(self, stage: str) -> None:
        is_new = self.network is None
        super().setup(stage)
        if is_new and stage == "fit" and self.options.word_vectors is not None:
            self.network.load_class_vectors(read_word_vectors(self.options.word_vectors, self.object_names))

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts by name."""
        loss = relation_loss(self.network(batch), batch.targets)
        return loss, {"loss": loss}

    def training_step(self, batch: GraphBatch, batch_index: int) -> Tensor:
        loss, parts = self.losses(batch, batch_index)
        parts = {f"train/{name}": part for name, part in parts.items()}
        self.log_dict(parts, batch_size=len(batch.image_ids), prog_bar=True)
        if not loss.isfinite():
            values = ", ".join(f"{name} {part.item():.3g}" for name, part in parts.items())
            raise ValueError(f"the loss must be finite, got {values} at step {self.global_step}: lower learning_rate")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.options.learning_rate, fused=True)


class AlignMotifsModule(MotifsModule):
    """Align-Motifs (Xu, Liao, Sigal, WACV 2024): Motifs trained with a mirrored, masked branch.

    L = L_supervised + alignment_weight * L_align, where the mirror shares every weight but its predicate head, and what
    its edge context reads is randomly set to 0. At evaluation the mirror does not exist: `network` is Motifs. The
    defaults are the paper's where it says something; docs/training.md has the reasons for the others.

    Args:
        embed_dim, hidden_dim, relation_dim, word_vectors, learning_rate: as in `MotifsModule`.
        mask_ratio: p, the probability of masking.
        alignment_weight: lambda.
        mask_granularity: "row" masks whole objects, "feature" single numbers.
        tied_head: the mirror has the supervised head instead of its own.
        reduction, direction: of `relation_alignment_loss`.
        aligned_relations: "all" pairs, annotated ("foreground") ones, or those with a "masked" object.
        alignment_warmup: steps over which the weight grows from 0 to `alignment_weight`.
        supervise_mirror: adds the supervised loss of the mirror's logits.
    """

    def __init__(
        self,
        embed_dim: int = 200,
        hidden_dim: int = 128,
        relation_dim: int = 512,
        word_vectors: str | None = None,
        learning_rate: float = 1e-3,
        mask_ratio: float = 0.1,
        alignment_weight: float = 10.0,
        mask_granularity: Literal["row", "feature"] = "row",
        tied_head: bool = False,
        reduction: Literal["element", "relation"] = "element",
        direction: Literal["teacher_to_student", "student_to_teacher", "symmetric"] = "teacher_to_student",
        aligned_relations: Literal["all", "foreground", "masked"] = "all",
        alignment_warmup: int = 0,
        supervise_mirror: bool = False,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, relation_dim, word_vectors, learning_rate)
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in [0, 1], got {mask_ratio}")
        for name, value in (("alignment_weight", alignment_weight), ("alignment_warmup", alignment_warmup)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        for name, choice, choices in (
            ("mask_granularity", mask_granularity, ("row", "feature")),
            ("reduction", reduction, REDUCTIONS),
            ("direction", direction, DIRECTIONS),
            ("aligned_relations", aligned_relations, ("all", "foreground", "masked")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        self.mirrored_head = self.network.predicate if self.options.tied_head else self.network.new_predicate_head()

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        dropped = self.draw_mask(batch, batch_index)
        logits, mirrored_logits = self.network.dual_branch(batch, dropped, self.mirrored_head)
        supervised = relation_loss(logits, batch.targets)
        alignment = relation_alignment_loss(
            logits,
            mirrored_logits,
            reduction=options.reduction,
            direction=options.direction,
            weight=self._weights(batch, dropped),
        )
        warmup = min(1.0, self.global_step / options.alignment_warmup) if options.alignment_warmup else 1.0
        loss = supervised + options.alignment_weight * warmup * alignment
        if options.supervise_mirror:
            loss = loss + relation_loss(mirrored_logits, batch.targets)
        return loss, {"loss": supervised, "alignment": alignment}

    def draw_mask(self, batch: GraphBatch, batch_index: int) -> Tensor:
        """What this step's mirror does not see: bool `[T, 1]` or `[T, F]`, drawn as attention masks are."""
        seed = mask_seed(self.run_seed, self.global_step, batch_index, self.global_rank)
        images, objects = len(batch.lengths), int(batch.lengths.max())
        draw = partial(random_attention_mask, ratio=self.options.mask_ratio, seed=seed, device=batch.boxes.device)
        if self.options.mask_granularity == "row":
            return draw(images, 1, 1, objects)[batch.images, 0, 0, batch.positions, None]
        return draw(images, 1, objects, self.network.edge_input_dim)[batch.images, 0, batch.positions]

    def _weights(self, batch: GraphBatch, dropped: Tensor) -> Tensor | None:
        if self.options.aligned_relations == "foreground":
            return 1 - batch.targets[:, 0]
        if self.options.aligned_relations == "masked":
            return dropped.any(1)[batch.pairs].any(1).float()
        return None


def relation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits `[R, K + 1]` with target distributions of the same shape; 0 without pairs."""
    return functional.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)


def mask_seed(run_seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A seed in the range of int64 for one step's mask; any change of an argument gives an unrelated one.

    Of explicit arguments rather than of torch's generator, so that ranks differ and a resumed run repeats.
    """
    packed = struct.pack("<4q", *(value % (1 << 64) - (1 << 63) for value in (run_seed, step, micro_batch, rank)))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


class TripletWriter(BasePredictionWriter):
    """Writes what `sgalign predict` finds, an image a line of JSON.

    A line has `image_id`, `objects` (`label`, `box` x1, y1, x2, y2 in pixels) and `triplets` by falling score
    (`subject` and `object`, indices of objects; `predicate`; `score`), the best predicate of each pair.

    Args:
        path: the file, replaced when the prediction is complete.
        top_k: triplets an image.

    Raises:
        ValueError: the trainer has several processes, which would write one file.
    """

    _file: TextIO

    def __init__(self, path: str = "predictions.jsonl", top_k: int = 100) -> None:
        super().__init__("batch")
        self.path, self.top_k = Path(path), top_k

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"trainer must predict in one process (--trainer.devices 1), got {trainer.world_size}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("w", encoding="utf-8")

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        assert isinstance(pl_module, RelationModule)
        for image in prediction:
            graph = describe(image, pl_module.object_names, pl_module.predicate_names, self.top_k)
            self._file.write(json.dumps(graph) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._file.close()
        self._partial.replace(self.path)
        print(f"wrote {self.path}")


def describe(
    prediction: dict[str, Any], object_names: list[str], predicate_names: list[str], top_k: int
) -> dict[str, Any]:
    """A prediction of `RelationModule.predictions` in names and plain numbers, best triplets first."""
    score, predicate = prediction["predicate_scores"][:, 1:].max(1)
    best = score.argsort(descending=True, stable=True)[:top_k].tolist()
    return {
        "image_id": prediction["image_id"],
        "objects": [
            {"label": object_names[label], "box": box}
            for label, box in zip(prediction["labels"].tolist(), prediction["boxes"].tolist(), strict=True)
        ],
        "triplets": [
            {
                "subject": int(prediction["pairs"][row, 0]),
                "predicate": predicate_names[int(predicate[row]) + 1],
                "object": int(prediction["pairs"][row, 1]),
                "score": round(float(score[row]), 6),
            }
            for row in best
        ],
    }
