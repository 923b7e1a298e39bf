"""Tests of `sgalign check`, which lists the faults of a data set."""

import json

import pytest

h5py = pytest.importorskip("h5py")
pytest.importorskip("PIL")
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from test_findings import BOX, many_images, write_coco  # noqa: E402
from test_layouts import small_vg150  # noqa: E402

from sgalign.commands import check  # noqa: E402
from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import CocoDataset, ScenesDataset  # noqa: E402
from sgalign.data.coco_writing import write_coco as write_scenes  # noqa: E402


def findings(report, part):
    return {(f["outcome"], f["kind"]): f["count"] for f in report["parts"][part]["findings"]}


def report_of(*arguments, tmp_path, code):
    path = tmp_path / "report.json"
    assert cli.main(["check", *map(str, arguments), "--json", str(path)]) == code
    return json.loads(path.read_text())


@pytest.fixture
def scenes(tmp_path):
    names = ScenesDataset("train")
    parts = {split: [ScenesDataset(split, size=6)[i] for i in range(6)] for split in ("train", "validation", "test")}
    root = tmp_path / "scenes"
    write_scenes(parts, names.object_names, names.predicate_names, root, images=True)
    return root


def test_a_sound_data_set_passes(scenes, tmp_path, capsys, caplog):
    report = report_of(scenes, tmp_path=tmp_path, code=0)
    test = [ScenesDataset("test", size=6)[i] for i in range(6)]
    assert report["parts"]["test"]["counts"] == {
        "images": 6,
        "without relations": 0,
        "objects": sum(len(graph.labels) for graph in test),
        "relations": sum(len(graph.relations) for graph in test),
        "image files": 6,
    }
    counts = report["classes"]["predicate"]["test"]
    assert sum(counts.values()) == report["parts"]["test"]["counts"]["relations"] and len(counts) == 20
    assert not any(report["shared"].values()) and not report["refused"]
    out = capsys.readouterr().out
    assert "nothing was refused" in out and "20 predicate classes, train: " in out and not caplog.messages


def test_all_faults_are_printed_at_once(scenes, tmp_path, capsys):
    content, rel = json.loads((scenes / "test.json").read_text()), json.loads((scenes / "rel.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    content["annotations"][0]["bbox"][2] = 0
    content["images"][2]["width"] *= 2
    rel["test"]["1"] += [[0, 99, 1], [0, 98, 1], [0, 97, 1], [0, 96, 1]]
    rel["test"]["2"] = []
    of_train = json.loads((scenes / "train.json").read_text())["images"][0]
    content["images"][3] |= {field: of_train[field] for field in ("file_name", "width", "height")}
    (scenes / "images" / names[4]).write_bytes((scenes / "images" / names[4]).read_bytes()[:900])
    (scenes / "images" / names[5]).unlink()
    (scenes / "test.json").write_text(json.dumps(content))
    (scenes / "rel.json").write_text(json.dumps(rel))
    report = report_of(scenes, tmp_path=tmp_path, code=1)
    found = findings(report, "test")
    assert found["refused", "object with a malformed annotation"] == 1
    assert found["refused", "relation to a missing object"] == 4
    assert found["refused", "image file that cannot be read"] == 1
    assert found["found", "image file of other proportions than annotated"] == 1
    assert found["found", "image without a file"] == 1
    assert report["parts"]["test"]["counts"]["without relations"] == 1
    assert report["shared"]["train and test"] == [content["images"][3]["file_name"]]
    out = capsys.readouterr().out
    assert "refused: 4 relations to a missing object" in out and out.count("objects must be from 0 to") == 3
    assert "train and test share 1 image: " in out and "(exit code 1)" in out


def test_a_split_that_cannot_be_read_does_not_hide_the_others(scenes, tmp_path):
    (scenes / "train.json").write_text("{")
    report = report_of(scenes, tmp_path=tmp_path, code=1)
    assert findings(report, "train") == {("refused", "split that cannot be read"): 1}
    assert report["parts"]["test"]["counts"]["images"] == 6


def test_splits_with_other_classes_are_refused(scenes, tmp_path):
    content = json.loads((scenes / "test.json").read_text())
    content["categories"][0]["name"] = "yeti"
    (scenes / "test.json").write_text(json.dumps(content))
    report = report_of(scenes, tmp_path=tmp_path, code=1)
    assert ("refused", "split with other object names") in findings(report, "test")


def test_relations_of_boxes_apart_and_unused_classes_are_reported(tmp_path, capsys):
    boxes = np.array([[100, 100, 50, 50], [400, 100, 50, 50]] * 3, np.int32)
    root = small_vg150(tmp_path / "vg", boxes_1024=boxes, predicates=np.array([1, 1, 1, 1, 2]))
    report = report_of(root, tmp_path=tmp_path, code=0)
    what = "relation between boxes that do not overlap, which Motifs with SGDet leaves out"
    assert findings(report, "train") == {("found", what): 4}
    assert "never in train: by" in capsys.readouterr().out


def test_splits_without_relations_or_images_are_named(tmp_path, capsys):
    many_images(tmp_path / "data", "train", 3)
    write_coco(tmp_path / "data", relations={})
    report_of(tmp_path / "data", tmp_path=tmp_path, code=0)
    out = capsys.readouterr().out
    assert "1 split without relations" in out and "1 split without images" in out


def test_predictions_are_checked(tmp_path):
    root = many_images(tmp_path / "data", "test", 4)
    graph = CocoDataset(root, "test")[0]
    good = {
        "boxes": (graph.boxes / 100).tolist(),
        "labels": graph.labels.tolist(),
        "triplets": [[0, 1, 1]],
        "triplet_scores": [0.5],
    }
    content = {
        "test0.jpg": good,
        "test1.jpg": good | {"labels": [1, 9]},
        "nowhere.jpg": good,
        "test3.jpg": {"boxes": []},
    }
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    report = report_of(root, "--predictions", path, tmp_path=tmp_path, code=1)
    assert findings(report, "predictions") == {
        ("refused", "image outside the test split"): 1,
        ("found", "image with relations but without a prediction"): 1,
        ("refused", "image with a malformed prediction"): 2,
    }
    assert "at most 1" in report["parts"]["predictions"]["causes"][0]


def test_a_missing_file_of_predictions_does_not_hide_the_report(tmp_path):
    root = many_images(tmp_path / "data", "test", 2)
    report = report_of(root, "--predictions", tmp_path / "none.json", tmp_path=tmp_path, code=1)
    assert findings(report, "predictions") == {("refused", "file of predictions that cannot be read"): 1}
    assert report["parts"]["test"]["counts"]["images"] == 2


def test_a_folder_without_a_known_layout_is_reported(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "must be a folder with" in capsys.readouterr().err


def test_a_turned_photograph_is_no_fault(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [{"id": 1, "file_name": "a.jpg", "width": 120, "height": 160}]
    root = write_coco(tmp_path / "data", images=images, annotations=[BOX, BOX])
    Image.new("RGB", (160, 120)).save(root / "a.jpg", exif=exif)
    report = check.check(str(root))
    assert report["parts"]["test"]["counts"]["image files"] == 1 and not report["parts"]["test"]["findings"]


def test_the_validation_images_of_a_training_can_be_checked(tmp_path):
    root = many_images(tmp_path / "data", "train", 10)
    options = "--validation-images", "3", "--validation-choice", "first"
    report = report_of(root, *options, tmp_path=tmp_path, code=0)
    assert [report["parts"][part]["counts"]["images"] for part in ("train", "validation")] == [7, 3]
