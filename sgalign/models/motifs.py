"""Neural Motifs (Zellers, Yatskar, Thomson, Choi, CVPR 2018), with the mirrored branch of relation alignment.

The layers and their order are those of the public Scene-Graph-Benchmark (`LSTMContext` and `MotifPredictor`). The
mirrored branch is also called the mirror. A model without images has no region features of objects, and computes the
union features of pairs from the geometry of the two boxes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sgalign.data import GraphBatch, SeenBatch
from sgalign.data.transfer import send
from sgalign.errors import InputError
from sgalign.models.frequency import FrequencyBaseline
from sgalign.models.label_decoder import LabelDecoder
from sgalign.ops.relation import dual_branch_relation_logits, fused_relation_logits

BOX_FEATURES = 9  # number of features from `box_features`
PAIR_FEATURES = 3 * BOX_FEATURES + 5  # number of features from `pair_features`


class Prediction(NamedTuple):
    """The predictions of a model for a batch."""

    logits: Tensor  # [R, num_predicates + 1], column 0 for the background
    labels: Tensor  # int64 [T], given or decoded
    object_logits: Tensor | None = None  # [T, num_objects + 1], output of the label decoder


class Shared(NamedTuple):
    """The tensors that both branches share. They are computed once, because they do not depend on the mirror's mask."""

    places: Tensor  # int64 [T], position of each object in its image's sequence
    edge_input: Tensor  # [T, F], input of the edge context, before the mirror's mask
    union: Tensor  # [R, relation_dim], union features
    bias: Tensor  # [R, num_predicates + 1], frequency bias
    labels: Tensor  # int64 [T], given or decoded
    object_logits: Tensor | None  # [T, num_objects + 1], output of the label decoder


class Motifs(nn.Module):
    """The Motifs model, which predicts the predicates of object pairs from classes, boxes and optional image features.

    Args:
        counts: `predicate_counts` of the training split. They initialize the frequency bias, and their shape determines
            the numbers of classes.
        embed_dim: number of channels of a class embedding.
        hidden_dim: number of channels of each direction of both LSTMs, and of the contexts.
        relation_dim: number of channels of a pair's features.
        object_dim: number of channels of the batch's `features.objects`, or 0 for a model without images. If it is not
            0, the batch's `features.unions` must have `relation_dim` channels.
        decodes_labels: if True, object classes are predicted from the batch's `features.logits` (SGCls, SGDet).
            Otherwise they are given (PredCls).
    """

    def __init__(
        self,
        counts: Tensor,
        *,
        embed_dim: int = 200,
        hidden_dim: int = 128,
        relation_dim: int = 512,
        object_dim: int = 0,
        decodes_labels: bool = False,
    ) -> None:
        super().__init__()
        classes, _, predicates = counts.shape
        self.object_dim = object_dim
        self.object_embedding = nn.Embedding(classes, embed_dim)
        self.edge_embedding = nn.Embedding(classes, embed_dim)
        self.position = nn.Sequential(
            nn.Linear(BOX_FEATURES, 32), nn.BatchNorm1d(32), nn.Linear(32, 128), nn.ReLU(inplace=True)
        )
        seen_dim = object_dim + embed_dim + 128
        self.object_context = _Context(seen_dim, hidden_dim)
        self.label_decoder = (
            LabelDecoder(seen_dim + hidden_dim, hidden_dim, classes, embed_dim) if decodes_labels else None
        )
        self.edge_context = _Context(embed_dim + object_dim + hidden_dim, hidden_dim)
        # Their names in Scene-Graph-Benchmark are post_emb, post_cat and (the predicate head) rel_compress.
        self.head_tail = nn.Linear(hidden_dim, 2 * hidden_dim)  # an object's features as subject and as object
        self.pair = nn.Linear(2 * hidden_dim, relation_dim)
        self.union = None if object_dim else _GeometryUnion(relation_dim)
        self.relation = _Relation()
        self.num_predicates = predicates - 1
        self.predicate = self.new_predicate_head()
        self.frequency_bias = FrequencyBaseline(counts, trainable=True)
        nn.init.normal_(self.head_tail.weight, std=10 * hidden_dim**-0.5)
        nn.init.xavier_normal_(self.pair.weight)

    def new_predicate_head(self) -> nn.Linear:
        """Return a new predicate head for the mirror. It is initialized by the same method as the supervised head."""
        head = nn.Linear(self.pair.out_features, self.num_predicates + 1)
        nn.init.xavier_normal_(head.weight)
        return head

    def load_class_vectors(self, vectors: Tensor) -> None:
        """Initialize all class embeddings with `vectors`, such as those of `read_word_vectors`.

        Args:
            vectors: `[num_objects + 1, embed_dim]`.
        """
        wanted = self.object_embedding.weight.shape
        if vectors.shape != wanted:
            raise InputError(f"vectors must be {list(wanted)} (classes, embed_dim), got {list(vectors.shape)}")
        for embedding in (self.object_embedding, self.edge_embedding):
            embedding.weight.data.copy_(vectors)
        if self.label_decoder is not None:
            self.label_decoder.load_class_vectors(vectors)

    def forward(self, seen: SeenBatch) -> Prediction:
        """Return the predictions of the supervised branch alone. Evaluation uses only these."""
        shared = self.shared(seen)
        edges = self.edge_context(shared.edge_input, seen.graph, shared.places)
        (logits,) = self.branches(seen.graph, shared, edges, [self.predicate])
        return Prediction(logits, shared.labels, shared.object_logits)

    def dual_branch(self, seen: SeenBatch, mirrored_head: nn.Linear, *, dropped: Tensor) -> tuple[Prediction, Tensor]:
        """Run both branches of relation alignment.

        In the mirror, dropped entries of the edge context's input `[T, F]` are 0. The other entries are not rescaled.

        Args:
            seen: the batch.
            mirrored_head: the mirror's predicate head. Pass `self.predicate` to use the supervised head for both
                branches.
            dropped: bool `[T, 1]` or `[T, F]`, True for the dropped entries.

        Returns:
            The predictions that `forward` returns, and the mirror's logits `[R, num_predicates + 1]`.
        """
        shared = self.shared(seen)
        edges = self.edge_context(shared.edge_input, seen.graph, shared.places, dropped)
        logits, mirrored_logits = self.branches(seen.graph, shared, edges, [self.predicate, mirrored_head])
        return Prediction(logits, shared.labels, shared.object_logits), mirrored_logits

    @property
    def edge_input_dim(self) -> int:
        return self.edge_context.lstm.input_size

    def shared(self, seen: SeenBatch) -> Shared:
        """Compute all tensors that do not depend on the mirror's mask."""
        batch, region = seen.graph, self._regions(seen)
        places = right_to_left(batch)
        position = self.position(box_features(batch.boxes, batch.sizes[batch.images]))
        inputs = torch.cat([*region, self._embed(seen), position], dim=1)
        (context,) = self.object_context(inputs, batch, places)
        labels, object_logits = batch.labels, None
        if self.label_decoder is not None:
            object_logits, labels = self.label_decoder(
                torch.cat([inputs, context], dim=1),
                batch.lengths,
                places,
                labels=batch.labels if self.training else None,
                boxes_per_class=seen.boxes_per_class,
            )
        return Shared(
            places=places,
            edge_input=torch.cat([self.edge_embedding(labels), *region, context], dim=1),
            union=self._unions(seen),
            bias=self.frequency_bias(batch._replace(labels=labels)),
            labels=labels,
            object_logits=object_logits,
        )

    def _regions(self, seen: SeenBatch) -> list[Tensor]:
        """Return the region features `[T, object_dim]` in a list, or an empty list for a model without images."""
        if not self.object_dim:
            return []
        if seen.features is None:
            raise InputError("batch must have features for a model with object_dim")
        return [seen.features.objects]

    def _unions(self, seen: SeenBatch) -> Tensor:
        """Return the union features `[R, relation_dim]`, computed from the image or from the boxes."""
        if self.union is not None:
            return self.union(seen.graph)
        assert seen.features is not None
        return seen.features.unions

    def _embed(self, seen: SeenBatch) -> Tensor:
        """Return the class embeddings `[T, embed_dim]`.

        If the classes are not given, the embeddings are averaged over the detector's class distribution.
        """
        if self.label_decoder is None:
            return self.object_embedding(seen.graph.labels)
        if seen.features is None or seen.features.logits is None:
            raise InputError("batch must have the detector's logits for a model that decodes labels")
        return seen.features.logits.detach().softmax(1) @ self.object_embedding.weight

    def branches(self, batch: GraphBatch, shared: Shared, edges: list[Tensor], heads: list[nn.Linear]) -> list[Tensor]:
        """Return the logits `[R, num_predicates + 1]` of each branch, given its edge context and its head."""
        return self.relation(edges, shared.union, batch.pairs, shared.bias, self.head_tail, self.pair, heads)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the relation head in place. Arguments are those of `torch.compile`."""
        self.relation.compile(*args, **options)


class _Relation(nn.Module):
    """The relation head of Motifs, from edge contexts to logits.

    It has no layers of its own. `Motifs` passes its layers to `forward`, which can therefore be compiled alone.
    """

    def forward(
        self,
        edges: list[Tensor],
        union: Tensor,
        pairs: Tensor,
        bias: Tensor,
        head_tail: nn.Linear,
        pair: nn.Linear,
        heads: list[nn.Linear],
    ) -> list[Tensor]:
        """Return the logits `[R, num_predicates + 1]` of each branch, given its edge context and its head."""
        ends = [self.ends(edge, head_tail, pair) for edge in edges]
        if len(ends) == 1:
            (own,), (head,) = ends, heads
            logits: tuple[Tensor, ...] = (fused_relation_logits(*own, union, pairs, head.weight, head.bias),)
        else:
            (own, mirrored), (head, mirrored_head) = ends, heads
            logits = dual_branch_relation_logits(
                *own, *mirrored, union, pairs, head.weight, head.bias, mirrored_head.weight, mirrored_head.bias
            )
        return [branch + bias for branch in logits]

    def ends(self, edge: Tensor, head_tail: nn.Linear, pair: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return the contribution of each object to the features of pairs, as subject and as object.

        Both are `[T, relation_dim]`. A linear layer on two concatenated vectors is the sum of two linear layers. It
        can therefore be computed for the N objects instead of the N^2 pairs.
        """
        as_subject, as_object = pair.weight.chunk(2, dim=1)
        head, tail = head_tail(edge).chunk(2, dim=1)
        return linear(head, as_subject, pair.bias), linear(tail, as_object)


class _GeometryUnion(nn.Sequential):
    """A network that computes union features from the boxes alone."""

    def __init__(self, relation_dim: int) -> None:
        super().__init__(
            nn.Linear(PAIR_FEATURES, 256), nn.ReLU(inplace=True), nn.Linear(256, relation_dim), nn.ReLU(inplace=True)
        )

    def forward(self, batch: GraphBatch) -> Tensor:
        return super().forward(pair_features(batch))


class _Context(nn.Module):
    """A bidirectional LSTM over the objects of each image, ordered from right to left, followed by a linear layer."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_dim, hidden_dim, bidirectional=True, batch_first=True)
        self.project = nn.Linear(2 * hidden_dim, hidden_dim)

    def forward(self, inputs: Tensor, batch: GraphBatch, places: Tensor, dropped: Tensor | None = None) -> list[Tensor]:
        """Return the contexts `[T, hidden_dim]`, once for each branch.

        Args:
            inputs: `[T, F]`.
            batch: the objects' images.
            places: int64 `[T]`, position of each object in its image's sequence.
            dropped: bool `[T, 1]` or `[T, F]`, True for the entries that are 0 in the mirror's input. If None, there is
                only the supervised branch.
        """
        # `projected_once` is used on the CPU under two conditions. The input must be wide, because its projection then
        # takes most of the layer's time. Whole rows or none must be masked, because one projection then serves both
        # branches. On a GPU, the library's LSTM is much faster than the loop of `projected_once`.
        is_wide = self.lstm.input_size > 4 * self.lstm.hidden_size and inputs.device.type == "cpu"
        if is_wide and (dropped is None or dropped.shape[1] == 1):
            return self.projected_once(inputs, batch, places, dropped)
        branches = [inputs] if dropped is None else [inputs, inputs.masked_fill(dropped, 0)]
        return self.packed(branches, batch, places)

    def packed(self, inputs: list[Tensor], batch: GraphBatch, places: Tensor) -> list[Tensor]:
        """Run the library's LSTM on the images of all branches in one packed batch.

        Inputs are `[T, F]` and contexts are `[T, hidden_dim]` for each branch.
        """
        # An image without objects gets a sequence of length 1, and its output is not used.
        # The lengths are sorted here, on the host. Otherwise packing would sort them, and the host would wait.
        lengths, order = batch.lengths.clamp(min=1).sort(descending=True, stable=True)
        rows = send(order.argsort(), places.device)[batch.images]
        shape = len(lengths), len(inputs), int(lengths[0])
        sequences = inputs[0].new_zeros(*shape, inputs[0].shape[1])
        sequences[rows, :, places] = torch.stack(inputs, dim=1)
        packed = pack_padded_sequence(sequences.flatten(0, 1), lengths.repeat_interleave(len(inputs)), batch_first=True)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=shape[2])
        return list(self.project(out.unflatten(0, shape[:2])[rows, :, places]).unbind(1))

    def projected_once(self, inputs: Tensor, batch: GraphBatch, places: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return the same contexts as `packed`, with one projection of the inputs for both branches.

        Arguments are as for `forward`, but `dropped` must be `[T, 1]` or None.
        """
        weights = self.lstm.all_weights  # input weight, state weight and their two biases, for each direction
        input_weight, weight, *biases = (torch.stack(both) for both in zip(*weights))
        bias = torch.stack(biases).sum(0).flatten()
        projected = linear(inputs, input_weight.flatten(0, 1), bias)
        # A row of zeros projects to the bias.
        branches = [projected] if dropped is None else [projected, torch.where(dropped, bias, projected)]
        gates = torch.stack(branches).unflatten(2, (2, -1))
        images, longest = len(batch.lengths), max(int(batch.lengths.max()), 1)
        # Each direction reads the objects from its own end. The padding after an image's last object is not used.
        steps = torch.stack([places, batch.lengths[batch.images] - 1 - places])
        direction = torch.arange(2, device=places.device)[:, None]
        sequences = gates.new_zeros(2, longest, images, len(branches), gates.shape[3])
        sequences = sequences.index_put((direction, steps, batch.images), gates.permute(2, 1, 0, 3))
        hidden = _Recurrence.apply(sequences.flatten(2, 3), weight.to(gates.dtype))[0].unflatten(2, (images, -1))
        out = hidden[direction, steps, batch.images]  # [directions, T, branches, H]
        return list(self.project(out.permute(2, 1, 0, 3).flatten(2)))


class _Recurrence(torch.autograd.Function):
    """The recurrent part of a bidirectional LSTM. Its inputs are already projected.

    `nn.LSTM` projects its inputs itself, so it would project them once for each branch.
    """

    @staticmethod
    def forward(gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Run both directions over all steps.

        Args:
            gates: `[2, L, S, 4 * H]`, the inputs' contribution to the gates (input, forget, candidate, output), before
                activation.
            weight: `[2, 4 * H, H]`, weight of the state.

        Returns:
            Hidden states and cell states, `[2, L, S, H]` each, and the gates after activation, `[2, L, S, 4 * H]`.
        """
        directions, length, sequences, width = gates.shape
        hidden = gates.new_empty(directions, length, sequences, width // 4)
        cells, active = torch.empty_like(hidden), torch.empty_like(gates)
        back = weight.transpose(1, 2)
        h = c = hidden.new_zeros(directions, sequences, width // 4)
        for step in range(length):
            enter, forget, candidate, leave = torch.baddbmm(gates[:, step], h, back).chunk(4, dim=2)
            enter, forget, leave, candidate = enter.sigmoid(), forget.sigmoid(), leave.sigmoid(), candidate.tanh()
            c = torch.addcmul(forget * c, enter, candidate)
            h = leave * c.tanh()
            active[:, step] = torch.cat([enter, forget, candidate, leave], dim=2)
            hidden[:, step], cells[:, step] = h, c
        return hidden, cells, active

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        weight, hidden, cells, active = ctx.saved_tensors
        grad_gates = torch.empty_like(active)
        first = torch.zeros_like(hidden[:, :1])
        before, cells_before = torch.cat([first, hidden[:, :-1]], 1), torch.cat([first, cells[:, :-1]], 1)
        grad_h = grad_c = first[:, 0]
        for step in reversed(range(hidden.shape[1])):
            enter, forget, candidate, leave = active[:, step].chunk(4, dim=2)
            out = cells[:, step].tanh()
            grad_h = grad_h + grad_hidden[:, step]
            grad_c = grad_c + grad_h * leave * (1 - out * out)
            grad_gates[:, step] = torch.cat(
                [
                    grad_c * candidate * enter * (1 - enter),
                    grad_c * cells_before[:, step] * forget * (1 - forget),
                    grad_c * enter * (1 - candidate * candidate),
                    grad_h * out * leave * (1 - leave),
                ],
                dim=2,
            )
            grad_h, grad_c = torch.bmm(grad_gates[:, step], weight), grad_c * forget
        # The gradient of the weight is one product for all steps, instead of one per step.
        return grad_gates, grad_gates.flatten(1, 2).transpose(1, 2) @ before.flatten(1, 2)


def right_to_left(batch: GraphBatch) -> Tensor:
    """Return the position of each object in its image's sequence, int64 `[T]`.

    Objects are ordered by the x coordinate of their centers, largest first, as in the public code.
    """
    middle = batch.boxes[:, ::2].mean(1)
    order = middle.argsort(descending=True, stable=True)
    order = order[batch.images[order].argsort(stable=True)]
    # Sorting keeps each image's objects together. The i-th object in this order is therefore in the same image as the
    # i-th object of the batch, and `batch.positions[i]` is its position in that image's sequence.
    places = torch.empty_like(order)
    places[order] = batch.positions
    return places


def box_features(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Encode boxes relative to their images, as Motifs does.

    Args:
        boxes: `[T, 4]`, x1, y1, x2, y2 in pixel indices (widths are x2 - x1 + 1).
        sizes: `[T, 2]`, width and height of each box's image.

    Returns:
        The features `[T, 9]`: width, height, center x and y, x1, y1, x2, y2 and area, all relative to the image size.
    """
    extent = (boxes[:, 2:] - boxes[:, :2] + 1) / sizes
    middle = boxes[:, :2] / sizes + extent / 2
    return torch.cat([extent, middle, boxes / sizes.repeat(1, 2), extent.prod(1, keepdim=True)], dim=1)


def pair_features(batch: GraphBatch) -> Tensor:
    """Return features of each pair's geometry. A model without images uses them in place of union features.

    Returns:
        The features `[R, 32]`:

        - `box_features` of the subject, the object and the box around both (27);
        - arsinh of the x and y offset from the subject's center to the object's, in widths and heights of the subject
          (2);
        - log of the object's width and height relative to the subject's (2);
        - IoU of subject and object (1).
    """
    sizes = batch.sizes[batch.images[batch.pairs[:, 0]]]
    subject, object_ = batch.boxes[batch.pairs].unbind(1)
    low, high = torch.minimum(subject, object_)[:, :2], torch.maximum(subject, object_)[:, 2:]
    around = torch.cat([low, high], dim=1)
    features = [box_features(boxes, sizes) for boxes in (subject, object_, around)]
    extents = [boxes[:, 2:] - boxes[:, :2] + 1 for boxes in (subject, object_)]
    middles = [(boxes[:, 2:] + boxes[:, :2]) / 2 for boxes in (subject, object_)]
    common = torch.minimum(subject, object_)[:, 2:] - torch.maximum(subject, object_)[:, :2] + 1
    intersection = common.clamp(min=0).prod(1, keepdim=True)
    union = extents[0].prod(1, keepdim=True) + extents[1].prod(1, keepdim=True) - intersection
    offset = torch.asinh((middles[1] - middles[0]) / extents[0])
    relative = [offset, torch.log(extents[1] / extents[0]), intersection / union]
    return torch.cat([*features, *relative], dim=1)
