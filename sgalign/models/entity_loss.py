"""DETR's losses (Carion et al., ECCV 2020), computed for all layers at once.

They equal the losses that `transformers` computes layer by layer. The matching costs of all layers and images are
copied to the host at once. The library copies them separately for each layer and image, and waits each time.
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

# Weights of the matching costs, as published. The class cost has weight 1.
BOX_COST = 5  # weight of the L1 distance between boxes
OVERLAP_COST = 2  # weight of the generalized IoU

# Annotated objects of an image: labels int64 [G] from 1, and boxes [G, 4], center x, y, width, height.
TrueObjects = tuple[Tensor, Tensor]


class EntityLoss(nn.Module):
    """The losses of DETR's classes and boxes.

    Args:
        num_objects: number of object classes, without the class for no object.
    """

    empty_weight: Tensor  # [num_objects + 1], weight of each class; checkpoints use this name

    def __init__(self, num_objects: int) -> None:
        super().__init__()
        self.register_buffer("empty_weight", torch.tensor([1.0] * num_objects + [NO_OBJECT_WEIGHT]))

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, objects: Sequence[TrueObjects]) -> list[Tensor]:
        """Return the cost of matching each query with each object, float32 `[L, N, G]` for each image.

        Args:
            logits: `[L, B, N, num_objects + 1]` of L layers.
            boxes: `[L, B, N, 4]`, center x, y, width, height.
            objects: annotated objects of each image, on any device.
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
        """Return the losses "classes", "boxes" (L1) and "overlaps" (generalized IoU), summed over the layers.

        Args:
            logits, boxes, objects: as for `costs`.
            matches: result of `sgalign.models.graph_assembly.assign` for these costs.
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
