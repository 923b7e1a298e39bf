"""Tests of the reader of PSG on hand-made files."""

import json

import pytest
from PIL import Image

from sgalign.commands import main as cli
from sgalign.data import CocoDataset, PSGDataset, open_dataset

THINGS, STUFF, PREDICATES = ["person", "dog"], ["grass-merged", "sky-other-merged"], ["on", "beside"]


def entry(name, *, relations=((0, 2, 0),), **changes):
    """Return the entry of an image of 100 x 80 pixels with a person, a dog and grass."""
    boxes = [[10, 10, 30, 60], [40, 30, 70, 60], [0, 50, 100, 80]]
    return {
        "file_name": f"val2017/{name}.jpg",
        "width": 100,
        "height": 80,
        "image_id": name,
        "pan_seg_file_name": f"panoptic_val2017/{name}.png",
        "segments_info": [
            {"id": number, "category_id": c, "isthing": int(c < 2)} for number, c in enumerate((0, 1, 2))
        ],
        "annotations": [{"bbox": box, "bbox_mode": 0, "category_id": c} for box, c in zip(boxes, (0, 1, 2))],
        "relations": [list(relation) for relation in relations],
    } | changes


def write(root, rows, test_ids=("9",), name="psg.json", **changes):
    root.mkdir(exist_ok=True)
    content = {
        "thing_classes": THINGS,
        "stuff_classes": STUFF,
        "predicate_classes": PREDICATES,
        "test_image_ids": list(test_ids),
        "data": rows,
    }
    (root / name).write_text(json.dumps(content | changes))
    return root


def found(dataset, outcome):
    return {finding.kind: finding.count for finding in dataset.findings.with_outcome(outcome)}


def test_boxes_classes_and_relations_are_read(tmp_path):
    root = write(tmp_path / "psg", [entry("9", relations=[(0, 2, 0), (1, 0, 1), (1, 0, 1)])])
    dataset = open_dataset(root, "test")
    assert isinstance(dataset, PSGDataset) and len(dataset) == 1
    assert dataset.object_names == ["__background__", *THINGS, *STUFF]
    assert dataset.predicate_names == ["__background__", *PREDICATES]
    graph = dataset[0]
    assert (graph.image_id, graph.width, graph.height, graph.image) == ("val2017/9.jpg", 100, 80, None)
    assert graph.boxes.tolist() == [[10, 10, 30, 60], [40, 30, 70, 60], [0, 50, 100, 80]]
    assert graph.labels.tolist() == [1, 2, 3]
    assert graph.relations.tolist() == [[0, 2, 1], [1, 0, 2], [1, 0, 2]]  # a repeated relation is kept
    assert found(dataset, "left out") == {"mask of a segment": 3}


def test_the_test_split_is_named_and_validation_images_are_held_out(tmp_path):
    rows = [entry(str(number)) for number in range(12)] + [entry("none", relations=[])]
    root = write(tmp_path / "psg", rows, test_ids=[9, "10"])  # a number and a text are the same id
    parts = {split: [g.image_id for g in open_dataset(root, split)] for split in ("train", "validation", "test")}
    assert parts["test"] == ["val2017/9.jpg", "val2017/10.jpg"]
    assert len(parts["validation"]) == 2 and len(parts["train"]) == 9  # a fifth of the ten images with relations
    assert "val2017/none.jpg" in parts["train"]
    first = open_dataset(root, "validation", validation_images=3, validation_choice="first")
    assert [graph.image_id for graph in first] == [f"val2017/{number}.jpg" for number in range(3)]


@pytest.mark.parametrize("folder", ["psg", "psg/coco", "psg/images", "coco"])
def test_images_are_found_where_openpsg_keeps_them(tmp_path, folder):
    root = write(tmp_path / "psg", [entry("9")])
    path = tmp_path / folder / "val2017" / "9.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 80), "red").save(path)
    assert open_dataset(root, "test")[0].image().size == (100, 80)


def test_missing_images_are_counted_if_their_folder_exists(tmp_path):
    root = write(tmp_path, [entry("9")])
    assert found(open_dataset(root, "test"), "found") == {}
    (root / "coco" / "val2017").mkdir(parents=True)
    assert found(open_dataset(root, "test"), "found") == {"image without a file": 1}


def test_the_first_of_several_files_is_read(tmp_path):
    write(tmp_path, [entry("9")], name="psg_train_val.json")
    assert len(open_dataset(tmp_path, "test")) == 1
    write(tmp_path, [entry("9"), entry("8")], test_ids=["8", "9"])
    assert len(open_dataset(tmp_path, "test")) == 2


ANNOTATION = {"bbox": [0, 0, 5, 5], "category_id": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"bbox": [10, 10, 5, 60], "category_id": 0}], "relations": []},
            "data, row 0, object 0: its box x1, y1, x2, y2",
        ),
        (
            {"annotations": [{"bbox": [10, 10, 50], "category_id": 0}], "relations": []},
            "must be 4 numbers x1, y1, x2, y2",
        ),
        ({"annotations": [{"bbox": [0, 0, float("nan"), 5], "category_id": 0}], "relations": []}, "finite"),
        ({"annotations": [ANNOTATION | {"category_id": 4}], "relations": []}, "its class must be the id of a class"),
        ({"annotations": ["person"], "relations": []}, "its class must be|its box must be"),
        ({"relations": [[0, 3, 0]]}, "row 0, relation 0: its objects must be two of the image's 3, from 0"),
        ({"relations": [[0, -1, 0]]}, "its objects must be two of the image's 3, from 0"),
        ({"relations": [[0, 1]]}, r"must be \[subject, object, predicate\]"),
        ({"relations": [[0, 1, 2]]}, "its predicate must be the id of a class"),
        ({"relations": 3}, "lists of annotations and relations"),
        ({"width": 0}, "width and height must be whole numbers from 1 to 16777216"),
        ({"file_name": "../9.jpg"}, "must be a path in the data set's folder"),
        ({"file_name": 9}, "must be a path in the data set's folder"),
    ],
)
def test_a_malformed_entry_is_refused_or_skipped_and_counted(tmp_path, changes, message):
    root = write(tmp_path, [entry("9") | changes, entry("8")], test_ids=["8", "9"])
    with pytest.raises(ValueError, match=message):
        open_dataset(root, "test")
    dataset = open_dataset(root, "test", bad_rows="skip")
    assert sum(found(dataset, "refused").values()) == 1
    assert "val2017/8.jpg" in [graph.image_id for graph in dataset]


def test_relations_of_a_refused_object_are_left_out(tmp_path):
    annotations = [ANNOTATION | {"bbox": [3, 3, 2, 2]}, ANNOTATION, ANNOTATION]
    rows = [entry("9", annotations=annotations, relations=[(0, 1, 0), (2, 1, 1)])]
    dataset = open_dataset(write(tmp_path, rows), "test", bad_rows="skip")
    assert dataset[0].relations.tolist() == [[1, 0, 2]]
    assert found(dataset, "left out") == {"mask of a segment": 3, "relation of a refused object": 1}


def test_an_image_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image names must be unique, but 'val2017/9.jpg' occurs twice"):
        open_dataset(write(tmp_path, [entry("9"), entry("9") | {"image_id": "8"}], test_ids=["8", "9"]), "test")


@pytest.mark.parametrize("image_id", [None, True, 8.5, "9", 9])
def test_the_id_of_an_image_must_be_its_own(tmp_path, image_id):
    root = write(tmp_path, [entry("9"), entry("8") | {"image_id": image_id}])
    with pytest.raises(ValueError, match="row 1: image_id must be a number or text that no other image has"):
        open_dataset(root, "test")


def test_ids_of_test_images_must_be_ids_and_unknown_ones_are_counted(tmp_path):
    root = write(tmp_path, [entry("9"), entry("8")], test_ids=["9", "0008", 777])
    assert found(open_dataset(root, "test"), "found") == {"id of a test image that no image has": 2}
    with pytest.raises(ValueError, match=r"test_image_ids: must be numbers or text, got \[8\]"):
        open_dataset(write(tmp_path, [entry("9")], test_ids=["9", [8]]), "test")


def test_malformed_segments_are_ignored_like_all_masks(tmp_path):
    root = write(tmp_path, [entry("9") | {"segments_info": 5}])
    assert found(open_dataset(root, "test"), "left out") == {}


@pytest.mark.parametrize("key", ["thing_classes", "stuff_classes", "predicate_classes", "test_image_ids", "data"])
def test_a_file_without_one_of_its_lists_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=rf"psg.json: must be a JSON object with a list {key}"):
        open_dataset(write(tmp_path, [], **{key: None}), "test")


def test_boxes_in_the_wrong_unit_are_named(tmp_path):
    boxes = [{"bbox": [0.1, 0.1, 0.5, 0.9], "category_id": 0}, {"bbox": [0, 0, 1, 1], "category_id": 1}]
    dataset = open_dataset(write(tmp_path, [entry("9", annotations=boxes, relations=[])]), "test")
    assert "all numbers of all boxes are between 0 and 1" in dataset.findings.causes[0]


def test_it_is_checked_and_converted(tmp_path, capsys):
    rows = [entry(str(number)) for number in range(12)]
    root = write(tmp_path / "psg", rows, test_ids=["9", "10"])
    assert cli.main(["check", str(root)]) == 0
    assert "mask" in capsys.readouterr().out
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--format", "coco", "--source", str(root)]) == 0
    for split in ("train", "validation", "test"):
        before, after = open_dataset(root, split), CocoDataset(tmp_path / "out", split)
        assert before.object_names == after.object_names and before.predicate_names == after.predicate_names
        assert len(before) == len(after) > 0
        for one, other in zip(before, after):
            assert one.image_id == other.image_id and one.relations.tolist() == other.relations.tolist()
            assert one.boxes.tolist() == other.boxes.tolist() and one.labels.tolist() == other.labels.tolist()
