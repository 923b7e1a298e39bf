"""The augmentation of DETR's and SGTR's training images: a random size for each batch, and random mirroring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from sgalign.data import GraphBatch
from sgalign.models.entity_detector import resize
from sgalign.models.graph_assembly import Annotations


class TrainingImages(NamedTuple):
    """Images and their annotations. The annotations stay on the host.

    Boxes are center x, center y, width and height relative to the image size.
    """

    pixels: list[Tensor]  # float32 [3, H, W]
    objects: list[tuple[Tensor, Tensor]]  # labels int64 [N] from 1, boxes [N, 4]
    relations: list[Annotations]


def augment(
    batch: GraphBatch,
    predicate_names: Sequence[str],
    generator: torch.Generator,
    *,
    short_sides: Sequence[int],
    long_side: int,
    flip: float,
) -> TrainingImages:
    """Return the batch's images in a random size, each mirrored with probability `flip`, and matching annotations.

    Args:
        batch: the batch, with pixels.
        predicate_names: names of all predicates, the background included. In a mirrored image, a predicate with the
            word "left" is replaced by its counterpart with "right", and the reverse.
        generator: random generator on the CPU.
        short_sides: lengths of the short side in pixels. One is drawn for the whole batch.
        long_side: largest length of the long side in pixels.
        flip: probability of mirroring an image.
    """
    short_side = short_sides[int(torch.randint(len(short_sides), (), generator=generator))]
    pixels = [resize(image, short_side, long_side) for image in batch.require_pixels()]
    flips = (torch.rand(len(pixels), generator=generator) < flip).tolist()
    objects, relations = annotations_of(batch)
    swap = torch.tensor(mirrored_predicates(predicate_names))
    for image, is_flipped in enumerate(flips):
        if is_flipped:
            pixels[image] = pixels[image].flip(-1)
            objects[image] = objects[image][0], mirrored_boxes(objects[image][1])
            predicates, labels, boxes = relations[image]
            relations[image] = Annotations(swap[predicates + 1] - 1, labels, mirrored_boxes(boxes))
    return TrainingImages(pixels, objects, relations)


def annotations_of(batch: GraphBatch) -> tuple[list[tuple[Tensor, Tensor]], list[Annotations]]:
    """Return each image's annotated objects and relations, in the format of `TrainingImages`.

    Relations of an object with itself are left out, because no assembled pair joins an entity with itself.
    """
    objects, annotations = [], []
    for truth in batch.truth:
        boxes = box_convert(truth["boxes"] / torch.tensor(truth["size"] * 2), "xyxy", "cxcywh")
        labels, relations = truth["labels"], truth["relations"]
        ends, predicates = relations[relations[:, 0] != relations[:, 1]].split((2, 1), dim=1)
        objects.append((labels, boxes))
        annotations.append(Annotations(predicates[:, 0] - 1, labels[ends.T] - 1, boxes[ends.T]))
    return objects, annotations


def mirrored_boxes(boxes: Tensor) -> Tensor:
    """Mirror boxes `[..., 4]`, in the format of `TrainingImages`, from left to right."""
    return torch.cat([1 - boxes[..., :1], boxes[..., 1:]], dim=-1)


def mirrored_predicates(names: Sequence[str]) -> list[int]:
    """Return the index of each predicate's counterpart in a mirrored image.

    The counterpart has "left" in place of "right" in its name, or the reverse. If no predicate has that name, the
    predicate is its own counterpart.
    """
    exchange = {"left": "right", "right": "left"}
    places = {name: place for place, name in enumerate(names)}
    mirrored = (" ".join(exchange.get(word, word) for word in name.split()) for name in names)
    return [places.get(name, place) for place, name in enumerate(mirrored)]
