"""The data module: the parts of a data set as batches of scene graphs."""

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
    """The training, validation and test parts of a data set.

    Prediction reads the test part. Training images without a related pair are left out, as in the public code. A part's
    graphs are read when the part is first used and then stay in memory, a few kilobytes per image. Images are read when
    their batch is made.

    Args:
        root: folder of a data set in one of the layouts that `sgalign.data.open_dataset` reads. If None, the generated
            scenes are used.
        batch_size: images per step and process.
        seed: seed of the order of training images. The order depends only on the seed and the epoch, so a resumed run
            sees the images in the same order as an uninterrupted one.
        validation_images: number of training images to hold out if the data set has no validation part. If None, the
            data set's default.
        images: read the images too, for models that use them.
        features: folder of features written by `sgalign cache-features`, for models with vision "cached".
        detections: file of another detector's objects, in the format of `sgalign.data.read_detections`. They replace
            the annotated objects in the test part (SGDet with a model of labels and boxes).
        num_workers: number of processes that read images. With 0 the training process reads them.
        repeat_threshold: threshold t of `sgalign.training.longtail.repeat_factors`, which repeats images with rare
            predicates. 0 repeats none.
        instance_drop: rate of `sgalign.training.longtail.drop_repeated`, which drops labels of commoner predicates in
            repeated images. It must be 0 for SGDet, where training pairs are made of detections, and for SGTR, which
            has no pairs.
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
            raise InputError("features and detections exclude each other: the cached features are of annotated boxes")
        self.cache = None if features is None else FeatureCache(features)
        if self.cache is not None and not self.cache.paths:
            raise FileNotFoundError(
                f"{features}: must be a folder that sgalign cache-features has filled, but it has no files of features"
            )
        self.detections = None if detections is None else read_detections(detections, len(self.object_names) - 1)

    @cached_property
    def train(self) -> list[SceneGraph]:
        """The training part, without images that have no related pair."""
        return self._read("train")

    @cached_property
    def validation(self) -> list[SceneGraph]:
        """The validation part."""
        return self._read("validation")

    @cached_property
    def test(self) -> list[SceneGraph]:
        """The test part."""
        return self._read("test")

    @cached_property
    def predicate_groups(self) -> dict[str, list[int]]:
        """The predicates of head, body and tail, from counts in the training part or from the data set's authors."""
        counts = count_predicates(self.train, len(self.predicate_names) - 1)
        return predicate_groups(self.predicate_names, counts[1:])

    @cached_property
    def zero_shot_validation(self) -> Tensor:
        """The class triplets of the validation part that the training part lacks, as in `zero_shot_triplets`."""
        return zero_shot_triplets(self.train, self.validation)

    @cached_property
    def zero_shot_test(self) -> Tensor:
        """The class triplets of the test part that both other parts lack."""
        return zero_shot_triplets([*self.train, *self.validation], self.test)

    def _open(self, split: Split) -> Any:
        if self.root is None:
            return ScenesDataset(split)
        return open_dataset(self.root, split, validation_images=self.validation_images)

    def _read(self, split: Split) -> list[SceneGraph]:
        dataset = self._open(split)
        for kind in ("object_names", "predicate_names"):
            if getattr(dataset, kind) != getattr(self, kind):
                raise InputError(f"{self.name}: {kind} must be the same in all parts, but those of {split} differ")
        graphs: list[SceneGraph] = list(dataset)
        if split == "train":
            graphs = [graph for graph in graphs if (graph.relations[:, 0] != graph.relations[:, 1]).any()]
        if self.cache is not None and (missing := [g.image_id for g in graphs if g.image_id not in self.cache]):
            raise InputError(
                f"{self.cache.folder}: has no features of {len(missing)} of the {len(graphs)} images of part {split}, "
                f"such as {missing[0]!r}: run sgalign cache-features again to add them"
            )
        return graphs

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of the training part, in the order of seed and epoch. A resumed run continues its epoch."""
        if not self.train:
            raise InputError(
                f"{self.name}: no training image has a relation between two objects, so there is nothing to fit"
            )
        # The distributed sampler serves a single process too. Lightning sets its epoch, but only after workers have
        # started on the first one, so the epoch is set here as well.
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
        """The repeat factor of each predicate's images, from `repeat_threshold`."""
        return repeat_factors(self.train, len(self.predicate_names) - 1, self.repeat_threshold)

    def on_before_batch_transfer(self, batch: GraphBatch, dataloader_idx: int) -> GraphBatch:
        """Return the batch. In training, the labels that `instance_drop` drops are removed."""
        if not self.instance_drop or self.trainer is None or not self.trainer.training:
            return batch
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = step_seed(self.seed, step, 0, self.trainer.global_rank, purpose="instance drop")
        generator = torch.Generator().manual_seed(seed)
        return drop_repeated(batch, self.repeat_factors, self.instance_drop, generator)

    def val_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the validation part."""
        return self._loader(self.validation, sampler=self._shard(self.validation))

    def test_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of this process's share of the test part, with the given detections if there are any."""
        ids = [graph.image_id for graph in self.test]
        if self.detections is not None and ids and self.detections.keys().isdisjoint(ids):
            raise InputError(f"detections must be of images of the test part, such as {ids[0]!r}, but none is")
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
        """True if the trainer computes on a GPU. This does not initialize a GPU that the trainer leaves unused."""
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
            pin_memory=self._feeds_gpu,  # otherwise `send` would pin the memory
            generator=torch.Generator(),  # draws the workers' seeds; torch's global generator stays as it is
            **{"collate_fn": self._collate_fn(detections)} | options,
        )

    def _collate_fn(self, detections: dict[str, Detections] | None = None) -> Callable[..., GraphBatch]:
        """Return the function that makes a batch of scene graphs. It can be sent to worker processes."""
        return partial(
            collate_for,
            num_predicates=len(self.predicate_names) - 1,
            pixels=self.images,
            cache=self.cache,
            detections=detections,
        )


class TrainingLoader(DataLoader[GraphBatch]):
    """A data loader with a position that Lightning saves and restores, to resume in the middle of an epoch."""

    batch_size: int
    trainer: pl.Trainer  # counts the batches trained on; workers may have fetched more

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, counted in batches trained on."""
        if not isinstance(self.sampler, RepeatSampler):  # Lightning's own sampler, for overfit_batches
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = 0 if progress.is_last_batch else progress.current.processed
        epoch = self.sampler.epoch + progress.is_last_batch
        return {"epoch": epoch, "batches": batches, "images": self.batch_size * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in a result of `state_dict`."""
        if not state or not isinstance(self.sampler, RepeatSampler):
            return
        if state["batches"] and state["images"] != (images := self.batch_size * self.sampler.num_replicas):
            raise InputError(
                f"batch_size times processes must be {state['images']}, as before, to resume in the middle of an "
                f"epoch, got {images}"
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
    """Make a batch of scene graphs, with detections in place of annotated objects or with cached features if given."""
    if detections is not None:
        return collate_detected(graphs, detections, num_predicates, pixels=pixels)
    batch = collate(graphs, num_predicates, pixels=pixels)
    return batch if cache is None else cache.add_to(batch)
