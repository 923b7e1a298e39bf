"""Sets of class triplets (subject, predicate, object), used to find zero-shot relations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sgalign.data.scene_graph import SceneGraph, check_range, check_tensor


class TripletSet:
    """A set of class triplets with a fast membership test for relations.

    Args:
        name: name of the argument, for error messages.
        triplets: subject class, predicate and object class, int64 `[Z, 3]`.
    """

    def __init__(self, name: str, triplets: Tensor) -> None:
        check_tensor("", name, triplets, (None, 3), (torch.int64,))
        check_range("", name, triplets, 1, (1 << 20) - 1)
        self._codes = _code(triplets).unique()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TripletSet) and torch.equal(self._codes.cpu(), other._codes.cpu())

    def __repr__(self) -> str:
        return f"{len(self._codes)} triplets"

    def has(self, triplets: Tensor) -> Tensor:
        """Return bool `[M]`, True for each row of `triplets` (int64 `[M, 3]`) that is in the set."""
        if not len(self._codes):
            return torch.zeros(len(triplets), dtype=torch.bool, device=triplets.device)
        self._codes, codes = self._codes.to(triplets.device), _code(triplets)
        place = torch.searchsorted(self._codes, codes).clamp(max=len(self._codes) - 1)
        return self._codes[place] == codes

    def has_relations(self, target: Mapping[str, Tensor]) -> Tensor:
        """Return bool `[M]`, True for each relation of an image whose class triplet is in the set."""
        subject, object_, predicate = target["relations"].unbind(1)
        return self.has(torch.stack((target["labels"][subject], predicate, target["labels"][object_]), 1))


def _code(triplets: Tensor) -> Tensor:
    return (triplets << torch.tensor((40, 20, 0), device=triplets.device)).sum(1)


def zero_shot_triplets(seen: Iterable[SceneGraph], evaluated: Iterable[SceneGraph]) -> Tensor:
    """Return the class triplets (subject, predicate, object) of `evaluated` that `seen` lacks, int64 `[Z, 3]`."""
    known = TripletSet("seen", _class_triplets(seen))
    triplets = _class_triplets(evaluated).unique(dim=0)
    return triplets[~known.has(triplets)]


def _class_triplets(graphs: Iterable[SceneGraph]) -> Tensor:
    triplets = [torch.zeros(0, 3, dtype=torch.int64)]
    for graph in graphs:
        subject, object_, predicate = graph.relations.unbind(1)
        triplets.append(torch.stack((graph.labels[subject], predicate, graph.labels[object_]), 1))
    return torch.cat(triplets)
