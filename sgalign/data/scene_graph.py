"""The scene graph of one image, which holds its objects with boxes and the relations between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgalign.data.class_names import Classes
from sgalign.data.findings import Findings
from sgalign.data.splits import Split
from sgalign.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class SceneGraph:
    """The objects and relations of an image. Both may be empty.

    Attributes:
        image_id: name of the image in its data set.
        width: width of the image in pixels.
        height: height of the image in pixels.
        boxes: x1, y1, x2, y2 in pixels, float32 `[N, 4]`.
        labels: object classes from 1, int64 `[N]`.
        relations: subject index, object index and predicate from 1, int64 `[M, 3]`. Relations are kept as annotated. A
            pair may have several predicates, rows may repeat, and an object may relate to itself.
        image: function that loads or draws the image. None if there is no image.

    Raises:
        ValueError: if a field has the wrong type, shape or range. The error names the image and the field.
    """

    image_id: str
    width: int
    height: int
    boxes: Tensor
    labels: Tensor
    relations: Tensor
    image: Callable[[], Image.Image] | None = None

    def __post_init__(self) -> None:
        where = f"image {self.image_id!r}: "
        for field in ("width", "height"):
            if not isinstance(size := getattr(self, field), int) or size < 1:
                raise InputError(f"{where}{field} must be an int of at least 1, got {size!r}")
        check_objects(where, self.boxes, self.labels, (torch.float32,))
        check_tensor(where, "relations", self.relations, (None, 3), (torch.int64,))
        check_range(where, "relations[:, :2]", self.relations[:, :2], 0, len(self.labels) - 1)
        check_range(where, "relations[:, 2]", self.relations[:, 2], 1)

    @property
    def truth(self) -> dict[str, Any]:
        """The annotations that evaluators compare predictions with, and the image's size."""
        size = {"size": (self.width, self.height)}
        return size | {name: getattr(self, name) for name in ("image_id", "boxes", "labels", "relations")}


class SceneGraphDataset(Dataset[SceneGraph]):
    """The base class of data sets. Subclasses implement `__len__` and `__getitem__`.

    Attributes:
        object_names: names of the object classes, background first.
        predicate_names: names of the predicates, background first.
        image_names: names of images by their ids as text, if the files of the data set give ids to images.
        object_classes: object classes by their ids in the files, if the files give ids to classes.
    """

    object_names: list[str]
    predicate_names: list[str]
    image_names: Mapping[str, str] = {}
    object_classes: Classes | None = None
    annotation_files: ClassVar[tuple[str, ...]] = ()  # patterns of the files with annotations, for `Path.glob`

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        """Return the splits for which a folder has files. There is none if the folder has another layout."""
        raise NotImplementedError("a data set that is read from a folder must override splits_in")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must override __len__")

    def __iter__(self) -> Iterator[SceneGraph]:
        # Without this method, Python would stop at the first IndexError, even at one that a defect raises.
        return (self[index] for index in range(len(self)))


def count_predicates(graphs: Iterable[SceneGraph], num_predicates: int) -> Tensor:
    """Return the number of relations per predicate, int64 `[num_predicates + 1]`, with 0 for the background."""
    counts = torch.zeros(num_predicates + 1, dtype=torch.int64)
    for graph in graphs:
        counts += torch.bincount(graph.relations[:, 2], minlength=num_predicates + 1)
    return counts


def has_relations(graphs: Iterable[SceneGraph]) -> bool:
    """Return True if any of the scene graphs has a relation."""
    return any(len(graph.relations) for graph in graphs)


def check_has_relations(graphs: Sequence[SceneGraph], where: str) -> None:
    """Raise InputError unless a split has relations, without which there is no recall to compute."""
    if not has_relations(graphs):
        raise InputError(f"{where} must have relations, got none in its {len(graphs)} images")


def without_apart(graph: SceneGraph, findings: Findings) -> SceneGraph:
    """Return the graph without relations between boxes that do not overlap, and record them.

    Boxes less than one pixel apart count as overlapping, as in Scene-Graph-Benchmark, because a box includes its last
    pixel.
    """
    subject, object_ = graph.boxes[graph.relations[:, 0]], graph.boxes[graph.relations[:, 1]]
    common = torch.minimum(subject[:, 2:], object_[:, 2:]) - torch.maximum(subject[:, :2], object_[:, :2]) + 1
    apart = (common <= 0).any(1)
    findings.add("left out", "relation between boxes that do not overlap", count=int(apart.sum()))
    return replace(graph, relations=graph.relations[~apart])


def check_objects(where: str, boxes: Any, labels: Any, box_dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise InputError unless boxes are `[N, 4]`, finite and ordered, and labels are int64 `[N]` from 1."""
    check_tensor(where, "boxes", boxes, (None, 4), box_dtypes)
    check_tensor(where, "labels", labels, (len(boxes),), (torch.int64,))
    # This one check covers NaN, infinity and both extents.
    extent = boxes[:, 2:] - boxes[:, :2]
    valid = ((extent >= 0) & extent.isfinite()).all(1)
    if not valid.all():
        row = int((~valid).nonzero()[0])
        raise InputError(
            f"{where}boxes must be finite with x1 <= x2 and y1 <= y2, got {boxes[row].tolist()} in row {row}"
        )
    check_range(where, "labels", labels, 1)


def check_tensor(
    where: str, field: str, value: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise InputError unless `value` is a tensor with this shape and one of these dtypes.

    None in `shape` allows any length.
    """
    wanted = f"a tensor of {' or '.join(map(str, dtypes))} and shape {shape}".replace("None", "any")
    if not isinstance(value, Tensor):
        raise InputError(f"{where}{field} must be {wanted}, got {type(value).__name__}")
    fits = len(shape) == value.dim() and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if value.dtype not in dtypes or not fits:
        raise InputError(f"{where}{field} must be {wanted}, got {value.dtype} and {tuple(value.shape)}")


def check_range(where: str, field: str, value: Tensor, lowest: int, highest: int | None = None) -> None:
    """Raise InputError unless every element is from `lowest` to `highest`, both inclusive.

    If `highest` is None, there is no upper limit.
    """
    outside = value < lowest if highest is None else (value < lowest) | (value > highest)
    if outside.any():
        place = outside.nonzero()[0].tolist()
        bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise InputError(f"{where}{field} must be {bounds}, got {value[tuple(place)].item()} in row {place[0]}")
