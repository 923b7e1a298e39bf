"""Losses and inference of SGTR: matching queries with annotations, and assembling queries into scene graphs.

All of this concerns only the supervised branch.
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
from sgalign.models.precision import widened
from sgalign.models.sgtr import RelationOutputs
from sgalign.ops._operands import without_autocast

# All numbers below are from SGTR's public code, Scarecrow0/SGTR at 03bdd65. Each is in its configuration for Visual
# Genome (`config_vg_sgtr.py`, which overrides `cvpods/configs/rel_detr_config.py`) or in the function that is named
# here.

# Numbers of the paper's assembling rule (Li et al., "SGTR", CVPR 2022), from `get_matching_scores_entities_aware`.
SIMILARITY_POWER = 0.6  # exponent of the cosine between the class distributions of a query and an entity
CONFIDENCE_POWER = 0.6  # exponent of an entity's confidence
PAIRS = 3  # number of entity pairs per query and predicate at inference (NUM_ENTITIES_PAIRING)
TRIPLETS = 300  # number of triplets kept per image
SAME_ENTITY_GIOU = 0.95  # generalized IoU at or above which two entities are the same (`RelPostProcess`)
SAME_ENTITY_IOU = 0.8  # IoU above which entities of one class are the same in repeated triplets (`RelPostProcess`)

# Matching costs, from `RelHungarianMatcher.indexing_entities_cost_calculation`. The costs of predicates and of box
# overlaps have weight 1.
TRAINING_ENTITIES = 25  # number of candidate entities for each role and query
COST_BASE = 32  # base of the cost 32 ** -p of a probability or an overlap p
VECTOR_COST = 0.6  # weight of the L1 distance between vectors
CLASS_COST = 0.5  # weight of the cost of subject and object classes
BOX_COST = 0.6 / 2  # weight of the sum of both L1 box distances; the public code weights their mean by 0.6
SCORE_COST = 0.01  # weight of 1 minus the assembling score

# Losses. The L1 loss of vectors and the focal loss of predicates have weight 1.
FOCAL_ALPHA = 0.25  # weight of positives, as in Lin et al., ICCV 2017
FOCAL_GAMMA = 2.0  # exponent that reduces the loss of easy examples
CLASS_WEIGHT = 0.3  # weight of the cross-entropy of subject and object classes
BOX_WEIGHT = 0.5  # weight of L1 and of generalized IoU; the public code reads the same coefficient for both
NO_OBJECT_WEIGHT = 0.1  # weight of the class for no object in cross-entropies
AUXILIARY_WEIGHT = 0.5  # weight of all layers except the last; the focal loss of predicates has weight 1 in all layers

LEAST_AREA = 1e-9  # smallest area in a denominator, relative to the image; far below a pixel; keeps gradients finite


Matches = list[list[tuple[Tensor, Tensor]]]  # the result of `assign`


class Entities(NamedTuple):
    """The N entities of each of B images, detected or given. Entities can be subjects and objects."""

    probabilities: Tensor  # [B, N, num_objects]
    boxes: Tensor  # [B, N, 4], center x, y, width, height relative to the image size

    @classmethod
    def detected(cls, logits: Tensor, boxes: Tensor) -> Entities:
        """Build the entities from a detector's outputs.

        Args:
            logits: `[B, N, num_objects + 1]`. The last column is for no object.
            boxes: `[B, N, 4]`, center x, y, width, height relative to the image size.
        """
        return cls(logits.detach().float().softmax(-1)[..., :-1], boxes.detach().float())

    @classmethod
    def given(
        cls,
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor],
        num_objects: int,
        scores: Sequence[Tensor] | None = None,
    ) -> Entities:
        """Build the entities from given labels, boxes and scores.

        Images with fewer entities than the largest one are padded with entities of probability 0.

        Args:
            labels: int64 `[N]` from 1, for each image.
            boxes: `[N, 4]`, center x, y, width, height relative to the image size, for each image.
            num_objects: number of object classes.
            scores: `[N]` for each image. If None, all scores are 1.
        """
        one_hot = [functional.one_hot(image - 1, num_objects).float() for image in labels]
        if scores is not None:
            one_hot = [image * score[:, None] for image, score in zip(one_hot, scores, strict=True)]
        return cls(padded(one_hot), padded(boxes))

    @property
    def confidence(self) -> Tensor:
        """The probability of the best class, `[B, N]`."""
        return self.probabilities.amax(-1)


class Annotations(NamedTuple):
    """The annotated relations of one image."""

    predicates: Tensor  # int64 [M], from 0
    labels: Tensor  # int64 [2, M], classes of subjects and objects, from 0
    boxes: Tensor  # [2, M, 4], boxes of subjects and objects: center x, y, width, height relative to the image size

    @property
    def vectors(self) -> Tensor:
        """The centers of subject and object, `[M, 4]`."""
        return torch.cat([self.boxes[0, ..., :2], self.boxes[1, ..., :2]], dim=-1)


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU (Rezatofighi et al., CVPR 2019) of each pair of boxes, `[..., N, M]`.

    Args:
        boxes, others: `[..., N, 4]` and `[..., M, 4]`, center x, y, width, height. Leading dimensions broadcast.
    """
    return giou(boxes[..., :, None, :], others[..., None, :, :])


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU of each box and its counterpart, `[...]`. It is differentiable.

    Args:
        boxes, others: `[..., 4]`, center x, y, width, height.
    """
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
    """Return the score of each entity as the subject and as the object of each query.

    The score is ``cos(p_q, p_e)^0.6 * max(gIoU, 0) * confidence^0.6 / (|dx| + |dy| + 1)`` (SGTR's rule-based graph
    assembling). The class probabilities ``p_q`` and ``p_e`` leave out the class for no object. The distance
    ``(dx, dy)`` is from the query's vector to the entity's center, in pixels of the image that the detector reads.

    Args:
        outputs: outputs of L layers.
        entities: entities of B images.
        sizes: `[B, 2]`, width and height of the images that the detector reads, in pixels.

    Returns:
        The scores `[2, L, B, Q, N]`, as subject and as object.
    """
    probabilities = outputs.class_logits.float().softmax(-1)[..., :-1]
    with without_autocast(probabilities.device):  # otherwise, the product would be bfloat16
        similarity = (
            functional.normalize(probabilities, dim=-1) @ functional.normalize(entities.probabilities, dim=-1).mT
        )
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
    """Return the cost of matching each candidate with each relation, float32 `[L, Q, candidates, M]` for each image.

    A candidate is a query with a subject and an object entity. Each query has `TRAINING_ENTITIES` candidates. The i-th
    candidate pairs the query's i-th best subject with its i-th best object.

    The public code assigns relations to candidates, so two relations may get candidates of the same query. Then the
    relation with the lower cost keeps the query. The other has no query and does not contribute to the losses.

    Args:
        outputs, entities, sizes: as in `assembling_scores`.
        annotations: annotated relations of each image, on any device.
        distinct: if True, each query has only its cheapest candidate for each relation, so no two relations get the
            same query. A relation is then without a query only if there are more relations than queries.
    """
    scores = assembling_scores(outputs, entities, sizes)
    if not scores.shape[-1]:  # no entity in any image, so no candidate
        return [scores.new_zeros(*outputs.vectors.shape[::2], 0, len(truth.predicates)) for truth in annotations]
    best = scores.topk(min(TRAINING_ENTITIES, scores.shape[-1]), dim=-1)
    # Costs of queries [L, B, Q, M] and of entities as subjects and as objects [2, B, N, M] are combined into costs of
    # candidates [L, B, Q, T, M].
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
    """Return the query of each annotated relation or object, found by the Hungarian method for each layer separately.

    If several relations get candidates of the same query, the cheapest keeps the query.

    Args:
        costs: costs of each image, on the host: `[L, Q, candidates, M]` from `relation_costs`, or `[L, Q, M]`.

    Returns:
        For each layer and image, indices of queries and of the annotations matched with them, int64 `[matched]` each,
        on the host.
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
    """Match relations with queries by calling `assign` with the costs from `relation_costs`.

    The host waits for the device once.

    Raises:
        ValueError: if a cost is not finite (raised by scipy). The trainers check the costs themselves and then call
            `assign`.
    """
    return assign(to_host(relation_costs(outputs, entities, sizes, annotations, distinct=distinct)))


def matched_queries(matches: Matches) -> Tensor:
    """Return the layer, image and query of all matches, int64 `[3, matched]`."""
    rows = [
        torch.stack([torch.full_like(query, layer), torch.full_like(query, image), query])
        for layer, images in enumerate(matches)
        for image, (query, _) in enumerate(images)
    ]
    return torch.cat(rows, dim=1)


def padded(images: Sequence[Tensor]) -> Tensor:
    """Return the images' tensors as one tensor `[B, longest, ...]`, padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True)


def _together(annotations: Sequence[Annotations], device: torch.device) -> Annotations:
    """Return the relations of all images on `device`, padded, with an image dimension before the relation dimension."""
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
    """Return the training losses, weighted and summed over all layers.

    - predicates: sigmoid focal loss (alpha 0.25, gamma 2), with weight 1 in all layers; cross-entropy if not `focal`.
    - vectors: L1.
    - classes (subject and object): cross-entropy, weight 0.3, with no object weighted 0.1.
    - boxes (subject and object): L1 and generalized IoU, weight 0.5 each.

    Layers before the last have weight 0.5, except in the focal loss. All losses except the cross-entropies are sums
    divided by `relations`.

    Args:
        outputs: outputs of L layers.
        annotations: annotated relations of each image, on any device.
        matches: result of `match`.
        focal: as for `SGTR`.
        relations: number of annotated relations of the step, averaged over processes; at least 1.
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
        logits = widened(outputs.logits)  # in bfloat16, the loss of negatives at -6 would be off by 15 %
        target = torch.zeros_like(logits)
        target[(*where, predicates)] = 1
        losses = sigmoid_focal_loss(logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
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
    """Return the weighted mean cross-entropy of each layer, `[L]`.

    Args:
        logits: `[L, ..., K]`.
        target: int64 `[L, ...]`.
        weight: `[K]`, weight of each class. If None, the last class has weight `NO_OBJECT_WEIGHT` and the others 1.
    """
    logits = widened(logits)
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

    With Q queries, the Q best (query, predicate) combinations of an image are kept. Each yields `pairs` triplets. The
    i-th of them has the query's i-th best subject and i-th best object. A triplet's score is predicate probability x
    subject confidence x object confidence. If the detector is equally sure of all entities, the second and third pair
    therefore rank as high as the first.

    These triplets are removed:

    - pairs of an entity with itself, or with an entity at a generalized IoU of at least 0.95;
    - repetitions of a better triplet: the same predicate, and for both roles the same entity, or an entity of the same
      class at an IoU above 0.8.

    Args:
        outputs: outputs of the last layer, without the dimension of layers.
        entities, sizes: as in `assembling_scores`.
        focal: as for `SGTR`.
        pairs: number of entity pairs for each query and predicate.

    Returns:
        For each image, triplets int64 `[T, 3]` (subject, object, predicate from 1), best first, and scores `[T]`.
    """
    by_layer = RelationOutputs(*(t[None] for t in outputs[:2]), *(t[:, None] for t in outputs[2:]))
    scores = assembling_scores(by_layer, entities, sizes)[:, 0]  # [2, B, Q, N]
    logits = outputs.logits.float()
    probabilities = logits.sigmoid() if focal else logits.softmax(-1)[..., :-1]
    queries, predicates = probabilities.shape[1:]
    graphs = []
    for image, (probability, confidence) in enumerate(zip(probabilities, entities.confidence, strict=True)):
        best, place = probability.flatten().topk(min(queries, probability.numel()))
        # This uses a stable sort, because topk picks arbitrarily among equal scores, and all entities without overlap
        # have score 0.
        ranked = scores[:, image].sort(dim=-1, descending=True, stable=True).indices[..., :pairs]
        partners = ranked[:, place // predicates]
        subject, object_ = partners.flatten(1)
        width = partners.shape[-1]
        predicate = (place % predicates).repeat_interleave(width)
        score = best.repeat_interleave(width) * confidence[subject] * confidence[object_]
        boxes = box_convert(entities.boxes[image], "cxcywh", "xyxy")
        overlap = giou(entities.boxes[image, subject], entities.boxes[image, object_])
        fits = (overlap < SAME_ENTITY_GIOU) & (subject != object_)
        fits &= (confidence[subject] > 0) & (confidence[object_] > 0)  # padding has confidence 0
        order = score.where(fits, -1).sort(descending=True, stable=True).indices[: int(fits.sum())]
        triplets = torch.stack([subject, object_, predicate], dim=1)[order]
        kept = _not_repeated(triplets, boxes, entities.probabilities[image].argmax(-1))[:TRIPLETS]
        graphs.append((triplets[kept] + triplets.new_tensor([0, 0, 1]), score[order][kept]))
    return graphs


def _not_repeated(triplets: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the indices, in order, of the triplets that do not repeat a better kept triplet.

    Args:
        triplets: int64 `[T, 3]` (subject, object, predicate), best first.
        boxes: `[N, 4]`, x1, y1, x2, y2.
        labels: int64 `[N]`, best class of each entity.
    """
    subject, object_, predicate = triplets.unbind(1)
    alike = (box_iou(boxes, boxes) > SAME_ENTITY_IOU) & (labels[:, None] == labels)
    alike |= torch.eye(len(boxes), dtype=torch.bool, device=boxes.device)
    repeats = alike[subject[:, None], subject] & alike[object_[:, None], object_] & (predicate[:, None] == predicate)
    repeats = repeats.triu(1)
    # After n rounds, at least the first n entries of `kept` are right. In practice two or three rounds are enough.
    kept = torch.ones(len(triplets), dtype=torch.bool, device=triplets.device)
    while not torch.equal(kept, after := ~(repeats & kept[:, None]).any(0)):
        kept = after
    return kept.nonzero()[:, 0]
