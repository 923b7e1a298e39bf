"""Slow readers of VRD, PSG, Open Images and GQA in plain Python, written after the documentation of the layouts.

Each returns what a data set must load and what it must count as missing. It raises `Malformed` if the whole input must
be refused.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from plain_values import (
    LARGEST,
    SPLITS,
    Classes,
    Expected,
    Malformed,
    Options,
    chosen,
    dict_of,
    held_out,
    is_int,
    is_path,
    json_of,
    must,
    only,
    records,
    text_of,
)


def vrd(root: Path, options: Options, files: dict[str, Any]) -> Expected:
    """Read VRD. `files` has the stored and the upright size of each image file, or None if it cannot be read."""
    objects, predicates = (Classes(enumerate(json_of(root / f"{n}.json", list))) for n in ("objects", "predicates"))
    rows = json_of(root / f"annotations_{'test' if options.split == 'test' else 'train'}.json", dict)
    if options.split != "test":
        marks = held_out(list(rows), options, 600)
        rows = {key: rows[key] for key, mark in zip(rows, marks) if mark == (options.split == "validation")}
    expected = Expected(objects.names, predicates.names)
    for name, relations in rows.items():
        if not isinstance(relations, list) or not is_path(name):
            expected.lose("refused", "image")
            continue
        ends: list[tuple] = []
        kept = []
        for row in relations:
            row = row if isinstance(row, dict) else {}
            pair = [_vrd_object(row.get(role), objects) for role in ("subject", "object")]
            number = predicates.number(row.get("predicate"))
            if None in pair or number is None:
                expected.lose("refused", "relation")
                continue
            ends += [end for place, end in enumerate(pair) if end not in ends and end not in pair[:place]]
            kept.append([ends.index(pair[0]), ends.index(pair[1]), number])
        boxes = [list(map(float, end[1:])) for end in ends]
        needs = [max([1, *(int(box[side]) + 1 for box in boxes)]) for side in (2, 3)]
        size = needs
        if (file := _found(name, files)) is not None:
            if files[file] is None:
                expected.lose("refused", "image")
                continue
            stored, turned = files[file]
            size = stored if _holds(stored, needs) or not _holds(turned, needs) else turned
        expected.graphs.append((name, *size, boxes, [end[0] for end in ends], kept))
    return expected


def _holds(size: Sequence[int], needs: Sequence[int]) -> bool:
    return size[0] >= needs[0] and size[1] >= needs[1]


def _found(name: str, files: dict[str, Any]) -> str | None:
    """Return the image file of a name, which may have another suffix."""
    path = PurePosixPath(name)
    if len(path.parts) > 1:
        return None
    if name in files:
        return name
    same = [file for file in sorted(files) if PurePosixPath(file).stem == path.stem]
    return same[0] if same and path.suffix.lower() in ("", ".jpg", ".png", ".gif", ".bmp", ".jpeg") else None


def _vrd_object(entry: Any, objects: Classes) -> tuple | None:
    entry = entry if isinstance(entry, dict) else {}
    box, label = entry.get("bbox"), objects.number(entry.get("category"))
    if label is None or not isinstance(box, list) or len(box) != 4:
        return None
    if not all(is_int(v) and abs(v) < LARGEST for v in box):
        return None
    top, bottom, left, right = box
    return (label, left, top, right, bottom) if top < bottom and left < right else None


def psg(root: Path, options: Options) -> Expected:
    """Read PSG."""
    path = next(
        (root / n for n in ("psg.json", "psg_train_val.json", "psg_val_test.json") if (root / n).exists()), root
    )
    content = json_of(path, dict)
    things, stuff, names, given, data = (
        content.get(key) for key in ("thing_classes", "stuff_classes", "predicate_classes", "test_image_ids", "data")
    )
    must(all(isinstance(part, list) for part in (things, stuff, names, given, data)))
    objects, predicates = Classes(enumerate(things + stuff)), Classes(enumerate(names))
    expected = Expected(objects.names, predicates.names)
    test = {text_of(value) for value in given} - {None}
    expected.lose("refused", "id", sum(text_of(value) is None for value in given))
    rows: dict[str, dict] = {}
    for row in data:
        keys = "file_name", "width", "height", "image_id", "annotations", "relations"
        whole_row = isinstance(row, dict) and all(key in row for key in keys)
        lists = whole_row and isinstance(row["annotations"], list) and isinstance(row["relations"], list)
        key = text_of(row["image_id"]) if lists else None
        if key is None or key in rows:
            expected.lose("refused", "image")
        else:
            rows[key] = row
    training = [row for key, row in rows.items() if key not in test]
    taken = [row for key, row in rows.items() if key in test]
    if options.split != "test":
        related = [row for row in training if row["relations"]]
        marks = held_out([str(row["file_name"]) for row in related], options, 1000)
        validation = [id(row) for row, mark in zip(related, marks) if mark]
        taken = [row for row in training if (id(row) in validation) == (options.split == "validation")]
    segments = [row.get("segments_info") for row in taken]
    expected.lose("left out", "mask", sum(len(part) for part in segments if isinstance(part, list)))
    records(expected, objects, predicates, map(_psg_record, taken), extents=False)
    return expected


def _psg_record(row: dict) -> tuple:
    entries = [entry if isinstance(entry, dict) else {} for entry in row["annotations"]]
    annotated = [(entry.get("category_id"), entry.get("bbox")) for entry in entries]
    return row["file_name"], row["width"], row["height"], annotated, row["relations"]


def split_files(root: Path, folder: str, names: dict[str, str]) -> dict[str, Path]:
    """Return the files of the splits, which lie in the folder or in its subfolder."""
    found = {split: only([root / name, root / folder / name]) for split, name in names.items()}
    return {split: path for split, path in found.items() if path is not None}


def split_file(files: dict[str, Path], options: Options) -> Path:
    """Return the file that has the images of the split."""
    if "validation" in files:
        must(options.wanted is None and options.choice == "hash")
    path = files.get(options.split) or (files.get("train") if options.split == "validation" else None)
    must(path)
    return path  # type: ignore[return-value]


def open_images_json(root: Path, options: Options) -> Expected:
    """Read the JSON files of Open Images."""
    names = {"train": "vrd-train-anno.json", "validation": "vrd-val-anno.json", "test": "vrd-test-anno.json"}
    files = split_files(root, "annotations", names)
    path = split_file(files, options)
    categories = json_of(path.parent / "categories_dict.json", dict)
    must(all(isinstance(categories.get(key), list) for key in ("obj", "rel")))
    objects, predicates = (Classes(enumerate(categories[key])) for key in ("obj", "rel"))
    expected = Expected(objects.names, predicates.names)
    rows = []
    for row in json_of(path, list):
        parts = [row.get(key) for key in ("img_size", "bbox", "det_labels", "rel")] if isinstance(row, dict) else [0]
        if not all(isinstance(part, list) for part in parts) or not (isinstance(row.get("img_fn"), str)):
            expected.lose("refused", "image")
        elif not row["img_fn"] or len(parts[0]) != 2 or len(parts[1]) != len(parts[2]):
            expected.lose("refused", "image")
        else:
            name = row["img_fn"]
            name = name if PurePosixPath(name).suffix.lower() in (".jpg", ".png") else f"{name}.jpg"
            rows.append((name, *parts[0], list(zip(parts[2], parts[1])), parts[3]))
    marks = chosen([row[0] for row in rows], "validation" in files, options)
    records(expected, objects, predicates, [row for row, mark in zip(rows, marks) if mark], extents=False)
    return expected


def csv_of(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file without empty lines."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [row for row in csv.reader(file, strict=True) if row]
    except (csv.Error, UnicodeDecodeError):
        raise Malformed from None


def table_of(path: Path, *columns: str) -> list[dict[str, str] | None]:
    """Return the rows of a CSV file as dicts, or None for a row of another length."""
    header, *rows = csv_of(path) or [[]]
    must(all(header.count(column) == 1 for column in columns))
    return [dict(zip(header, row)) if len(row) == len(header) else None for row in rows]


def open_images_csv(root: Path, options: Options, files: dict[str, Any]) -> Expected:
    """Read the CSV files of Open Images. `files` is as in `vrd`."""
    tables = {s: p for s in SPLITS for p in root.glob(f"*-{s}-*-vrd.csv")}
    path = split_file(tables, options)
    described = sorted(root.glob("*class-descriptions*.csv"), key=lambda p: "boxable" not in p.name)
    must(described)
    rows = csv_of(described[0])
    must(all(len(row) == 2 for row in rows))
    has_header = rows and rows[0][0].lower() in ("labelname", "id", "mid")
    objects = Classes((row[0], row[1]) for row in (rows[1:] if has_header else rows))
    triplets = sorted(root.glob("*relationship-triplets*.csv")) or sorted(tables.values())
    labels = {row["RelationshipLabel"] for file in triplets for row in table_of(file, "RelationshipLabel") if row}
    predicates = Classes(((label, label) for label in sorted(labels) if label.strip() and label != "is"), False)
    expected = Expected(objects.names, predicates.names)
    keys = [[f"{side}{end}" for side in ("XMin", "YMin", "XMax", "YMax")] for end in (1, 2)]
    images: dict[str, list] = {}
    for row in table_of(path, "ImageID", "RelationshipLabel", "LabelName1", "LabelName2", *keys[0], *keys[1]):
        if not row or not row["ImageID"]:
            expected.lose("refused", "relation")
            continue
        of_image = images.setdefault(row["ImageID"], [])
        ends = [_fractions(row[f"LabelName{n + 1}"], [row[key] for key in keys[n]], objects) for n in (0, 1)]
        label = row["RelationshipLabel"]
        if ends[0] and (label == "is" or (ends[1] and label in predicates.numbers)):
            of_image.append((label, *ends))
        else:
            expected.lose("refused", "relation")
    marks = chosen([f"{name}.jpg" for name in images], "validation" in tables, options)
    wanted = [(name, of_image) for (name, of_image), mark in zip(images.items(), marks) if mark]
    rows_of = [_csv_record(f"{name}.jpg", of_image, files, expected) for name, of_image in wanted]
    records(expected, objects, predicates, rows_of, extents=False)
    return expected


def _fractions(label: str, texts: list[str], objects: Classes) -> tuple | None:
    if "_" in "".join(texts):
        return None
    try:
        box = [float(text) for text in texts]
    except ValueError:
        return None
    valid = all(0 <= value <= 1 for value in box) and box[0] < box[2] and box[1] < box[3]
    return (label, *box) if valid and objects.numbers.get(label) else None


def _csv_record(name: str, rows: list[tuple], files: dict[str, Any], expected: Expected) -> tuple:
    file = _found(name, files)
    width, height = (1024, 1024) if file is None or files[file] is None else files[file][0]
    ends: list[tuple] = []
    relations = []
    for label, subject, object_ in rows:
        pair = [subject] if label == "is" else [subject, object_]
        ends += [end for place, end in enumerate(pair) if end not in ends and end not in pair[:place]]
        if label == "is":
            expected.lose("left out", "attribute")
        else:
            relations.append([ends.index(subject), ends.index(object_), label])
    sides = width, height, width, height
    return name, width, height, [(e[0], [v * s for v, s in zip(e[1:], sides)]) for e in ends], relations


def gqa(root: Path, options: Options) -> Expected:
    """Read GQA."""
    has_test = any((root / folder / "test_sceneGraphs.json").exists() for folder in ("", "sceneGraphs"))
    names = {"train": "train", "validation": "val", "test": "test"} if has_test else {"train": "train", "test": "val"}
    files = split_files(root, "sceneGraphs", {split: f"{name}_sceneGraphs.json" for split, name in names.items()})
    path = split_file(files, options)
    contents = {file: json_of(file, dict) for file in files.values()}
    classes: dict[str, set[str]] = {"object": set(), "relation": set()}
    for content in contents.values():
        for _, _, objects, relations in _gqa_images(content, Expected([], [])):
            classes["object"] |= {entry["name"] for entry in objects if _is_name(dict_of(entry).get("name"))}
            classes["relation"] |= {name for _, _, name in relations if _is_name(name)}
    of_objects, predicates = (Classes(((n, n) for n in sorted(names)), False) for names in classes.values())
    expected = Expected(of_objects.names, predicates.names)
    content = contents[path]
    marks = chosen([f"{key}.jpg" for key in content], "validation" in files, options)
    rows = []
    for key, graph, entries, relations in _gqa_images(
        {key: graph for (key, graph), mark in zip(content.items(), marks) if mark}, expected
    ):
        values = [dict_of(entry).get("attributes") for entry in entries]
        expected.lose("left out", "attribute", sum(len(v) if isinstance(v, list) else 1 for v in values if v))
        objects = [
            (dict_of(entry).get("name"), [entry.get(k) for k in "xywh"] if isinstance(entry, dict) else None)
            for entry in entries
        ]
        rows.append((f"{key}.jpg", graph.get("width"), graph.get("height"), objects, relations))
    records(expected, of_objects, predicates, rows, extents=True)
    return expected


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _gqa_images(content: dict, expected: Expected) -> Iterable[tuple[str, dict, list, list]]:
    """Yield key, entry, objects and relations of each image, and count the rows that are refused."""
    for key, graph in content.items():
        if not isinstance(dict_of(graph).get("objects"), dict):
            expected.lose("refused", "image")
            continue
        ids, relations = list(graph["objects"]), []
        for subject, entry in graph["objects"].items():
            rows = entry.get("relations") if isinstance(entry, dict) else []
            if not isinstance(rows, list):
                expected.lose("refused", "object")
                continue
            for row in rows:
                if isinstance(target := dict_of(row).get("object"), str) and target in ids:
                    relations.append((ids.index(subject), ids.index(target), row.get("name")))
                else:
                    expected.lose("refused", "relation")
        yield key, graph, list(graph["objects"].values()), relations
