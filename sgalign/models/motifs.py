"""Neural Motifs (Zellers, Yatskar, Thomson, Choi, CVPR 2018), in both branches of relation alignment.

Layers and their order are those of the public Scene-Graph-Benchmark (`LSTMContext` and `MotifPredictor`). Without
images two of its inputs are missing: the objects' region features are left out, and the pairs' union features come from
the geometry of the two boxes.
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

BOX_FEATURES = 9
PAIR_FEATURES = 3 * BOX_FEATURES + 5


class Prediction(NamedTuple):
    """The predictions of a model for a batch."""

    logits: Tensor  # [R, num_predicates + 1], column 0 the background
    labels: Tensor  # int64 [T], given or decoded
    object_logits: Tensor | None = None  # [T, num_objects + 1], of the label decoder


class Shared(NamedTuple):
    """Tensors that both branches share, computed once: all of them lie before the masked input or beside it."""

    places: Tensor  # [T], of each object in its image's sequence
    edge_input: Tensor  # [T, F], what the edge context reads and the mirror masks
    union: Tensor  # [R, relation_dim]
    bias: Tensor  # [R, K + 1], of the class frequencies
    labels: Tensor  # [T]
    object_logits: Tensor | None  # [T, num_objects + 1]


class Motifs(nn.Module):
    """Predicate logits of pairs of objects: given their classes and boxes, or what an image shows of them as well.

    Args:
        counts: `predicate_counts` of the training part: their logarithm is the frequency bias, and their shape tells
            the numbers of classes.
        embed_dim: channels of a class embedding.
        hidden_dim: of each direction of both LSTMs, and of the contexts.
        relation_dim: channels of a pair's features.
        object_dim: channels of the batch's `features.objects`; its `features.unions` have `relation_dim` then. 0 for a
            model without images.
        decodes_labels: object classes are predicted from the batch's `features.logits` (SGCls, SGDet) rather than
            given (PredCls).
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
        self.head_tail = nn.Linear(hidden_dim, 2 * hidden_dim)  # post_emb: of each object as subject and as object
        self.pair = nn.Linear(2 * hidden_dim, relation_dim)  # post_cat
        self.union = None if object_dim else _GeometryUnion(relation_dim)
        self.relation = _Relation()
        self.num_predicates = predicates - 1
        self.predicate = self.new_predicate_head()  # rel_compress
        self.frequency_bias = FrequencyBaseline(counts, trainable=True)
        nn.init.normal_(self.head_tail.weight, std=10 * hidden_dim**-0.5)
        nn.init.xavier_normal_(self.pair.weight)

    def new_predicate_head(self) -> nn.Linear:
        """Return a predicate head that starts as the supervised one did: the mirror's own."""
        head = nn.Linear(self.pair.out_features, self.num_predicates + 1)
        nn.init.xavier_normal_(head.weight)
        return head

    def load_class_vectors(self, vectors: Tensor) -> None:
        """Start all class embeddings from `vectors`, `[num_objects + 1, embed_dim]`, as of `read_word_vectors`."""
        wanted = self.object_embedding.weight.shape
        if vectors.shape != wanted:
            raise InputError(f"vectors must be {list(wanted)}, classes and embed_dim, got {list(vectors.shape)}")
        for embedding in (self.object_embedding, self.edge_embedding):
            embedding.weight.data.copy_(vectors)
        if self.label_decoder is not None:
            self.label_decoder.load_class_vectors(vectors)

    def forward(self, seen: SeenBatch) -> Prediction:
        """Return what the supervised branch alone says of the batch: all there is at evaluation."""
        shared = self.shared(seen)
        edges = self.edge_context(shared.edge_input, seen.graph, shared.places)
        (logits,) = self.branches(seen.graph, shared, edges, [self.predicate])
        return Prediction(logits, shared.labels, shared.object_logits)

    def dual_branch(self, seen: SeenBatch, mirrored_head: nn.Linear, *, dropped: Tensor) -> tuple[Prediction, Tensor]:
        """Run both branches of relation alignment. What the mirror does not see is set to 0, and nothing is rescaled.

        Args:
            mirrored_head: the mirror's predicate head; `self.predicate` ties it.
            dropped: bool `[T, 1]` or `[T, F]`, what the mirror does not see of the edge context's input `[T, F]`.

        Returns:
            What `forward` gives, and the mirror's logits `[R, num_predicates + 1]`.
        """
        shared = self.shared(seen)
        edges = self.edge_context(shared.edge_input, seen.graph, shared.places, dropped)
        logits, mirrored_logits = self.branches(seen.graph, shared, edges, [self.predicate, mirrored_head])
        return Prediction(logits, shared.labels, shared.object_logits), mirrored_logits

    @property
    def edge_input_dim(self) -> int:
        return self.edge_context.lstm.input_size

    def shared(self, seen: SeenBatch) -> Shared:
        """Compute everything before the mirror's mask, and what does not depend on it."""
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
        """Return the region features `[T, object_dim]` in a list, which is empty for a model without images."""
        if not self.object_dim:
            return []
        if seen.features is None:
            raise InputError("batch must have features for a model with object_dim")
        return [seen.features.objects]

    def _unions(self, seen: SeenBatch) -> Tensor:
        """Return the union features `[R, relation_dim]`: of the image, or of the boxes' geometry."""
        if self.union is not None:
            return self.union(seen.graph)
        assert seen.features is not None
        return seen.features.unions

    def _embed(self, seen: SeenBatch) -> Tensor:
        """Return class embeddings `[T, E]`: of given classes, else the mean under the detector's distribution."""
        if self.label_decoder is None:
            return self.object_embedding(seen.graph.labels)
        if seen.features is None or seen.features.logits is None:
            raise InputError("batch must have the detector's logits for a model that decodes labels")
        return seen.features.logits.detach().softmax(1) @ self.object_embedding.weight

    def branches(self, batch: GraphBatch, shared: Shared, edges: list[Tensor], heads: list[nn.Linear]) -> list[Tensor]:
        """Return each branch's logits, from its edge context `[T, hidden_dim]` and its head."""
        return self.relation(edges, shared.union, batch.pairs, shared.bias, self.head_tail, self.pair, heads)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the relation head, in place; arguments are those of `torch.compile`."""
        self.relation.compile(*args, **options)


class _Relation(nn.Module):
    """The end of Motifs, from edge contexts to logits. Its layers are Motifs' own, so that it can be compiled alone."""

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
        """Return each branch's logits `[R, num_predicates + 1]`, from its edge context and its head."""
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
        """Return what each object adds to a pair's features as its subject and as its object, `[T, relation_dim]`.

        A linear layer of two concatenated vectors is a sum of two layers, each of N objects instead of N^2 pairs.
        """
        as_subject, as_object = pair.weight.chunk(2, dim=1)
        head, tail = head_tail(edge).chunk(2, dim=1)
        return linear(head, as_subject, pair.bias), linear(tail, as_object)


class _GeometryUnion(nn.Sequential):
    """Union features from the boxes alone."""

    def __init__(self, relation_dim: int) -> None:
        super().__init__(
            nn.Linear(PAIR_FEATURES, 256), nn.ReLU(inplace=True), nn.Linear(256, relation_dim), nn.ReLU(inplace=True)
        )

    def forward(self, batch: GraphBatch) -> Tensor:
        return super().forward(pair_features(batch))


class _Context(nn.Module):
    """A bidirectional LSTM over the objects of each image, from right to left, and a linear layer."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_dim, hidden_dim, bidirectional=True, batch_first=True)
        self.project = nn.Linear(2 * hidden_dim, hidden_dim)

    def forward(self, inputs: Tensor, batch: GraphBatch, places: Tensor, dropped: Tensor | None = None) -> list[Tensor]:
        """`[T, F]` to `[T, hidden_dim]`, and where `dropped` is given once more with what it drops set to 0.

        Args:
            dropped: bool `[T, 1]` or `[T, F]`.
        """
        # Where the input is wide its projection is most of the layer, and masking whole rows commutes with it. On a GPU
        # the library's LSTM is far ahead of a loop.
        is_wide = self.lstm.input_size > 4 * self.lstm.hidden_size and inputs.device.type == "cpu"
        if is_wide and (dropped is None or dropped.shape[1] == 1):
            return self.projected_once(inputs, batch, places, dropped)
        branches = [inputs] if dropped is None else [inputs, inputs.masked_fill(dropped, 0)]
        return self.packed(branches, batch, places)

    def packed(self, inputs: list[Tensor], batch: GraphBatch, places: Tensor) -> list[Tensor]:
        """The library's LSTM on all branches' images in one packed batch: `[T, F]` each to `[T, hidden_dim]`."""
        # Images without objects have no sequence; a length of 1 stands in for theirs, and is read by nobody.
        lengths, order = batch.lengths.clamp(min=1).sort(descending=True, stable=True)  # or packing would wait to sort
        rows = send(order.argsort(), places.device)[batch.images]
        shape = len(lengths), len(inputs), int(lengths[0])
        sequences = inputs[0].new_zeros(*shape, inputs[0].shape[1])
        sequences[rows, :, places] = torch.stack(inputs, dim=1)
        packed = pack_padded_sequence(sequences.flatten(0, 1), lengths.repeat_interleave(len(inputs)), batch_first=True)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=shape[2])
        return list(self.project(out.unflatten(0, shape[:2])[rows, :, places]).unbind(1))

    def projected_once(self, inputs: Tensor, batch: GraphBatch, places: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """As `packed` of `inputs` `[T, F]`, and of `inputs` with the rows of `dropped` `[T, 1]` set to 0."""
        weights = self.lstm.all_weights  # of each direction: of input and state, and their biases
        input_weight, weight, *biases = (torch.stack(both) for both in zip(*weights))
        bias = torch.stack(biases).sum(0).flatten()
        projected = linear(inputs, input_weight.flatten(0, 1), bias)
        # A row of zeros projects to the bias.
        branches = [projected] if dropped is None else [projected, torch.where(dropped, bias, projected)]
        gates = torch.stack(branches).unflatten(2, (2, -1))
        images, longest = len(batch.lengths), max(int(batch.lengths.max()), 1)
        # Each direction reads an image's objects from its own end; what follows the last is read by nobody.
        steps = torch.stack([places, batch.lengths[batch.images] - 1 - places])
        direction = torch.arange(2, device=places.device)[:, None]
        sequences = gates.new_zeros(2, longest, images, len(branches), gates.shape[3])
        sequences = sequences.index_put((direction, steps, batch.images), gates.permute(2, 1, 0, 3))
        hidden = _Recurrence.apply(sequences.flatten(2, 3), weight.to(gates.dtype))[0].unflatten(2, (images, -1))
        out = hidden[direction, steps, batch.images]  # [directions, T, branches, H]
        return list(self.project(out.permute(2, 1, 0, 3).flatten(2)))


class _Recurrence(torch.autograd.Function):
    """The recurrent part of a bidirectional LSTM, given what its inputs add to the gates.

    For `nn.LSTM`, which projects its own inputs, both branches' inputs would have to be projected.
    """

    @staticmethod
    def forward(gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """From gates before activation `[2, L, S, 4 * H]` (input, forget, candidate, output), weight `[2, 4 * H, H]`.

        Returns:
            hidden and cell states `[2, L, S, H]` and the gates after activation.
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
        # One product for all steps, instead of one for each.
        return grad_gates, grad_gates.flatten(1, 2).transpose(1, 2) @ before.flatten(1, 2)


def right_to_left(batch: GraphBatch) -> Tensor:
    """Where each object stands in its image's sequence, by falling middle as in the public code: int64 `[T]`."""
    middle = batch.boxes[:, ::2].mean(1)
    order = middle.argsort(descending=True, stable=True)
    order = order[batch.images[order].argsort(stable=True)]
    # Sorted or not, the i-th slot belongs to the same image, and is the same place in it.
    places = torch.empty_like(order)
    places[order] = batch.positions
    return places


def box_features(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes relative to their images, as Motifs encodes them.

    Args:
        boxes: `[T, 4]`, x1, y1, x2, y2 in pixels, both ends inside (widths are x2 - x1 + 1).
        sizes: `[T, 2]`, width and height of each box's image.

    Returns:
        `[T, 9]`: width, height, x and y of the middle, x1, y1, x2, y2, each divided by its side of the image; area.
    """
    extent = (boxes[:, 2:] - boxes[:, :2] + 1) / sizes
    middle = boxes[:, :2] / sizes + extent / 2
    return torch.cat([extent, middle, boxes / sizes.repeat(1, 2), extent.prod(1, keepdim=True)], dim=1)


def pair_features(batch: GraphBatch) -> Tensor:
    """The geometry of each pair, in place of what an image would show of it.

    Returns:
        `[R, 32]`: `box_features` of subject, object and the box around both; the object's offset from the subject in
        widths and heights of the subject, its far ends compressed by arsinh; the logarithm of its relative width and
        height; the intersection over union.
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
