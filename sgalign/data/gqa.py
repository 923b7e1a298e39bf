"""The scene graphs of GQA (Hudson & Manning, CVPR 2019), which are cleaned graphs of Visual Genome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgalign.data.box_checks import EXTENTS
from sgalign.data.class_names import Classes, read_classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.records import Record, RecordDataset
from sgalign.data.splits import Split, ValidationChoice, in_split, split_file, split_files, splits_from
from sgalign.errors import InputError, shown
from sgalign.files import read_json

_FOLDER = "sceneGraphs"
_TEST = "test_sceneGraphs.json"


class GQADataset(RecordDataset):
    """GQA's scene graphs with about 1700 object classes and 300 predicates, on 85k images of Visual Genome.

    The files are `train_sceneGraphs.json` and `val_sceneGraphs.json`, in this folder or in `sceneGraphs/`. Each has an
    entry per image id: `width`, `height` and `objects`, which has an entry per object id: `name`, `x`, `y`, `w` and `h`
    in pixels, `attributes` and `relations`. A relation has a predicate as `name` and an object id as `object`. The
    object that has the relation is its subject.

    The classes and the predicates are all names that occur in the files of the folder, sorted, so all splits number
    them in the same way. They are not selected. Attributes, `location` and `weather` are left out.

    Args:
        root: folder of the files. Images are optional, in `images/`, and are called `ID.jpg`.
        split: "train", "validation" or "test". GQA publishes no test graphs, so `val_sceneGraphs.json` is the test
            split, and the validation split is held out from the training file. If the folder has a
            `test_sceneGraphs.json`, each split has its own file.
        validation_images: number of images to hold out. If None, 5000, but at most a fifth of the training images. It
            must be None if there is a test file.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.
        findings: the rows that were left out, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the image and the object.
    """

    box_format = EXTENTS
    annotation_files = ("*_sceneGraphs.json", f"{_FOLDER}/*_sceneGraphs.json")

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        validation_images: int | None = None,
        validation_choice: ValidationChoice = "hash",
        bad_rows: BadRows = "error",
    ) -> None:
        self.root = Path(root)
        files = _graph_files(self.root)
        path = split_file(self.root, files, split, validation_images, validation_choice)
        objects, predicates = set[str](), set[str]()
        for other in {*files.values()} - {path}:
            _add_names(objects, predicates, other, _read_graphs(other))  # these graphs are large and not kept
        graphs = _read_graphs(path)
        _add_names(objects, predicates, path, graphs)
        self.object_classes = _classes(f"{self.root}, names of objects", objects)
        self._predicates = _classes(f"{self.root}, names of relations", predicates)
        self._files = ImageFiles([self.root / "images"])
        self.findings = Findings(f"{path}, {split}")
        marks = in_split([_file_name(key) for key in graphs], files, split, validation_images, validation_choice)
        graphs = {key: graph for (key, graph), mark in zip(graphs.items(), marks, strict=True) if mark}
        self._read(_records(path, graphs, self.findings), bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        return splits_from(_graph_files(root))


def _graph_files(root: Path) -> dict[Split, Path]:
    has_test = (root / _TEST).exists() or (root / _FOLDER / _TEST).exists()
    names: dict[Split, str] = {"train": "train_sceneGraphs.json", "test": "val_sceneGraphs.json"}
    if has_test:
        names |= {"validation": "val_sceneGraphs.json", "test": _TEST}
    return split_files(root, _FOLDER, names)


def _read_graphs(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object with image ids as keys, got {shown(content)}")
    return content


def _file_name(image_id: str) -> str:
    return f"{image_id}.jpg"


def _add_names(objects: set[str], predicates: set[str], path: Path, graphs: Mapping[str, Any]) -> None:
    """Add all names of objects and of relations. Malformed ones are refused later, in the split that has them."""
    for record in _records(path, graphs, Findings("")):
        objects.update(filter(_is_name, (class_id for class_id, _ in record.objects)))
        predicates.update(filter(_is_name, (predicate for _, _, predicate in record.relations)))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _classes(where: str, names: Iterable[str]) -> Classes:
    return read_classes(where, ((name, name) for name in sorted(names)), has_background=False)


def _records(path: Path, graphs: Mapping[str, Any], findings: Findings) -> Iterator[Record]:
    """Yield a record per image. Relations name their predicates, and relations to missing objects are refused."""
    for image_id, graph in graphs.items():
        where = f"{path}, image {image_id!r}"
        if not isinstance(graph, dict) or not isinstance(graph.get("objects"), dict):
            got = f"must have width, height and an object with the key objects, got {shown(graph)}"
            findings.refuse("image with a malformed entry", f"{where}: {got}")
            continue
        objects = graph["objects"]
        places = {object_id: place for place, object_id in enumerate(objects)}
        relations = [
            relation
            for object_id, entry in objects.items()
            if isinstance(entry, dict)
            for relation in _relations(f"{where}, object {object_id!r}", object_id, entry, places, findings)
        ]
        annotated = [_object(entry) for entry in objects.values()]
        attributes = [entry.get("attributes") for entry in objects.values() if isinstance(entry, dict)]
        count = sum(len(values) if isinstance(values, list) else 1 for values in attributes if values)
        findings.add("left out", "attribute of an object", count=count)
        size = graph.get("width"), graph.get("height")
        yield Record(where, _file_name(image_id), size, annotated, relations)


def _object(entry: Any) -> tuple[Any, Any]:
    """Return the class and the box x, y, width, height of an object."""
    return (entry.get("name"), [entry.get(key) for key in "xywh"]) if isinstance(entry, dict) else (None, entry)


def _relations(
    where: str, subject: str, entry: Mapping[str, Any], places: Mapping[str, int], findings: Findings
) -> Sequence[tuple[int, int, Any]]:
    """Return subject, object and predicate of the relations of one object."""
    rows = entry.get("relations")
    if not isinstance(rows, list):
        findings.refuse("object without a list of relations", f"{where}: relations must be a list, got {shown(rows)}")
        return []
    relations = []
    for number, row in enumerate(rows):
        at = f"{where}, relation {number}"
        if not isinstance(row, dict) or not isinstance(row.get("object"), str):
            got = f"{at}: must have a name and the id of an object, which is text, got {shown(row)}"
            findings.refuse("relation with a malformed row", got)
        elif row["object"] not in places:
            got = f"{at}: object must be the id of an object of the image, got {row['object']!r}"
            findings.refuse("relation to a missing object", got)
        else:
            relations.append((places[subject], places[row["object"]], row.get("name")))
    return relations
