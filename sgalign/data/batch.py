"""Batches of scene graphs for models that read several images at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.data.detections import NOTHING, Detections
from sgalign.data.images import Size, read_images
from sgalign.data.scene_graph import SceneGraph
from sgalign.data.transfer import send
from sgalign.errors import InputError


class VisualFeatures(NamedTuple):
    """Visual features of a batch's objects and pairs, computed by a detector and feature extractors.

    Attributes:
        objects: features of each object, float32 `[T, F]`.
        unions: features of each pair, from its union box, float32 `[R, F]`.
        logits: class logits of the detector, from which labels are decoded, float32 `[T, num_objects + 1]`. If None,
            the detector did not classify the boxes.
    """

    objects: Tensor
    unions: Tensor
    logits: Tensor | None = None


class GraphBatch(NamedTuple):
    """A batch of B images with T objects in total and R ordered pairs of different objects of the same image.

    The objects of the images follow one another in image order. `lengths`, `pair_counts`, `related`, `truth` and
    `stretched` stay on the host when `to` moves a batch to a GPU. The host needs them, for example to compute tensor
    sizes, and reading them from the GPU would make it wait.

    Attributes:
        image_ids: names of the images.
        sizes: width and height in pixels, float32 `[B, 2]`.
        lengths: number of objects per image, int64 `[B]`.
        pair_counts: number of pairs per image, int64 `[B]`.
        related: True for each pair with an annotated predicate in `targets`, bool `[R]`.
        boxes: x1, y1, x2, y2 in pixels, float32 `[T, 4]`.
        labels: object classes from 1, int64 `[T]`. If the model decodes classes, the labels are the training targets of
            its label decoder. A detection that matches no object has label 0.
        scores: detector confidence of each object, float32 `[T]`. It is 1 for annotated objects.
        images: index of each object's image, int64 `[T]`.
        positions: index of each object within its image, from 0, int64 `[T]`.
        pairs: indices of subject and object among the T objects, int64 `[R, 2]`. The pairs of an image are contiguous.
        targets: distribution over each pair's annotated predicates, float32 `[R, num_predicates + 1]`. A pair without
            annotated predicates has the background (column 0). A row of zeros marks a pair whose label is unknown, and
            the loss ignores it.
        truth: `image_id`, `size`, `boxes`, `labels` and `relations` of each image as annotated.
        pixels: the images, float32 `[3, H, W]` with values from 0 to 1. The list is empty if the images were not read.
        stretched: size of the file and size in the annotations, for the id of each image in `pixels` whose file has
            other proportions than its annotations.
        features: features of the objects and pairs, cached by `sgalign cache-features`. If None, no cache was read.
    """

    image_ids: list[str]
    sizes: Tensor
    lengths: Tensor
    pair_counts: Tensor
    related: Tensor
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    images: Tensor
    positions: Tensor
    pairs: Tensor
    targets: Tensor
    truth: list[dict[str, Any]]
    pixels: list[Tensor]
    stretched: dict[str, tuple[Size, Size]]
    features: VisualFeatures | None = None

    def to(self, device: torch.device) -> GraphBatch:
        """Return the batch on `device`, except for the fields that stay on the host."""
        features = self.features
        if features is not None:
            logits = None if features.logits is None else send(features.logits, device)
            features = VisualFeatures(send(features.objects, device), send(features.unions, device), logits)
        moved: dict[str, Any] = {name: send(getattr(self, name), device) for name in ON_DEVICE}
        return self._replace(**moved, pixels=[send(image, device) for image in self.pixels], features=features)

    @property
    def starts(self) -> Tensor:
        """The index of each image's first object among the T objects, int64 `[B]`, on the host."""
        return _starts(self.lengths)

    def keep_pairs(self, rows: Tensor) -> GraphBatch:
        """Return the batch with only the given rows of `pairs`.

        Args:
            rows: indices of the kept pairs in ascending order, int64 on the host.
        """
        images = torch.repeat_interleave(torch.arange(len(self.lengths)), self.pair_counts)
        counts = torch.bincount(images[rows], minlength=len(self.lengths))
        batch = self._replace(pair_counts=counts, related=self.related[rows])
        rows, features = send(rows, self.pairs.device), self.features
        if features is not None:
            features = features._replace(unions=features.unions[rows])
        return batch._replace(pairs=self.pairs[rows], targets=self.targets[rows], features=features)

    def pairs_by_image(self) -> list[Tensor]:
        """Return the pairs of each image as indices among the image's own objects, int64 `[R_b, 2]`."""
        images = zip(self.pairs.split(self.pair_counts.tolist()), self.starts.tolist(), strict=True)
        return [pairs - start for pairs, start in images]

    def boxes_by_image(self) -> tuple[Tensor, ...]:
        """Return the boxes of each image, float32 `[N, 4]`."""
        return self.boxes.split(self.lengths.tolist())

    def require_pixels(self) -> list[Tensor]:
        """Return `pixels`, for a model that reads images.

        Raises:
            ValueError: if the images were not read.
        """
        if not self.pixels:
            raise InputError("data.images must be true for a model that reads images, got false")
        return self.pixels


# Fields that `GraphBatch.to` moves, in addition to pixels and features.
ON_DEVICE = "sizes", "boxes", "labels", "scores", "images", "positions", "pairs", "targets"


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


class SeenBatch(NamedTuple):
    """The inputs of a relation model, which are a batch's objects, pairs and visual features.

    Attributes:
        graph: the objects, and the pairs to classify. The objects are annotated or detected. In training, some of their
            pairs may be left out.
        features: visual features of these objects and pairs. If None, the model uses only labels and boxes.
        boxes_per_class: the detector's box for each class, float32 `[T, num_objects + 1, 4]`, for the non-maximum
            suppression of decoded labels. It is given only for detected objects at evaluation. Otherwise it is None.
    """

    graph: GraphBatch
    features: VisualFeatures | None = None
    boxes_per_class: Tensor | None = None


class Objects(NamedTuple):
    """Indices of a batch's objects and of all their pairs. The fields mean the same as in `GraphBatch`."""

    lengths: Tensor  # int64 [B], on the host
    pair_counts: Tensor  # int64 [B], on the host
    images: Tensor
    positions: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | None = None) -> Objects:
        """Return the indices on `device` for images with `lengths` objects each.

        Args:
            lengths: number of objects per image, int64 `[B]` on the host.
            device: device of `images`, `positions` and `pairs`. If None, the device of `lengths`.
        """
        device = device or lengths.device
        pair_counts = lengths * (lengths - 1)
        objects, total = int(lengths.sum()), int(pair_counts.sum())
        counts, starts = send(torch.stack([lengths, _starts(lengths)]), device)
        number = torch.arange(max(objects, total, len(lengths)), device=device)
        images = torch.repeat_interleave(number[: len(lengths)], counts, output_size=objects)
        positions = number[:objects] - starts[images]
        partners = counts[images] - 1
        subject = torch.repeat_interleave(number[:objects], partners, output_size=total)
        partner = number[:total] - _starts(partners)[subject]
        partner = partner + (partner >= positions[subject])  # skips the subject itself
        pairs = torch.stack([subject, starts[images[subject]] + partner], dim=1)
        return cls(lengths, pair_counts, images, positions, pairs)


def collate(graphs: Sequence[SceneGraph], num_predicates: int, *, pixels: bool = False) -> GraphBatch:
    """Return the batch of the given scene graphs.

    If a pair has several predicates, Motifs' public code trains on one of them at random. Here the target is uniform
    over all of them, so the gradient is the same on average, without the noise. A relation of an object with itself
    does not become a pair. It remains in `truth` and counts in the evaluation.

    Args:
        graphs: at least one scene graph.
        num_predicates: number of predicate classes without the background.
        pixels: if True, also read the images.

    Raises:
        ValueError: if there is no graph, a predicate exceeds `num_predicates` or an image is missing. The error names
            the image.
    """
    if not graphs:
        raise InputError("graphs must be at least one scene graph, got none")
    objects = Objects.of(torch.tensor([len(graph.labels) for graph in graphs]))
    # rows[subject, position of the object in its image] is the pair's row in `pairs`.
    rows = torch.full((len(objects.images), int(objects.lengths.max())), -1)
    rows[objects.pairs[:, 0], objects.positions[objects.pairs[:, 1]]] = torch.arange(len(objects.pairs))

    targets = torch.zeros(len(objects.pairs), num_predicates + 1)
    for graph, start in zip(graphs, _starts(objects.lengths).tolist()):
        if len(graph.relations) and int(graph.relations[:, 2].max()) > num_predicates:
            raise InputError(
                f"image {graph.image_id!r}: relations[:, 2] must be from 1 to {num_predicates}, "
                f"got {int(graph.relations[:, 2].max())}"
            )
        row = rows[start + graph.relations[:, 0], graph.relations[:, 1]]
        targets[row[row >= 0], graph.relations[row >= 0, 2]] = 1
    images, stretched = read_images(graphs) if pixels else ([], {})
    return GraphBatch(
        image_ids=[graph.image_id for graph in graphs],
        sizes=torch.tensor([(graph.width, graph.height) for graph in graphs], dtype=torch.float32),
        lengths=objects.lengths,
        pair_counts=objects.pair_counts,
        related=targets[:, 1:].any(1),
        boxes=torch.cat([graph.boxes for graph in graphs]),
        labels=torch.cat([graph.labels for graph in graphs]),
        scores=torch.ones(len(objects.images)),
        images=objects.images,
        positions=objects.positions,
        pairs=objects.pairs,
        targets=target_distribution(targets),
        truth=[graph.truth for graph in graphs],
        pixels=images,
        stretched=stretched,
    )


def target_distribution(marks: Tensor) -> Tensor:
    """Return the target distribution over predicates, float32 `[R, num_predicates + 1]`.

    A pair's distribution is uniform over its marked predicates. A pair without marks gets the background (column 0).

    Args:
        marks: 1 for each annotated predicate of a pair and 0 otherwise, float32 `[R, num_predicates + 1]`.
    """
    background = (~marks.any(1, keepdim=True)).to(marks)
    marks = torch.cat([background, marks[:, 1:]], dim=1)
    return marks / marks.sum(1, keepdim=True)


def collate_detected(
    graphs: Sequence[SceneGraph], detections: Mapping[str, Detections], num_predicates: int, *, pixels: bool = False
) -> GraphBatch:
    """Return the same batch as `collate`, but with the detected instead of the annotated objects.

    Images that are missing from `detections` get no objects. All targets are background, because detected objects have
    no annotated relations. `truth` still contains the annotations.
    """
    found = [detections.get(graph.image_id, NOTHING) for graph in graphs]
    seen = [
        replace(graph, boxes=image.boxes, labels=image.labels, relations=graph.relations[:0])
        for graph, image in zip(graphs, found, strict=True)
    ]
    scores = torch.cat([image.scores for image in found])
    return collate(seen, num_predicates, pixels=pixels)._replace(truth=[graph.truth for graph in graphs], scores=scores)
