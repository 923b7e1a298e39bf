"""The frequency baseline, which predicts predicates from object classes alone (Zellers et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.data import GraphBatch, SceneGraph


def predicate_counts(graphs: Iterable[SceneGraph], num_objects: int, num_predicates: int) -> Tensor:
    """Count how often each predicate occurs with each pair of object classes.

    Args:
        graphs: the training split. Repeated relations count each time.
        num_objects, num_predicates: numbers of object classes and predicates, without the background.

    Returns:
        The counts, float32 `[num_objects + 1, num_objects + 1, num_predicates + 1]`, indexed by subject class, object
        class and predicate. Predicate 0 counts ordered pairs of different objects without any relation.

    Raises:
        IndexError: if a class exceeds `num_objects` or a predicate exceeds `num_predicates`.
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
    """A model that predicts each pair's predicate from its two classes, by the log of the counted frequencies.

    Args:
        counts: result of `predicate_counts`.
        trainable: if True, the logits are trained, and the counts are their initial values. This is the frequency bias
            of Motifs.
    """

    def __init__(self, counts: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        # This is the smoothing of Motifs. One background pair is added to each pair of classes, so unseen pairs do not
        # rank first.
        counts = counts.clone()
        counts[..., 0] += 1
        logits = torch.log(counts / counts.sum(-1, keepdim=True) + 1e-3)
        self.logits = nn.Parameter(logits, requires_grad=trainable)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the logits of the batch's pairs, `[R, num_predicates + 1]`."""
        subject, object_ = batch.labels[batch.pairs].unbind(1)
        # This uses an embedding instead of indexing. The gradient of indexing would add up pairs of equal classes in an
        # order that depends on the threads.
        return functional.embedding(subject * len(self.logits) + object_, self.logits.flatten(0, 1))
