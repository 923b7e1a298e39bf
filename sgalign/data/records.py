"""The base class of data sets whose files list their images one after the other, with the checks that they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from sgalign.data.box_checks import CORNERS, EXTENTS, check_boxes, checked_corners
from sgalign.data.class_names import Classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.images import Size, check_file_name, load_image, parse_size
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.errors import InputError, shown


class Record(NamedTuple):
    """The annotations of an image as a file has them, not checked yet.

    Attributes:
        where: the file and the place in it, for messages.
        name: name of the image, a path in the data set's folder.
        size: width and height in pixels, as numbers or text.
        objects: class id and box of each object, in pixels and in the `box_format` of the data set.
        relations: index of the subject, index of the object and predicate id of each relation.
    """

    where: str
    name: Any
    size: tuple[Any, Any]
    objects: Sequence[tuple[Any, Any]]
    relations: Sequence[Any]


class RecordDataset(SceneGraphDataset):
    """A base class for data sets that are read image by image.

    A subclass sets `findings`, `object_classes`, `_predicates` and `_files`, and passes its records to `_read`.
    """

    box_format = CORNERS
    findings: Findings
    object_classes: Classes
    _predicates: Classes
    _files: ImageFiles

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitem__(self, index: int) -> SceneGraph:
        return self._graphs[index]

    def _read(self, records: Iterable[Record], bad_rows: BadRows) -> None:
        """Check the records, keep their scene graphs, and raise an error or log the findings."""
        self.object_names, self.predicate_names = self.object_classes.names, self._predicates.names
        graphs: dict[str, SceneGraph] = {}
        for record in records:
            try:
                check_file_name(f"{record.where}: the name of an image", record.name)
                if record.name in graphs:
                    raise InputError(f"{record.where}: image names must be unique, but {record.name!r} occurs twice")
                size = parse_size(record.where, dict(zip(("width", "height"), record.size, strict=True)))
            except InputError as error:
                self.findings.refuse("image with a malformed entry", str(error))
            else:
                graphs[record.name] = self._graph(record, size)
        self._graphs = list(graphs.values())
        missing = [graph.image_id for graph in self._graphs if graph.image is None]
        if len(missing) < len(graphs) or (missing and self._files.expects(missing[0])):
            self.findings.add("found", "image without a file", missing, len(missing))
        boxes = [graph.boxes.double().numpy() for graph in self._graphs]
        if self.box_format == EXTENTS:
            boxes = [np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1) for corners in boxes]
        sizes = [(graph.width, graph.height) for graph in self._graphs]
        check_boxes(self.findings, list(graphs), sizes, boxes, self.box_format)
        self.findings.raise_or_log(bad_rows)

    def _graph(self, record: Record, size: Size) -> SceneGraph:
        places: list[int | None] = []  # row of each object among those that are not refused
        boxes: list[list[float]] = []
        labels: list[int] = []
        for number, (class_id, box) in enumerate(record.objects):
            where = f"{record.where}, object {number}"
            try:
                corners = checked_corners(f"{where}: its box", box, self.box_format)
                label = self.object_classes.number(f"{where}: its class", class_id)
            except InputError as error:
                self.findings.refuse("object with a malformed annotation", str(error))
                places.append(None)
            else:
                places.append(len(boxes))
                boxes.append(corners)
                labels.append(label)
        relations = [
            relation
            for number, row in enumerate(record.relations)
            if (relation := self._relation(f"{record.where}, relation {number}", row, places)) is not None
        ]
        path = self._files.find(record.name)
        return SceneGraph(
            record.name,
            *size,
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(relations, dtype=torch.int64).reshape(-1, 3),
            None if path is None else partial(load_image, path, size),
        )

    def _relation(self, where: str, row: Any, places: Sequence[int | None]) -> tuple[int, int, int] | None:
        """Return subject, object and predicate of a relation. Return None if it is refused or left out."""
        if not isinstance(row, (list, tuple)) or len(row) != 3 or any(type(end) is not int for end in row[:2]):
            got = f"must be [subject, object, predicate], got {shown(row)}"
            self.findings.refuse("relation with a malformed row", f"{where}: {got}")
            return None
        if not 0 <= min(row[:2]) <= max(row[:2]) < len(places):
            got = f"its objects must be two of the image's {len(places)}, from 0, got {list(row[:2])}"
            self.findings.refuse("relation to a missing object", f"{where}: {got}")
            return None
        try:
            predicate = self._predicates.number(f"{where}: its predicate", row[2])
        except InputError as error:
            self.findings.refuse("relation with an unknown predicate", str(error))
            return None
        subject, object_ = places[row[0]], places[row[1]]
        if subject is None or object_ is None:
            self.findings.add("left out", "relation of a refused object", where)
            return None
        return subject, object_, predicate
