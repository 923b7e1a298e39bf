"""Tests of the reader of GQA's scene graphs, on hand-made files."""

import gc
import json
import weakref

import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from sgalign.commands import check  # noqa: E402
from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import CocoDataset, GQADataset, open_dataset  # noqa: E402
from sgalign.data.coco_writing import write_coco
from sgalign.data.open import splits_of  # noqa: E402

DOG = {"name": "dog", "x": 10, "y": 20, "w": 30, "h": 15, "attributes": ["brown", "small"], "relations": []}
CAR = {"name": "car", "x": 0, "y": 5, "w": 60, "h": 40, "attributes": ["red"], "relations": []}


def related(entry, predicate, target):
    return entry | {"relations": [*entry["relations"], {"name": predicate, "object": target}]}


def graph(predicate="near", **other):
    """Return an image in which a dog (object 7) has a relation to a car (object 3)."""
    objects = {"7": related(DOG, predicate, "3"), "3": CAR}
    return {"width": 80, "height": 60, "location": "street", "objects": objects} | other


def write(root, *, folder=".", **splits):
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    for split, graphs in (splits or {"train": {"1": graph()}}).items():
        (place / f"{split}_sceneGraphs.json").write_text(json.dumps(graphs))
    return root


def found(dataset, outcome):
    return {finding.kind: finding.count for finding in dataset.findings.with_outcome(outcome)}


@pytest.mark.parametrize("folder", [".", "sceneGraphs"])
def test_scene_graphs_are_read(tmp_path, folder):
    objects = {"7": related(related(DOG, "near", "3"), "to the left of", "3"), "3": related(CAR, "near", "7")}
    write(tmp_path, folder=folder, train={"12": graph(objects=objects)})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "images" / "12.jpg")
    dataset = open_dataset(tmp_path, "train")
    assert isinstance(dataset, GQADataset)
    assert dataset.object_names == ["__background__", "car", "dog"]
    assert dataset.predicate_names == ["__background__", "near", "to the left of"]
    (read,) = dataset
    assert (read.image_id, read.width, read.height) == ("12.jpg", 80, 60) and read.image().size == (80, 60)
    assert read.boxes.tolist() == [[10, 20, 40, 35], [0, 5, 60, 45]] and read.labels.tolist() == [2, 1]
    # The dog is the subject of its relations.
    assert read.relations.tolist() == [[0, 1, 1], [0, 1, 2], [1, 0, 1]]


def test_attributes_are_counted_in_the_images_of_the_split(tmp_path):
    write(tmp_path, train={str(n): graph() for n in range(5)})
    assert found(GQADataset(tmp_path, "train"), "left out") == {"attribute of an object": 12}
    assert found(GQADataset(tmp_path, "validation"), "left out") == {"attribute of an object": 3}


def test_the_validation_file_is_the_test_split(tmp_path):
    write(tmp_path, train={str(n): graph() for n in range(10)}, val={"v": graph()})
    assert splits_of(tmp_path) == ["train", "validation", "test"]
    parts = [GQADataset(tmp_path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [8, 2, 1] and parts[2][0].image_id == "v.jpg"
    assert sorted(g.image_id for part in parts[:2] for g in part) == [f"{n}.jpg" for n in range(10)]
    first = GQADataset(tmp_path, "validation", validation_images=3, validation_choice="first")
    assert [g.image_id for g in first] == ["0.jpg", "1.jpg", "2.jpg"]


def test_with_a_test_file_each_split_has_its_own_file(tmp_path):
    write(tmp_path, **{split: {f"{split}{n}": graph() for n in range(6)} for split in ("train", "val", "test")})
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert [g.image_id for g in GQADataset(tmp_path, split)] == [f"{name}{n}.jpg" for n in range(6)]
    with pytest.raises(ValueError, match="has its own validation split, so validation_images must be left out"):
        GQADataset(tmp_path, "test", validation_images=1)


def test_a_folder_may_have_one_file(tmp_path):
    assert splits_of(write(tmp_path / "test", val={"v": graph()})) == ["test"]
    with pytest.raises(FileNotFoundError, match="must have a file of the train split, but has .*val_sceneGraphs"):
        GQADataset(tmp_path / "test", "train")
    assert splits_of(write(tmp_path / "train")) == ["train", "validation"]


def test_all_splits_have_the_classes_of_all_files(tmp_path):
    only_val = graph("on top of", objects={"1": related(DOG | {"name": " dog"}, "on top of", "1")})
    write(tmp_path, train={"1": graph()}, val={"2": only_val})
    for split in ("train", "validation", "test"):
        dataset = GQADataset(tmp_path, split)
        assert dataset.object_names == ["__background__", " dog", "car", "dog"]  # spaces are kept
        assert dataset.predicate_names == ["__background__", "near", "on top of"]
    assert dataset[0].relations.tolist() == [[0, 0, 2]] and dataset[0].labels.tolist() == [1]


def test_each_file_is_read_once_and_the_other_one_is_not_kept(tmp_path, monkeypatch):
    class Graphs(dict):
        """A dict that can be referred to weakly."""

    from sgalign.data import gqa

    read, contents, alive = gqa.read_json, [], []

    def recorded(path):
        gc.collect()
        alive.append(sum(content() is not None for content in contents))
        graphs = Graphs(read(path))
        contents.append(weakref.ref(graphs))
        return graphs

    monkeypatch.setattr(gqa, "read_json", recorded)
    GQADataset(write(tmp_path, train={"1": graph()}, val={"2": graph()}), "train")
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "image 'bad': must have width, height and an object with the key objects"),
        (graph(objects=[]), "image 'bad': must have width, height and an object with the key objects"),
        (graph(width=None), "image 'bad': width and height must be whole numbers"),
        (graph(objects={"7": []}), "image 'bad', object 0: its box must be 4 numbers x, y, width, height"),
        (graph(objects={"7": DOG | {"w": "wide"}}), "image 'bad', object 0: its box must be 4 numbers x, y, width"),
        (graph(objects={"7": DOG | {"h": 0}}), "image 'bad', object 0: its box .* must have a width and a height"),
        (graph(objects={"7": {k: v for k, v in DOG.items() if k != "x"}}), "image 'bad', object 0: its box must be 4"),
        (graph(objects={"7": DOG | {"name": 5}}), "image 'bad', object 0: its class must be the id of a class"),
        (graph(objects={"7": DOG | {"name": " "}}), "image 'bad', object 0: its class must be the id of a class"),
        (
            graph(objects={"7": DOG | {"relations": {"name": "near", "object": "7"}}}),
            "image 'bad', object '7': relations must be a list, got {'name'",
        ),
        (
            graph(objects={"7": {**DOG, "relations": None}}),
            "image 'bad', object '7': relations must be a list, got None",
        ),
        (
            graph(objects={"7": related(DOG, "near", "8")}),
            "image 'bad', object '7', relation 0: object must be the id of an object of the image, got '8'",
        ),
        (
            graph(objects={"7": related(DOG, "near", 7)}),
            "object '7', relation 0: must have a name and the id of an obj",
        ),
        (graph(objects={"7": DOG | {"relations": ["near"]}}), "object '7', relation 0: must have a name and the id"),
        (graph(None), "image 'bad', relation 0: its predicate must be the id of a class"),
    ],
)
def test_malformed_rows_are_refused_or_left_out(tmp_path, bad, message):
    write(tmp_path, train={"1": graph(), "bad": bad})
    with pytest.raises(ValueError, match="train_sceneGraphs.json, .*" + message):
        GQADataset(tmp_path, "train")
    dataset = GQADataset(tmp_path, "train", bad_rows="skip")
    assert len(dataset[0].relations) == 1 and sum(found(dataset, "refused").values()) == 1
    assert dataset.object_names == ["__background__", "car", "dog"]


def test_a_malformed_row_of_another_split_does_not_stop_this_one(tmp_path):
    write(tmp_path, train={"1": graph()}, val={"2": graph(width=0)})
    assert len(GQADataset(tmp_path, "train")) == 1
    with pytest.raises(ValueError, match="val_sceneGraphs.json, image '2': width and height"):
        GQADataset(tmp_path, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": {"width": 80, "hei', "must be a JSON file, but is not JSON or is cut short"),
        ("[]", "must be a JSON object with image ids as keys"),
        ('{"1": {}, "1": {}}', "the key '1' occurs twice"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_files_are_refused(tmp_path, content, message, split):
    write(tmp_path, train={"1": graph()}, val={"2": graph()})
    (tmp_path / "train_sceneGraphs.json").write_text(content)
    with pytest.raises(ValueError, match=f"train_sceneGraphs.json: .*{message}"):
        GQADataset(tmp_path, split)


def test_check_counts_images_objects_and_relations(tmp_path):
    report = check.check(str(write(tmp_path, train={str(n): graph() for n in range(5)}, val={"v": graph()})))
    assert not report["refused"]
    assert [report["parts"][split]["counts"]["relations"] for split in ("train", "validation", "test")] == [4, 1, 1]


def test_a_converted_folder_reads_back_equal(tmp_path):
    source = write(tmp_path / "gqa", train={str(n): graph() for n in range(5)}, val={"v": graph("in")})
    assert cli.main(["make-dataset", str(tmp_path / "out"), "--source", str(source)]) == 0
    for split in ("train", "validation", "test"):
        before, after = GQADataset(source, split), CocoDataset(tmp_path / "out", split)
        assert before.object_names == after.object_names and before.predicate_names == after.predicate_names
        for one, other in zip(before, after, strict=True):
            assert (one.image_id, one.width, one.height) == (other.image_id, other.width, other.height)
            torch.testing.assert_close(one.boxes, other.boxes)
            assert one.labels.equal(other.labels) and one.relations.equal(other.relations)


@pytest.mark.parametrize("name", ["none", "background", "apple"])
def test_names_that_other_layouts_use_for_the_background_are_classes(tmp_path, name):
    objects = {"7": related(DOG | {"name": name}, name, "3"), "3": CAR}
    dataset = GQADataset(write(tmp_path, train={"1": graph() | {"objects": objects}}), "train", validation_images=0)
    (read,) = dataset
    assert [dataset.object_names[label] for label in read.labels] == [name, "car"]
    assert [dataset.predicate_names[row[2]] for row in read.relations] == [name]


def test_such_names_are_not_written_where_they_would_be_lost(tmp_path):
    objects = {"7": related(DOG | {"name": "none"}, "near", "3"), "3": CAR}
    write(tmp_path / "in", train={"1": graph() | {"objects": objects}})
    with pytest.raises(ValueError, match="must not be those of the background in this layout, got 'none'"):
        write_coco({"train": GQADataset(tmp_path / "in", "train")}, ["", "none"], ["", "near"], tmp_path / "out")


def test_a_file_in_two_places_is_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, folder="sceneGraphs")
    with pytest.raises(ValueError, match="must have one file train_sceneGraphs.json"):
        GQADataset(tmp_path, "train")
