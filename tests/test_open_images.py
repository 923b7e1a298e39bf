"""Tests of the reader of Open Images' visual relationships, on hand-made CSV and JSON files."""

import json

import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from sgalign.commands import check  # noqa: E402
from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import CocoDataset, OpenImagesDataset, open_dataset  # noqa: E402
from sgalign.data.open import splits_of  # noqa: E402

COLUMNS = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel"
# The columns have both x before both y. The man is at x 0.1 to 0.5 and y 0.2 to 0.75.
MAN, GUITAR, HAT = "0.1,0.5,0.2,0.75", "0.25,0.5,0.5,0.75", "0.25,0.5,0.125,0.25"
PLAYS = f"aa,/m/man,/m/guitar,{MAN},{GUITAR},plays"
WEARS = f"aa,/m/man,/m/hat,{MAN},{HAT},wears"
WOODEN = f"aa,/m/guitar,/m/wooden,{GUITAR},{GUITAR},is"
NAMES = ["__background__", "Man", "Guitar", "Hat"]


def write(root, *, train=(PLAYS, WEARS, WOODEN), prefix="oidv6-", header=COLUMNS, **other):
    """Write CSV files with one text per row. Other splits are other keyword arguments."""
    root.mkdir(exist_ok=True)
    (root / "class-descriptions-boxable.csv").write_text("/m/man,Man\n/m/guitar,Guitar\n/m/hat,Hat\n")
    for split, rows in {"train": train, **other}.items():
        text = "".join(f"{row}\n" for row in (header, *rows))
        (root / f"{prefix}{split}-annotations-vrd.csv").write_text(text)
    return root


def entry(name="aa", **other):
    values = {
        "img_fn": name,
        "img_size": [80, 60],
        "bbox": [[8, 12, 40, 45], [20, 30, 40.5, 45]],
        "det_labels": [0, 2],
        "rel": [[0, 1, 1], [0, 1, 1], [1, 0, 0]],
    }
    return values | other


def write_json(root, *, folder="annotations", **splits):
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "categories_dict.json").write_text(json.dumps({"obj": NAMES[1:], "rel": ["at", "plays"]}))
    for split, rows in {"train": [entry()], **splits}.items():
        (place / f"vrd-{split}-anno.json").write_text(json.dumps(rows))
    return root


def found(dataset, outcome):
    return {finding.kind: finding.count for finding in dataset.findings.with_outcome(outcome)}


def triplets(graph, dataset):
    objects, predicates = dataset.object_names, dataset.predicate_names
    return [(objects[graph.labels[s]], predicates[p], objects[graph.labels[o]]) for s, o, p in graph.relations.tolist()]


# ---- CSV files


def test_rows_of_an_image_become_one_scene_graph(tmp_path):
    dataset = OpenImagesDataset(write(tmp_path), "train")
    assert dataset.object_names == NAMES and dataset.predicate_names == ["__background__", "plays", "wears"]
    (graph,) = dataset
    assert graph.image_id == "aa.jpg" and (graph.width, graph.height) == (1024, 1024) and graph.image is None
    fractions = [[0.1, 0.2, 0.5, 0.75], [0.25, 0.5, 0.5, 0.75], [0.25, 0.125, 0.5, 0.25]]
    torch.testing.assert_close(graph.boxes, torch.tensor(fractions) * 1024)
    assert graph.labels.tolist() == [1, 2, 3]
    assert triplets(graph, dataset) == [("Man", "plays", "Guitar"), ("Man", "wears", "Hat")]


def test_attributes_are_counted_and_their_objects_are_kept(tmp_path):
    rows = [WOODEN, WOODEN.replace(GUITAR, HAT), PLAYS]  # the first and the last row have the same guitar
    dataset = OpenImagesDataset(write(tmp_path, train=rows), "train")
    assert dataset[0].labels.tolist() == [2, 2, 1] and dataset[0].relations.tolist() == [[2, 0, 1]]
    assert found(dataset, "left out") == {"attribute of an object": 2}


def test_objects_of_the_same_box_but_other_classes_are_two(tmp_path):
    rows = [PLAYS.replace(MAN, GUITAR), PLAYS.replace("aa", "bb"), PLAYS]
    dataset = OpenImagesDataset(write(tmp_path, train=rows), "train")
    assert [graph.image_id for graph in dataset] == ["aa.jpg", "bb.jpg"]  # rows of an image may lie apart
    assert dataset[0].labels.tolist() == [1, 2, 1] and dataset[0].relations.tolist() == [[0, 1, 1], [2, 1, 1]]
    assert dataset[0].boxes[0].equal(dataset[0].boxes[1])


def test_sizes_come_from_the_image_files(tmp_path):
    write(tmp_path, train=[PLAYS, PLAYS.replace("aa", "bb")])
    (tmp_path / "train").mkdir()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "train" / "bb.jpg")
    dataset = OpenImagesDataset(tmp_path, "train")
    assert [(graph.width, graph.height) for graph in dataset] == [(1024, 1024), (80, 60)]
    torch.testing.assert_close(dataset[1].boxes[0], torch.tensor([8.0, 12, 40, 45]))
    assert dataset[1].image().size == (80, 60)
    unknown = "image of unknown size, taken as 1024 x 1024 pixels"
    assert found(dataset, "found") == {unknown: 1, "image without a file": 1}
    assert found(OpenImagesDataset(write(tmp_path / "bare"), "train"), "found") == {unknown: 1}


def test_the_labels_of_an_image_file_that_cannot_be_read_are_kept(tmp_path):
    (write(tmp_path, train=[PLAYS, PLAYS.replace("aa", "bb")]) / "aa.jpg").write_text("no image")
    dataset = OpenImagesDataset(tmp_path, "train")
    assert [(graph.image_id, graph.width, len(graph.relations)) for graph in dataset] == [
        ("aa.jpg", 1024, 1),
        ("bb.jpg", 1024, 1),
    ]
    assert found(dataset, "found")["image that cannot be read, taken as 1024 x 1024 pixels"] == 1


def test_the_images_of_a_split_are_first_searched_in_its_own_folder(tmp_path):
    write(tmp_path, test=[PLAYS])
    for folder, color in (("train", "red"), ("test", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 6), color).save(tmp_path / folder / "aa.png")
    colors = [OpenImagesDataset(tmp_path, split)[0].image().getpixel((0, 0)) for split in ("train", "test")]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_a_file_whose_last_line_has_no_end_is_named(tmp_path):
    path = write(tmp_path) / "oidv6-train-annotations-vrd.csv"
    path.write_text(path.read_text().rstrip("\n"))
    assert found(OpenImagesDataset(tmp_path, "train"), "found")["last line without an end, which may be cut short"] == 1


@pytest.mark.parametrize("name", ["class-descriptions-boxable.csv", "oidv6-relationship-triplets.csv"])
def test_a_file_of_names_whose_last_line_has_no_end_is_named(name, tmp_path, caplog):
    write(tmp_path)
    triplet_rows = "LabelName1,LabelName2,RelationshipLabel\n/m/man,/m/hat,wears\n/m/man,/m/guitar,plays\n"
    (tmp_path / "oidv6-relationship-triplets.csv").write_text(triplet_rows)
    path = tmp_path / name
    path.write_text(path.read_text().rstrip("\n"))
    OpenImagesDataset(tmp_path, "train")
    assert f"{path}: the last line has no end, so the file may be cut short" in caplog.text


@pytest.mark.parametrize("prefix", ["", "oidv6-", "challenge-2019-"])
def test_splits_have_their_own_files_and_the_same_predicates(tmp_path, prefix):
    test = [PLAYS.replace("plays", "at").replace("aa", "cc")]
    write(tmp_path, prefix=prefix, validation=[PLAYS.replace("aa", "bb")], test=test)
    (tmp_path / "challenge-2018-classes-vrd.csv").write_text("/m/man\n")  # no file of relationships
    assert splits_of(tmp_path) == ["train", "validation", "test"]
    datasets = [open_dataset(tmp_path, split) for split in ("train", "validation", "test")]
    assert [[graph.image_id for graph in dataset] for dataset in datasets] == [["aa.jpg"], ["bb.jpg"], ["cc.jpg"]]
    assert all(dataset.predicate_names == ["__background__", "at", "plays", "wears"] for dataset in datasets)
    with pytest.raises(ValueError, match="has its own validation split, so validation_images must be left out"):
        OpenImagesDataset(tmp_path, "train", validation_images=1)


def test_validation_images_are_held_out_of_a_training_file(tmp_path):
    write(tmp_path, train=[PLAYS.replace("aa", name) for name in "abcdefghij"])
    assert splits_of(tmp_path) == ["train", "validation"]
    parts = [OpenImagesDataset(tmp_path, split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [8, 2]
    assert sorted(graph.image_id[0] for part in parts for graph in part) == list("abcdefghij")
    first = OpenImagesDataset(tmp_path, "validation", validation_images=3, validation_choice="first")
    assert [graph.image_id[0] for graph in first] == ["a", "b", "c"]
    with pytest.raises(FileNotFoundError, match="must have a file of the test split, but has .*train"):
        OpenImagesDataset(tmp_path, "test")


def test_a_file_of_triplets_gives_the_predicates(tmp_path):
    triplet_rows = "LabelName1,LabelName2,RelationshipLabel\n/m/man,/m/hat,wears\n/m/man,/m/hat,on\n/m/man,/m/x,is\n"
    (write(tmp_path, train=[WEARS, PLAYS]) / "oidv6-relationship-triplets.csv").write_text(triplet_rows)
    dataset = OpenImagesDataset(tmp_path, "train", bad_rows="skip")
    assert dataset.predicate_names == ["__background__", "on", "wears"]
    assert triplets(dataset[0], dataset) == [("Man", "wears", "Hat")]
    with pytest.raises(
        ValueError, match="line 3: RelationshipLabel must be the id of a class .on, wears., got 'plays'"
    ):
        OpenImagesDataset(tmp_path, "train")


def test_the_boxable_class_descriptions_are_preferred(tmp_path):
    write(tmp_path)
    (tmp_path / "oidv6-class-descriptions.csv").write_text("LabelName,DisplayName\n/m/man,Person\n/m/cat,Cat\n")
    assert OpenImagesDataset(tmp_path, "train").object_names == NAMES
    text = 'LabelName,DisplayName\n/m/hat,"Hat, cap"\n/m/man,Man\n/m/guitar,Guitar\n'
    (tmp_path / "class-descriptions-boxable.csv").write_text(text)
    assert OpenImagesDataset(tmp_path, "train").object_names == ["__background__", "Hat, cap", "Man", "Guitar"]
    (tmp_path / "oidv7-class-descriptions-boxable.csv").write_text(text)
    with pytest.raises(ValueError, match="must have one file of class descriptions, but has class-.*, oidv7-"):
        OpenImagesDataset(tmp_path, "train")


@pytest.mark.parametrize(
    "header", ["\nLabelName,DisplayName", 'LabelName,"Display\nName"'], ids=["blank line", "line break"]
)
def test_a_header_of_two_lines_is_not_a_class(tmp_path, header):
    write(tmp_path)
    classes = "/m/man,Man\n/m/guitar,Guitar\n/m/hat,Hat\n"
    (tmp_path / "class-descriptions-boxable.csv").write_text(f"{header}\n{classes}")
    assert OpenImagesDataset(tmp_path, "train").object_names == NAMES


def test_class_descriptions_are_needed(tmp_path):
    (write(tmp_path) / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(FileNotFoundError, match="class-descriptions-boxable.csv not found: download it"):
        OpenImagesDataset(tmp_path, "train")
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/man,Man\n/m/hat\n")
    with pytest.raises(ValueError, match="line 2: must have the id and the name of a class"):
        OpenImagesDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PLAYS.replace("0.75", "1.5", 1), "line 3, object 1: its box must be 4 fractions .*1.5"),
        (PLAYS.replace("0.1", "-0.1"), "line 3, object 1: its box must be 4 fractions"),
        (PLAYS.replace("0.1", "nan"), "line 3, object 1: its box must be 4 fractions"),
        (PLAYS.replace("0.1", "0.1_5"), "line 3, object 1: its box must be 4 fractions .*0.1_5"),
        (PLAYS.replace(GUITAR, "0.2,left,0.5,0.7"), "line 3, object 2: its box must be 4 fractions .*left"),
        (PLAYS.replace(GUITAR, "0.5,0.5,0.5,0.7"), "line 3, object 2: its box .* must have a width and a height"),
        (PLAYS.replace("/m/man", "/m/cat"), "line 3, object 1: LabelName must be the id of a class .*'/m/cat'"),
        (PLAYS.replace("/m/guitar", "/m/cat"), "line 3, object 2: LabelName must be the id of a class .*'/m/cat'"),
        (PLAYS.replace("plays", ""), "line 3: RelationshipLabel must be the id of a class .*''"),
        (PLAYS.replace("aa", ""), "line 3: must have an ImageID"),
        (PLAYS.replace("aa", "../aa"), "the name of an image must be a path in the data set's folder"),
        (PLAYS[:40], "line 3: must have as many values as the first line"),
        (PLAYS + ",1", "line 3: must have as many values as the first line"),
    ],
)
def test_malformed_rows_are_refused_or_left_out(tmp_path, row, message):
    write(tmp_path, train=[WEARS, row])
    with pytest.raises(ValueError, match=message):
        OpenImagesDataset(tmp_path, "train")
    dataset = OpenImagesDataset(tmp_path, "train", bad_rows="skip")
    assert [triplets(graph, dataset) for graph in dataset] == [[("Man", "wears", "Hat")]]
    assert sum(found(dataset, "refused").values()) == 1


def test_columns_may_have_any_order_and_must_be_complete(tmp_path):
    names, rows = COLUMNS.split(","), [PLAYS.split(","), WEARS.split(",")]
    header = ",".join(["Confidence", *names[::-1]])
    write(tmp_path / "any", train=[",".join(["1", *row[::-1]]) for row in rows], header=header)
    same = OpenImagesDataset(write(tmp_path / "usual", train=[PLAYS, WEARS]), "train")[0]
    other = OpenImagesDataset(tmp_path / "any", "train")[0]
    assert same.boxes.equal(other.boxes) and same.relations.equal(other.relations)
    write(tmp_path / "any", header=COLUMNS.replace("XMax2", "X2").replace("ImageID", "ID"))
    with pytest.raises(ValueError, match="train-annotations-vrd.csv: the first line .* lacks ImageID, XMax2"):
        OpenImagesDataset(tmp_path / "any", "train")


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    write(tmp_path, train=[f"{PLAYS},0.9"], header=f"{COLUMNS},XMax2")
    with pytest.raises(ValueError, match="the first line must name the columns, each once, but has XMax2 twice"):
        OpenImagesDataset(tmp_path, "train")


def test_a_row_with_a_blank_predicate_can_be_skipped(tmp_path):
    write(tmp_path, train=[WEARS, PLAYS.replace("plays", " ")])
    dataset = OpenImagesDataset(tmp_path, "train", bad_rows="skip")
    assert dataset.predicate_names == ["__background__", "wears"] and len(dataset[0].relations) == 1
    assert found(dataset, "refused") == {"relation with a malformed row": 1}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", COLUMNS.encode() + b'\n"aa'])
def test_files_that_are_not_csv_are_refused(tmp_path, content):
    (write(tmp_path) / "oidv6-train-annotations-vrd.csv").write_bytes(content)
    with pytest.raises(ValueError, match="train-annotations-vrd.csv: "):
        OpenImagesDataset(tmp_path, "train")


def test_two_files_of_a_split_are_refused(tmp_path):
    write(write(tmp_path), prefix="challenge-2018-")
    with pytest.raises(ValueError, match="must have one train file, but has challenge-2018-train.* and oidv6-train"):
        OpenImagesDataset(tmp_path, "train")


# ---- JSON files


@pytest.mark.parametrize("folder", ["annotations", "."])
def test_entries_of_json_files_are_read(tmp_path, folder):
    write_json(tmp_path, folder=folder, val=[entry("bb", bbox=[], det_labels=[], rel=[])], test=[entry("cc")])
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "images" / "aa.jpg")
    assert splits_of(tmp_path) == ["train", "validation", "test"]
    dataset = open_dataset(tmp_path, "train")
    assert isinstance(dataset, OpenImagesDataset)
    assert dataset.object_names == NAMES and dataset.predicate_names == ["__background__", "at", "plays"]
    (graph,) = dataset
    assert (graph.image_id, graph.width, graph.height) == ("aa.jpg", 80, 60) and graph.image().size == (80, 60)
    assert graph.boxes.tolist() == [[8, 12, 40, 45], [20, 30, 40.5, 45]] and graph.labels.tolist() == [1, 3]
    assert graph.relations.tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 1]]  # nothing is filtered
    (empty,) = OpenImagesDataset(tmp_path, "validation")
    assert len(empty.boxes) == len(empty.relations) == 0 and empty.image_id == "bb.jpg"


def test_validation_images_are_held_out_of_a_json_file(tmp_path):
    write_json(tmp_path, train=[entry(name) for name in "abcde"])
    first = OpenImagesDataset(tmp_path, "validation", validation_choice="first")
    assert [graph.image_id for graph in first] == ["a.jpg"]
    assert [len(OpenImagesDataset(tmp_path, "train", validation_images=n)) for n in (0, 3)] == [5, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_fn": None}, "row 1: must have the text img_fn"),
        ({"img_fn": ""}, "row 1: must have the text img_fn"),
        ({"img_fn": "aa"}, "row 1: image names must be unique, but 'aa.jpg' occurs twice"),
        ({"img_size": [80]}, "row 1: must have .* 2 numbers in img_size"),
        ({"img_size": [80, "wide"]}, "row 1: width and height must be whole numbers"),
        ({"det_labels": [0]}, "row 1: must have .* as many det_labels as boxes"),
        ({"rel": {}}, "row 1: must have .* the lists"),
        ({"det_labels": [0, 3]}, "row 1, object 1: its class must be the id of a class"),
        ({"bbox": [[8, 12, 40, 45], [20, 30, 10, 45]]}, "row 1, object 1: its box .* must have a width"),
        ({"bbox": [[8, 12, 40, "x"], [20, 30, 40, 45]]}, "row 1, object 0: its box must be 4 numbers"),
        ({"rel": [[0, 2, 1]]}, "row 1, relation 0: its objects must be two of the image's 2"),
        ({"rel": [[0, 1, 2]]}, "row 1, relation 0: its predicate must be the id of a class"),
        ({"rel": [[0, 1]]}, r"row 1, relation 0: must be \[subject, object, predicate\]"),
    ],
)
def test_malformed_entries_are_refused_or_left_out(tmp_path, change, message):
    write_json(tmp_path, train=[entry(), entry("bb") | change])
    with pytest.raises(ValueError, match="vrd-train-anno.json, " + message):
        OpenImagesDataset(tmp_path, "train")
    dataset = OpenImagesDataset(tmp_path, "train", bad_rows="skip")
    assert len(dataset[0].relations) == 3 and sum(found(dataset, "refused").values()) == 1


@pytest.mark.parametrize("content", ["[{", '{"aa": 1}', ""])
def test_bad_json_files_are_refused(tmp_path, content):
    (write_json(tmp_path) / "annotations" / "vrd-train-anno.json").write_text(content)
    with pytest.raises(ValueError, match="vrd-train-anno.json: must be a "):
        OpenImagesDataset(tmp_path, "train")


def test_the_file_of_categories_is_needed(tmp_path):
    path = write_json(tmp_path) / "annotations" / "categories_dict.json"
    path.write_text(json.dumps({"obj": NAMES[1:]}))
    with pytest.raises(ValueError, match="categories_dict.json: must be a JSON object with the lists obj and rel"):
        OpenImagesDataset(tmp_path, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="categories_dict.json"):
        OpenImagesDataset(tmp_path, "train")


def test_files_of_both_forms_are_refused(tmp_path):
    write_json(write(tmp_path))
    with pytest.raises(ValueError, match="must have either CSV files or JSON files, but has .*vrd.csv, .*anno.json"):
        open_dataset(tmp_path, "train")


# ---- commands


@pytest.mark.parametrize("form", [write, write_json])
def test_check_counts_images_objects_and_relations(tmp_path, form):
    report = check.check(str(form(tmp_path)))
    counts = {"images": 1, "without relations": 0, "objects": 3, "relations": 2, "image files": 0}
    expected = counts if form is write else counts | {"objects": 2, "relations": 3}
    assert report["parts"]["train"]["counts"] == expected and not report["refused"]


@pytest.mark.parametrize("form", [write, write_json])
def test_a_converted_folder_reads_back_equal(tmp_path, form):
    source, out = form(tmp_path / "source"), tmp_path / "out"
    assert cli.main(["make-dataset", str(out), "--source", str(source)]) == 0
    before, after = OpenImagesDataset(source, "train"), CocoDataset(out, "train")
    assert before.object_names == after.object_names and before.predicate_names == after.predicate_names
    for one, other in zip(before, after, strict=True):
        assert (one.image_id, one.width, one.height) == (other.image_id, other.width, other.height)
        torch.testing.assert_close(one.boxes, other.boxes)
        assert one.labels.equal(other.labels) and one.relations.equal(other.relations)
