"""DETR's losses (Carion et al., ECCV 2020) of all its layers at once, as `transformers` computes them one by one.

All layers and images share one copy of costs to the host, where the library makes one for each, and waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgalign.data.transfer import send
from sgalign.models.graph_assembly import (
    NO_OBJECT_WEIGHT,
    Matches,
    cross_entropies,
    giou,
    matched_queries,
    padded,
    pairwise_giou,
)

# Of the matching, as published; classes count once.
BOX_COST = 5
OVERLAP_COST = 2

TrueObjects = tuple[Tensor, Tensor]  # of an image: labels int64 [G] from 1; boxes [G, 4], middle x, y, width, height


class EntityLoss(nn.Module):
    """The losses of DETR's classes and boxes.

    Args:
        num_objects: classes, without one for no object.
    """

    empty_weight: Tensor  # [num_objects + 1], of each class; the name that it has in checkpoints

    def __init__(self, num_objects: int) -> None:
        super().__init__()
        self.register_buffer("empty_weight", torch.tensor([1.0] * num_objects + [NO_OBJECT_WEIGHT]))

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, objects: Sequence[TrueObjects]) -> list[Tensor]:
        """Return what it costs that a query stands for an object: float32 `[L, N, G]` of each image.

        Args:
            logits: `[L, B, N, num_objects + 1]` of L layers.
            boxes: `[L, B, N, 4]`, middle x, y, width, height.
            objects: of each image, on any device.
        """
        labels, true_boxes = padded([labels - 1 for labels, _ in objects]), padded([true for _, true in objects])
        labels, true_boxes, boxes = send(labels, boxes.device), send(true_boxes, boxes.device), boxes.float()
        likely = logits.float().softmax(-1).gather(-1, labels[:, None].expand(*boxes.shape[:3], -1))
        away = torch.cdist(boxes, true_boxes.expand(len(boxes), -1, -1, -1), p=1)
        cost = BOX_COST * away - likely - OVERLAP_COST * pairwise_giou(boxes, true_boxes)
        return [cost[:, image, :, : len(labels)] for image, (labels, _) in enumerate(objects)]

    def forward(
        self, logits: Tensor, boxes: Tensor, objects: Sequence[TrueObjects], matches: Matches
    ) -> dict[str, Tensor]:
        """Return the losses of "classes", "boxes" (L1) and "overlaps" (generalised IoU), summed over the layers.

        Args:
            logits, boxes, objects: of `costs`.
            matches: of `sgalign.models.graph_assembly.assign`, for these costs.
        """
        device = logits.device
        of_images = [image for layer in matches for image in zip(layer, objects, strict=True)]
        labels = send(torch.cat([labels[found] - 1 for (_, found), (labels, _) in of_images]), device)
        true_boxes = send(torch.cat([true[found] for (_, found), (_, true) in of_images]), device)
        where = send(matched_queries(matches), device).unbind()
        target = torch.full(logits.shape[:-1], logits.shape[-1] - 1, device=device)
        target[where] = labels
        found, count = boxes[where].float(), max(sum(len(labels) for labels, _ in objects), 1)
        return {
            "classes": cross_entropies(logits, target, self.empty_weight).sum(),
            "boxes": (found - true_boxes).abs().sum() / count,
            "overlaps": (1 - giou(found, true_boxes)).sum() / count,
        }
