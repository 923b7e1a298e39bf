"""From SGTR's queries to scene graphs: assembling with entities, matching with annotations, losses, inference.

All of it is of the supervised branch. Constants are those of the public code's Visual Genome configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, box_iou, sigmoid_focal_loss

from sgalign.data.transfer import send, to_host
from sgalign.models.sgtr import RelationOutputs

# Numbers of SGTR's public code, Scarecrow0/SGTR at 03bdd65: its configuration for Visual Genome, `config_vg_sgtr.py`
# over `cvpods/configs/rel_detr_config.py`, and where that has none the function that is named.

# Assembling: `get_matching_scores_entities_aware`, the rule of the paper (Li et al., "SGTR", CVPR 2022).
SIMILARITY_POWER = 0.6  # of the cosine between the classes that a query and an entity have
CONFIDENCE_POWER = 0.6  # of how sure the detector is of an entity
PAIRS = 3  # entity pairs of a query and predicate at inference: NUM_ENTITIES_PAIRING
TRIPLETS = 300  # kept of an image
SAME_ENTITY_GIOU = 0.95  # `RelPostProcess`: from here on, subject and object are one thing
SAME_ENTITY_IOU = 0.8  # `RelPostProcess`: above, two entities of one class say the same

# Matching: `RelHungarianMatcher.indexing_entities_cost_calculation`. The public code weights the mean of the subject's
# and the object's box distance by 0.6, which is their sum by half as much.
TRAINING_ENTITIES = 25  # of each role and query, candidates of the matching
COST_BASE = 32  # of the powers that turn probabilities and overlaps into costs: 32 ** -p
VECTOR_COST = 0.6  # of the L1 distance between vectors
CLASS_COST = 0.5  # of the classes of subject and object; that of predicates counts once
BOX_COST = 0.6 / 2  # of the L1 distance between boxes, subject's and object's; their overlap's counts once
SCORE_COST = 0.01  # of one less the assembling score

# Losses: weights relative to the L1 of vectors and the focal loss of predicates, which count once.
FOCAL_ALPHA = 0.25  # share of the positives, as in Lin et al., ICCV 2017
FOCAL_GAMMA = 2.0  # how much less the easy ones count
CLASS_WEIGHT = 0.3
BOX_WEIGHT = 0.5  # of L1, and of generalised IoU, for which the public code reads the same coefficient
NO_OBJECT_WEIGHT = 0.1
AUXILIARY_WEIGHT = 0.5  # of all layers but the last, predicates excepted

LEAST_AREA = 1e-9  # of boxes in units of the image, far below a pixel: keeps gradients finite


Matches = list[list[tuple[Tensor, Tensor]]]  # of `assign`


class Entities(NamedTuple):
    """What can be subject or object in B images: N detected or given entities."""

    probabilities: Tensor  # [B, N, num_objects]
    boxes: Tensor  # [B, N, 4], middle x, y, width, height in units of the image

    @classmethod
    def detected(cls, logits: Tensor, boxes: Tensor) -> Entities:
        """Of a detector's logits `[B, N, num_objects + 1]`, the last column for no object."""
        return cls(logits.detach().float().softmax(-1)[..., :-1], boxes.detach().float())

    @classmethod
    def given(
        cls,
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor],
        num_objects: int,
        scores: Sequence[Tensor] | None = None,
    ) -> Entities:
        """Of given classes from 1, boxes and how sure they are, if not wholly, of each image.

        Shorter images end in entities of probability 0.
        """
        one_hot = [functional.one_hot(image - 1, num_objects).float() for image in labels]
        if scores is not None:
            one_hot = [image * score[:, None] for image, score in zip(one_hot, scores, strict=True)]
        return cls(padded(one_hot), padded(boxes))

    @property
    def confidence(self) -> Tensor:
        """`[B, N]`, the probability of the best class."""
        return self.probabilities.amax(-1)


class Annotations(NamedTuple):
    """The relations of one image."""

    predicates: Tensor  # int64 [M], from 0
    labels: Tensor  # int64 [2, M] of subjects and objects, from 0
    boxes: Tensor  # [2, M, 4], middle x, y, width, height in units of the image

    @property
    def vectors(self) -> Tensor:
        """`[M, 4]`, middle of subject and object."""
        return torch.cat([self.boxes[0, ..., :2], self.boxes[1, ..., :2]], dim=-1)


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes `[..., N, 4]` and `[..., M, 4]`: `[..., N, M]`.

    Boxes are middle x, y, width, height; leading dimensions broadcast.
    """
    return giou(boxes[..., :, None, :], others[..., None, :, :])


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of each box and its counterpart, middle x, y, width, height: `[...]`, differentiable."""
    first, second = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, others))
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    around_low, around_high = (
        torch.minimum(first[..., :2], second[..., :2]),
        torch.maximum(first[..., 2:], second[..., 2:]),
    )
    common = (high - low).clamp(min=0).prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - common
    around = (around_high - around_low).prod(-1)
    return common / union.clamp(min=LEAST_AREA) - (around - union) / around.clamp(min=LEAST_AREA)


@torch.no_grad()
def assembling_scores(outputs: RelationOutputs, entities: Entities, sizes: Tensor) -> Tensor:
    """Return how well each entity is the subject, and the object, that a query tells of.

    ``cos(p_q, p_e)^0.6 * max(gIoU, 0) * confidence^0.6 / (|dx| + |dy| + 1)`` (SGTR's rule-based graph assembling):
    classes' probabilities without no object, and the distance from the predicate's vector to the entity's middle, in
    pixels of the image as the detector sees it.

    Args:
        outputs: of L layers.
        entities: of B images.
        sizes: `[B, 2]`, width and height of the images in pixels.

    Returns:
        `[2, L, B, Q, N]`, subject and object.
    """
    probabilities = outputs.class_logits.float().softmax(-1)[..., :-1]
    similarity = functional.normalize(probabilities, dim=-1) @ functional.normalize(entities.probabilities, dim=-1).mT
    overlap = pairwise_giou(outputs.boxes.float(), entities.boxes).clamp(min=0)
    middles = torch.stack(outputs.vectors.float().split(2, -1)) * sizes[:, None]
    distance = torch.cdist(middles, entities.boxes[..., :2] * sizes[:, None], p=1)
    certainty = entities.confidence[:, None] ** CONFIDENCE_POWER
    return similarity.clamp(0, 1) ** SIMILARITY_POWER * overlap * certainty / (distance + 1)


@torch.no_grad()
def relation_costs(
    outputs: RelationOutputs,
    entities: Entities,
    sizes: Tensor,
    annotations: Sequence[Annotations],
    *,
    distinct: bool = False,
) -> list[Tensor]:
    """Return what it costs that a query's candidate stands for a relation: float32 `[L, Q, candidates, M]` an image.

    Candidates are each query's `TRAINING_ENTITIES` best subjects and objects, put together by rank. The public code
    assigns relations to candidates, so that two may take different candidates of one query, which then is left to the
    cheaper of them; the other relation has none and teaches nothing.

    Args:
        outputs, entities, sizes: as in `assembling_scores`.
        annotations: of each image, on any device.
        distinct: assigns relations to queries, each with its cheapest candidate, so that only relations beyond the
            number of queries have none.
    """
    scores = assembling_scores(outputs, entities, sizes)
    if not scores.shape[-1]:  # no entity in any image, so no candidate
        return [scores.new_zeros(*outputs.vectors.shape[::2], 0, len(truth.predicates)) for truth in annotations]
    best = scores.topk(min(TRAINING_ENTITIES, scores.shape[-1]), dim=-1)
    # Of queries [L, B, Q, M], then of entities as subjects and as objects [2, B, N, M], and of candidates.
    truth = _together(annotations, scores.device)
    cost = VECTOR_COST * torch.cdist(outputs.vectors.float(), truth.vectors, p=1)
    predicates = truth.predicates[:, None].expand_as(cost)
    cost = cost + COST_BASE ** -outputs.logits.float().softmax(-1).gather(-1, predicates)
    away = torch.cdist(entities.boxes, truth.boxes, p=1)
    likely = entities.probabilities.expand(2, -1, -1, -1).gather(-1, truth.labels[:, :, None].expand_as(away))
    overlap = pairwise_giou(entities.boxes, truth.boxes).clamp(min=0)
    image = torch.arange(len(annotations), device=scores.device)[:, None, None]
    subject, object_ = best.indices  # [L, B, Q, T]
    likely, away, overlap = (of[0][image, subject] + of[1][image, object_] for of in (likely, away, overlap))
    candidates = CLASS_COST * COST_BASE**-likely + BOX_COST * away + COST_BASE**-overlap
    candidates = candidates + SCORE_COST * (1 - best.values.mean(0))[..., None]
    total = cost[:, :, :, None] + candidates  # [L, B, Q, T, M]
    if distinct:
        total = total.amin(3, keepdim=True)
    return [total[:, image, :, :, : len(truth.predicates)] for image, truth in enumerate(annotations)]


def assign(costs: Sequence[Tensor]) -> Matches:
    """Return the query of each annotated relation or object, by the Hungarian method, in every layer by itself.

    Args:
        costs: of each image, on the host: `[L, Q, candidates, M]` of `relation_costs`, or `[L, Q, M]`. Of several that
            take candidates of one query the cheapest has it.

    Returns:
        For each layer and image: int64 query indices and indices of what is annotated, both `[matched]`, on the host.
    """
    matches: Matches = [[] for _ in range(len(costs[0]))]
    for of_image in costs:
        candidates = of_image[:, :, None] if of_image.dim() == 3 else of_image
        for layer, of_layer in enumerate(candidates.flatten(1, 2)):
            candidate, relation = (torch.as_tensor(found) for found in linear_sum_assignment(of_layer))
            order = of_layer[candidate, relation].argsort(stable=True)
            query, relation = candidate[order] // max(candidates.shape[2], 1), relation[order]
            first = torch.full((candidates.shape[1],), len(query))
            first.scatter_reduce_(0, query, torch.arange(len(query)), "amin")
            rows = first[first < len(query)]
            matches[layer].append((query[rows], relation[rows]))
    return matches


def match(
    outputs: RelationOutputs,
    entities: Entities,
    sizes: Tensor,
    annotations: Sequence[Annotations],
    *,
    distinct: bool = False,
) -> Matches:
    """Return what `assign` does of `relation_costs`, for which the host waits once.

    Raises:
        ValueError: of scipy, where a cost is not finite. Trainers check that before.
    """
    return assign(to_host(relation_costs(outputs, entities, sizes, annotations, distinct=distinct)))


def matched_queries(matches: Matches) -> Tensor:
    """Return layer, image and query of all that is matched: int64 `[3, matched]`."""
    rows = [
        torch.stack([torch.full_like(query, layer), torch.full_like(query, image), query])
        for layer, images in enumerate(matches)
        for image, (query, _) in enumerate(images)
    ]
    return torch.cat(rows, dim=1)


def padded(images: Sequence[Tensor]) -> Tensor:
    """Return a tensor of all images, `[B, longest, ...]`, where shorter ones end in zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True)


def _together(annotations: Sequence[Annotations], device: torch.device) -> Annotations:
    """Return the relations of all images on `device`, with a dimension of images before that of relations."""
    predicates = padded([truth.predicates for truth in annotations])
    labels = padded([truth.labels.movedim(1, 0) for truth in annotations]).movedim(2, 0)
    boxes = padded([truth.boxes.movedim(1, 0) for truth in annotations]).movedim(2, 0)
    return Annotations(send(predicates, device), send(labels, device), send(boxes, device))


def relation_losses(
    outputs: RelationOutputs,
    annotations: Sequence[Annotations],
    matches: Matches,
    *,
    focal: bool,
    relations: float | Tensor,
) -> dict[str, Tensor]:
    """Return what training minimises: each part, weighted and summed over all layers.

    Predicates: sigmoid focal loss (alpha 0.25, gamma 2), in all layers with weight 1, or (not `focal`) cross-entropy.
    Vectors: L1. Classes of subject and object: cross-entropy, 0.3, with no object weighted 0.1. Boxes of both: L1 and
    generalised IoU, 0.5 each. Layers before the last count half. All but the cross-entropies are sums divided by
    `relations`.

    Args:
        outputs: of L layers.
        annotations: of each image, on any device.
        matches: of `match`.
        focal: of `SGTR`.
        relations: annotated ones of the whole step, over its processes their mean; at least 1.
    """
    layers, images, queries, classes = outputs.logits.shape
    device = outputs.logits.device
    of_images = [image for layer in matches for image in zip(layer, annotations, strict=True)]
    predicates = send(torch.cat([truth.predicates[found] for (_, found), truth in of_images]), device)
    labels = send(torch.cat([truth.labels[:, found] for (_, found), truth in of_images], dim=1), device)
    boxes = send(torch.cat([truth.boxes[:, found] for (_, found), truth in of_images], dim=1), device)
    layer_of, image_of, query_of = where = send(matched_queries(matches), device).unbind()
    weight = torch.full((layers,), AUXILIARY_WEIGHT, device=device)
    weight[-1] = 1.0
    weights = weight[layer_of]

    if focal:
        target = torch.zeros_like(outputs.logits)
        target[(*where, predicates)] = 1
        losses = sigmoid_focal_loss(outputs.logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
        predicate_loss = losses / relations
    else:
        target = torch.full((layers, images, queries), classes - 1, device=device)
        target[where] = predicates
        predicate_loss = (cross_entropies(outputs.logits, target) * weight).sum()
    no_object = outputs.class_logits.shape[-1] - 1
    classes_target = torch.full((2, layers, images, queries), no_object, device=device)
    classes_target[:, layer_of, image_of, query_of] = labels
    class_losses = [cross_entropies(outputs.class_logits[role], classes_target[role]) for role in (0, 1)]
    found = outputs.boxes[:, layer_of, image_of, query_of].float()
    vectors = torch.cat([boxes[0, :, :2], boxes[1, :, :2]], dim=1)
    return {
        "predicates": predicate_loss,
        "vectors": (weights * (outputs.vectors[where] - vectors).abs().sum(1)).sum() / relations,
        "classes": CLASS_WEIGHT * (torch.stack(class_losses).sum(0) * weight).sum(),
        "boxes": BOX_WEIGHT * (weights * ((found - boxes).abs().sum(2) + 1 - giou(found, boxes))).sum() / relations,
    }


def cross_entropies(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return each layer's cross-entropy `[L]`, classes weighted, over the sum of weights.

    Args:
        logits: `[L, ..., K]`.
        target: int64 `[L, ...]`.
        weight: `[K]` of each class; None for 1, and `NO_OBJECT_WEIGHT` of the last.
    """
    if weight is None:
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = NO_OBJECT_WEIGHT
    losses = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, reduction="none")
    return losses.view(len(logits), -1).sum(1) / weight[target].flatten(1).sum(1)


@torch.no_grad()
def assemble(
    outputs: RelationOutputs, entities: Entities, sizes: Tensor, *, focal: bool, pairs: int = PAIRS
) -> list[tuple[Tensor, Tensor]]:
    """Return the best triplets of each image, as SGTR's inference ranks them.

    The Q best of all queries' predicates each take their query's `pairs` best subjects and objects, put together by
    rank; a triplet scores predicate x subject confidence x object confidence, so that where the detector is sure the
    second and third pair rank as high as the first. Not kept are pairs of an entity with itself or
    with one that has a generalised IoU of 0.95 with it, and what a better triplet of the same predicate says already:
    of the same two entities, or of two of the same classes with an IoU above 0.8.

    Args:
        outputs: of the last layer, without the leading dimension of layers.
        entities, sizes: as in `assembling_scores`.
        focal: of `SGTR`.
        pairs: of entities for a query and predicate.

    Returns:
        For each image triplets int64 `[T, 3]`, subject, object and predicate from 1, best first, and scores `[T]`.
    """
    by_layer = RelationOutputs(*(t[None] for t in outputs[:2]), *(t[:, None] for t in outputs[2:]))
    scores = assembling_scores(by_layer, entities, sizes)[:, 0]  # [2, B, Q, N]
    logits = outputs.logits.float()
    probabilities = logits.sigmoid() if focal else logits.softmax(-1)[..., :-1]
    queries, predicates = probabilities.shape[1:]
    graphs = []
    for image, (probability, confidence) in enumerate(zip(probabilities, entities.confidence, strict=True)):
        best, place = probability.flatten().topk(min(queries, probability.numel()))
        # Sorted, as topk takes any of equal ones, such as of all that do not overlap.
        ranked = scores[:, image].sort(dim=-1, descending=True, stable=True).indices[..., :pairs]
        partners = ranked[:, place // predicates]
        subject, object_ = partners.flatten(1)
        width = partners.shape[-1]
        predicate = (place % predicates).repeat_interleave(width)
        score = best.repeat_interleave(width) * confidence[subject] * confidence[object_]
        boxes = box_convert(entities.boxes[image], "cxcywh", "xyxy")
        overlap = giou(entities.boxes[image, subject], entities.boxes[image, object_])
        fits = (overlap < SAME_ENTITY_GIOU) & (subject != object_)
        fits &= (confidence[subject] > 0) & (confidence[object_] > 0)  # others fill up a shorter image
        order = score.where(fits, -1).sort(descending=True, stable=True).indices[: int(fits.sum())]
        triplets = torch.stack([subject, object_, predicate], dim=1)[order]
        kept = _not_repeated(triplets, boxes, entities.probabilities[image].argmax(-1))[:TRIPLETS]
        graphs.append((triplets[kept] + triplets.new_tensor([0, 0, 1]), score[order][kept]))
    return graphs


def _not_repeated(triplets: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the indices, in order, of the triplets that no better kept one repeats; they come best first."""
    subject, object_, predicate = triplets.unbind(1)
    alike = (box_iou(boxes, boxes) > SAME_ENTITY_IOU) & (labels[:, None] == labels)
    alike |= torch.eye(len(boxes), dtype=torch.bool, device=boxes.device)
    repeats = alike[subject[:, None], subject] & alike[object_[:, None], object_] & (predicate[:, None] == predicate)
    repeats = repeats.triu(1)
    # The first n are right after n rounds at the latest, in practice all after two or three.
    kept = torch.ones(len(triplets), dtype=torch.bool, device=triplets.device)
    while not torch.equal(kept, after := ~(repeats & kept[:, None]).any(0)):
        kept = after
    return kept.nonzero()[:, 0]
