"""The sampling of object pairs in training, as in Scene-Graph-Benchmark."""

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
    """Draw at most `limit` pairs per image.

    At most `positive_fraction * limit` of them are related pairs, but one related pair is always allowed.

    Args:
        is_foreground: bool `[R]` on the host, True for related pairs.
        images: int64 `[R]` on the host, the image of each pair.
        limit: largest number of pairs per image.
        positive_fraction: largest number of related pairs as a fraction of `limit`.
        generator: random generator on the CPU. It is the only source of randomness.

    Returns:
        The rows of the drawn pairs in ascending order, int64 `[S]`.
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
    """Match one image's detections with its annotations, and draw training pairs with their targets (SGDet).

    - A detection takes the class of the annotated object that it overlaps most, if their IoU is above `iou`. Otherwise
      it gets class 0 (no object).
    - A pair of detections matches a relation if its detections match the relation's subject and object, with the same
      class and an IoU above `iou`. At most `per_relation` matching pairs are drawn for each relation, with
      probabilities proportional to the product of both detections' IoU.
    - Pairs that match no relation are background if both detections have a class above 0. Other pairs are left out.

    Args:
        boxes: boxes of the detections, `[N, 4]`. All tensors are on the host.
        true_boxes, true_labels: boxes `[G, 4]` and classes int64 `[G]` of the annotated objects.
        relations: annotated relations, int64 `[M, 3]`.
        num_predicates: number of predicates without the background.
        generator: random generator on the CPU.
        per_relation: largest number of pairs drawn per relation.
        limit, positive_fraction: as in `sample_pairs`.
        iou: IoU that a match must exceed.

    Returns:
        The pairs, int64 `[S, 2]`. Their targets as in `sgalign.data.collate`, float32 `[S, num_predicates + 1]`. The
        classes of the detections, int64 `[N]`, with 0 for a detection that matches no object.
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
