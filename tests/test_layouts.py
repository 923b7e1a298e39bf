"""Tests of the writers and readers of the layouts of VG150, VRD and COCO with relations."""

import hashlib
import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

h5py = pytest.importorskip("h5py")
pytest.importorskip("PIL")
import numpy as np  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402
from sgalign.commands import make_dataset  # noqa: E402
from sgalign.data import SceneGraph, ScenesDataset, VRDDataset, open_dataset  # noqa: E402
from sgalign.data.coco import CocoDataset  # noqa: E402
from sgalign.data.coco_writing import write_coco  # noqa: E402
from sgalign.data.open import annotation_files  # noqa: E402
from sgalign.data.triplets import read_zero_shot_triplets  # noqa: E402
from sgalign.data.vg150 import VG150Dataset  # noqa: E402
from sgalign.data.vrd import write_vrd  # noqa: E402

SPLITS = ("train", "validation", "test")
SIZES = {"train": 12, "validation": 4, "test": 5}


@pytest.fixture(scope="module")
def scenes():
    return {split: [ScenesDataset(split, size=SIZES[split])[i] for i in range(SIZES[split])] for split in SPLITS}


@pytest.fixture(scope="module")
def folders(scenes, tmp_path_factory):
    names = ScenesDataset("train").object_names, ScenesDataset("train").predicate_names
    root = tmp_path_factory.mktemp("layouts")
    for layout, write in make_dataset.WRITERS.items():
        write(scenes, *names, root / layout, images=layout == "vg150")
    return root


@pytest.fixture
def vg150(folders, tmp_path):
    return shutil.copytree(folders / "vg150", tmp_path / "vg150")


def edit(root, name, change):
    """Replace an array of the HDF5 file by `change(array)`, or remove it if that is None."""
    with h5py.File(root / "VG-SGG.h5", "a") as file:
        value = file[name][()]
        del file[name]
        if (value := change(value)) is not None:
            file[name] = value


def class_triplets(graph):
    return sorted((int(graph.labels[s]), int(graph.labels[o]), p) for s, o, p in graph.relations.tolist())


def placed_triplets(graph):
    """Return the relations with the classes and rounded boxes of subject and object."""
    objects = [(label, *map(round, box)) for label, box in zip(graph.labels.tolist(), graph.boxes.tolist())]
    return sorted((objects[s], objects[o], p) for s, o, p in graph.relations.tolist())


# ---- written files give back the same scenes


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_in_the_layout_of_vg150_are_read_back(scenes, folders, split):
    dataset = open_dataset(folders / "vg150", split)
    assert isinstance(dataset, VG150Dataset) and dataset.object_names == ScenesDataset("train").object_names
    expected = [g for g in scenes[split] if len(g.relations)]
    assert len(dataset) == len(expected)
    for graph, scene in zip((dataset[i] for i in range(len(dataset))), expected):
        assert (graph.width, graph.height) == (scene.width, scene.height)
        assert graph.image().size == (scene.width, scene.height)
        assert torch.equal(graph.labels, scene.labels) and torch.equal(graph.relations, scene.relations)
        unit = max(scene.width, scene.height) / 1024
        assert (graph.boxes - scene.boxes).abs().max() <= 2 * unit + 1e-3 + (split == "train")  # clipped by a pixel


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_in_the_layout_of_coco_are_read_back(scenes, folders, split):
    dataset = open_dataset(folders / "coco", split)
    assert isinstance(dataset, CocoDataset) and dataset.predicate_names == ScenesDataset("train").predicate_names
    for graph, scene in zip((dataset[i] for i in range(len(dataset))), scenes[split], strict=True):
        torch.testing.assert_close(graph.boxes, scene.boxes)
        assert torch.equal(graph.labels, scene.labels) and torch.equal(graph.relations, scene.relations)


def test_scenes_in_the_layout_of_vrd_are_read_back(scenes, folders):
    parts = [open_dataset(folders / "vrd", split, validation_images=4) for split in ("train", "validation")]
    assert all(isinstance(part, VRDDataset) for part in parts)
    read = sorted(placed_triplets(part[i]) for part in parts for i in range(len(part)))
    assert read == sorted(placed_triplets(scene) for split in ("train", "validation") for scene in scenes[split])


def one_graph(image_id, box):
    boxes = torch.tensor([box])
    return SceneGraph(image_id, 200, 100, boxes, torch.tensor([1]), torch.tensor([[0, 0, 1]]))


NAMES = ["__background__", "cat"], ["__background__", "on"]


def test_boxes_in_the_layout_of_coco_are_read_back_bit_for_bit(tmp_path):
    ends = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([-99.0, 1]).reshape(2, 1, 1)
    graphs = [one_graph(f"{n}.jpg", box) for n, box in enumerate(torch.cat(ends.unbind(), 1).tolist())]
    write_coco({"test": graphs}, *NAMES, tmp_path)
    for graph, again in zip(graphs, CocoDataset(tmp_path, "test"), strict=True):
        assert torch.equal(graph.boxes, again.boxes)


@pytest.mark.parametrize("box", [[5.0, 5, 5, 9], [-(2.0**24), 0, 9, 9]])
def test_a_box_that_coco_could_not_be_read_back_from_is_not_written(tmp_path, box):
    with pytest.raises(ValueError, match=r"image 'a\.jpg': bbox"):
        write_coco({"test": [one_graph("a.jpg", box)]}, *NAMES, tmp_path)


def test_images_of_the_same_file_name_are_not_written_as_one(tmp_path):
    graphs = [one_graph("a/b", [0.0, 0, 9, 9]), one_graph("a_b", [0.0, 0, 9, 9])]
    with pytest.raises(ValueError, match="must give different file names, but 'a_b.jpg' occurs twice"):
        write_vrd({"test": graphs}, *NAMES, tmp_path / "vrd")


def test_vg150_is_converted_to_coco_without_loss(folders, tmp_path):
    out, source = tmp_path / "converted", folders / "vg150"
    assert cli.main(["make-dataset", str(out), "--format", "coco", "--source", str(source), "--no-images"]) == 0
    before, after = VG150Dataset(folders / "vg150", "test"), CocoDataset(out, "test")
    for i in range(len(before)):
        assert class_triplets(before[i]) == class_triplets(after[i]) and before[i].image_id == after[i].image_id
        torch.testing.assert_close(before[i].boxes, after[i].boxes)


def test_a_few_photographs_are_shrunk_with_their_boxes(folders, tmp_path):
    out, command = tmp_path / "few", ["--format", "coco", "--source", str(folders / "vg150"), "--few", "2"]
    assert cli.main(["make-dataset", str(out), *command, "--long-side", "100"]) == 0
    whole = VG150Dataset(folders / "vg150", "test")
    whole = {graph.image_id: graph for graph in map(whole.__getitem__, range(len(whole)))}
    parts = [CocoDataset(out, split) for split in ("train", "validation", "test")]
    chosen = sorted(n for n, g in whole.items() if len(g.relations))[:2]
    for part in parts:
        assert [part[i].image_id for i in range(len(part))] == chosen
        for graph in map(part.__getitem__, range(2)):
            before = whole[graph.image_id]
            assert max(graph.width, graph.height) == 100 and graph.image().size == (graph.width, graph.height)
            scale = torch.tensor([graph.width / before.width, graph.height / before.height] * 2)
            torch.testing.assert_close(graph.boxes, before.boxes * scale, rtol=1e-3, atol=0.01)
            assert torch.equal(graph.relations, before.relations)


def test_a_few_photographs_need_a_source(tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["make-dataset", str(tmp_path / "no"), "--few", "2"])


def test_more_photographs_than_the_source_has_are_refused(folders, tmp_path):
    command = ["--format", "coco", "--source", str(folders / "vg150"), "--few", "999"]
    assert cli.main(["make-dataset", str(tmp_path / "no"), *command]) == 1 and not (tmp_path / "no").exists()


def test_make_dataset_writes_images_into_a_new_folder_only(tmp_path, capsys):
    out = tmp_path / "new"
    assert cli.main(["make-dataset", str(out), "--sizes", "3", "2", "2", "--format", "vrd"]) == 0
    assert "wrote" in capsys.readouterr().out and len(list((out / "images").iterdir())) == 7
    with pytest.raises(SystemExit):
        cli.main(["make-dataset", str(out)])
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_make_dataset_leaves_nothing_behind_if_the_disk_is_full(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgalign.data.vg150.save_image", full)
    assert cli.main(["make-dataset", str(tmp_path / "full"), "--sizes", "1", "1", "1"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_known_layout_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"known layout \(VRD: annotations_train.json"):
        open_dataset(tmp_path, "train")


# ---- VG150 in detail


def small_vg150(root, **arrays):
    """Write a folder with two training images and one test image. `arrays` replace these, None removes one."""
    content = {
        "boxes_1024": np.array([[101, 51, 101, 51], [300, 300, 200, 200], [512, 512, 64, 65], [600, 512, 200, 64],
                                [900, 100, 300, 100], [50, 50, 100, 100]], np.int32),
        "labels": np.array([[1], [2], [3], [1], [2], [3]]),
        "relationships": np.array([[0, 1], [1, 0], [2, 3], [2, 3], [4, 5]], np.int32),
        "predicates": np.array([[1], [2], [1], [2], [2]]),
        "split": np.array([0, 0, 2], np.int32),
        "img_to_first_box": np.array([0, 2, 4]), "img_to_last_box": np.array([1, 3, 5]),
        "img_to_first_rel": np.array([0, 2, 4]), "img_to_last_rel": np.array([1, 3, 4]),
    }  # fmt: skip
    root.mkdir(exist_ok=True)
    with h5py.File(root / "VG-SGG-with-attri.h5", "w") as file:
        for name, value in (content | arrays).items():
            if value is not None:
                file[name] = value
    names = {"1": "α", "2": "b", "3": "c"}
    dicts = {"idx_to_label": names, "idx_to_predicate": {"1": "on", "2": "by"}}
    (root / "VG-SGG-dicts-with-attri.json").write_text(json.dumps(dicts))
    sizes = [{"image_id": i, "width": 1024, "height": 768} for i in (7, 8, 9)]
    (root / "image_data.json").write_text(json.dumps(sizes))
    return root


@pytest.fixture
def small(tmp_path):
    return small_vg150(tmp_path / "vg")


def test_boxes_of_the_test_part_are_not_clipped_to_the_image(small):
    # The first corner is (900 - 150, 100 - 50). The image is 1024 pixels wide, but the box ends at 1050.
    assert VG150Dataset(small, "test")[0].boxes.tolist() == [[750, 50, 1050, 150], [0, 0, 100, 100]]


def test_corners_of_boxes_are_truncated_to_integers(small):
    train = VG150Dataset(small, "train", validation_images=0)
    # 512 - 32.5 = 479.5 becomes 479.
    assert train[1].boxes.tolist() == [[480, 479, 544, 544], [500, 480, 700, 544]]


def test_training_images_keep_relations_between_boxes_that_do_not_overlap(small):
    train = VG150Dataset(small, "train", validation_images=0)
    assert train[0].image_id == "7.jpg" and train[0].relations.tolist() == [[0, 1, 1], [1, 0, 2]]


def test_several_predicates_of_a_pair_are_kept(small):
    train = VG150Dataset(small, "train", validation_images=0)
    assert train[1].relations.tolist() == [[0, 1, 1], [0, 1, 2]]


def test_class_names_may_have_any_letters(small):
    train = VG150Dataset(small, "train", validation_images=0)
    assert train.object_names == ["__background__", "α", "b", "c"]


def test_validation_images_are_chosen_by_hash_or_are_the_first(small):
    sizes = [{"image_id": i, "width": 1024, "height": 768} for i in (7, 11, 9)]
    (small / "image_data.json").write_text(json.dumps(sizes))
    by_hash = VG150Dataset(small, "validation", validation_images=1)
    first = VG150Dataset(small, "validation", validation_images=1, validation_choice="first")
    lowest = min(["7.jpg", "11.jpg"], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert by_hash[0].image_id == lowest == "11.jpg" and first[0].image_id == "7.jpg"
    assert len(VG150Dataset(small, "validation")) == 0, "the default is a fifth of the two images, rounded down"


def test_more_validation_images_than_training_images_are_refused(small):
    with pytest.raises(ValueError, match="validation_images must be from 0 to 2"):
        VG150Dataset(small, "train", validation_images=3)


def test_files_with_a_validation_split_need_no_validation_images(tmp_path):
    own = small_vg150(tmp_path / "own", split=np.array([0, 1, 2]))
    assert VG150Dataset(own, "validation")[0].image_id == "8.jpg"
    with pytest.raises(ValueError, match="has its own validation split, so validation_images must be left out"):
        open_dataset(own, "train", validation_images=1)


def test_training_boxes_are_clipped_to_the_image(tmp_path):
    boxes = np.array([[10, 10, 40, 40], [600, 900, 100, 100], [512, 512, 64, 64], [600, 512, 200, 64],
                      [900, 100, 300, 100], [50, 50, 100, 100]], np.int32)  # fmt: skip
    boxes[1] = [20, 20, 60, 2000]  # reaches beyond the lower edge
    root = small_vg150(tmp_path / "vg", boxes_1024=boxes)
    first = VG150Dataset(root, "train", validation_images=0)[0]
    assert first.boxes.tolist() == [[0, 0, 30, 30], [0, 0, 50, 767]]


@pytest.mark.parametrize("variant", ["floats", "flat", "int8", "only 512"])
def test_variants_of_the_files_give_the_same_graphs(tmp_path, variant):
    plain = VG150Dataset(small_vg150(tmp_path / "plain"), "test")[0]
    with h5py.File(tmp_path / "plain" / "VG-SGG-with-attri.h5") as file:
        content = {name: file[name][()] for name in file}
    changed = {
        "floats": {"boxes_1024": content["boxes_1024"].astype(np.float32)},
        "flat": {"predicates": content["predicates"].ravel(), "labels": content["labels"].ravel()},
        "int8": {"split": content["split"].astype(np.int8), "labels": content["labels"].astype(np.uint8)},
        "only 512": {"boxes_512": content["boxes_1024"] // 2, "boxes_1024": None},
    }[variant]
    graph = VG150Dataset(small_vg150(tmp_path / "other", **changed), "test")[0]
    torch.testing.assert_close(graph.boxes, plain.boxes)
    assert torch.equal(graph.relations, plain.relations) and torch.equal(graph.labels, plain.labels)


# Visual Genome lists four corrupt images that the HDF5 file leaves out.
LISTED = [{"image_id": i, "width": 1024, "height": 768} for i in (7, 1592, 8, 1722, 4616, 4617, 9)]


def test_image_data_may_list_the_known_corrupt_images(small):
    (small / "image_data.json").write_text(json.dumps(LISTED))
    assert VG150Dataset(small, "test")[0].image_id == "9.jpg"


def test_image_data_with_another_number_of_images_is_refused(small):
    (small / "image_data.json").write_text(json.dumps(LISTED[:-1]))
    with pytest.raises(ValueError, match="image_data.json: must have the 3 images of .*, got 6"):
        VG150Dataset(small, "test")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("predicates", lambda a: None, "must have the arrays predicates"),
        ("boxes_1024", lambda a: a[:-1], r"array boxes_1024: must be \[\d+, 4\]"),
        (
            "boxes_1024",
            lambda a: a * [1, 1, 0, 1],
            "boxes must be at most 16777216, with a width and a height above 0, got .* in row 0",
        ),
        ("labels", lambda a: a + 99, r"array labels: must be from 1 to 16, got \d+ in row 0"),
        ("predicates", lambda a: a * 0, "array predicates: must be from 1 to 20, got 0 in row 0"),
        ("split", lambda a: a + 3, "array split: must be from 0 to 2"),
        ("relationships", lambda a: a[:, :1], "array relationships: must be"),
        ("relationships", lambda a: a + 40, "must refer to boxes of the relation's image, got .* in row 0"),
        ("img_to_last_box", lambda a: a + 100000, "img_to_last_box: must be ascending and from 0 to"),
        ("labels", lambda a: a.astype("S"), "array labels: must be numeric, got |S"),
        ("labels", lambda a: a * np.nan, "array labels: must be from 1 to 16, got no whole number in row 0"),
        ("img_to_first_rel", lambda a: a[:-1], "img_to_first_rel: must have 21 rows to match split"),
    ],
)
def test_bad_arrays_are_refused_by_name(vg150, name, change, message):
    edit(vg150, name, change)
    with pytest.raises(ValueError, match=message) as error:
        VG150Dataset(vg150, "train")
    assert str(vg150) in str(error.value)


def test_an_incomplete_hdf5_file_is_refused_by_name(vg150):
    path = vg150 / "VG-SGG.h5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="VG-SGG.h5: must be an HDF5 file, but is not one or is cut short"):
        VG150Dataset(vg150, "train")


def test_a_missing_hdf5_file_is_reported(vg150):
    (vg150 / "VG-SGG.h5").unlink()
    with pytest.raises(FileNotFoundError, match="must have VG-SGG-with-attri.h5 or VG-SGG.h5"):
        VG150Dataset(vg150, "train")


def test_an_unreadable_image_is_refused_by_name(vg150):
    graph = VG150Dataset(vg150, "test")[0]
    (vg150 / "VG_100K" / graph.image_id).write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{graph.image_id}: must be an image that can be read"):
        graph.image()


def test_images_may_be_missing(vg150):
    shutil.rmtree(vg150 / "VG_100K")
    assert VG150Dataset(vg150, "test")[0].image is None


def test_worker_processes_read_the_same_images(vg150):
    dataset = VG150Dataset(vg150, "test")
    loader = DataLoader(dataset, num_workers=2, collate_fn=lambda graphs: graphs[0].image_id)
    assert list(loader) == [dataset[i].image_id for i in range(len(dataset))]


def test_the_zero_shot_file_has_the_class_triplets_that_only_the_test_part_has(folders, scenes):
    in_part = {
        split: {(int(g.labels[s]), p, int(g.labels[o])) for g in scenes[split] for s, o, p in g.relations.tolist()}
        for split in SPLITS
    }
    triplets = read_zero_shot_triplets(folders / "vg150" / "zeroshot_triplets.csv")
    expected = in_part["test"] - in_part["train"] - in_part["validation"]
    assert 0 < len(expected) < len(in_part["test"]), "the test part must have both kinds of triplets"
    assert sorted(map(tuple, triplets.tolist())) == sorted(expected)


def test_zero_shot_triplets_are_read_from_files_saved_by_torch(folders, tmp_path):
    triplets = read_zero_shot_triplets(folders / "vg150" / "zeroshot_triplets.csv")
    torch.save(triplets[:, [0, 2, 1]], tmp_path / "z.pytorch", _use_new_zipfile_serialization=False)
    assert torch.equal(read_zero_shot_triplets(tmp_path / "z.pytorch"), triplets)


def test_zero_shot_files_need_no_header(tmp_path):
    (tmp_path / "bare.csv").write_text("1,2,3\n")
    assert read_zero_shot_triplets(tmp_path / "bare.csv").tolist() == [[1, 3, 2]]


@pytest.mark.parametrize(
    "content, message", [("1,2\n", "every row"), ("", "cut short"), ("a,b,c\n0,1,2\n", "every row")]
)
def test_bad_zero_shot_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(ValueError, match=f"bad.csv: .*{message}"):
        read_zero_shot_triplets(tmp_path / "bad.csv")


# ---- COCO in detail


def test_coco_files_may_have_gaps_in_ids_any_letters_and_no_background(tmp_path):
    boxes, labels = torch.tensor([[1.0, 2, 11.5, 22], [5, 5, 6, 6]]), torch.tensor([2, 1])
    graph = SceneGraph("späti.png", 40, 30, boxes, labels, torch.tensor([[0, 1, 2]]))
    write_coco({"test": [graph]}, ["__background__", "猫", "hut"], ["__background__", "auf", "über"], tmp_path)
    content = json.loads((tmp_path / "test.json").read_text())
    for entry in (*content["categories"], *content["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = 10 * entry[key]  # leaves gaps between the ids
    (tmp_path / "test.json").write_text(json.dumps(content))
    rel = {"rel_categories": ["auf", "über"], "test": {"0": [[0, 1, 1]]}}
    for relations in (rel, json.loads((tmp_path / "rel.json").read_text())):
        (tmp_path / "rel.json").write_text(json.dumps(relations))
        dataset = CocoDataset(tmp_path, "test")
        assert dataset.object_names[1:] == ["猫", "hut"] and dataset.predicate_names[1:] == ["auf", "über"]
        read = dataset[0]
        assert read.image_id == "späti.png" and torch.equal(read.labels, labels) and torch.equal(read.boxes, boxes)
        assert read.relations.tolist() == [[0, 1, 2]] and read.image is None


def test_parts_with_different_classes_are_refused(folders, tmp_path):
    from sgalign.training.datamodule import SceneGraphData

    root = shutil.copytree(folders / "coco", tmp_path / "coco")
    content = json.loads((root / "train.json").read_text())
    content["categories"][0]["name"], content["categories"][1]["name"] = "b", "a"
    (root / "train.json").write_text(json.dumps(content))
    data = SceneGraphData(str(root))
    with pytest.raises(ValueError, match="in all splits, but in train, class 1 is 'b' instead of 'person'"):
        _ = data.train


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, r: c.pop("categories"), "test.json: must have .*, categories, but lacks categories"),
        (
            lambda c, r: c["annotations"][0].update(image_id=99),
            "annotations, row 0: image_id must be the id of an image, got 99",
        ),
        (lambda c, r: c["annotations"][0].update(category_id=99), "category_id must be the id of a class .*, got 99"),
        (
            lambda c, r: c["annotations"][0].update(bbox=[1, 2, 0, 4]),
            "bbox x, y, width, height must have a width and a height above 0",
        ),
        (lambda c, r: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox must be 4 numbers"),
        (lambda c, r: c["images"][0].pop("width"), "images, row 0: must have id, file_name, width, height"),
        (
            lambda c, r: r["test"]["0"].append([0, 99, 1]),
            r"rel.json, test, image 0, row \d+: objects must be from 0 to \d+",
        ),
        (lambda c, r: r["test"]["0"].append([0, 1, 0]), "predicate must not be the background, got 0"),
        (lambda c, r: r["test"]["0"].append([0, 1]), r"must be \[subject, object, predicate\]"),
        (lambda c, r: r.pop("test"), "rel.json: must have rel_categories, test, but lacks test"),
        (lambda c, r: r.update(test=None), "rel.json: test must be a JSON object with image ids as keys, got NoneType"),
        (lambda c, r: r.update(rel_categories="on"), "rel.json: rel_categories must be a list, got str"),
        (lambda c, r: r["test"].update({"77": []}), "rel.json, test: image ids must occur in test.json, got '77'"),
        (
            lambda c, r: c["images"][0].update(file_name="/tmp/x.jpg"),
            "file_name must be a path in the data set's folder",
        ),
        (lambda c, r: c["images"][0].update(file_name="../x.jpg"), "file_name must be a path in the data set's folder"),
        (lambda c, r: c["images"][0].update(file_name=7), "file_name must be a path in the data set's folder, got 7"),
        (lambda c, r: c["images"].append(c["images"][0]), "id must be unique, but 0 occurs twice"),
        (lambda c, r: c["images"].append(c["images"][0] | {"id": 99}), "file_name must be unique, but .* occurs twice"),
        (lambda c, r: c.update(annotations=None), "annotations must be a list, got NoneType"),
        (lambda c, r: r["test"].update({"0": None}), "image 0: must be a list of relations, got NoneType"),
    ],
)
def test_bad_coco_files_are_refused_by_name(folders, tmp_path, change, message):
    root = shutil.copytree(folders / "coco", tmp_path / "coco")
    content, relations = (json.loads((root / name).read_text()) for name in ("test.json", "rel.json"))
    change(content, relations)
    (root / "test.json").write_text(json.dumps(content))
    (root / "rel.json").write_text(json.dumps(relations))
    with pytest.raises(ValueError, match=message):
        CocoDataset(root, "test")


# ---- all layouts


FILES_OF_LAYOUTS = {
    "VRD": ["annotations_train.json", "annotations_test.json", "objects.json", "predicates.json"],
    "VG150": ["VG-SGG.h5", "VG-SGG-dicts.json", "image_data.json"],
    "COCO with rel.json": ["train.json", "val.json", "test.json", "rel.json"],
    "COCO in folders": ["train/_annotations.coco.json", "valid/_annotations.coco.json"],
    "PSG": ["psg.json"],
    "Open Images": [
        "oidv6-train-annotations-vrd.csv",
        "class-descriptions-boxable.csv",
        "oidv6-relationship-triplets.csv",
    ],
    "Open Images in JSON": ["annotations/vrd-train-anno.json", "annotations/categories_dict.json"],
    "GQA": ["sceneGraphs/train_sceneGraphs.json", "sceneGraphs/val_sceneGraphs.json"],
}


@pytest.mark.parametrize("files", FILES_OF_LAYOUTS.values(), ids=FILES_OF_LAYOUTS)
def test_annotation_files_are_all_files_that_a_layout_reads(tmp_path, files):
    """Studies recognize a data set by the content of these files."""
    for name in [*files, "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert annotation_files(tmp_path) == sorted(tmp_path / name for name in files)
