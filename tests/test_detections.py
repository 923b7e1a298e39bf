"""Tests of files of detections and of batches made from them."""

import json
from functools import partial

import pytest
import torch

from sgalign.data import CocoDataset, SceneGraph, collate_detected, read_detections
from sgalign.data.detections import check_detections, coco_ids, ids_of_names

CLASSES = ["__background__", "cat", "dog", "cup", "hat", "car"]
GOOD = {"a.jpg": {"boxes_xyxy": [[1, 2, 30.5, 40]], "labels": [4], "scores": [0.5]},
        "b.jpg": {"boxes_xyxy": [], "labels": [], "scores": []}}  # fmt: skip
ROW = {"image_id": "a", "category_id": 5, "bbox": [1, 2, 29.5, 38], "score": 0.5}
IDS = partial(ids_of_names, ["a.jpg", "b.jpg", "7.jpg", "8.jpg", "8.png"], CLASSES)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_detections_are_read_with_labels_that_start_at_1(tmp_path):
    found = read_detections(write(tmp_path / "d.json", GOOD), CLASSES)
    assert found["a.jpg"].boxes.tolist() == [[1, 2, 30.5, 40]] and found["a.jpg"].labels.tolist() == [5]
    assert found["a.jpg"].scores.tolist() == [0.5] and found["b.jpg"].boxes.shape == (0, 4)


def test_labels_may_be_class_names(tmp_path):
    rows = {"boxes_xyxy": [[1, 2, 3, 4]] * 3, "labels": ["car", 0, "cat"], "scores": [0.5] * 3}
    found = read_detections(write(tmp_path / "d.json", {"a.jpg": rows}), CLASSES)
    assert found["a.jpg"].labels.tolist() == [5, 1, 1]


def test_vrd_detections_are_read_completely(vrd_root):
    names = ["__background__", *map(str, range(100))]
    found = read_detections(vrd_root / "detections_test.json", names)
    assert len(found) == 1000 and sum(len(image.labels) for image in found.values()) == 7221


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON or is cut short"),
        (3, "must be a JSON object with image names as keys, or a list of COCO results, got int"),
        ({"a.jpg": 3}, "image 'a.jpg': must have boxes_xyxy, labels, scores"),
        ({"a.jpg": {"labels": []}}, "must have boxes_xyxy"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": []}}, "lists of equal length"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": [5]}}, r"labels must be integers from 0 to 4 .*, got 5 in row 0"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": [True]}}, "labels must be integers"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": ["cow"]}}, "or names of classes, got 'cow' in row 0"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": ["__background__"]}}, "got '__background__' in row 0"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": [1.5]}}, r"scores must be from 0 to 1, got 1.5"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": [float("nan")]}}, "scores must be from 0 to 1, got nan"),
        ({"a.jpg": GOOD["a.jpg"] | {"boxes_xyxy": [[1, 2, 3]]}}, "boxes_xyxy must have 4 numbers"),
        ({"a.jpg": GOOD["a.jpg"] | {"boxes_xyxy": [[9, 2, 3, 4]]}}, "x1 <= x2"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, message):
    path = write(tmp_path / "d.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_detections(path, CLASSES)
    assert str(path) in str(error.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json not found: write the file as"):
        read_detections(tmp_path / "none.json", CLASSES)


# ---- COCO results


@pytest.mark.parametrize("ids", [IDS, None], ids=["known images", "any images"])
def test_coco_results_have_corners_and_classes_from_1(tmp_path, ids):
    rows = [ROW | {"image_id": "a.jpg"}, ROW | {"image_id": "7.jpg", "category_id": 1, "score": 1}]
    rows += [ROW | {"image_id": "a.jpg", "category_id": "2", "bbox": [0, 0, 0, 4]}]
    found = read_detections(write(tmp_path / "d.json", rows), CLASSES, ids)
    assert list(found) == ["a.jpg", "7.jpg"]
    assert found["a.jpg"].boxes.tolist() == [[1, 2, 30.5, 40], [0, 0, 0, 4]]
    assert found["a.jpg"].labels.tolist() == [5, 2] and found["a.jpg"].scores.tolist() == [0.5, 0.5]
    assert found["7.jpg"].labels.tolist() == [1] and found["7.jpg"].labels.dtype == torch.int64


@pytest.mark.parametrize("image_id", [7, "7", "7.jpg", 7.0], ids=repr)
def test_image_ids_are_names_with_or_without_the_suffix(tmp_path, image_id):
    path = write(tmp_path / "d.json", [ROW | {"image_id": image_id}])
    assert list(read_detections(path, CLASSES, IDS)) == ["7.jpg"]


def test_a_whole_name_is_preferred_to_a_name_without_its_suffix():
    assert ids_of_names(["8.jpg", "8", "8.png"], CLASSES).images.find("", "8") == "8"


@pytest.mark.parametrize(
    "of_class", [{"category_id": "dog"}, {"category_name": "dog"}, {"category": "dog"}, {"category_id": 2.0},
                 {"category_id": 2, "category_name": "dog"}], ids=str,
)  # fmt: skip
def test_classes_may_be_names(tmp_path, of_class):
    row = {name: value for name, value in ROW.items() if name != "category_id"} | of_class
    assert read_detections(write(tmp_path / "d.json", [row]), CLASSES, IDS)["a.jpg"].labels.tolist() == [2]


@pytest.mark.parametrize(
    "row, message",
    [
        (3, "must have image_id, bbox, score and category_id, got 3"),
        ({name: value for name, value in ROW.items() if name != "score"}, "must have image_id, bbox, score"),
        ({name: value for name, value in ROW.items() if name != "category_id"}, "must have .* and category_id, got"),
        (ROW | {"image_id": None}, "image_id must be an integer or text, got None"),
        (ROW | {"image_id": 1.5}, "image_id must be an integer or text, got 1.5"),
        (ROW | {"image_id": 8}, "image_id must name one image, but '8' fits '8.jpg' and '8.png'"),
        (ROW | {"category_id": 0}, "category_id must not be the background, got 0"),
        (ROW | {"category_id": 6}, "category_id must be the id of a class .*, got 6"),
        (ROW | {"category_id": -1}, "category_id must be the id of a class .*, got -1"),
        (ROW | {"category_id": True}, "category_id must be the id of a class .*, got True"),
        (ROW | {"category_id": "cow"}, "category_id must be the name of a class, such as 'car', got 'cow'"),
        (ROW | {"category": 2}, "category must be the name of a class, such as 'car', got 2"),
        (ROW | {"category_name": "dog"}, "category_id and category_name must be the same class, got"),
        (ROW | {"bbox": [1, 2, 3]}, "bbox must be 4 numbers x, y, width, height, got"),
        (ROW | {"bbox": [1, 2, 3, "4"]}, "bbox must be 4 numbers x, y, width, height, got"),
        (ROW | {"bbox": [1, 2, -3, 4]}, "bbox must have a width and a height of at least 0, got"),
        (ROW | {"bbox": [1, 2, 3, float("nan")]}, "bbox must be in pixels, finite and at most 16777216"),
        (ROW | {"bbox": [float("inf"), 2, 3, 4]}, "bbox must be in pixels, finite and at most 16777216"),
        (ROW | {"score": 1.5}, "score must be from 0 to 1, got 1.5"),
        (ROW | {"score": -0.1}, "score must be from 0 to 1, got -0.1"),
        (ROW | {"score": float("nan")}, "score must be from 0 to 1, got nan"),
        (ROW | {"score": True}, "score must be from 0 to 1, got True"),
    ],
    ids=str,
)
def test_bad_coco_results_are_refused_by_row(tmp_path, row, message):
    path = write(tmp_path / "d.json", [ROW, row])
    with pytest.raises(ValueError, match=f"row 1: {message}") as error:
        read_detections(path, CLASSES, IDS)
    assert str(path) in str(error.value)


def test_coco_results_of_other_images_are_counted(tmp_path, caplog):
    rows = [ROW, ROW | {"image_id": 9}, ROW | {"image_id": 9}, ROW | {"image_id": "c.jpg"}]
    found = read_detections(write(tmp_path / "d.json", rows), CLASSES, IDS)
    assert list(found) == ["a.jpg"] and len(found["a.jpg"].labels) == 1
    (message,) = caplog.messages
    assert message.endswith("left out 3 detections of 2 images that the data do not have, such as '9'")


def test_coco_results_without_a_known_image_are_refused(tmp_path):
    path = write(tmp_path / "d.json", [ROW | {"image_id": 9}])
    with pytest.raises(
        ValueError, match="image_id must be the id of an image, such as 'a.jpg', got 1 image that the data"
    ):
        read_detections(path, CLASSES, IDS)


def test_the_ids_of_a_coco_data_set_are_those_of_its_file(tmp_path):
    """The number 1 is not the id of a class, and names of images are not ids."""
    names = [{"id": 90, "name": "dog"}, {"id": "x", "name": "cat"}, {"id": 0, "name": "__background__"}]
    images = [{"id": 5, "file_name": "7.jpg", "width": 60, "height": 50},
              {"id": "7", "file_name": "b.jpg", "width": 60, "height": 50}]  # fmt: skip
    content = {"images": images, "annotations": [], "categories": [names[2], *names[:2]]}
    write(tmp_path / "test.json", content)
    write(tmp_path / "rel.json", {"rel_categories": ["on"], "test": {}})
    dataset = CocoDataset(tmp_path, "test")
    read = partial(read_detections, object_names=dataset.object_names, ids=partial(coco_ids, dataset))
    rows = [ROW | {"image_id": "5", "category_id": "x"}, ROW | {"image_id": 7, "category_id": 90}]
    found = read(write(tmp_path / "d.json", rows))
    classes = {name: dataset.object_names[image.labels] for name, image in found.items()}
    assert classes == {"7.jpg": "cat", "b.jpg": "dog"}
    with pytest.raises(ValueError, match=r"category_id must be the id of a class \(90, x\), got 1"):
        read(write(tmp_path / "d.json", [ROW | {"category_id": 1}]))
    with pytest.raises(ValueError, match="image_id must be the id of an image, such as '5'"):
        read(write(tmp_path / "d.json", [ROW | {"image_id": "c.jpg", "category_id": 90}]))


def test_images_of_the_other_part_of_the_training_file_are_unknown(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 50} for i in range(10)]
    write(tmp_path / "train.json", {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]})
    write(tmp_path / "rel.json", {"rel_categories": ["on"], "train": {}})
    parts = [CocoDataset(tmp_path, part, validation_images=4) for part in ("train", "validation")]
    for part in parts:
        names = {graph.image_id for graph in part}
        assert {name for n in range(10) if (name := coco_ids(part).images.find("", str(n)))} == names


def test_the_id_of_an_image_of_another_split_is_not_taken_as_a_file_name(tmp_path):
    images = [{"id": i, "file_name": f"{9 - i}.jpg", "width": 60, "height": 50} for i in range(10)]
    write(tmp_path / "train.json", {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]})
    write(tmp_path / "rel.json", {"rel_categories": ["on"], "train": {}})
    part = CocoDataset(tmp_path, "validation", validation_images=3, validation_choice="first")
    assert [coco_ids(part).images.find("", str(n)) for n in range(10)] == ["9.jpg", "8.jpg", "7.jpg", *[None] * 7]


# ---- use


def graphs_of(*names):
    boxes, labels = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20]]), torch.tensor([1, 2])
    return [SceneGraph(name, 100, 50, boxes, labels, torch.tensor([[0, 1, 2]])) for name in names]


def test_detections_of_no_image_of_the_split_are_refused(tmp_path):
    found = read_detections(write(tmp_path / "d.json", GOOD), CLASSES)
    with pytest.raises(ValueError, match="detections must contain images of the test split, such as 'c.jpg', but"):
        check_detections(found, graphs_of("c.jpg"), "test")
    check_detections(found, graphs_of("a.jpg", "c.jpg"), "test")


def test_detected_objects_replace_the_annotated_ones(tmp_path):
    found = read_detections(write(tmp_path / "d.json", GOOD), CLASSES)
    graphs = graphs_of("a.jpg", "c.jpg")
    batch = collate_detected(graphs, found, 3)
    assert batch.lengths.tolist() == [1, 0] and batch.labels.tolist() == [5] and batch.scores.tolist() == [0.5]
    assert len(batch.pairs) == 0 and torch.equal(batch.truth[1]["boxes"], graphs[1].boxes)
    assert batch.truth[0]["relations"].tolist() == [[0, 1, 2]]
