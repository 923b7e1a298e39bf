"""Scene graphs put together for a model that reads many images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgalign.data.scene_graph import SceneGraph


class GraphBatch(NamedTuple):
    """B images; their T objects one after the other, and all R ordered pairs of different objects of one image.

    Attributes:
        image_ids: names of the images.
        sizes: float32 `[B, 2]`, width and height in pixels.
        lengths: int64 `[B]`, objects of each image.
        boxes: float32 `[T, 4]`, x1, y1, x2, y2 in pixels.
        labels: int64 `[T]`, from 1.
        images: int64 `[T]`, the image of each object.
        positions: int64 `[T]`, its place in its image, from 0.
        pairs: int64 `[R, 2]`, subject and object among the T; the pairs of an image stand together.
        targets: float32 `[R, num_predicates + 1]`, the distribution of the pair's annotated predicates, or the
            background (column 0) for a pair without any.
        relations: int64 `[M, 3]` for each image, as annotated.
    """

    image_ids: list[str]
    sizes: Tensor
    lengths: Tensor
    boxes: Tensor
    labels: Tensor
    images: Tensor
    positions: Tensor
    pairs: Tensor
    targets: Tensor
    relations: list[Tensor]


def collate(graphs: Sequence[SceneGraph], num_predicates: int) -> GraphBatch:
    """Puts scene graphs together.

    Of several predicates of a pair Motifs' public code trains on one at random; the target here is their mean, which
    is what that amounts to on average, without its noise. Relations of an object with itself are no pair, and remain
    for the evaluation alone.

    Args:
        graphs: at least one.
        num_predicates: without the background.

    Raises:
        ValueError: there is no graph, or a predicate is beyond `num_predicates`; names the image.
    """
    if not graphs:
        raise ValueError("graphs must be at least one scene graph, got none")
    lengths = torch.tensor([len(graph.labels) for graph in graphs])
    images = torch.repeat_interleave(torch.arange(len(graphs)), lengths)
    starts = lengths.cumsum(0) - lengths
    total = len(images)
    # rows[subject, object within its image] is the pair's place in `pairs`
    longest = int(lengths.max())
    partner = torch.arange(longest)
    positions = torch.arange(total) - starts[images]
    is_pair = (partner < lengths[images, None]) & (partner != positions[:, None])
    subject, column = is_pair.nonzero(as_tuple=True)
    pairs = torch.stack([subject, starts[images[subject]] + column], dim=1)
    rows = torch.full((total, longest), -1)
    rows[subject, column] = torch.arange(len(pairs))

    targets = torch.zeros(len(pairs), num_predicates + 1)
    for graph, start in zip(graphs, starts.tolist()):
        if len(graph.relations) and int(graph.relations[:, 2].max()) > num_predicates:
            raise ValueError(
                f"image {graph.image_id!r}: relations[:, 2] must be in 1 to {num_predicates}, "
                f"got {int(graph.relations[:, 2].max())}"
            )
        row = rows[start + graph.relations[:, 0], graph.relations[:, 1]]
        targets[row[row >= 0], graph.relations[row >= 0, 2]] = 1
    count = targets.sum(1, keepdim=True)
    targets[:, :1] += count == 0
    return GraphBatch(
        image_ids=[graph.image_id for graph in graphs],
        sizes=torch.tensor([(graph.width, graph.height) for graph in graphs], dtype=torch.float32),
        lengths=lengths,
        boxes=torch.cat([graph.boxes for graph in graphs]),
        labels=torch.cat([graph.labels for graph in graphs]),
        images=images,
        positions=positions,
        pairs=pairs,
        targets=targets / count.clamp(min=1),
        relations=[graph.relations for graph in graphs],
    )
