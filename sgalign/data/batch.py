"""Scene graphs put together for a model that reads many images at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.data.detections import Detections
from sgalign.data.images import read_pixels
from sgalign.data.scene_graph import SceneGraph
from sgalign.data.transfer import send
from sgalign.errors import InputError


class VisualFeatures(NamedTuple):
    """Features of a batch's objects and pairs, as a detector and the extractors of a relation model see them.

    Attributes:
        objects: float32 `[T, F]`, of each object.
        unions: float32 `[R, G]`, of each pair.
        logits: float32 `[T, num_objects + 1]` of the detector, from which labels are decoded; None where the classes
            are given and no detector was asked for them.
    """

    objects: Tensor
    unions: Tensor
    logits: Tensor | None = None


class GraphBatch(NamedTuple):
    """B images; their T objects one after the other, and R ordered pairs of different objects of one image.

    `lengths`, `pair_counts`, `related` and `truth` stay on the host when a batch goes to a GPU (`to`): sizes of tensors
    follow from them, for which the host would have to wait otherwise.

    Attributes:
        image_ids: names of the images.
        sizes: float32 `[B, 2]`, width and height in pixels.
        lengths: int64 `[B]`, objects of each image.
        pair_counts: int64 `[B]`, pairs of each image.
        related: bool `[R]`, the pair has a label in `targets`: an annotated predicate.
        boxes: float32 `[T, 4]`, x1, y1, x2, y2 in pixels.
        labels: int64 `[T]`, from 1. Where a label decoder predicts them: what it is trained towards, 0 for a detection
            of nothing.
        scores: float32 `[T]`, how sure a detector is of each object; 1 for annotated ones.
        images: int64 `[T]`, the image of each object.
        positions: int64 `[T]`, its place in its image, from 0.
        pairs: int64 `[R, 2]`, subject and object among the T; the pairs of an image stand together.
        targets: float32 `[R, num_predicates + 1]`, the distribution of the pair's annotated predicates, or the
            background (column 0) for a pair without any.
        truth: `image_id`, `size`, `boxes`, `labels` and `relations` of each image as annotated.
        pixels: float32 `[3, H, W]` of each image, in 0 to 1; an empty list where images were not read.
        features: what `sgalign cache-features` has kept of the objects and pairs, where a cache was read.
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
    features: VisualFeatures | None = None

    def to(self, device: torch.device) -> GraphBatch:
        """Return the batch on `device`, but for what stays on the host."""
        features = self.features
        if features is not None:
            logits = None if features.logits is None else send(features.logits, device)
            features = VisualFeatures(send(features.objects, device), send(features.unions, device), logits)
        moved: dict[str, Any] = {name: send(getattr(self, name), device) for name in ON_DEVICE}
        return self._replace(**moved, pixels=[send(image, device) for image in self.pixels], features=features)

    @property
    def starts(self) -> Tensor:
        """Each image's first object among the T, int64 `[B]`, on the host."""
        return _starts(self.lengths)

    def keep_pairs(self, rows: Tensor) -> GraphBatch:
        """Return the batch with these rows of `pairs` alone, int64 in rising order, on the host."""
        images = torch.repeat_interleave(torch.arange(len(self.lengths)), self.pair_counts)
        counts = torch.bincount(images[rows], minlength=len(self.lengths))
        batch = self._replace(pair_counts=counts, related=self.related[rows])
        rows, features = send(rows, self.pairs.device), self.features
        if features is not None:
            features = features._replace(unions=features.unions[rows])
        return batch._replace(pairs=self.pairs[rows], targets=self.targets[rows], features=features)

    def pairs_by_image(self) -> list[Tensor]:
        """Return `pairs` of each image, int64 `[R_b, 2]`: subject and object among the image's own objects."""
        images = zip(self.pairs.split(self.pair_counts.tolist()), self.starts.tolist(), strict=True)
        return [pairs - start for pairs, start in images]

    def boxes_by_image(self) -> tuple[Tensor, ...]:
        """Return `boxes` of each image, float32 `[N, 4]`."""
        return self.boxes.split(self.lengths.tolist())

    def require_pixels(self) -> list[Tensor]:
        """Return `pixels`, which a model that looks at images needs.

        Raises:
            ValueError: the images were not read.
        """
        if not self.pixels:
            raise InputError("data must have images: true for a model that looks at images")
        return self.pixels


# Fields that `GraphBatch.to` moves, besides pixels and features.
ON_DEVICE = "sizes", "boxes", "labels", "scores", "images", "positions", "pairs", "targets"


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


class SeenBatch(NamedTuple):
    """A batch that a model has looked at, before it relates anything.

    Attributes:
        graph: the objects and pairs that it relates: those of the data or some of their pairs, or what it has detected.
        features: what it sees of them; None for a model of labels and boxes.
        boxes_per_class: float32 `[T, num_objects + 1, 4]`, the detector's box for each class, by which decoded labels
            are committed; None but for detected objects at evaluation.
    """

    graph: GraphBatch
    features: VisualFeatures | None = None
    boxes_per_class: Tensor | None = None


class Objects(NamedTuple):
    """The objects of a batch by image and place, and all pairs of them, as the fields of `GraphBatch`."""

    lengths: Tensor  # int64 [B], on the host as `pair_counts`
    pair_counts: Tensor
    images: Tensor
    positions: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | None = None) -> Objects:
        """Return them on `device` for the number of objects of each image, int64 `[B]` on the host."""
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
        partner = partner + (partner >= positions[subject])  # an object is no partner of its own
        pairs = torch.stack([subject, starts[images[subject]] + partner], dim=1)
        return cls(lengths, pair_counts, images, positions, pairs)


def collate(graphs: Sequence[SceneGraph], num_predicates: int, *, pixels: bool = False) -> GraphBatch:
    """Return scene graphs put together.

    Of several predicates of a pair Motifs' public code trains on one at random; the target here is their mean, which
    is what that amounts to on average, without its noise. Relations of an object with itself are no pair, and remain
    for the evaluation alone.

    Args:
        graphs: at least one.
        num_predicates: without the background.
        pixels: reads the images too.

    Raises:
        ValueError: there is no graph, a predicate is beyond `num_predicates`, or an image is not there; names it.
    """
    if not graphs:
        raise InputError("graphs must be at least one scene graph, got none")
    objects = Objects.of(torch.tensor([len(graph.labels) for graph in graphs]))
    # rows[subject, object within its image] is the pair's place in `pairs`
    rows = torch.full((len(objects.images), int(objects.lengths.max())), -1)
    rows[objects.pairs[:, 0], objects.positions[objects.pairs[:, 1]]] = torch.arange(len(objects.pairs))

    targets = torch.zeros(len(objects.pairs), num_predicates + 1)
    for graph, start in zip(graphs, _starts(objects.lengths).tolist()):
        if len(graph.relations) and int(graph.relations[:, 2].max()) > num_predicates:
            raise InputError(
                f"image {graph.image_id!r}: relations[:, 2] must be in 1 to {num_predicates}, "
                f"got {int(graph.relations[:, 2].max())}"
            )
        row = rows[start + graph.relations[:, 0], graph.relations[:, 1]]
        targets[row[row >= 0], graph.relations[row >= 0, 2]] = 1
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
        pixels=[read_pixels(graph) for graph in graphs] if pixels else [],
    )


def target_distribution(marks: Tensor) -> Tensor:
    """Return the distribution over predicates of pairs whose predicates are marked 1.

    It is their mean, or the background (column 0) for a pair without any: float32 `[R, num_predicates + 1]`.
    """
    background = (~marks.any(1, keepdim=True)).to(marks)
    marks = torch.cat([background, marks[:, 1:]], dim=1)
    return marks / marks.sum(1, keepdim=True)


def collate_detected(
    graphs: Sequence[SceneGraph], detections: Mapping[str, Detections], num_predicates: int, *, pixels: bool = False
) -> GraphBatch:
    """Return what `collate` does, but with the objects detected in each image: none where `detections` lacks it.

    Targets are all background: what is detected is not what was annotated. The `truth` remains.
    """
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    found = [detections.get(graph.image_id, nothing) for graph in graphs]
    seen = [
        replace(graph, boxes=image.boxes, labels=image.labels, relations=graph.relations[:0])
        for graph, image in zip(graphs, found, strict=True)
    ]
    scores = torch.cat([image.scores for image in found])
    return collate(seen, num_predicates, pixels=pixels)._replace(truth=[graph.truth for graph in graphs], scores=scores)
