"""Fuzz the readers of data sets. Each must load what a slow reader in plain Python loads, or refuse the input."""

import json
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_coco
import plain_readers
import plain_vg150
import torch
from fuzzing import Draw, Target, changed_bytes, changed_csv, changed_json, instrumented, main, one_of, write_hdf5
from plain_values import LARGEST, SPLITS, Expected, Malformed, Options

with instrumented():
    from sgalign.data import open_dataset
    from sgalign.data.coco import CocoDataset
    from sgalign.data.coco_writing import write_coco
    from sgalign.data.gqa import GQADataset
    from sgalign.data.open_images import OpenImagesDataset
    from sgalign.data.psg import PSGDataset
    from sgalign.data.scene_graph import SceneGraph
    from sgalign.data.vg150 import KEEP, VG150Dataset, write_vg150
    from sgalign.data.vrd import VRDDataset, write_vrd
    from sgalign.errors import InputError

EXACT = 2**26  # no box of valid numbers reaches farther in its file's unit
NOUNS = {"annotation": "object"}


# ---- drawing


def drawn_options(draw: Draw) -> tuple[Options, str]:
    """Draw the options of a reader, and `bad_rows`."""
    split = one_of(draw, *SPLITS)
    wanted = one_of(draw, None, None, None, None, 0, 1, 2, 5, -1)
    return Options(split, wanted, one_of(draw, "hash", "hash", "hash", "first")), one_of(draw, "skip", "error")


def put(draw: Draw, path: Path, content: Any, most: int = 4) -> None:
    """Write a JSON file of which up to `most` parts were changed, and sometimes bytes of the text, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(changed_json(draw, content, most)).encode()
    path.write_bytes(changed_bytes(draw, text) if draw.ConsumeIntInRange(0, 9) == 9 else text)


def png(width: int, height: int) -> bytes:
    """Return a PNG file that says this size, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gif(width: int, height: int) -> bytes:
    """Return a GIF file that says this size."""
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def rotated(width: int, height: int, orientation: int) -> bytes:
    """Return the head of a JPEG file of this size with an EXIF orientation."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1" + struct.pack(">H", orientation) + b"\0\0\0\0\0\0"
    frame = b"\x08" + struct.pack(">HH", height, width) + b"\1\1\x11\0"
    segments = ((b"\xff\xe1", exif), (b"\xff\xc0", frame), (b"\xff\xda", b"\1\1\0\0?\0"))
    return b"\xff\xd8" + b"".join(mark + struct.pack(">H", len(part) + 2) + part for mark, part in segments)


def put_images(draw: Draw, folder: Path, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Write image files of odd sizes.

    Return the stored and the upright size of each by its name. The sizes of a file that cannot be read are None. Return
    None instead of the dict if bytes of a file were changed, so its size is unknown.
    """
    files: dict[str, Any] | None = {}
    for name in names:
        side = [1, 2, 90, 100, 3000, 65535]
        width, height = one_of(draw, *side), one_of(draw, *side)
        kind = draw.ConsumeIntInRange(0, 9)
        sizes: Any = ((width, height), (width, height))
        if kind == 0:
            continue
        if kind <= 3:
            content = png(width, height)
        elif kind == 4:
            content = gif(width, height)
        elif kind <= 6:
            content = rotated(width, height, orientation := draw.ConsumeIntInRange(0, 9))
            sizes = ((width, height), (height, width) if 5 <= orientation <= 8 else (width, height))
        elif kind == 7:
            content, sizes = one_of(draw, b"", b"text", b"\xff\xd8", png(0, 9), png(2**31, 2)), None
        else:
            content, files = changed_bytes(draw, png(width, height)), None
        if width * height > 2 * 89_478_485:  # twice Pillow's limit, from which on it refuses an image
            sizes = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        if files is not None:
            files[name] = sizes
    return files


# ---- comparing


def read(kind: Any, folder: Path, options: Options, bad_rows: str) -> Any:
    """Return the data set that the package reads."""
    other = {"keep": options.keep} if kind is VG150Dataset else {}
    chosen = {"validation_images": options.wanted, "validation_choice": options.choice}
    return kind(folder, options.split, bad_rows=bad_rows, **chosen, **other)


def agree(kind: Any, folder: Path, options: Options, bad_rows: str, plain: Callable[[], Expected] | None) -> Any:
    """Read a data set, and require that it is what the plain reader expects. Without one, require only valid graphs."""
    try:
        expected = plain() if plain else None
    except Malformed:
        expected = None
    try:
        dataset = read(kind, folder, options, bad_rows)
    except (InputError, OSError) as error:
        valid = expected is not None and (bad_rows == "skip" or not expected.refused)
        assert not valid, f"a valid input was refused: {error}"
        raise
    graphs = list(dataset)
    for graph in graphs:
        check_graph(graph, dataset)
    if plain is None:
        return dataset
    assert expected is not None, "a malformed input was accepted"
    assert dataset.object_names == expected.objects, "names of objects"
    assert dataset.predicate_names == expected.predicates, "names of predicates"
    assert [fields(graph) for graph in graphs] == [list(graph) for graph in expected.graphs], "graphs"
    lost: Counter[tuple[str, str]] = Counter()
    for finding in dataset.findings:
        noun = finding.kind.split()[0]
        if finding.outcome in ("refused", "left out"):
            lost[finding.outcome, NOUNS.get(noun, noun)] += finding.count
    assert lost == expected.lost, f"counted {dict(lost)}, but lost {dict(expected.lost)}"
    return dataset


def fields(graph: SceneGraph) -> list[Any]:
    """Return the fields of a graph as plain values."""
    tensors = [graph.boxes.tolist(), graph.labels.tolist(), graph.relations.tolist()]
    return [graph.image_id, graph.width, graph.height, *tensors]


def check_graph(graph: SceneGraph, dataset: Any) -> None:
    """Fail an assertion if a graph is impossible, or refers to classes that its data set does not have."""
    tensors = graph.boxes, graph.labels, graph.relations
    assert [tensor.dtype for tensor in tensors] == [torch.float32, torch.int64, torch.int64], "dtypes"
    boxes, labels, relations = (tensor.tolist() for tensor in tensors)
    assert len(boxes) == len(labels) and all(len(row) == 3 for row in relations), "shapes"
    assert type(graph.width) is type(graph.height) is int and min(graph.width, graph.height) >= 1, "size"
    assert max(graph.width, graph.height) <= LARGEST, "size"
    farthest = EXACT * max(graph.width, graph.height)
    assert all(abs(value) <= farthest for box in boxes for value in box), "boxes"
    assert all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in boxes), "order of boxes"
    assert all(1 <= label < len(dataset.object_names) for label in labels), "labels"
    assert all(0 <= end < len(labels) for row in relations for end in row[:2]), "ends of relations"
    assert all(1 <= row[2] < len(dataset.predicate_names) for row in relations), "predicates"
    assert isinstance(graph.image_id, str) and graph.image_id.encode() and "\0" not in graph.image_id, "name"


# ---- targets


def make_vrd(draw: Draw, folder: Path, split: str, most: int = 4) -> None:
    """Write the files of VRD for a split."""
    person, horse = {"category": 0, "bbox": [10, 60, 20, 80]}, {"category": 1, "bbox": [0, 5, 1, 9]}
    annotations = {
        "a.jpg": [{"subject": person, "predicate": 1, "object": horse}],
        "b.jpg": [{"subject": horse, "predicate": 0, "object": horse}],
        "c": [],
    }
    put(draw, folder / f"annotations_{'test' if split == 'test' else 'train'}.json", annotations, most)
    put(draw, folder / "objects.json", ["person", "horse"], one_of(draw, 0, 0, 0, 1))
    put(draw, folder / "predicates.json", ["on", "above"], one_of(draw, 0, 0, 0, 1))


def vrd(draw: Draw, folder: Path) -> None:
    """Read VRD, also with image files."""
    options, bad_rows = drawn_options(draw)
    make_vrd(draw, folder, options.split)
    files = put_images(draw, folder / "images", ("a.jpg", "b.png")) if draw.ConsumeBool() else {}
    plain = None if files is None else partial(plain_readers.vrd, folder, options, files)
    agree(VRDDataset, folder, options, bad_rows, plain)


def vg150(draw: Draw, folder: Path) -> None:
    """Read VG150 with every value of keep."""
    options, bad_rows = drawn_options(draw)
    options.keep = one_of(draw, *KEEP)
    make_vg150(draw, folder)
    agree(VG150Dataset, folder, options, bad_rows, partial(plain_vg150.vg150, folder, options))


def make_vg150(draw: Draw, folder: Path) -> None:
    """Write VG150's files."""
    side, dtype = one_of(draw, 1024, 512), one_of(draw, "i4", "i8", "f4", "f8")
    arrays = {
        f"boxes_{side}": np.array([[50, 60, 21, 30], [80, 80, 9, 9], [500, 400, 51, 60], [9, 9, 5, 5]], dtype),
        "labels": np.array([[1], [2], [2], [1]]),
        "relationships": np.array([[0, 1], [1, 0], [2, 2]], "i4"),
        "predicates": np.array([[1], [2], [1]]),
        "split": np.array([0, 0, 2, one_of(draw, 0, 1)], "i4"),
        "img_to_first_box": np.array([0, 2, 3, -1], "i4"),
        "img_to_last_box": np.array([1, 2, 3, -1], "i4"),
        "img_to_first_rel": np.array([0, 2, -1, -1], "i4"),
        "img_to_last_rel": np.array([1, 2, -1, -1], "i4"),
    }
    name = one_of(draw, "VG-SGG.h5", "VG-SGG-with-attri.h5", "other.h5")
    write_hdf5(draw, folder / name, arrays, {}, one_of(draw, 3, 2, 1, 0))
    dicts = {
        "idx_to_label": {"1": "cat", "2": "hat"},
        "label_to_idx": {"cat": 1, "hat": 2},
        "idx_to_predicate": {"1": "on", "2": "by"},
        "predicate_to_idx": {"on": 1, "by": 2},
    }
    name = one_of(draw, "VG-SGG-dicts.json", "VG-SGG-dicts-with-attri.json", "my-dicts.json")
    put(draw, folder / name, dicts, one_of(draw, 0, 0, 0, 2))
    rows = [{"image_id": number, "width": 800, "height": 600} for number in (1, 2, 1592)]
    more = [{"image_id": key, "width": 9, "height": 9} for key in (1722, 4616, 4617)] + [{"image_id": 1592}]
    rows = [*rows, {"file_name": "d.png", "width": 1, "height": 1}]
    rows = (
        rows if draw.ConsumeIntInRange(0, 3) else [*rows[:2], {"image_id": 3, "width": 8, "height": 6}, *more, rows[3]]
    )
    put(draw, folder / "image_data.json", rows, one_of(draw, 0, 2, 4))


def make_coco(draw: Draw, folder: Path, most: int = 4) -> None:
    """Write COCO files in one of the layouts."""
    names = {"train": ("train", "train"), "val": ("val", one_of(draw, "val", "valid")), "test": ("test", "test")}
    beside, in_folders = draw.ConsumeBool(), draw.ConsumeBool()
    size = {"width": 90, "height": 80}
    images = [{"id": number, "file_name": f"{number}.jpg"} | size for number in (1, 2, 3)]
    boxes = [(1, 1, [5, 5, 10, 10]), (1, 2, [0.5, 2, 30.25, 8]), (2, 2, [1, 2, 3, 4]), (2, 1, [0, 0, 90, 80])]
    annotations = [
        {"id": 10 + n, "image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
        for n, (image, label, box) in enumerate(boxes)
    ]
    base = {"images": images, "annotations": annotations}
    base["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "hat"}]
    inside = [(10, 11, 1), (11, 11, 0), (13, 12, 1)]
    if not beside:
        base["rel_categories"] = [{"id": 0, "name": "on"}, {"id": 1, "name": "by"}]
        base["rel_annotations"] = [
            {"id": n, "subject_id": s, "object_id": o, "predicate_id": p} | ({"image_id": 1 + (s > 11)} if n else {})
            for n, (s, o, p) in enumerate(inside)
        ]
    for part in ("train", "val", "test"):
        if part != "train" and draw.ConsumeIntInRange(0, 2) == 0:
            continue
        plain, inner = names[part]
        path = folder / inner / "_annotations.coco.json" if in_folders else folder / f"{plain}.json"
        put(draw, path, base, most)
        if draw.ConsumeIntInRange(0, 49) == 49:
            put(draw, folder / f"{plain}.json", base, 0)
    if beside or draw.ConsumeIntInRange(0, 49) == 49:
        relations: dict[str, Any] = {"rel_categories": one_of(draw, ["on", "by"], ["__background__", "on", "by"])}
        for part in ("train", "val", "test"):
            relations[part] = {"1": [[0, 1, 1], [1, 1, 0]], "2": [[1, 0, 1]]}
        put(draw, folder / "rel.json", relations, most)


def coco(draw: Draw, folder: Path) -> None:
    """Read COCO files, with relations beside and inside."""
    options, bad_rows = drawn_options(draw)
    make_coco(draw, folder)
    agree(CocoDataset, folder, options, bad_rows, partial(plain_coco.coco, folder, options))


def psg(draw: Draw, folder: Path) -> None:
    """Read PSG."""
    options, bad_rows = drawn_options(draw)
    make_psg(draw, folder)
    agree(PSGDataset, folder, options, bad_rows, partial(plain_readers.psg, folder, options))


def make_psg(draw: Draw, folder: Path) -> None:
    """Write the file of PSG."""
    boxes = [(0, [10, 10, 30.5, 60]), (2, [0, 50, 100, 80])]
    rows = [
        {
            "file_name": f"val2017/{name}.jpg",
            "width": 100,
            "height": 80,
            "image_id": name,
            "segments_info": [{"id": 1}],
            "annotations": [{"bbox": box, "category_id": label} for label, box in boxes],
            "relations": relations,
        }
        for name, relations in (("7", [[0, 1, 0], [1, 0, 1]]), ("8", [[0, 0, 1]]), ("9", []))
    ]
    content = {"data": rows, "thing_classes": ["person"], "stuff_classes": ["grass", "sky"]}
    content |= {"predicate_classes": ["on", "by"], "test_image_ids": one_of(draw, ["9"], [7, "8"], [])}
    for name in one_of(draw, ("psg.json",), ("psg_train_val.json",), ("psg_val_test.json", "psg.json")):
        put(draw, folder / name, content, 4)


def open_images_json(draw: Draw, folder: Path) -> None:
    """Read the JSON files of Open Images."""
    options, bad_rows = drawn_options(draw)
    place = folder / one_of(draw, "annotations", ".")
    put(draw, place / "categories_dict.json", {"obj": ["Man", "Hat"], "rel": ["at", "on"]}, one_of(draw, 0, 0, 0, 1))
    row = {"bbox": [[8, 12, 40, 45], [20, 30, 40.5, 45]], "det_labels": [0, 1], "img_size": [80, 60]}
    rows = [row | {"img_fn": name, "rel": [[0, 1, 1], [1, 1, 0]]} for name in ("aa", "b.jpg", "c")]
    for part in ("train", "val", "test"):
        if part == "train" or draw.ConsumeIntInRange(0, 2):
            put(draw, place / f"vrd-{part}-anno.json", rows)
            if draw.ConsumeIntInRange(0, 49) == 49:
                put(draw, folder / f"vrd-{part}-anno.json", rows, 0)
    agree(OpenImagesDataset, folder, options, bad_rows, partial(plain_readers.open_images_json, folder, options))


COLUMNS = "ImageID LabelName1 LabelName2 XMin1 XMax1 YMin1 YMax1 XMin2 XMax2 YMin2 YMax2 RelationshipLabel".split()


def open_images_csv(draw: Draw, folder: Path) -> None:
    """Read the CSV files of Open Images, also with image files."""
    options, bad_rows = drawn_options(draw)
    man, hat = ["0.1", "0.5", "0.2", "0.75"], ["0.25", "0.5", "0.125", "0.25"]
    rows = [COLUMNS]
    rows += [[name, "/m/man", "/m/hat", *man, *hat, "wears"] for name in ("aa", "b", "aa", "c")]
    rows += [["b", "/m/hat", "/m/man", *hat, *man, "is"], ["c", "/m/hat", "/m/man", *hat, *man, "on"]]
    for part in ("train", "validation", "test"):
        if part == "train" or draw.ConsumeIntInRange(0, 2):
            put_csv(draw, folder / f"oidv6-{part}-annotations-vrd.csv", rows, 4)
    described = [["/m/man", "Man"], ["/m/hat", "Hat"]]
    described = [["LabelName", "DisplayName"], *described] if draw.ConsumeBool() else described
    put_csv(draw, folder / one_of(draw, "class-descriptions-boxable.csv", "class-descriptions.csv"), described, 1)
    if draw.ConsumeBool():
        triplets = [["LabelName1", "LabelName2", "RelationshipLabel"], ["/m/man", "/m/hat", "wears"], ["", "", "on"]]
        put_csv(draw, folder / "oidv6-relationship-triplets.csv", triplets, 1)
    files = put_images(draw, folder / "images", ("aa.jpg", "b.png")) if draw.ConsumeBool() else {}
    plain = None if files is None else partial(plain_readers.open_images_csv, folder, options, files)
    agree(OpenImagesDataset, folder, options, bad_rows, plain)


def put_csv(draw: Draw, path: Path, rows: list[list[str]], most: int) -> None:
    """Write a CSV file of which up to `most` parts were changed."""
    content = changed_csv(draw, rows, most)
    path.write_bytes(changed_bytes(draw, content) if draw.ConsumeIntInRange(0, 9) == 9 else content)


def gqa(draw: Draw, folder: Path) -> None:
    """Read GQA."""
    options, bad_rows = drawn_options(draw)
    make_gqa(draw, folder)
    agree(GQADataset, folder, options, bad_rows, partial(plain_readers.gqa, folder, options))


def make_gqa(draw: Draw, folder: Path) -> None:
    """Write GQA's files."""
    dog = {"name": "dog", "x": 10, "y": 20, "w": 30, "h": 15.5, "attributes": ["brown"]}
    dog |= {"relations": [{"name": "near", "object": "3"}, {"name": "on", "object": "7"}]}
    car = {"name": "car", "x": 0, "y": 5, "w": 60, "h": 40, "attributes": [], "relations": []}
    graphs = {key: {"width": 80, "height": 60, "objects": {"7": dog, "3": car}} for key in ("1", "2", "b")}
    place = folder / one_of(draw, ".", "sceneGraphs")
    for part in ("train", "val", "test"):
        if part == "train" or draw.ConsumeIntInRange(0, 1 if part == "test" else 3):
            put(draw, place / f"{part}_sceneGraphs.json", graphs)


# ---- writing


def written_coco(draw: Draw, folder: Path) -> str | None:
    """Convert a data set of any layout to COCO's, and require that it is read back unchanged."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    options, _ = drawn_options(draw)
    make = one_of(draw, make_coco, make_psg, make_gqa, make_vg150, partial(make_vrd, split=options.split))
    make(draw, source)
    dataset = open_dataset(source, options.split, bad_rows="skip", keep="everything")  # type: ignore[arg-type]
    try:
        write_coco({options.split: dataset}, dataset.object_names, dataset.predicate_names, out)  # type: ignore[dict-item]
    except InputError as error:
        flat = any((graph.boxes[:, 2:] <= graph.boxes[:, :2]).any() for graph in dataset)
        far = any((graph.boxes.abs() > LARGEST / 2).any() for graph in dataset)
        reasons = ["file names", "background"] + ["bbox"] * (flat or far)
        assert any(reason in str(error) for reason in reasons), error
        return "refused by the writer"
    again = CocoDataset(out, options.split)  # type: ignore[arg-type]
    assert (again.object_names, again.predicate_names) == (dataset.object_names, dataset.predicate_names)
    assert [fields(graph)[1:] for graph in again] == [fields(graph)[1:] for graph in dataset]
    assert not list(again.findings.with_outcome("left out"))
    return None


def written_vrd(draw: Draw, folder: Path) -> str | None:
    """Write a VRD data set again. All its objects have relations, so nothing may be lost."""
    make_vrd(draw, folder, "test")
    dataset = VRDDataset(folder, "test", bad_rows="skip")
    names = dataset.object_names, dataset.predicate_names
    try:
        write_vrd({"test": list(dataset)}, *names, folder / "out")
    except InputError as error:
        assert "file name" in str(error) or "background" in str(error), error
        return "refused by the writer"
    again = VRDDataset(folder / "out", "test")
    assert (again.object_names, again.predicate_names) == names
    assert [fields(graph)[1:] for graph in again] == [fields(graph)[1:] for graph in dataset]
    return None


def written_vg150(draw: Draw, folder: Path) -> str | None:
    """Write a VG150 data set again. Its boxes are rounded to the unit of the file, and all else is unchanged."""
    (folder / "source").mkdir()
    make_vg150(draw, folder / "source")
    dataset = VG150Dataset(folder / "source", "test", bad_rows="skip", keep="everything")
    names = dataset.object_names, dataset.predicate_names
    try:
        write_vg150({"test": list(dataset)}, *names, folder / "out")
    except InputError as error:
        assert "background" in str(error), error
        return "refused by the writer"
    again = VG150Dataset(folder / "out", "test", keep="everything")
    assert (again.object_names, again.predicate_names) == names
    for one, other in zip(dataset, again, strict=True):
        assert fields(one)[1:3] + fields(one)[4:] == fields(other)[1:3] + fields(other)[4:]
        unit = max(one.width, one.height) / 1024
        assert not len(one.boxes) or (one.boxes - other.boxes).abs().max() <= 2 * unit * (1 + 2**-20), "boxes"
    return None


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(vrd, vg150, coco, psg, open_images_json, open_images_csv, gqa),
        *(written_coco, written_vrd, written_vg150),
    )
}

if __name__ == "__main__":
    logging.getLogger("sgalign").setLevel(logging.ERROR)  # each input would log what it left out
    main(TARGETS)
