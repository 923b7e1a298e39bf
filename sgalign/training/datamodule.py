"""The data module, which yields the splits of a data set as batches of scene graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal

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
from sgalign.data.features import FeatureCache
from sgalign.data.triplets import zero_shot_triplets
from sgalign.errors import InputError
from sgalign.metrics import predicate_groups
from sgalign.training.longtail import RepeatSampler, drop_repeated, repeat_factors
from sgalign.training.seeds import step_seed

Split = Literal["train", "validation", "test"]


class SceneGraphData(pl.LightningDataModule):
    """The training, validation and test splits of a data set.

    Prediction reads the test split. Training images that have no relation between two different objects are left out,
    as in the public code. The graphs of a split are read when the split is first used, and they stay in memory (a few
    kilobytes per image). Pixels are read when a batch is made.

    Args:
        root: folder of a data set in one of the layouts that `sgalign.data.open_dataset` reads. If None, the generated
            scenes are used.
        batch_size: images per batch and process.
        seed: seed of the order of training images. The order depends only on the seed and the epoch, so a resumed run
            reads the images in the same order as an uninterrupted one.
        validation_images: number of training images to hold out if the data set has no validation split. If None, the
            class of the data set chooses the number.
        images: if True, also read the pixels, for models that use them.
        features: folder of features written by `sgalign cache-features`, for models with vision "cached".
        detections: file of objects from a separate detector, in the format of `sgalign.data.read_detections`. They
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
        images: bool = False,
        features: str | None = None,
        detections: str | None = None,
        num_workers: int = 0,
        repeat_threshold: float = 0.0,
        instance_drop: float = 0.0,
    ) -> None:
        super().__init__()
        for option, value in (("repeat_threshold", repeat_threshold), ("instance_drop", instance_drop)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{option} must be at least 0 and finite, got {value}")
        self.repeat_threshold, self.instance_drop = repeat_threshold, instance_drop
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise InputError(f"num_workers must be at least 0, got {num_workers}")
        self.root, self.batch_size, self.seed, self.validation_images = root, batch_size, seed, validation_images
        self.images, self.num_workers = images, num_workers
        self.name = "generated scenes" if root is None else f"the data in {root}"
        dataset = self._open("validation")
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
        self.detections = None if detections is None else read_detections(detections, len(self.object_names) - 1)

    @cached_property
    def train(self) -> list[SceneGraph]:
        """The training split, without images that have no relation between two different objects."""
        return self._read("train")

    @cached_property
    def validation(self) -> list[SceneGraph]:
        """The validation split."""
        return self._read("validation")

    @cached_property
    def test(self) -> list[SceneGraph]:
        """The test split."""
        return self._read("test")

    @cached_property
    def predicate_groups(self) -> dict[str, list[int]]:
        """The head, body and tail predicates, as published for VG150, otherwise from counts in the training split."""
        counts = count_predicates(self.train, len(self.predicate_names) - 1)
        return predicate_groups(self.predicate_names, counts[1:])

    @cached_property
    def zero_shot_validation(self) -> Tensor:
        """The class triplets of the validation split that the training split lacks, as in `zero_shot_triplets`."""
        return zero_shot_triplets(self.train, self.validation)

    @cached_property
    def zero_shot_test(self) -> Tensor:
        """The class triplets of the test split that both other splits lack."""
        return zero_shot_triplets([*self.train, *self.validation], self.test)

    def _open(self, split: Split) -> Any:
        if self.root is None:
            return ScenesDataset(split)
        return open_dataset(self.root, split, validation_images=self.validation_images)

    def _read(self, split: Split) -> list[SceneGraph]:
        dataset = self._open(split)
        for kind in ("object_names", "predicate_names"):
            if getattr(dataset, kind) != getattr(self, kind):
                raise InputError(f"{self.name}: {kind} must be the same in all splits, but {split} has different ones")
        graphs: list[SceneGraph] = list(dataset)
        if split == "train":
            graphs = [graph for graph in graphs if (graph.relations[:, 0] != graph.relations[:, 1]).any()]
        if self.cache is not None and (missing := [g.image_id for g in graphs if g.image_id not in self.cache]):
            raise InputError(
                f"{self.cache.folder}: must have features of all {len(graphs)} images of the {split} split, but lacks "
                f"{len(missing)} of them, such as {missing[0]!r}: run sgalign cache-features again to add them"
            )
        return graphs

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of the training split, in an order that depends only on the seed and the epoch.

        A resumed run continues in the middle of its epoch.
        """
        if not self.train:
            raise InputError(
                f"{self.name}: no training image has a relation between two objects, so there is nothing to fit"
            )
        # The distributed sampler works for a single process, too. Lightning sets the sampler's epoch only after the
        # workers have started on the first epoch, so it is also set here.
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = RepeatSampler(self.train, self.repeat_factors, num_replicas=world, rank=rank, seed=self.seed)
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        sampler.set_epoch(epochs.processed)
        loader = self._loader(self.train, kind=TrainingLoader, sampler=sampler)
        loader.trainer = self.trainer
        return loader

    @cached_property
    def repeat_factors(self) -> Tensor:
        """The repeat factor of images with each predicate, from `repeat_threshold`."""
        return repeat_factors(self.train, len(self.predicate_names) - 1, self.repeat_threshold)

    def on_before_batch_transfer(self, batch: GraphBatch, dataloader_idx: int) -> GraphBatch:
        """Return the batch. In training, first drop labels at the rate `instance_drop`."""
        if not self.instance_drop or self.trainer is None or not self.trainer.training:
            return batch
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = step_seed(self.seed, step, 0, self.trainer.global_rank, purpose="instance drop")
        generator = torch.Generator().manual_seed(seed)
        return drop_repeated(batch, self.repeat_factors, self.instance_drop, generator)

    def val_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the validation split."""
        return self._loader(self.validation, sampler=self._shard(self.validation))

    def test_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the test split, with the given detections if there are any."""
        ids = [graph.image_id for graph in self.test]
        if self.detections is not None and ids and self.detections.keys().isdisjoint(ids):
            raise InputError(f"detections must contain images of the test split, such as {ids[0]!r}, but contain none")
        return self._loader(self.test, self.detections, sampler=self._shard(self.test))

    predict_dataloader = test_dataloader

    def _shard(self, graphs: Sequence[SceneGraph]) -> UnrepeatedDistributedSampler | None:
        """Return the sampler of this process's share, or None for a single process.

        Lightning's own sampler repeats images to make all shares equal, and the repeated images would count twice.
        """
        if self.trainer is None or self.trainer.world_size == 1:
            return None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return UnrepeatedDistributedSampler(range(len(graphs)), num_replicas=world, rank=rank, shuffle=False)

    @property
    def _feeds_gpu(self) -> bool:
        """True if the trainer computes on a GPU. Only the trainer's device is read, so no unused GPU is initialized."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _loader(
        self,
        graphs: Sequence[SceneGraph],
        detections: dict[str, Detections] | None = None,
        kind: type[Any] = DataLoader,
        **options: Any,
    ) -> Any:
        return kind(
            graphs,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self._feeds_gpu,  # the loader's thread pins, so `send` does not
            generator=torch.Generator(),  # draws the workers' seeds instead of torch's global generator
            **{"collate_fn": self._collate_fn(detections)} | options,
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
        batches = 0 if progress.is_last_batch else progress.current.processed
        epoch = self.sampler.epoch + progress.is_last_batch
        return {"epoch": epoch, "batches": batches, "images": self.batch_size * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the position in a result of `state_dict`."""
        if not state or not isinstance(self.sampler, RepeatSampler):
            return
        if state["batches"] and state["images"] != (images := self.batch_size * self.sampler.num_replicas):
            raise InputError(
                f"batch_size times the number of processes must still be {state['images']} to resume in the "
                f"middle of an epoch, got {images}"
            )
        self.sampler.done = state["epoch"], state["batches"] * self.batch_size
        self.sampler.set_epoch(state["epoch"])


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
