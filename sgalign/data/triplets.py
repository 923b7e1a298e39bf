"""Sets of class triplets (subject, predicate, object), used to find zero-shot relations."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sgalign.data.scene_graph import SceneGraph, check_range, check_tensor
from sgalign.errors import InputError
from sgalign.files import read_tensors
from sgalign.numbers import whole_number

REMEDY = "download or write it again"
WHOLE = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


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


def read_zero_shot_triplets(path: str | Path) -> Tensor:
    """Return the class triplets that never occur in training.

    Args:
        path: a CSV file, with or without a header line, or the public benchmark's `zeroshot_triplet.pytorch`.

    Returns:
        Subject class, predicate and object class, all from 1, int64 `[Z, 3]`, as the evaluators expect them. The files
        have the object class before the predicate.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has neither of the two formats.
    """
    path, what = Path(path), "file of zero-shot triplets"
    if path.suffix == ".csv":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such {what}")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [row for row in csv.reader(file) if row]
            has_header = not any(re.search("[0-9]", cell) for cell in rows[0])
            triplets = torch.tensor([[_class_number(cell) for cell in row] for row in rows[has_header:]])
        except (IndexError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: must be a {what}, but is not one or is cut short ({error}); {REMEDY}") from error
    else:
        triplets = read_tensors(path, what)
    whole = isinstance(triplets, Tensor) and triplets.dtype in WHOLE
    if not whole or triplets.dim() != 2 or triplets.shape[1] != 3 or (triplets < 1).any():
        raise InputError(
            f"{path}: every row must be a subject class, an object class and a predicate, all from 1; {REMEDY}"
        )
    return triplets.long()[:, [0, 2, 1]]


def _class_number(cell: str) -> int:
    if (number := whole_number(cell)) is None:
        raise ValueError(f"{cell!r} is no whole number from 1 and below 2^53")
    return number
