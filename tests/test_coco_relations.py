"""Tests of COCO files that have their relations inside, as SGG-Benchmark reads them."""

import json

import pytest
from PIL import Image

from sgalign.commands import main as cli
from sgalign.data import CocoDataset, open_dataset

IMAGES = [
    {"id": 5, "file_name": "a.jpg", "width": 100, "height": 80},
    {"id": 6, "file_name": "b.jpg", "width": 100, "height": 80},
]
# The annotations of an image need not stand together, and their ids need not be in order.
ANNOTATIONS = [
    {"id": 70, "image_id": 6, "category_id": 1, "bbox": [0, 0, 50, 50]},
    {"id": 12, "image_id": 5, "category_id": 2, "bbox": [10, 10, 20, 30]},
    {"id": 3, "image_id": 6, "category_id": 2, "bbox": [20, 20, 30, 30]},
    {"id": 11, "image_id": 5, "category_id": 1, "bbox": [0, 0, 40, 40]},
]
RELATION = {"id": 0, "subject_id": 3, "predicate_id": 4, "object_id": 70, "image_id": 6}
RELATIONS = [RELATION, {"id": 1, "subject_id": 12, "predicate_id": 2, "object_id": 11, "image_id": 5}]


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": IMAGES,
        "annotations": ANNOTATIONS,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "hat"}],
        "rel_categories": [{"id": 4, "name": "on"}, {"id": 2, "name": "by"}],
        "rel_annotations": RELATIONS,
    }
    path.write_text(json.dumps(content | changes))
    return path


def found(dataset, outcome):
    return {finding.kind: finding.count for finding in dataset.findings.with_outcome(outcome)}


def test_relations_refer_to_annotations_by_their_ids(tmp_path):
    write(tmp_path / "test.json")
    dataset = open_dataset(tmp_path, "test")
    assert isinstance(dataset, CocoDataset)
    assert dataset.predicate_names == ["__background__", "by", "on"]
    first, second = dataset
    assert first.relations.tolist() == [[0, 1, 1]] and first.labels.tolist() == [2, 1]
    assert second.relations.tolist() == [[1, 0, 2]] and second.boxes.tolist() == [[0, 0, 50, 50], [20, 20, 50, 50]]
    assert not list(dataset.findings)


@pytest.mark.parametrize("folder", ["val", "valid"])
def test_each_split_may_be_a_folder(tmp_path, folder):
    for name in ("train", folder, "test"):
        write(
            tmp_path / name / "_annotations.coco.json",
            images=[image | {"file_name": f"{name}_{image['file_name']}"} for image in IMAGES],
        )
        Image.new("RGB", (100, 80)).save(tmp_path / name / f"{name}_a.jpg")
    for split, name in {"train": "train", "validation": folder, "test": "test"}.items():
        dataset = open_dataset(tmp_path, split)
        assert [graph.image_id for graph in dataset] == [f"{name}_a.jpg", f"{name}_b.jpg"]
        assert dataset[0].image().size == (100, 80)
        assert found(dataset, "found") == {"image without a file": 1}


def test_validation_images_are_held_out_without_a_file_of_their_own(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 9, "height": 9} for n in range(10)]
    annotations = [{"id": n, "image_id": n // 2, "category_id": 1, "bbox": [0, 0, 3, 3]} for n in range(20)]
    relations = [{"subject_id": 2 * n, "object_id": 2 * n + 1, "predicate_id": 4} for n in range(10)]
    write(tmp_path / "train.json", images=images, annotations=annotations, rel_annotations=relations)
    parts = [open_dataset(tmp_path, split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [8, 2]
    assert all(graph.relations.tolist() == [[0, 1, 2]] for part in parts for graph in part)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"subject_id": 99},
            "relation to a missing object",
            "row 0: subject_id and object_id must be ids of annotations, got '99'",
        ),
        ({"object_id": None}, "relation to a missing object", "must be ids of annotations"),
        ({"object_id": 11}, "relation between objects of two images", "subject and object must be in the same image"),
        ({"image_id": 5}, "relation with another image than its objects", "image_id must be that of its objects"),
        ({"predicate_id": 3}, "relation with an unknown predicate", "predicate must be the id of a class"),
    ],
)
def test_a_malformed_relation_is_refused(tmp_path, change, kind, message):
    write(tmp_path / "test.json", rel_annotations=[RELATION | change, RELATIONS[1]])
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, "test")
    dataset = open_dataset(tmp_path, "test", bad_rows="skip")
    assert found(dataset, "refused") == {kind: 1}
    assert [len(graph.relations) for graph in dataset] == [1, 0]


@pytest.mark.parametrize("row", [7, {}, {"subject_id": 3, "object_id": 70}])
def test_a_relation_without_its_fields_is_refused(tmp_path, row):
    write(tmp_path / "test.json", rel_annotations=[row])
    with pytest.raises(ValueError, match="must have subject_id, predicate_id, object_id"):
        open_dataset(tmp_path, "test")


def test_relations_of_an_id_that_occurs_twice_are_left_out(tmp_path):
    twice = [*ANNOTATIONS, {"id": 3, "image_id": 6, "category_id": 1, "bbox": [1, 1, 2, 2]}]
    write(tmp_path / "test.json", annotations=twice)
    with pytest.raises(ValueError, match="annotations, row 4: id must be unique, but 3 occurs twice"):
        open_dataset(tmp_path, "test")
    dataset = open_dataset(tmp_path, "test", bad_rows="skip")
    assert len(dataset[1].labels) == 2 and not len(dataset[1].relations)
    assert found(dataset, "left out") == {"relation of an id that several annotations have": 1}


def test_relations_of_a_refused_object_or_image_are_left_out(tmp_path):
    write(tmp_path / "test.json", annotations=[ANNOTATIONS[0] | {"bbox": [0, 0, 0, 5]}, *ANNOTATIONS[1:]])
    dataset = open_dataset(tmp_path, "test", bad_rows="skip")
    assert found(dataset, "left out") == {"relation of a refused object": 1}
    write(tmp_path / "test.json", images=[IMAGES[0], IMAGES[1] | {"width": 0}])
    dataset = open_dataset(tmp_path, "test", bad_rows="skip")
    assert found(dataset, "left out") == {"object of a refused image": 2, "relation of a refused image": 1}


@pytest.mark.parametrize("missing", ["rel_annotations", "rel_categories"])
def test_a_file_without_relations_is_refused(tmp_path, missing):
    path = write(tmp_path / "test.json")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != missing}))
    with pytest.raises(ValueError, match=rf"test.json: must have .*{missing}"):
        open_dataset(tmp_path, "test")


def test_it_is_checked_and_converted(tmp_path, capsys):
    for name in ("train", "val", "test"):
        write(tmp_path / "in" / f"{name}.json")
    assert cli.main(["check", str(tmp_path / "in")]) == 0
    assert "2 predicate classes" in capsys.readouterr().out
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--format", "coco", "--source", str(tmp_path / "in")]) == 0
    before, after = open_dataset(tmp_path / "in", "test"), open_dataset(tmp_path / "out", "test")
    for one, other in zip(before, after, strict=True):
        assert one.relations.tolist() == other.relations.tolist() and one.boxes.tolist() == other.boxes.tolist()


def test_images_of_one_name_in_two_splits_are_not_overwritten(tmp_path, capsys):
    for name, color in (("train", "red"), ("test", "blue")):
        write(tmp_path / "in" / name / "_annotations.coco.json")
        Image.new("RGB", (100, 80), color).save(tmp_path / "in" / name / "a.jpg")
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--source", str(tmp_path / "in")]) == 1
    assert "must have different file names, got 'a.jpg' twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--source", str(tmp_path / "in"), "--no-images"]) == 0


def test_an_image_that_is_in_two_splits_is_converted(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "in" / f"{name}.json")
    Image.new("RGB", (100, 80), "red").save(tmp_path / "in" / "a.jpg")
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--source", str(tmp_path / "in")]) == 0
    assert (tmp_path / "out" / "images" / "a.jpg").exists()


def test_splits_with_other_numbers_of_the_classes_are_not_converted(tmp_path, capsys):
    write(tmp_path / "in" / "train.json")
    write(tmp_path / "in" / "test.json", categories=[{"id": 2, "name": "cat"}, {"id": 1, "name": "hat"}])
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--source", str(tmp_path / "in")]) == 1
    assert "object_names must be the same in all splits" in capsys.readouterr().err


def test_relations_in_two_places_and_two_files_of_a_split_are_refused(tmp_path):
    write(tmp_path / "a" / "test.json")
    (tmp_path / "a" / "rel.json").write_text(json.dumps({"rel_categories": ["on"], "test": {}}))
    with pytest.raises(ValueError, match="must have no rel_annotations, because .*rel.json has the relations"):
        open_dataset(tmp_path / "a", "test")
    write(tmp_path / "b" / "test.json")
    write(tmp_path / "b" / "test" / "_annotations.coco.json")
    with pytest.raises(ValueError, match="must have one file of the test split"):
        open_dataset(tmp_path / "b", "test")


def test_an_annotation_without_an_image_is_refused(tmp_path):
    write(tmp_path / "test.json", annotations=[*ANNOTATIONS, {"id": 99, "category_id": 1, "bbox": [0, 0, 5, 5]}])
    with pytest.raises(ValueError, match="annotations, row 4: must have an image_id"):
        open_dataset(tmp_path, "test")
    dataset = open_dataset(tmp_path, "test", bad_rows="skip")
    assert [len(graph.relations) for graph in dataset] == [1, 1]
    assert found(dataset, "refused") == {"annotation without an image": 1}
