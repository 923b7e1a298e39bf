"""The pairs of objects that a training step draws, as Scene-Graph-Benchmark samples them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from sgalign.data.batch import target_distribution


def sample_pairs(
    is_foreground: Tensor,
    images: Tensor,
    *,
    limit: int = 1024,
    positive_fraction: float = 0.25,
    generator: torch.Generator,
) -> Tensor:
    """Draw at most `limit` pairs an image, of these at most `positive_fraction` related (or one).

    Args:
        is_foreground: bool `[R]` on the host, the pair is related.
        images: int64 `[R]` on the host, its image.
        generator: on the CPU; what is drawn depends on it alone.

    Returns:
        int64 `[S]`, the rows kept, in rising order.
    """
    if not len(images):
        return images
    draw = torch.rand(len(images), generator=generator)
    group = 2 * images + is_foreground
    order = draw.argsort()
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=2 * (int(images.max()) + 1))
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[group[order]]
    related = sizes[1::2].clamp(max=max(int(limit * positive_fraction), 1))
    return (rank < torch.where(is_foreground, related[images], limit - related[images])).nonzero()[:, 0]


def match_detections(
    boxes: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    relations: Tensor,
    *,
    num_predicates: int,
    generator: torch.Generator,
    per_relation: int = 4,
    limit: int = 1024,
    positive_fraction: float = 0.25,
    iou: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match one image's detections with its annotations, which they are trained towards (SGDet).

    A detection is of the annotated object that it overlaps most, if by an IoU above `iou`. A pair of detections is
    related as annotated objects are if each overlaps its one by more than `iou` and is of its class; of these pairs
    `per_relation` are drawn for each relation, with odds in proportion to the product of both overlaps. All other pairs
    of detections of something are background.

    Args:
        boxes: `[N, 4]` of the detections; true_boxes `[G, 4]`; true_labels int64 `[G]`; relations int64 `[M, 3]`. All
            are on the host.
        num_predicates: without the background.
        generator: on the CPU.
        limit, positive_fraction: as in `sample_pairs`.

    Returns:
        Pairs int64 `[S, 2]`; their targets float32 `[S, num_predicates + 1]`, as `sgalign.data.collate` makes them; the
        detections' classes int64 `[N]`, 0 for nothing.
    """
    overlap = box_iou(boxes, true_boxes) if len(true_boxes) else boxes.new_zeros(len(boxes), 1)
    best, whose = overlap.max(1)
    labels = torch.where(best > iou, true_labels[whose] if len(true_labels) else 0, 0)
    is_of = (overlap > iou) & (labels[:, None] == true_labels) if len(true_labels) else overlap > iou
    apart = ~torch.eye(len(boxes), dtype=torch.bool)
    related = torch.zeros_like(apart)
    targets = boxes.new_zeros(len(boxes), len(boxes), num_predicates + 1)
    for subject, object_, predicate in relations.unique(dim=0).tolist():
        odds = (overlap[:, subject] * is_of[:, subject])[:, None] * (overlap[:, object_] * is_of[:, object_])
        odds = (odds * apart).flatten()
        candidates = int((odds > 0).sum())
        if not candidates:
            continue
        related |= (odds > 0).view_as(related)
        drawn = torch.multinomial(odds, min(per_relation, candidates), generator=generator)
        targets.view(-1, num_predicates + 1)[drawn, predicate] = 1
    is_drawn = targets.any(2)
    something = (labels[:, None] > 0) & (labels > 0) & apart
    pairs = (is_drawn | (something & ~related)).nonzero()
    is_foreground = is_drawn[pairs[:, 0], pairs[:, 1]]
    images = torch.zeros_like(pairs[:, 0])
    kept = sample_pairs(is_foreground, images, limit=limit, positive_fraction=positive_fraction, generator=generator)
    pairs = pairs[kept]
    return pairs, target_distribution(targets[pairs[:, 0], pairs[:, 1]]), labels
