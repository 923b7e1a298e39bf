"""The data module, which yields the splits of a data set as batches of scene graphs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader

from sgalign.data import (
    Detections,
    GraphBatch,
    SceneGraph,
    ScenesDataset,
    collate,
    collate_detected,
    count_predicates,
    open_dataset,
    read_detections,
)
from sgalign.data.detections import check_detections, coco_ids
from sgalign.data.features import FeatureCache
from sgalign.data.findings import BadRows, Findings, warn
from sgalign.data.images import describe_stretched
from sgalign.data.open import NO_TRAINING, check_same_classes, splits_of
from sgalign.data.scene_graph import check_has_relations, has_relations, without_apart
from sgalign.data.splits import SPLITS, Split, ValidationChoice
from sgalign.data.triplets import zero_shot_triplets
from sgalign.data.workers import collate_and_share
from sgalign.errors import InputError
from sgalign.metrics import predicate_groups
from sgalign.ops.seeds import step_seed
from sgalign.training.longtail import RepeatSampler, drop_repeated, repeat_factors
from sgalign.training.saved_states import check_form

log = logging.getLogger("sgalign")


class _Needs(NamedTuple):
    """The training images and relations that a module needs."""

    relations: bool = True  # False for a detector, which also trains on images without relations
    overlapping_only: bool = False  # True to leave out relations between boxes that do not overlap


class SceneGraphData(pl.LightningDataModule):
    """The training, validation and test splits of a data set.

    Prediction reads the test split. Relation models train on the images that have a relation between two different
    objects, as in the public code. Detectors train on all images that have objects. The number of images and relations
    that are left out is logged. The graphs of a split are read when the split is first used, and they stay in memory (a
    few kilobytes per image). Pixels are read when a batch is made.

    Args:
        root: folder of a data set in one of the layouts that `sgalign.data.open_dataset` reads. If None, the generated
            scenes are used.
        batch_size: images per batch and process.
        seed: seed of the order of training images. The order depends only on the seed and the epoch, so a resumed run
            reads the images in the same order as an uninterrupted one.
        validation_images: number of training images to hold out if the data set has no validation split. If None, the
            class of the data set chooses the number.
        validation_choice: "hash" to hold out the images whose names have the lowest hashes, "first" to hold out the
            first images of the file. The public code for VG150 holds out the first 5000.
        bad_rows: "error" to raise an error if a row of the data set is malformed, "skip" to leave out such rows.
        overlapping_only: if true, leave out training relations between boxes that do not overlap, as the public code
            for Motifs does for SGDet. If None, this depends on the module: true only for Motifs with protocol "sgdet".
        images: if True, also read the pixels, for models that use them.
        features: folder of features written by `sgalign cache-features`, for models with vision "cached".
        detections: file of objects from a separate detector, in a format of `sgalign.data.read_detections`. They
            replace the annotated objects of the test split. A model that uses only labels and boxes is then evaluated
            on SGDet.
        num_workers: number of processes that read images. With 0 the training process reads them.
        repeat_threshold: threshold t of `sgalign.training.longtail.repeat_factors`, which repeats images with rare
            predicates. With 0, no image is repeated.
        instance_drop: rate of `sgalign.training.longtail.drop_repeated`, which drops labels of more common predicates
            in repeated images. It must be 0 for SGDet, because training pairs come from detections, and for SGTR,
            because it does not train on pairs.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        seed: int = 0,
        validation_images: int | None = None,
        validation_choice: ValidationChoice = "hash",
        bad_rows: BadRows = "error",
        overlapping_only: bool | None = None,
        images: bool = False,
        features: str | None = None,
        detections: str | None = None,
        num_workers: int = 0,
        repeat_threshold: float = 0.0,
        instance_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # checkpoints contain them
        for option, value in (("repeat_threshold", repeat_threshold), ("instance_drop", instance_drop)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{option} must be at least 0 and finite, got {value}")
        self.repeat_threshold, self.instance_drop = repeat_threshold, instance_drop
        if not 1 <= batch_size <= sys.maxsize:
            raise InputError(f"batch_size must be from 1 to {sys.maxsize}, got {batch_size}")
        if abs(seed) >= 1 << 62:  # epochs are added to it, and torch takes 64 bits
            raise InputError(f"seed must be above -2^62 and below 2^62, got {seed}")
        if num_workers < 0:
            raise InputError(f"num_workers must be at least 0, got {num_workers}")
        self.root, self.batch_size, self.seed = root, batch_size, seed
        self.images, self.num_workers, self.overlapping_only = images, num_workers, overlapping_only
        self._reading: dict[str, Any] = {"validation_images": validation_images}
        self._reading |= {"validation_choice": validation_choice, "bad_rows": bad_rows}
        self._needs = _Needs()
        self._chosen: list[SceneGraph] | None = None  # the images that `train` has chosen
        self.stretched: set[str] = set()  # ids of the images that `_note_stretched` has seen
        self.name = "generated scenes" if root is None else f"the data in {root}"
        # The classes come from the first split that the folder has. `_open` returns this data set once more.
        self._first: tuple[Split, Any] | None = None
        self.splits = list(SPLITS) if root is None else splits_of(root)
        if "train" not in self.splits:
            warn(f"{self.name}: {NO_TRAINING}")
        split: Split = "validation" if "validation" in self.splits else self.splits[0]
        dataset = self._open(split)
        self._first = split, dataset
        self.object_names, self.predicate_names = dataset.object_names, dataset.predicate_names
        if features is not None and detections is not None:
            raise InputError(
                "features and detections must not be given together, because cached features belong to annotated boxes"
            )
        self.cache = None if features is None else FeatureCache(features)
        if self.cache is not None and not self.cache.paths:
            raise FileNotFoundError(
                f"{features}: must be a folder that sgalign cache-features has filled, but it has no feature files"
            )
        self.detections: dict[str, Detections] | None = None
        if detections is not None:
            self.detections = read_detections(detections, self.object_names, lambda: coco_ids(self._open("test")))

    def prepare_for(self, *, relations: bool, overlapping_only: bool) -> None:
        """Choose the training images for a module.

        Args:
            relations: True if the module learns from relations, False for a detector.
            overlapping_only: True if the module leaves out relations between boxes that do not overlap. The option of
                the data wins if it is given.
        """
        if self.overlapping_only is not None:
            overlapping_only = self.overlapping_only
        if self._needs != (needs := _Needs(relations, overlapping_only and relations)):
            self._needs = needs
            if self.__dict__.get("train") is self._chosen:  # images that were assigned to `train` stay
                for name in ("train", "repeat_factors"):
                    self.__dict__.pop(name, None)

    @cached_property
    def annotated(self) -> list[SceneGraph]:
        """The training split as the data set has it. It defines the predicate groups and the zero-shot triplets."""
        return self._read("train")

    @cached_property
    def train(self) -> list[SceneGraph]:
        """The images that the module trains on (see `prepare_for`)."""
        findings = Findings(f"{self.name}, training")
        if self._needs.relations:
            graphs = self.annotated
            if self._needs.overlapping_only:
                graphs = [without_apart(graph, findings) for graph in graphs]
            kept = [graph for graph in graphs if (graph.relations[:, 0] != graph.relations[:, 1]).any()]
            kind = "image without a relation between two objects"
        else:
            graphs = self._read("train", keep="objects")
            kept = [graph for graph in graphs if len(graph.labels)]
            kind = "image without objects"
        findings.add("left out", kind, count=len(graphs) - len(kept))
        findings.log()
        self._chosen = self._check_cached(kept, "train")
        return kept

    @cached_property
    def validation(self) -> list[SceneGraph]:
        """The validation split."""
        return self._check_cached(self._read("validation"), "validation")

    @cached_property
    def test(self) -> list[SceneGraph]:
        """The test split."""
        return self._check_cached(self._read("test"), "test")

    @property
    def features_source(self) -> str | None:
        """The detector whose features the data have, or None if they have no features."""
        return None if self.cache is None else self.cache.source

    def _check_cached(self, graphs: list[SceneGraph], split: Split) -> list[SceneGraph]:
        """Return the graphs. Raise InputError if there are cached features, but not of all of them."""
        if self.cache is not None and (missing := [g.image_id for g in graphs if g.image_id not in self.cache]):
            raise InputError(
                f"{self.cache.folder}: must have features of all {len(graphs)} images of the {split} split, but lacks "
                f"{len(missing)} of them, such as {missing[0]!r}: run sgalign cache-features again to add them"
            )
        return graphs

    def require_relations(self, split: Split) -> None:
        """Raise InputError unless the split has relations, without which there is no recall to compute."""
        check_has_relations(getattr(self, split), f"{self.name}: the {split} split")

    @cached_property
    def predicate_groups(self) -> dict[str, list[int]]:
        """The head, body and tail predicates, as published for VG150, otherwise from counts in the training split."""
        trains = "train" in self.splits
        counts = count_predicates(self.annotated, len(self.predicate_names) - 1)[1:] if trains else None
        return predicate_groups(self.predicate_names, counts)

    @cached_property
    def zero_shot_validation(self) -> Tensor | None:
        """The class triplets of the validation split that the training split lacks, as in `zero_shot_triplets`.

        It is None without a training split, or if there are no such triplets.
        """
        return self._zero_shot("validation", self.annotated) if "train" in self.splits else None

    @cached_property
    def zero_shot_test(self) -> Tensor | None:
        """The class triplets of the test split that both other splits lack, or None as for `zero_shot_validation`."""
        return self._zero_shot("test", [*self.annotated, *self.validation]) if "train" in self.splits else None

    def _zero_shot(self, split: Split, seen: list[SceneGraph]) -> Tensor | None:
        found = zero_shot_triplets(seen, getattr(self, split))
        if not len(found):
            warn(f"{self.name}: no zero-shot recall, as the {split} split has no zero-shot relations")
        return found if len(found) else None

    def _open(self, split: Split, **options: Any) -> Any:
        if self.root is None:
            return ScenesDataset(split)
        if self._first is not None and self._first[0] == split and not options:
            dataset, self._first = self._first[1], None  # not kept, because it is large
            return dataset
        return open_dataset(self.root, split, **self._reading, **options)

    def _read(self, split: Split, **options: Any) -> list[SceneGraph]:
        dataset = self._open(split, **options)
        check_same_classes(str(self.name), self, split, dataset)
        return list(dataset)

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of the training split, in an order that depends only on the seed and the epoch.

        A resumed run continues in the middle of its epoch.
        """
        if not self.train:
            needed = "a relation between two objects" if self._needs.relations else "objects"
            raise InputError(f"{self.name}: no training image has {needed}, so there is nothing to fit")
        # The distributed sampler works for a single process, too. Lightning sets the sampler's epoch only after the
        # workers have started on the first epoch, so it is also set here.
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        graphs = self.training_graphs()
        sampler = RepeatSampler(graphs, self.repeat_factors, num_replicas=world, rank=rank, seed=self.seed)
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        sampler.set_epoch(epochs.processed)
        loader = self._loader(graphs, kind=TrainingLoader, sampler=sampler, collate_fn=self._training_collate_fn())
        loader.trainer = self.trainer
        return loader

    def training_graphs(self) -> list[SceneGraph]:
        """Return the images that an epoch reads."""
        return self.train

    def _training_collate_fn(self) -> Callable[..., GraphBatch]:
        return self._collate_fn()

    @cached_property
    def repeat_factors(self) -> Tensor:
        """The repeat factor of images with each predicate, from `repeat_threshold`."""
        return repeat_factors(self.train, len(self.predicate_names) - 1, self.repeat_threshold)

    def on_before_batch_transfer(self, batch: GraphBatch, dataloader_idx: int) -> GraphBatch:
        """Note stretched images and return the batch. In training, also drop labels at the rate `instance_drop`."""
        self._note_stretched(batch)
        if not self.instance_drop or self.trainer is None or not self.trainer.training:
            return batch
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = step_seed(self.seed, step, 0, self.trainer.global_rank, purpose="instance drop")
        generator = torch.Generator().manual_seed(seed)
        return drop_repeated(batch, self.repeat_factors, self.instance_drop, generator)

    def _note_stretched(self, batch: GraphBatch) -> None:
        """Remember the stretched images of the batch, and log a warning at the first one.

        Every process logs its own images, because each image is read by only one of them.
        """
        if batch.stretched and not self.stretched:
            log.warning(describe_stretched(batch.stretched))
        self.stretched.update(batch.stretched)

    def teardown(self, stage: str) -> None:
        """Log the number of stretched images if there was more than one."""
        if len(self.stretched) > 1:
            log.warning(f"{self.name}: {len(self.stretched)} images were stretched, so their boxes may not fit")
        self.stretched.clear()

    def val_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the validation split.

        Relation models do not validate on a split without relations. Its recall would be 0 in every epoch.
        """
        graphs = self.validation
        if self._needs.relations and not has_relations(graphs):
            warn(
                f"{self.name}: the validation split has no relations, so no epoch is validated, and no checkpoint is "
                "chosen by its recall"
            )
            graphs = []
        return self._loader(graphs, sharded=True)

    def test_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the test split, with the given detections if there are any."""
        if self.detections is not None:
            check_detections(self.detections, self.test, "test")
        return self._loader(self.test, self.detections, sharded=True)

    predict_dataloader = test_dataloader

    @property
    def _feeds_gpu(self) -> bool:
        """True if the trainer computes on a GPU. Only the trainer's device is read, so no unused GPU is initialized."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _loader(
        self,
        graphs: list[SceneGraph],
        detections: dict[str, Detections] | None = None,
        kind: type[Any] = DataLoader,
        sharded: bool = False,
        collate_fn: Callable[..., GraphBatch] | None = None,
        **options: Any,
    ) -> Any:
        trainer = self.trainer
        if sharded and trainer is not None and trainer.world_size > 1:
            graphs = with_idle_images(graphs, trainer.world_size)
            # Lightning's own sampler would repeat images to make all shares equal, and these would count twice.
            options["sampler"] = UnrepeatedDistributedSampler(
                range(len(graphs)), num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
            )
        return kind(
            graphs,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self._feeds_gpu,  # the loader's thread pins, so `send` does not
            generator=torch.Generator(),  # draws the workers' seeds instead of torch's global generator
            collate_fn=partial(collate_and_share, collate_fn or self._collate_fn(detections)),
            **options,
        )

    def _collate_fn(self, detections: dict[str, Detections] | None = None) -> Callable[..., GraphBatch]:
        """Return the function that makes a batch of scene graphs. It can be pickled for worker processes."""
        return partial(
            collate_for,
            num_predicates=len(self.predicate_names) - 1,
            pixels=self.images,
            cache=self.cache,
            detections=detections,
        )


class TrainingLoader(DataLoader[GraphBatch]):
    """A data loader that resumes in the middle of an epoch. Lightning saves and restores its position."""

    batch_size: int
    trainer: pl.Trainer  # counts the batches used for training; workers may have fetched more

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, as the number of batches that were used for training."""
        if not isinstance(self.sampler, RepeatSampler):  # Lightning's own sampler, for overfit_batches
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        epochs: Any = self.trainer.fit_loop.epoch_progress
        batches, epoch = progress.current.processed, epochs.current.started - 1
        if progress.is_last_batch and batches == progress.current.ready:  # not if the last step was interrupted
            batches, epoch = 0, epoch + 1
        return {"epoch": max(epoch, 0), "batches": batches, "images": self.batch_size * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the position in a result of `state_dict`."""
        if not state or not isinstance(self.sampler, RepeatSampler):
            return
        check_form(state, {"epoch": 0, "batches": 0, "images": 0}, "combined_loader[0]")
        if state["batches"] > len(self):
            raise InputError(f"ckpt_path must have a position of at most {len(self)} batches, got {state['batches']}")
        if state["batches"] and state["images"] != (images := self.batch_size * self.sampler.num_replicas):
            raise InputError(
                f"batch_size times the number of processes must be {state['images']} as in ckpt_path, because "
                f"ckpt_path was written in the middle of an epoch, got {images}"
            )
        self.sampler.done = state["epoch"], state["batches"] * self.batch_size
        self.sampler.set_epoch(state["epoch"])


def with_idle_images(graphs: list[SceneGraph], processes: int) -> list[SceneGraph]:
    """Return the scene graphs, and copies without objects if there are fewer images than processes.

    Every process must evaluate something, because it waits for the others at the end. Copies without objects do not
    count in any metric.
    """
    idle = [
        replace(graph, boxes=graph.boxes[:0], labels=graph.labels[:0], relations=graph.relations[:0])
        for graph in graphs[:1] * (processes - len(graphs))
    ]
    return [*graphs, *idle]


def collate_for(
    graphs: Sequence[SceneGraph],
    num_predicates: int,
    *,
    pixels: bool = False,
    cache: FeatureCache | None = None,
    detections: dict[str, Detections] | None = None,
) -> GraphBatch:
    """Make a batch of scene graphs.

    If `detections` are given, they replace the annotated objects. Otherwise, if a `cache` is given, the batch gets its
    features.
    """
    if detections is not None:
        return collate_detected(graphs, detections, num_predicates, pixels=pixels)
    batch = collate(graphs, num_predicates, pixels=pixels)
    return batch if cache is None else cache.add_to(batch)
