"""Neural Motifs (Zellers, Yatskar, Thomson, Choi, CVPR 2018) for PredCls from labels and boxes.

Layers and their order are those of the public Scene-Graph-Benchmark (`LSTMContext` and `MotifPredictor`). Without
images two of its inputs are missing: the objects' region features are left out, and the pairs' union features come from
the geometry of the two boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sgalign.data import GraphBatch
from sgalign.models.frequency import FrequencyBaseline

BOX_FEATURES = 9
PAIR_FEATURES = 3 * BOX_FEATURES + 5


class Shared(NamedTuple):
    """What both branches have in common, computed once: all of it lies before the masked input or beside it."""

    places: Tensor  # [T], of each object in its image's sequence
    edge_input: Tensor  # [T, F], what the edge context reads and the mirror masks
    union: Tensor  # [R, relation_dim]
    bias: Tensor  # [R, K + 1], of the class frequencies


class Motifs(nn.Module):
    """Predicate logits of all pairs of objects, given their classes and boxes.

    Args:
        counts: `predicate_counts` of the training part: their logarithm is the frequency bias, and their shape tells
            the numbers of classes.
        embed_dim: channels of a class embedding.
        hidden_dim: of each direction of both LSTMs, and of the contexts.
        relation_dim: channels of a pair's features.
    """

    def __init__(self, counts: Tensor, *, embed_dim: int = 200, hidden_dim: int = 128, relation_dim: int = 512) -> None:
        super().__init__()
        classes, _, predicates = counts.shape
        self.object_embedding = nn.Embedding(classes, embed_dim)
        self.edge_embedding = nn.Embedding(classes, embed_dim)
        self.position = nn.Sequential(
            nn.Linear(BOX_FEATURES, 32), nn.BatchNorm1d(32), nn.Linear(32, 128), nn.ReLU(inplace=True)
        )
        self.object_context = _Context(embed_dim + 128, hidden_dim)
        self.edge_context = _Context(embed_dim + hidden_dim, hidden_dim)
        self.head_tail = nn.Linear(hidden_dim, 2 * hidden_dim)  # post_emb: of each object as subject and as object
        self.pair = nn.Linear(2 * hidden_dim, relation_dim)  # post_cat
        self.union = nn.Sequential(
            nn.Linear(PAIR_FEATURES, 256), nn.ReLU(inplace=True), nn.Linear(256, relation_dim), nn.ReLU(inplace=True)
        )
        self.num_predicates = predicates - 1
        self.predicate = self.new_predicate_head()  # rel_compress
        self.frequency_bias = FrequencyBaseline(counts, trainable=True)
        nn.init.normal_(self.head_tail.weight, std=10 * hidden_dim**-0.5)
        nn.init.xavier_normal_(self.pair.weight)

    def new_predicate_head(self) -> nn.Linear:
        """A head of its own for the mirror, initialised as the supervised one."""
        head = nn.Linear(self.pair.out_features, self.num_predicates + 1)
        nn.init.xavier_normal_(head.weight)
        return head

    def load_class_vectors(self, vectors: Tensor) -> None:
        """Starts both class embeddings from `vectors`, `[num_objects + 1, embed_dim]`, as of `read_word_vectors`."""
        wanted = self.object_embedding.weight.shape
        if vectors.shape != wanted:
            raise ValueError(f"vectors must be {list(wanted)}, classes and embed_dim, got {list(vectors.shape)}")
        for embedding in (self.object_embedding, self.edge_embedding):
            embedding.weight.data.copy_(vectors)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Logits `[R, num_predicates + 1]` of the batch's pairs, column 0 the background."""
        shared = self.shared(batch)
        return self.branches(batch, shared, [shared.edge_input], [self.predicate])[0]

    def dual_branch(self, batch: GraphBatch, dropped: Tensor, mirrored_head: nn.Linear) -> tuple[Tensor, Tensor]:
        """Both branches of relation alignment.

        Args:
            dropped: bool, broadcastable to the edge context's input `[T, F]`: what the mirror does not see. It is set
                to 0 and nothing is rescaled.
            mirrored_head: the mirror's predicate head; `self.predicate` ties it.

        Returns:
            The logits of `forward` and the mirror's, each `[R, num_predicates + 1]`.
        """
        shared = self.shared(batch)
        inputs = [shared.edge_input, shared.edge_input.masked_fill(dropped, 0)]
        logits, mirrored_logits = self.branches(batch, shared, inputs, [self.predicate, mirrored_head])
        return logits, mirrored_logits

    @property
    def edge_input_dim(self) -> int:
        return self.edge_context.lstm.input_size

    def shared(self, batch: GraphBatch) -> Shared:
        """Everything before the mirror's mask, and what does not depend on it."""
        geometry = box_features(batch.boxes, batch.sizes[batch.images])
        seen = torch.cat([self.object_embedding(batch.labels), self.position(geometry)], dim=1)
        places = right_to_left(batch)
        (context,) = self.object_context([seen], batch, places)
        return Shared(
            places=places,
            edge_input=torch.cat([self.edge_embedding(batch.labels), context], dim=1),
            union=self.union(pair_features(batch)),
            bias=self.frequency_bias(batch),
        )

    def branches(
        self, batch: GraphBatch, shared: Shared, edge_inputs: list[Tensor], heads: list[nn.Linear]
    ) -> list[Tensor]:
        """Each branch's logits; the edge context runs once, on all branches' sequences."""
        logits = []
        for edge, head in zip(self.edge_context(edge_inputs, batch, shared.places), heads, strict=True):
            # A linear layer of two concatenated vectors is a sum of two layers, each of N objects instead of N^2 pairs.
            as_subject, as_object = self.head_tail(edge).chunk(2, dim=1)
            subject_weight, object_weight = self.pair.weight.chunk(2, dim=1)
            subject = linear(as_subject, subject_weight, self.pair.bias)
            object_ = linear(as_object, object_weight)
            pair = subject[batch.pairs[:, 0]] + object_[batch.pairs[:, 1]]
            logits.append(head(pair * shared.union) + shared.bias)
        return logits


class _Context(nn.Module):
    """A bidirectional LSTM over the objects of each image, from right to left, and a linear layer."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_dim, hidden_dim, bidirectional=True, batch_first=True)
        self.project = nn.Linear(2 * hidden_dim, hidden_dim)

    def forward(self, inputs: list[Tensor], batch: GraphBatch, places: Tensor) -> list[Tensor]:
        """`[T, F]` for each branch to `[T, hidden_dim]`, all branches' images in one packed batch."""
        shape = len(inputs), len(batch.lengths), max(int(batch.lengths.max()), 1)
        sequences = inputs[0].new_zeros(*shape, inputs[0].shape[1])
        sequences[:, batch.images, places] = torch.stack(inputs)
        # Images without objects have no sequence; a length of 1 stands in for theirs, and is read by nobody.
        lengths = batch.lengths.clamp(min=1).repeat(len(inputs))
        packed = pack_padded_sequence(sequences.flatten(0, 1), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=shape[2])
        out = self.project(out.unflatten(0, shape[:2])[:, batch.images, places])
        return list(out)


def right_to_left(batch: GraphBatch) -> Tensor:
    """Where each object stands in its image's sequence, by falling middle as in the public code: int64 `[T]`."""
    middle = batch.boxes[:, [0, 2]].mean(1)
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
