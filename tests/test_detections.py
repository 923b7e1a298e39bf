"""Tests of files of detections and of batches made from them."""

import json

import pytest
import torch

from sgalign.data import SceneGraph, collate_detected, read_detections

GOOD = {"a.jpg": {"boxes_xyxy": [[1, 2, 30.5, 40]], "labels": [4], "scores": [0.5]},
        "b.jpg": {"boxes_xyxy": [], "labels": [], "scores": []}}  # fmt: skip


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_detections_are_read_with_labels_that_start_at_1(tmp_path):
    found = read_detections(write(tmp_path / "d.json", GOOD), 5)
    assert found["a.jpg"].boxes.tolist() == [[1, 2, 30.5, 40]] and found["a.jpg"].labels.tolist() == [5]
    assert found["a.jpg"].scores.tolist() == [0.5] and found["b.jpg"].boxes.shape == (0, 4)


def test_vrd_detections_are_read_completely(vrd_root):
    found = read_detections(vrd_root / "detections_test.json", 100)
    assert len(found) == 1000 and sum(len(image.labels) for image in found.values()) == 7221


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON or is cut short"),
        ([1], "must be a JSON object with image names as keys, got list"),
        ({"a.jpg": 3}, "image 'a.jpg': must have boxes_xyxy, labels, scores"),
        ({"a.jpg": {"labels": []}}, "must have boxes_xyxy"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": []}}, "lists of equal length"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": [5]}}, r"labels must be integers from 0 to 4, got 5 in row 0"),
        ({"a.jpg": GOOD["a.jpg"] | {"labels": [True]}}, "labels must be integers"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": [1.5]}}, r"scores must be from 0 to 1, got 1.5"),
        ({"a.jpg": GOOD["a.jpg"] | {"scores": [float("nan")]}}, "scores must be from 0 to 1, got nan"),
        ({"a.jpg": GOOD["a.jpg"] | {"boxes_xyxy": [[1, 2, 3]]}}, "boxes_xyxy must have 4 numbers"),
        ({"a.jpg": GOOD["a.jpg"] | {"boxes_xyxy": [[9, 2, 3, 4]]}}, "x1 <= x2"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, message):
    path = write(tmp_path / "d.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_detections(path, 5)
    assert str(path) in str(error.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json not found: write the file as"):
        read_detections(tmp_path / "none.json", 5)


def test_detected_objects_replace_the_annotated_ones(tmp_path):
    found = read_detections(write(tmp_path / "d.json", GOOD), 5)
    boxes, labels = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20]]), torch.tensor([1, 2])
    graphs = [SceneGraph(name, 100, 50, boxes, labels, torch.tensor([[0, 1, 2]])) for name in ("a.jpg", "c.jpg")]
    batch = collate_detected(graphs, found, 3)
    assert batch.lengths.tolist() == [1, 0] and batch.labels.tolist() == [5] and batch.scores.tolist() == [0.5]
    assert len(batch.pairs) == 0 and torch.equal(batch.truth[1]["boxes"], boxes)
    assert batch.truth[0]["relations"].tolist() == [[0, 1, 2]]
