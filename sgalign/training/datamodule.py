"""What trainers read: the parts of a data set as batches of scene graphs."""

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
    """Training, validation and test part of a data set; `predict` reads the test part.

    Training images without a related pair are left out, as in the public code. Graphs are kept in memory, a few
    kilobytes each, a part from when it is first asked for; images are read when their batch is made.

    Args:
        root: folder of a data set in one of the layouts that `sgalign.data.open_dataset` knows; None for the generated
            scenes.
        batch_size: images a step and process.
        seed: of the order of training images, which depends on it and on the epoch alone, so that a resumed run goes on
            as the first would have.
        validation_images: how many of the training images are held out, where the data set has no validation part of
            its own; None for the data set's default.
        images: reads the images too, for models that look at them.
        features: folder that `sgalign cache-features` has filled, for models that read what was seen before.
        detections: file of `sgalign.data.read_detections`, whose objects take the place of the annotated ones in the
            test part (SGDet of a model of labels and boxes).
        num_workers: processes that read images; 0 reads them in the training process.
        repeat_threshold: t of `sgalign.training.longtail.repeat_factors`, which images of rare predicates are repeated
            by; 0 for not at all.
        instance_drop: rate of `sgalign.training.longtail.drop_repeated`, for images that are repeated. Not for SGDet,
            whose training pairs are made of detections, nor for SGTR, which has no pairs.
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
            raise InputError("features and detections exclude each other: what was cached is of annotated boxes")
        self.cache = None if features is None else FeatureCache(features)
        if self.cache is not None and not self.cache.paths:
            raise FileNotFoundError(
                f"{features}: must be a folder that sgalign cache-features has filled, has no files"
            )
        self.detections = None if detections is None else read_detections(detections, len(self.object_names) - 1)

    @cached_property
    def train(self) -> list[SceneGraph]:
        """Return the training part, without images that have no related pair."""
        return self._read("train")

    @cached_property
    def validation(self) -> list[SceneGraph]:
        """Return the validation part."""
        return self._read("validation")

    @cached_property
    def test(self) -> list[SceneGraph]:
        """Return the test part."""
        return self._read("test")

    @cached_property
    def predicate_groups(self) -> dict[str, list[int]]:
        """Return the predicates of head, body and tail, by the training part or by the data set's authors."""
        counts = count_predicates(self.train, len(self.predicate_names) - 1)
        return predicate_groups(self.predicate_names, counts[1:])

    @cached_property
    def zero_shot_validation(self) -> Tensor:
        """Return the class triplets of the validation part that training does not show, as `zero_shot_triplets`."""
        return zero_shot_triplets(self.train, self.validation)

    @cached_property
    def zero_shot_test(self) -> Tensor:
        """Return the class triplets of the test part that neither of the others shows."""
        return zero_shot_triplets([*self.train, *self.validation], self.test)

    def _open(self, split: Split) -> Any:
        if self.root is None:
            return ScenesDataset(split)
        return open_dataset(self.root, split, validation_images=self.validation_images)

    def _read(self, split: Split) -> list[SceneGraph]:
        dataset = self._open(split)
        for kind in ("object_names", "predicate_names"):
            if getattr(dataset, kind) != getattr(self, kind):
                raise InputError(f"{self.name}: {kind} must be the same in all parts, those of {split} differ")
        graphs: list[SceneGraph] = list(dataset)
        if split == "train":
            graphs = [graph for graph in graphs if (graph.relations[:, 0] != graph.relations[:, 1]).any()]
        if self.cache is not None and (missing := [g.image_id for g in graphs if g.image_id not in self.cache]):
            raise InputError(
                f"{self.cache.folder}: has no features of {len(missing)} of the {len(graphs)} images of part {split}, "
                f"such as {missing[0]!r}: run sgalign cache-features again, it goes on"
            )
        return graphs

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        """Return batches of the training part, in an order of seed and epoch, from where the run goes on."""
        if not self.train:
            raise InputError(f"{self.name}: no training image has a relation between two objects, nothing to fit")
        # A sampler for several processes also where there is one: Lightning tells it the epoch, but not before workers
        # have begun with the first.
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
        """Return how often images with each predicate are seen in an epoch, by `repeat_threshold`."""
        return repeat_factors(self.train, len(self.predicate_names) - 1, self.repeat_threshold)

    def on_before_batch_transfer(self, batch: GraphBatch, dataloader_idx: int) -> GraphBatch:
        """Return the batch, in training without the labels that `instance_drop` drops."""
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
        """Return batches of this process's share of the test part, with given detections where there are some."""
        ids = [graph.image_id for graph in self.test]
        if self.detections is not None and ids and self.detections.keys().isdisjoint(ids):
            raise InputError(f"detections must be of images of the test part, such as {ids[0]!r}; none is")
        return self._loader(self.test, self.detections, sampler=self._shard(self.test))

    predict_dataloader = test_dataloader

    def _shard(self, graphs: Sequence[SceneGraph]) -> UnrepeatedDistributedSampler | None:
        """Return the sampler of this process's part.

        Lightning's own repeats images to make all parts equal, and those would count twice.
        """
        if self.trainer is None or self.trainer.world_size == 1:
            return None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return UnrepeatedDistributedSampler(range(len(graphs)), num_replicas=world, rank=rank, shuffle=False)

    @property
    def _feeds_gpu(self) -> bool:
        """Return whether the trainer computes on a GPU; one that it leaves alone is not touched."""
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
            pin_memory=self._feeds_gpu,  # or `send` would do it
            generator=torch.Generator(),  # of workers' seeds, which torch's own would be drawn on for
            **{"collate_fn": self._collate_fn(detections)} | options,
        )

    def _collate_fn(self, detections: dict[str, Detections] | None = None) -> Callable[..., GraphBatch]:
        """Return what makes a batch of scene graphs, and can be sent to worker processes."""
        return partial(
            collate_for,
            num_predicates=len(self.predicate_names) - 1,
            pixels=self.images,
            cache=self.cache,
            detections=detections,
        )


class TrainingLoader(DataLoader[GraphBatch]):
    """A loader whose place Lightning saves and finds again, so that a run resumes in the middle of an epoch."""

    batch_size: int
    trainer: pl.Trainer  # knows what was trained on, where workers may have fetched more

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch, in batches that were trained on."""
        if not isinstance(self.sampler, RepeatSampler):  # Lightning's, for overfit_batches
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = 0 if progress.is_last_batch else progress.current.processed
        epoch = self.sampler.epoch + progress.is_last_batch
        return {"epoch": epoch, "batches": batches, "images": self.batch_size * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place of `state_dict`."""
        if not state or not isinstance(self.sampler, RepeatSampler):
            return
        if state["batches"] and state["images"] != (images := self.batch_size * self.sampler.num_replicas):
            raise InputError(
                f"batch_size times processes must be {state['images']}, as before, for a run to go on in the middle of "
                f"an epoch, got {images}"
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
    """Return the batch of `collate`, with given detections or cached features where the model reads them."""
    if detections is not None:
        return collate_detected(graphs, detections, num_predicates, pixels=pixels)
    batch = collate(graphs, num_predicates, pixels=pixels)
    return batch if cache is None else cache.add_to(batch)
