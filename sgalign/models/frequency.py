"""What the classes of two objects alone say about their predicate (Zellers et al., "Neural Motifs", CVPR 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.data import GraphBatch, SceneGraph


def predicate_counts(graphs: Iterable[SceneGraph], num_objects: int, num_predicates: int) -> Tensor:
    """How often each predicate joins each pair of classes.

    Args:
        graphs: the training part; repeated relations count as often as they stand.
        num_objects, num_predicates: without the background.

    Returns:
        float32 `[num_objects + 1, num_objects + 1, num_predicates + 1]`: subject class, object class, predicate; column
        0 counts ordered pairs of different objects without any relation.

    Raises:
        IndexError: a class or predicate is beyond its number.
    """
    counts = torch.zeros(num_objects + 1, num_objects + 1, num_predicates + 1)
    one = torch.ones(())
    for graph in graphs:
        subject, object_, predicate = graph.relations.unbind(1)
        counts.index_put_((graph.labels[subject], graph.labels[object_], predicate), one, accumulate=True)
        unrelated = ~torch.eye(len(graph.labels), dtype=torch.bool)
        unrelated[subject, object_] = False
        subject, object_ = unrelated.nonzero(as_tuple=True)
        counts[..., 0].index_put_((graph.labels[subject], graph.labels[object_]), one, accumulate=True)
    return counts


class FrequencyBaseline(nn.Module):
    """Predicts every pair's predicate from its two classes: the log of counted frequencies.

    Args:
        counts: of `predicate_counts`.
        trainable: the logits are parameters, initialised from the counts: Motifs' frequency bias.
    """

    def __init__(self, counts: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        # Motifs' smoothing; one background pair more keeps unseen class pairs from ranking first.
        counts = counts.clone()
        counts[..., 0] += 1
        logits = torch.log(counts / counts.sum(-1, keepdim=True) + 1e-3)
        self.logits = nn.Parameter(logits, requires_grad=trainable)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Logits `[R, num_predicates + 1]` of the batch's pairs."""
        subject, object_ = batch.labels[batch.pairs].unbind(1)
        # Not indexed: the gradient of that adds up what meets in a class pair in whatever order threads come to it.
        return functional.embedding(subject * len(self.logits) + object_, self.logits.flatten(0, 1))
