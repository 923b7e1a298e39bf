"""Tests that readers of data sets leave out, change or rename nothing without saying so."""

import json

import pytest
import torch

h5py = pytest.importorskip("h5py")
pytest.importorskip("PIL")
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from test_layouts import small_vg150  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import CocoDataset, SceneGraph, VG150Dataset, VRDDataset, open_dataset  # noqa: E402
from sgalign.data.class_names import is_background, read_classes  # noqa: E402
from sgalign.data.findings import Findings, counted  # noqa: E402
from sgalign.data.scene_graph import without_apart  # noqa: E402
from sgalign.data.triplets import read_zero_shot_triplets  # noqa: E402
from sgalign.training.datamodule import SceneGraphData  # noqa: E402

BOX = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}


def write_coco(root, *, images=None, annotations=None, relations=None, split="test", predicates=("on", "by"), **rest):
    """Write one part of a COCO folder: by default one image with two objects and one relation."""
    root.mkdir(exist_ok=True)
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "hat"}]
    content = {
        "images": images or [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": annotations or [BOX, BOX | {"category_id": 2, "bbox": [12, 5, 10, 10]}],
        "categories": names,
    }
    (root / f"{split}.json").write_text(json.dumps(content | rest))
    path = root / "rel.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    of_part = {"1": [[1, 0, 0]]} if relations is None else relations
    path.write_text(json.dumps(before | {"rel_categories": list(predicates), split: of_part}))
    return root


def found(dataset, outcome):
    return {finding.kind: finding.count for finding in dataset.findings.with_outcome(outcome)}


# ---- the record


def test_a_count_has_a_noun_in_the_right_number():
    assert [counted(n, "box beyond the image") for n in (1, 2)] == [
        "1 box beyond the image",
        "2 boxes beyond the image",
    ]
    assert counted(1234, "relation") == "1,234 relations"


def test_findings_are_said_in_one_line_with_counts(caplog):
    findings = Findings("file, train")
    findings.refuse("relation to a missing object", "row 3")
    findings.add("left out", "image without relations", ["a", "b", "c", "d"], 40)
    findings.add("clipped", "box beyond the image", count=0)
    findings.raise_or_log("skip")
    assert caplog.messages == ["file, train: left out 1 relation to a missing object, 40 images without relations"]
    assert findings.with_outcome("left out")[0].examples == ["a", "b", "c"]


def test_bad_rows_raise_an_error_with_their_number():
    findings = Findings("file, train")
    findings.raise_or_log("error")
    for row in range(3):
        findings.refuse("row", f"row {row}: is bad")
    with pytest.raises(ValueError, match=r"row 0: is bad \(2 more bad rows\); sgalign check .* the option bad_rows"):
        findings.raise_or_log("error")
    with pytest.raises(ValueError, match="bad_rows must be 'error' or 'skip', got 'ignore'"):
        findings.raise_or_log("ignore")


@pytest.mark.parametrize(
    "ranks, logs",
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": ""}, True),
        ({}, True),
    ],
)
def test_only_the_first_process_logs(caplog, monkeypatch, ranks, logs):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    findings = Findings("file, train")
    findings.add("left out", "row")
    findings.log()
    assert len(caplog.messages) == logs


# ---- names of classes


@pytest.mark.parametrize("name", ["no_relation", "No Relation", "__background__", "BACKGROUND", "none", "N/A", "bg"])
def test_the_background_is_recognized_by_its_usual_names(name):
    classes = read_classes("file", enumerate([name, "on", "under"]))
    assert is_background(name) and classes.names == ["__background__", "on", "under"]
    assert classes.numbers == {"0": 0, "1": 1, "2": 2} and classes.number("row", 2) == 2
    with pytest.raises(ValueError, match="row must not be the background, got 0"):
        classes.number("row", 0)


def test_ordinary_names_are_not_the_background():
    assert not any(map(is_background, ["nonet", "banana", "on", "underground", "above", "bag"]))


def test_names_may_be_objects_with_ids_in_any_order():
    entries = [{"id": 7, "name": "under"}, {"id": "3", "name": "on"}]
    classes = read_classes("file", enumerate(entries))
    assert classes.names[1:] == ["on", "under"] and classes.number("row", 7) == 2 and classes.number("row", 3.0) == 1


@pytest.mark.parametrize(
    "names, message",
    [
        (["on", None], "must have a name that is text and not empty, got None"),
        (["on", 3], "must have a name that is text and not empty, got 3"),
        (["on", " "], "must have a name that is text and not empty"),
        (["on", "by", "on"], "every class must have its own name, but 'on' occurs twice"),
        (
            [{"id": 1, "name": "on"}, {"id": "1", "name": "by"}],
            "every class must have its own id, but '1' occurs twice",
        ),
        (["on", "no_relation"], "the background must be the first class, but 'no_relation' is not"),
        (["__background__", "on", "none"], "the background must be the first class, but 'none' is not"),
        (["none"], "must have a class besides the background"),
        ([], "must have a class besides the background"),
    ],
)
def test_names_that_would_lose_a_class_are_refused(names, message):
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        read_classes("file", enumerate(names))


def test_an_id_of_a_class_may_have_any_number_of_digits():
    assert read_classes("a file", [("9" * 5000, "cat"), ("1", "hat")]).names == ["__background__", "cat", "hat"]


def test_a_background_never_becomes_a_class(tmp_path):
    root = write_coco(tmp_path, predicates=["no_relation", "on", "under"], relations={"1": [[1, 0, 2]]})
    content = json.loads((root / "test.json").read_text())
    content["categories"].insert(0, {"id": 0, "name": "Background"})
    (root / "test.json").write_text(json.dumps(content))
    dataset = CocoDataset(root, "test")
    assert dataset.predicate_names == ["__background__", "on", "under"] and len(dataset.object_names) == 3
    assert dataset[0].relations.tolist() == [[1, 0, 2]] and dataset[0].labels.tolist() == [1, 2]


def test_recalls_of_predicates_are_told_from_those_of_groups():
    from sgalign.metrics.results import is_of_class

    assert is_of_class("R@50/head") and is_of_class("R@50/left/right")
    assert not any(map(is_of_class, ["mR@50/head", "R@50", "ng-mR@50"]))


@pytest.mark.parametrize("form", ["idx_to", "to_idx", "with background", "any order"])
def test_dictionaries_of_vg150_may_have_one_direction(tmp_path, form):
    root = small_vg150(tmp_path)
    names, predicates = {"1": "α", "2": "b", "3": "c"}, {"1": "on", "2": "by"}
    if form == "any order":
        names = dict(reversed(names.items()))
    if form == "with background":
        names = {"0": "__background__"} | names
    dicts = {"idx_to_label": names, "idx_to_predicate": predicates}
    if form == "to_idx":
        dicts = {
            f"{w}_to_idx": {name: int(i) for i, name in n.items()}
            for w, n in (("label", names), ("predicate", predicates))
        }
    (root / "VG-SGG-dicts-with-attri.json").write_text(json.dumps(dicts))
    dataset = VG150Dataset(root, "test")
    assert dataset.object_names == ["__background__", "α", "b", "c"]
    assert dataset.predicate_names == ["__background__", "on", "by"]


@pytest.mark.parametrize(
    "dicts, message",
    [
        ({}, "must have idx_to_label or label_to_idx"),
        ({"idx_to_label": {"1": "a", "3": "b"}}, "numbers must be 1, 2, 3 and so on"),
        ({"label_to_idx": {"a": 1, "b": 1}}, "every class must have its own id, but '1' occurs twice"),
        ({"idx_to_label": {"1": "a", "2": "b"}, "label_to_idx": {"a": 2, "b": 1}}, "must agree, but they differ"),
    ],
)
def test_contradictory_dictionaries_of_vg150_are_refused(tmp_path, dicts, message):
    root = small_vg150(tmp_path)
    (root / "VG-SGG-dicts-with-attri.json").write_text(json.dumps({"idx_to_predicate": {"1": "on", "2": "by"}} | dicts))
    with pytest.raises(ValueError, match=f"VG-SGG-dicts-with-attri.json.*{message}"):
        VG150Dataset(root, "test")


# ---- numbers in HDF5


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "<u2", ">u8", "<f4", ">f8", "<f2", "<i2"])
def test_numbers_of_any_type_keep_their_value(tmp_path, dtype):
    plain = VG150Dataset(small_vg150(tmp_path / "plain"), "test")[0]
    with h5py.File(tmp_path / "plain" / "VG-SGG-with-attri.h5") as file:
        changed = {name: file[name][()].astype(dtype) for name in file}
    graph = VG150Dataset(small_vg150(tmp_path / "other", **changed), "test")[0]
    # The first box starts at x = 50 - 50 = 0. An unsigned type would wrap around in 50 - 150 / 2 of another box.
    torch.testing.assert_close(graph.boxes, plain.boxes)
    assert torch.equal(graph.relations, plain.relations) and torch.equal(graph.labels, plain.labels)


def test_corners_left_of_the_image_are_negative_for_unsigned_numbers(tmp_path):
    boxes = np.array([[10, 10, 50, 40]] * 6, np.uint8)
    assert VG150Dataset(small_vg150(tmp_path, boxes_1024=boxes), "test")[0].boxes[0].tolist() == [-15, -10, 35, 30]


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("labels", [1, 1, 1, 1, 1.5, 1], "array labels: must be from 1 to 3, got no whole number in row 4"),
        ("predicates", np.array([1, 1, 1, 1, 2**64 - 1], np.uint64), "predicates: .* got no whole number in row 4"),
        ("split", [0, 0, 2.5], "array split: must be from 0 to 2, got no whole number in row 2"),
    ],
)
def test_numbers_are_not_rounded_or_wrapped(tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message):
        VG150Dataset(small_vg150(tmp_path, **{name: np.array(values)}), "test")


@pytest.mark.parametrize("first, last", [(-1, -1), (5, 4), (0, -1)])
def test_every_convention_for_images_without_relations_is_read(tmp_path, first, last):
    ranges = {"img_to_first_rel": np.array([0, 2, first]), "img_to_last_rel": np.array([1, 3, last])}
    shorter = {"relationships": np.array([[0, 1], [1, 0], [2, 3], [2, 3]]), "predicates": np.array([1, 2, 1, 2])}
    root = small_vg150(tmp_path, **ranges, **shorter)
    dataset = VG150Dataset(root, "test")
    assert len(dataset) == 0 and found(dataset, "left out") == {"image without relations": 1}
    assert len(VG150Dataset(root, "test", keep="everything")) == 1


def test_images_that_share_rows_are_refused(tmp_path):
    root = small_vg150(tmp_path, img_to_first_box=np.array([0, 1, 4]))
    with pytest.raises(ValueError, match=r"must not share rows with another image, got \[1, 3\] in row 1"):
        VG150Dataset(root, "train")
    dataset = VG150Dataset(root, "train", validation_images=0, bad_rows="skip")
    assert found(dataset, "refused") == {"image with rows of another image in img_to_*_box": 1} and len(dataset) == 1


def test_relations_of_an_image_without_objects_are_refused(tmp_path):
    ranges = {"img_to_first_box": np.array([0, 2, -1]), "img_to_last_box": np.array([1, 3, -1])}
    with pytest.raises(ValueError, match="must refer to boxes of the relation's image, got"):
        VG150Dataset(small_vg150(tmp_path, **ranges), "test")


def test_a_file_without_relations_may_have_an_empty_array(tmp_path):
    none = np.array([-1, -1, -1])
    empty = {"relationships": np.zeros(0), "predicates": np.zeros(0)}
    root = small_vg150(tmp_path, img_to_first_rel=none, img_to_last_rel=none, **empty)
    graph = VG150Dataset(root, "test", keep="everything")[0]
    assert len(graph.labels) == 2 and graph.relations.shape == (0, 3)


# ---- the files of VG150


def test_rows_of_image_data_may_have_other_forms(tmp_path):
    root = small_vg150(tmp_path)
    rows = [
        {"image_id": 0, "width": 1024, "height": 768},
        {"image_id": "120", "width": "1024", "height": 768.0},
        {"file_name": "VG_100K_2/photo.png", "width": 1024, "height": 768},
    ]
    (root / "image_data.json").write_text(json.dumps(rows))
    (root / "VG_100K_2").mkdir()
    for name in ("120.png", "photo.png"):
        Image.new("RGB", (1024, 768)).save(root / "VG_100K_2" / name)
    train, test = VG150Dataset(root, "train", validation_images=0), VG150Dataset(root, "test")
    assert [train[0].image_id, train[1].image_id, test[0].image_id] == ["0.jpg", "120.jpg", "VG_100K_2/photo.png"]
    assert train[0].image is None and train[1].image().size == test[0].image().size == (1024, 768)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"image_id": 1, "width": 9},
            "row 2: width and height must be whole numbers from 1 to 16777216, got 9 and None",
        ),
        ({"width": 9, "height": 9}, "row 2: must have image_id or file_name, but has only width, height"),
        ({"image_id": [1], "width": 9, "height": 9}, r"image_id must be an integer or text, got \[1\]"),
        ({"image_id": 7, "width": 9, "height": 9}, "image_id must be unique, but '7.jpg' occurs twice"),
        (None, "row 2: must be a JSON object, got None"),
    ],
)
def test_a_bad_row_of_image_data_is_named_or_left_out(tmp_path, row, message):
    root = small_vg150(tmp_path)
    rows = json.loads((root / "image_data.json").read_text())
    (root / "image_data.json").write_text(json.dumps([*rows[:2], row]))
    with pytest.raises(ValueError, match=f"image_data.json.*{message}"):
        VG150Dataset(root, "train")
    assert len(VG150Dataset(root, "train", validation_images=0, bad_rows="skip")) == 2


def test_an_image_with_two_faults_is_counted_once(tmp_path):
    root = small_vg150(tmp_path, split=np.array([0, 0, 9]))
    rows = json.loads((root / "image_data.json").read_text())
    (root / "image_data.json").write_text(json.dumps([*rows[:2], None]))
    dataset = VG150Dataset(root, "train", validation_images=0, bad_rows="skip")
    assert found(dataset, "refused") == {"image with an unknown split": 1}


def test_bad_rows_of_vg150_are_left_out_and_counted(tmp_path):
    arrays = {
        "labels": np.array([1, 2, 3, 9, 1, 2]),
        "relationships": np.array([[0, 1], [1, 4], [2, 3], [2, 3], [4, 5]]),
        "predicates": np.array([7, 1, 1, 2, 2]),
    }
    root = small_vg150(tmp_path, **arrays)
    with pytest.raises(ValueError, match=r"array labels: must be from 1 to 3, got 9 in row 3.*\(2 more bad rows\)"):
        VG150Dataset(root, "train", validation_images=0)
    train = VG150Dataset(root, "train", validation_images=0, bad_rows="skip", keep="everything")
    assert found(train, "refused") == {
        "object with an unknown class": 1,
        "relation with an unknown predicate": 1,
        "relation to a missing object": 1,
    }
    assert found(train, "left out") == {"relation with a left-out object": 2}
    assert [train[i].labels.tolist() for i in (0, 1)] == [[1, 2], [3]] and len(train[1].relations) == 0
    assert VG150Dataset(root, "test")[0].relations.tolist() == [[0, 1, 2]]


def test_rows_that_belong_to_no_image_are_counted(tmp_path):
    dataset = VG150Dataset(small_vg150(tmp_path, img_to_last_rel=np.array([0, 3, 4])), "test")
    assert found(dataset, "left out") == {"relation of no image or of a refused one": 1}


def test_bad_rows_of_images_without_relations_are_refused_for_every_use(tmp_path):
    none = {"img_to_first_rel": np.array([0, 2, -1]), "img_to_last_rel": np.array([1, 3, -1])}
    root = small_vg150(tmp_path, labels=np.array([1, 2, 3, 1, 2, 9]), **none)
    for keep in ("related", "objects", "everything"):
        with pytest.raises(ValueError, match="array labels: must be from 1 to 3, got 9 in row 5"):
            VG150Dataset(root, "test", keep=keep)


def test_a_dangling_link_in_hdf5_is_refused(tmp_path):
    root = small_vg150(tmp_path)
    with h5py.File(root / "VG-SGG-with-attri.h5", "a") as file:
        del file["labels"]
        file["labels"] = h5py.ExternalLink("other.h5", "/labels")
    with pytest.raises(ValueError, match="must be an HDF5 file, but is not one or is cut short"):
        VG150Dataset(root, "test")


@pytest.mark.parametrize("text", [" 1,2,1\n2,3,2\n", "1,2,1\n2,3,2\n", "subject,object,predicate\n1,2,1\n2,3,2\n"])
def test_the_first_zero_shot_triplet_is_not_a_header(tmp_path, text):
    (tmp_path / "z.csv").write_text(text)
    assert read_zero_shot_triplets(tmp_path / "z.csv").tolist() == [[1, 1, 2], [2, 2, 3]]


def test_other_than_whole_numbers_are_no_zero_shot_triplets(tmp_path):
    (tmp_path / "z.csv").write_text("1.0,2,1\n2,3,2\n")
    (tmp_path / "underscore.csv").write_text("1_0,2,1\n2,3,2\n")
    (tmp_path / "large.csv").write_text(f"{2**64},2,1\n2,3,2\n")
    torch.save(torch.tensor([[1.9, 2, 1]]), tmp_path / "z.pytorch")
    torch.save(torch.ones(1, 3, dtype=torch.bool), tmp_path / "truth.pytorch")
    for name in ("z.csv", "underscore.csv", "large.csv", "z.pytorch", "truth.pytorch"):
        with pytest.raises(ValueError, match=name):
            read_zero_shot_triplets(tmp_path / name)


def test_several_hdf5_files_are_refused(tmp_path):
    root = small_vg150(tmp_path)
    for name in ("a.h5", "b.h5"):
        (root / "VG-SGG-with-attri.h5").rename(root / name) if name == "a.h5" else (root / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"must have one file \*.h5, but has a.h5, b.h5"):
        VG150Dataset(root, "test")


def test_files_in_different_folders_are_different_images(tmp_path):
    root = small_vg150(tmp_path)
    rows = [{"file_name": f"part{i}/1.jpg", "width": 1024, "height": 768} for i in range(3)]
    (root / "image_data.json").write_text(json.dumps(rows))
    for folder, color in (("images/part0", "red"), ("images/part1", "blue"), ("images", "green")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1024, 768), color).save(root / folder / "1.jpg", quality=100)
    train, test = VG150Dataset(root, "train", validation_images=0), VG150Dataset(root, "test")
    assert [graph.image().getpixel((0, 0)) for graph in train] == [(254, 0, 0), (0, 0, 254)]
    assert test[0].image is None


def test_an_index_error_does_not_end_a_data_set(tmp_path, monkeypatch):
    dataset = VG150Dataset(small_vg150(tmp_path), "train", validation_images=0)
    dataset._files = None
    monkeypatch.setattr(VG150Dataset, "__getitem__", lambda self, index: [][index])
    with pytest.raises(IndexError):
        list(dataset)


# ---- relations between boxes that do not overlap


@pytest.fixture
def apart(tmp_path):
    """A folder whose only training relation joins two boxes that do not overlap."""
    boxes = np.array([[100, 100, 50, 50], [400, 100, 50, 50]] * 3, np.int32)
    return small_vg150(tmp_path / "apart", boxes_1024=boxes)


@pytest.mark.parametrize("protocol, option, relations", [("predcls", None, 4), ("sgdet", None, 0), ("sgdet", False, 4)])
def test_relations_of_boxes_apart_are_left_out_only_for_sgdet(apart, protocol, option, relations, caplog):
    data = SceneGraphData(str(apart), validation_images=0, overlapping_only=option)
    data.prepare_for(relations=True, overlapping_only=protocol == "sgdet")
    assert sum(len(graph.relations) for graph in data.train) == relations
    said = [line for line in caplog.messages if "boxes that do not overlap" in line]
    assert len(said) == (relations == 0) and all("left out 4 relations between boxes" in line for line in said)


def test_the_protocol_of_the_module_decides_about_boxes_apart():
    from sgalign.training import DetectorModule, MotifsModule, SGTRModule

    sgdet = MotifsModule(protocol="sgdet", vision="images")
    assert sgdet.overlapping_only and not MotifsModule().overlapping_only and not SGTRModule().overlapping_only
    assert MotifsModule.needs_relations and not DetectorModule.needs_relations


def test_boxes_that_touch_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [10.9, 0, 20, 10], [11, 0, 20, 10]])
    relations = torch.tensor([[0, 1, 1], [0, 2, 1], [0, 3, 1]])
    graph = SceneGraph("a", 30, 30, boxes, torch.ones(4, dtype=torch.int64), relations)
    findings = Findings("")
    assert without_apart(graph, findings).relations.tolist() == relations[:2].tolist()
    assert list(map(str, findings)) == ["1 relation between boxes that do not overlap"]


def test_a_conversion_keeps_everything(apart, tmp_path):
    with h5py.File(apart / "VG-SGG-with-attri.h5", "a") as file:
        file["img_to_first_rel"][1] = file["img_to_last_rel"][1] = -1  # an image without relations
        file["boxes_1024"][0] = [1500, 100, 50, 50]  # outside the image
    out = tmp_path / "out"
    assert cli.main(["make-dataset", str(out), "--format", "coco", "--source", str(apart), "--no-images"]) == 0
    converted = CocoDataset(out, "train")
    assert len(converted) == 2 and converted[0].boxes[0].tolist() == [1475, 75, 1525, 125]
    assert len(converted[0].relations) == 2 and len(converted[1].relations) == 0


def test_training_boxes_of_vg150_are_clipped_and_counted(tmp_path, caplog):
    boxes = np.array([[100, 100, 50, 50], [1000, 100, 100, 50], [2000, 100, 50, 50]] + [[100, 100, 50, 50]] * 3)
    train = VG150Dataset(small_vg150(tmp_path, boxes_1024=boxes), "train", validation_images=0)
    assert found(train, "clipped") == {"box beyond the image": 1}
    assert found(train, "left out") == {
        "object outside the image": 1,
        "relation with a left-out object": 2,
        "image without remaining relations": 1,
    }
    assert train[0].boxes[1].tolist() == [950, 75, 1023, 125] and len(caplog.messages) == 1


# ---- units and orders of boxes


def test_boxes_given_as_corners_are_named_as_the_likely_cause(tmp_path, caplog):
    boxes = [[10, 10, 60, 60], [40, 30, 95, 75], [60, 50, 99, 79]]
    root = write_coco(tmp_path, annotations=[BOX | {"bbox": box} for box in boxes])
    dataset = CocoDataset(root, "test")
    assert found(dataset, "found") == {"box beyond the image": 2}
    (cause,) = dataset.findings.causes
    assert "2 of 3 boxes reach beyond their images, but would fit if their numbers were x1, y1, x2, y2" in cause
    assert "must be x, y, width, height" in cause and any(cause in line for line in caplog.messages)


def test_a_few_boxes_beyond_the_image_are_only_counted(tmp_path):
    boxes = [[10, 10, 20, 20]] * 9 + [[10, 10, 95, 75]]
    dataset = CocoDataset(write_coco(tmp_path, annotations=[BOX | {"bbox": box} for box in boxes]), "test")
    assert found(dataset, "found") == {"box beyond the image": 1} and not dataset.findings.causes


def test_relative_boxes_are_named(tmp_path):
    boxes = [[0.1, 0.1, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5]]
    dataset = CocoDataset(write_coco(tmp_path, annotations=[BOX | {"bbox": box} for box in boxes]), "test")
    assert "all numbers of all boxes are between 0 and 1" in dataset.findings.causes[0]


@pytest.mark.parametrize(
    "scale, cause",
    [
        (1.0, None),
        (1 / 1000, "all coordinates of the 2 predicted boxes are at most 1"),
        (10.0, "2 of 2 predicted boxes reach beyond their images"),
        (0.4, "predicted boxes reach only 0.40 times as far as annotated ones"),
    ],
)
def test_predicted_boxes_in_another_unit_are_named(scale, cause):
    from sgalign.data.box_checks import PredictedBoxes

    boxes = torch.tensor([[10.0, 10, 60, 50], [50, 40, 99, 79]])
    graph = SceneGraph("a", 100, 80, boxes, torch.tensor([1, 1]), torch.zeros(0, 3, dtype=torch.int64))
    predicted = PredictedBoxes()
    predicted.add(graph, boxes * scale)
    assert [cause in said for said in predicted.causes()] == ([] if cause is None else [True])


# ---- COCO


def test_bad_rows_of_coco_are_left_out_with_their_relations(tmp_path):
    annotations = [
        BOX,
        BOX | {"bbox": [1, 2, 0, 4]},
        BOX | {"bbox": [float("nan"), 1, 2, 3]},
        BOX | {"category_id": 2},
        BOX | {"image_id": 2},
        BOX | {"image_id": 9},
    ]
    images = [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "b.jpg", "width": 0, "height": 80},
    ]
    relations = {"1": [[0, 3, 1], [1, 3, 0], [0, 9, 0], [0, 3, 5], "x"], "2": [[0, 0, 0]], "77": []}
    root = write_coco(tmp_path, images=images, annotations=annotations, relations=relations)
    with pytest.raises(ValueError, match=r"images, row 1: width and height must be .*\(7 more bad rows\)"):
        CocoDataset(root, "test")
    dataset = CocoDataset(root, "test", bad_rows="skip")
    assert len(dataset) == 1 and dataset[0].labels.tolist() == [1, 2] and dataset[0].relations.tolist() == [[0, 1, 2]]
    assert found(dataset, "refused") == {
        "image with a malformed entry": 1,
        "object with a malformed annotation": 2,
        "annotation of an unknown image": 1,
        "relation to a missing object": 1,
        "relation with an unknown predicate": 1,
        "relation with a malformed row": 1,
        "image with relations that test.json lacks": 1,
    }
    assert "1 annotation of an unknown image may belong to a known one" in dataset.findings.causes[0]
    assert found(dataset, "left out") == {
        "object of a refused image": 1,
        "relation of a refused object": 1,
        "relation of a refused image": 1,
    }


def test_ids_of_coco_may_be_text_and_crowds_are_counted(tmp_path):
    images = [{"id": "1", "file_name": "a.jpg", "width": "100", "height": 80.0}]
    annotations = [BOX | {"category_id": "2", "iscrowd": 1}, BOX | {"iscrowd": 1}]
    dataset = CocoDataset(write_coco(tmp_path, images=images, annotations=annotations), "test")
    assert dataset[0].labels.tolist() == [2, 1] and (dataset[0].width, dataset[0].height) == (100, 80)
    assert found(dataset, "found") == {"annotation of a crowd, read as one object": 2}


def many_images(root, split, count):
    images = [{"id": i, "file_name": f"{split}{i}.jpg", "width": 100, "height": 80} for i in range(count)]
    boxes = [BOX | {"image_id": i, "category_id": c} for i in range(count) for c in (1, 2)]
    relations = {str(i): [[0, 1, i % 2]] for i in range(count)}
    return write_coco(root, images=images, annotations=boxes, relations=relations, split=split)


def test_without_val_json_validation_images_are_held_out(tmp_path):
    root = many_images(tmp_path, "train", 10)
    parts = [CocoDataset(root, split) for split in ("train", "validation")]
    ids = [{part[i].image_id for i in range(len(part))} for part in parts]
    assert [len(part) for part in ids] == [8, 2] and not ids[0] & ids[1]
    first = open_dataset(root, "validation", validation_images=3, validation_choice="first")
    assert [first[i].image_id for i in range(3)] == ["train0.jpg", "train1.jpg", "train2.jpg"]
    many_images(tmp_path, "test", 2)
    assert len(open_dataset(root, "test", validation_images=3)) == 2
    many_images(tmp_path, "val", 3)
    assert len(CocoDataset(root, "train")) == 10 and len(CocoDataset(root, "validation")) == 3
    for option in ({"validation_images": 3}, {"validation_choice": "first"}):
        with pytest.raises(ValueError, match=f"has its own validation split, so {next(iter(option))} must be left out"):
            open_dataset(root, "train", **option)


def test_predictions_for_images_without_relations_are_accepted(tmp_path):
    none = {"img_to_first_rel": np.array([0, -1, 4]), "img_to_last_rel": np.array([1, -1, 4])}
    root = small_vg150(tmp_path / "vg", split=np.array([2, 2, 2]), **none)
    predictions = {}
    for graph in VG150Dataset(root, "test", keep="everything"):
        triplets = {"triplets": graph.relations.tolist(), "triplet_scores": [1.0] * len(graph.relations)}
        predictions[graph.image_id] = {"boxes": graph.boxes.tolist(), "labels": graph.labels.tolist()} | triplets
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    arguments = ["--annotations", str(root), "--protocol", "sgdet", "--json", str(tmp_path / "f.json")]
    assert len(predictions) == 3 and cli.main(["evaluate", str(tmp_path / "p.json"), *arguments]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["R@50"] == 1


def test_a_test_split_alone_is_evaluated(tmp_path, capsys, caplog):
    root = many_images(tmp_path / "data", "test", 4)
    dataset = CocoDataset(root, "test")
    predictions = {}
    for graph in (dataset[i] for i in range(4)):
        triplets = {"triplets": graph.relations.tolist(), "triplet_scores": [1.0]}
        predictions[graph.image_id] = {"boxes": graph.boxes.tolist(), "labels": graph.labels.tolist()} | triplets
    path = tmp_path / "p.json"
    path.write_text(json.dumps(predictions))
    arguments = ["--annotations", str(root), "--protocol", "predcls", "--json", str(tmp_path / "f.json")]
    assert cli.main(["evaluate", str(path), *arguments]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["R@50"] == 1 and not any(name.startswith(("zR", "mR@50/")) for name in figures)
    assert any("there is no training split" in line for line in caplog.messages)
    path.write_text(json.dumps({"0001": predictions["test0.jpg"]}))
    assert cli.main(["evaluate", str(path), *arguments]) == 1
    assert "such as 'test0.jpg', got 1 other, such as '0001'" in capsys.readouterr().err


def test_annotations_that_name_no_image_are_refused_even_if_bad_rows_are_skipped(tmp_path):
    """Their relations would point to other objects."""
    root = write_coco(tmp_path, annotations=[BOX | {"image_id": None}, BOX, BOX | {"category_id": 2}])
    with pytest.raises(ValueError, match="annotations, row 0: must have an image_id, an integer or text"):
        CocoDataset(root, "test", bad_rows="skip")


def test_images_with_the_same_id_are_all_refused(tmp_path):
    images = [{"id": i, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n, i in enumerate([1, 2, "1"])]
    root = write_coco(tmp_path, images=images, annotations=[BOX, BOX, BOX | {"image_id": 2}])
    dataset = CocoDataset(root, "test", bad_rows="skip")
    assert [graph.image_id for graph in dataset] == ["1.jpg"]
    assert found(dataset, "left out") == {
        "image whose id another image has": 1,
        "object of a refused image": 2,
        "relation of a refused image": 1,
    }


def test_bad_rows_of_a_split_file_are_counted_in_one_split(tmp_path):
    root = many_images(tmp_path, "train", 10)
    content = json.loads((root / "train.json").read_text())
    content["annotations"][0]["bbox"] = [1]
    (root / "train.json").write_text(json.dumps(content))
    parts = [CocoDataset(root, split, bad_rows="skip") for split in ("train", "validation")]
    assert sum(len(part.findings.with_outcome("refused")) for part in parts) == 1


def test_indices_that_count_from_1_are_named(tmp_path):
    with pytest.raises(ValueError, match="objects must be from 0 to 1, got .* are counted from 1, but must be"):
        CocoDataset(write_coco(tmp_path, relations={"1": [[1, 2, 0], [2, 1, 0]]}), "test")
    sound = CocoDataset(write_coco(tmp_path, relations={"1": [[1, 0, 0]]}), "test")
    assert not sound.findings.causes


def test_file_names_as_keys_of_relations_are_named(tmp_path):
    with pytest.raises(ValueError, match="rel.json has file names as keys, but must have image ids"):
        CocoDataset(write_coco(tmp_path, relations={"a.jpg": [[1, 0, 0]]}), "test")


def test_a_folder_without_any_part_is_reported(tmp_path, capsys):
    (tmp_path / "rel.json").write_text("{}")
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "COCO with relations: train.json or test.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": [BOX | {"bbox": [2**24 + 1, 0, 5, 5]}]}, "finite and at most 16777216, got"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg", "width": 2**24 + 1, "height": 9}]},
            "numbers from 1 to 1677",
        ),
    ],
)
def test_numbers_that_float32_would_round_to_other_pixels_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CocoDataset(write_coco(tmp_path, **changes), "test")


def test_a_folder_of_images_in_which_none_is_found_is_reported(tmp_path):
    root = write_coco(tmp_path)
    (root / "images" / "train").mkdir(parents=True)
    assert found(CocoDataset(root, "test"), "found") == {"image without a file": 1}


def test_a_repeated_key_is_refused(tmp_path):
    root = write_coco(tmp_path)
    text = (root / "rel.json").read_text()
    (root / "rel.json").write_text(text.replace('"test": {', '"test": {"1": [], '))
    with pytest.raises(ValueError, match="rel.json: .*the key '1' occurs twice in an object"):
        CocoDataset(root, "test")


@pytest.mark.parametrize("width", [10**400, "9" * 5000, "²", True, [1]])
def test_numbers_that_are_none_are_refused(tmp_path, width):
    images = [{"id": 1, "file_name": "a.jpg", "width": width, "height": 80}]
    with pytest.raises(ValueError, match="width and height must be whole numbers from 1 to 16777216, got"):
        CocoDataset(write_coco(tmp_path, images=images), "test")


@pytest.mark.parametrize("name", ["\ud800.jpg", "../a.jpg", "/a.jpg", "//a.jpg", "a\0.jpg", "", "..", 7, None])
def test_names_of_files_outside_the_folder_are_refused(tmp_path, name):
    images = [{"id": 1, "file_name": name, "width": 100, "height": 80}]
    with pytest.raises(ValueError, match="must be a path in the data set's folder|must be a JSON file"):
        CocoDataset(write_coco(tmp_path / "coco", images=images), "test")
    if isinstance(name, str) and name:
        with pytest.raises(ValueError, match="must be a path in the data set's folder|must be a JSON file"):
            VRDDataset(write_vrd(tmp_path / "vrd", {name: [row()]}), "train")


def test_a_conversion_gives_every_image_its_own_file(tmp_path, capsys):
    root = write_vrd(tmp_path / "vrd", {}, {"a": [row()], "a.jpg": [row()]})
    assert cli.main(["make-dataset", str(tmp_path / "o"), "--format", "coco", "--source", str(root)]) == 1
    assert "must give different file names, but 'a.jpg' occurs twice" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_long_row_is_cut_in_messages(tmp_path):
    root = write_coco(tmp_path, annotations=[{"image_id": 1, "segmentation": [1] * 9999}])
    with pytest.raises(ValueError) as error:
        CocoDataset(root, "test")
    assert len(str(error.value)) < 600


def test_a_folder_of_two_layouts_is_refused(tmp_path):
    write_vrd(write_coco(tmp_path), {"a.jpg": [row()]})
    with pytest.raises(ValueError, match="the files of one layout, but has those of VRD, COCO with relations"):
        open_dataset(tmp_path, "test")


# ---- VRD


def write_vrd(root, rows, test=None):
    root.mkdir(exist_ok=True)
    contents = {"objects": ["cat", "hat"], "predicates": ["on"], "annotations_train": rows, "annotations_test": test}
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content or {}))
    return root


def row(predicate=0, box=(0, 90, 0, 60)):
    return {
        "predicate": predicate,
        "subject": {"category": 0, "bbox": list(box)},
        "object": {"category": 1, "bbox": [5, 20, 5, 20]},
    }


def test_bad_rows_of_vrd_are_left_out_and_counted(tmp_path):
    root = write_vrd(tmp_path, {"a.jpg": [row(), row(predicate=4), 3], "b.jpg": None})
    dataset = VRDDataset(root, "train", validation_images=0, bad_rows="skip")
    assert len(dataset) == 1 and dataset[0].relations.tolist() == [[0, 1, 1]]
    refused = {"relation with a malformed row": 2, "image without a list of relations": 1}
    assert found(dataset, "refused") == refused


def test_vrd_pictures_are_found_in_the_folders_of_its_archive(tmp_path, caplog):
    root = write_vrd(tmp_path, {"a.jpg": [row()], "b.jpg": [row()]})
    (root / "sg_train_images").mkdir()
    Image.new("RGB", (120, 100)).save(root / "sg_train_images" / "a.gif")
    dataset = VRDDataset(root, "train", validation_images=0)
    sizes = {graph.image_id: (graph.width, graph.height) for graph in (dataset[0], dataset[1])}
    assert sizes == {"a.jpg": (120, 100), "b.jpg": (61, 91)}
    assert caplog.messages == [
        f"{root}/annotations_train.json, train: found 1 image without a file, sized by its boxes"
    ]


# ---- splits


@pytest.mark.parametrize("kind", ["DetectorModule", "EntityDetectorModule"])
def test_detectors_train_on_images_without_relations(tmp_path, kind, caplog):
    from sgalign import training

    none = np.array([-1, -1, -1])
    root = small_vg150(tmp_path, img_to_first_rel=none, img_to_last_rel=none)
    data = SceneGraphData(str(root), validation_images=0)
    data.prepare_for(relations=getattr(training, kind).needs_relations, overlapping_only=False)
    assert [graph.image_id for graph in data.train] == ["7.jpg", "8.jpg"]
    data.prepare_for(relations=True, overlapping_only=False)
    assert data.train == []
    assert any("2 images without relations" in line for line in caplog.messages)


def test_detections_that_are_missing_or_left_over_are_counted(tmp_path, caplog):
    root = many_images(tmp_path / "data", "test", 3)
    one = {"boxes_xyxy": [[0.1, 0.1, 0.3, 0.3]], "labels": [0], "scores": [0.5]}
    (tmp_path / "d.json").write_text(json.dumps({"test0.jpg": one, "other.jpg": one}))
    SceneGraphData(str(root), detections=str(tmp_path / "d.json")).test_dataloader()
    assert caplog.messages[-2] == (
        "detections: left out 1 image outside the test split; found 2 images of the test split without detections"
    )
    assert "all coordinates of the 1 predicted boxes are at most 1" in caplog.messages[-1]


def test_a_test_split_without_relations_is_refused(tmp_path):
    many_images(tmp_path, "train", 6)
    root = write_coco(tmp_path, relations={})
    data = SceneGraphData(str(root))
    with pytest.raises(ValueError, match="the test split must have relations, got none in its 1 images"):
        data.require_relations("test")
    data.require_relations("train")


def test_a_validation_split_without_relations_is_not_evaluated(tmp_path, caplog):
    many_images(tmp_path, "train", 6)
    root = write_coco(tmp_path, relations={}, split="val")
    data = SceneGraphData(str(root))
    assert len(data.val_dataloader()) == 0 and len(data.validation) == 1
    assert any("the validation split has no relations" in line for line in caplog.messages)
    data.prepare_for(relations=False, overlapping_only=False)
    assert len(data.val_dataloader()) == 1


def test_a_sorted_file_is_split_into_similar_parts(tmp_path):
    """All relations of the first half of the images have the same predicate."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in range(400)]
    boxes = [BOX | {"image_id": i, "category_id": c} for i in range(400) for c in (1, 2)]
    relations = {str(i): [[0, 1, int(i >= 200)]] for i in range(400)}
    root = write_coco(tmp_path, images=images, annotations=boxes, relations=relations, split="train")
    shares = {}
    for choice in ("hash", "first"):
        part = CocoDataset(root, "validation", validation_choice=choice)
        shares[choice] = sum(int(part[i].relations[0, 2]) == 1 for i in range(len(part))) / len(part)
    assert shares["first"] == 1 and abs(shares["hash"] - 0.5) < 0.1


def test_every_process_evaluates_something_and_no_image_counts_twice():
    from sgalign.data import ScenesDataset
    from sgalign.training.datamodule import with_idle_images

    graphs = list(map(ScenesDataset("test", size=4).__getitem__, range(4)))
    assert with_idle_images(graphs, 3) == graphs
    more = with_idle_images(graphs[:2], 4)
    assert more[:2] == graphs[:2] and len(more) == 4
    assert all(len(graph.labels) == len(graph.relations) == 0 and graph.image for graph in more[2:])
    assert with_idle_images([], 4) == []
