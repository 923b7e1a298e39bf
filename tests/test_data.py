"""Tests of scene graphs, of the VRD reader on real and broken files, of generated scenes and of word vectors."""

import hashlib
import json
import pickle
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError

import pytest
import torch

from sgalign.data import SceneGraph, ScenesDataset, VRDDataset, read_word_vectors
from sgalign.data.scenes import CONFUSABLE, OBJECTS, PREDICATE_NAMES


def graph(**changes):
    fields = {
        "image_id": "a.jpg",
        "width": 100,
        "height": 50,
        "boxes": torch.tensor([[0.0, 0, 9, 9], [5, 5, 5, 5]]),
        "labels": torch.tensor([1, 2]),
        "relations": torch.tensor([[0, 1, 1]]),
    }
    return SceneGraph(**fields | changes)


def same(a, b):
    return (a.image_id, a.width, a.height) == (b.image_id, b.width, b.height) and all(
        torch.equal(getattr(a, field), getattr(b, field)) for field in ("boxes", "labels", "relations")
    )


# ---- SceneGraph


def test_a_graph_is_frozen():
    with pytest.raises(FrozenInstanceError):
        graph().width = 3


def test_a_graph_may_have_no_objects():
    empty = graph(boxes=torch.empty(0, 4), labels=torch.empty(0).long(), relations=torch.empty(0, 3).long())
    assert len(empty.labels) == len(empty.relations) == 0 and empty.image is None


def test_a_graph_may_repeat_relations_and_relate_an_object_to_itself():
    assert len(graph(relations=torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 2]])).relations) == 4


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("width", 0, "width must be an int of at least 1, got 0"),
        ("height", 5.0, "height must be an int"),
        ("boxes", torch.zeros(2, 5), r"boxes must be .* got torch.float32 and \(2, 5\)"),
        ("boxes", torch.zeros(2, 4).double(), r"boxes must be .*torch.float32.* got torch.float64"),
        ("boxes", [[0, 0, 1, 1]], "boxes must be a tensor .* got list"),
        ("boxes", torch.tensor([[0.0, 0, 9, 9], [5, 5, 4, 5]]), r"boxes must .* got \[5.0, 5.0, 4.0, 5.0\] in row 1"),
        ("boxes", torch.tensor([[0.0, float("nan"), 9, 9], [0, 0, 1, 1]]), "boxes must be finite"),
        ("boxes", torch.tensor([[0.0, 0, float("inf"), 9], [0, 0, 1, 1]]), "boxes must be finite"),
        ("labels", torch.tensor([1]), r"labels must be .* shape \(2,\), got .* \(1,\)"),
        ("labels", torch.tensor([1, 0]), "labels must be at least 1, got 0 in row 1"),
        ("labels", torch.tensor([1, 2], dtype=torch.int32), "labels must be .* got torch.int32"),
        ("relations", torch.tensor([[0, 1]]), r"relations must be .* shape \(any, 3\), got .* \(1, 2\)"),
        ("relations", torch.tensor([[0, 2, 1]]), r"relations\[:, :2\] must be from 0 to 1, got 2 in row 0"),
        ("relations", torch.tensor([[-1, 0, 1]]), r"relations\[:, :2\] must be from 0 to 1, got -1"),
        ("relations", torch.tensor([[0, 1, 1], [0, 1, 0]]), r"relations\[:, 2\] must be at least 1, got 0 in row 1"),
    ],
)
def test_malformed_graphs_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=rf"image 'a\.jpg': {message}"):
        graph(**{field: value})


# ---- VRD


@pytest.fixture(scope="module")
def vrd_train(vrd_root):
    return VRDDataset(vrd_root, "train", validation_images=0)


@pytest.fixture(scope="module")
def vrd_test(vrd_root):
    return VRDDataset(vrd_root, "test")


def test_vrd_has_all_images_and_relations_of_its_files(vrd_train, vrd_test):
    assert (len(vrd_train), sum(len(g.relations) for g in vrd_train)) == (3780, 29857)
    assert (len(vrd_test), sum(len(g.relations) for g in vrd_test)) == (1000, 7638)
    assert sum(int((g.relations[:, 0] == g.relations[:, 1]).sum()) for g in vrd_test) == 26
    assert sum(len(g.relations) == 0 for g in vrd_test) == 45


def test_vrd_classes_follow_the_background_in_the_order_of_the_files(vrd_train):
    predicates = torch.cat([g.relations for g in vrd_train])[:, 2].bincount()
    assert vrd_train.predicate_names[:2] == ["__background__", "on"] and len(vrd_train.predicate_names) == 71
    assert vrd_train.object_names[:2] == ["__background__", "person"] and len(vrd_train.object_names) == 101
    assert predicates[1] == 5014 and predicates[1:].min() == 1 and len(predicates) == 71


def test_vrd_graphs_contain_every_row_of_the_file(vrd_root, vrd_test):
    """The test rebuilds the classes, boxes and predicates of all rows from the graphs, in the order of the file."""
    annotations = json.loads((vrd_root / "annotations_test.json").read_text())

    def entry(graph, index):
        x1, y1, x2, y2 = graph.boxes[index].int().tolist()
        return {"category": int(graph.labels[index]) - 1, "bbox": [y1, y2, x1, x2]}

    for graph in vrd_test:
        rows = [
            {"predicate": p - 1, "subject": entry(graph, s), "object": entry(graph, o)}
            for s, o, p in graph.relations.tolist()
        ]
        assert rows == annotations[graph.image_id]
        objects = {(label, *box) for label, box in zip(graph.labels.tolist(), graph.boxes.tolist(), strict=True)
                   for box in [tuple(box)]}  # fmt: skip
        assert len(objects) == len(graph.labels), "an object occurs twice"


def test_vrd_validation_images_are_taken_from_the_training_part(vrd_root):
    """A smaller validation part is a subset of a larger one."""
    parts = {
        (split, n): {g.image_id for g in VRDDataset(vrd_root, split, validation_images=n)}
        for split, n in (("train", 600), ("validation", 600), ("validation", 50))
    }
    train, validation, smaller = parts.values()
    assert (len(train), len(validation), len(smaller)) == (3180, 600, 50)
    assert not train & validation and smaller < validation


def test_vrd_validation_images_have_the_lowest_hashes_of_their_names(tmp_path):
    names = [f"{number}.jpg" for number in range(20)]
    root = write_vrd(tmp_path, {name: [ROW] for name in names})
    data = VRDDataset(root, "validation", validation_images=4)
    lowest = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:4]
    assert {data[index].image_id for index in range(4)} == set(lowest)


def test_vrd_refuses_more_validation_images_than_it_has(vrd_root):
    with pytest.raises(ValueError, match="validation_images must be from 0 to 3780.* got 3781"):
        VRDDataset(vrd_root, "train", validation_images=3781)


def test_vrd_images_have_the_sizes_of_their_graphs(vrd_root, vrd_test):
    if not (vrd_root / "images").is_dir():
        pytest.skip(f"no images in {vrd_root}")
    with_image = [g for g in vrd_test if g.image is not None]
    assert with_image
    for g in with_image[:3]:
        image = g.image()
        assert image.size == (g.width, g.height) and image.mode == "RGB"


def test_vrd_images_that_are_missing_have_the_size_of_their_boxes(vrd_test):
    without = next(g for g in vrd_test if g.image is None and len(g.labels))
    assert (without.width, without.height) == tuple((without.boxes[:, 2:].amax(0).int() + 1).tolist())


ROW = {
    "predicate": 1,
    "subject": {"category": 0, "bbox": [1, 20, 3, 40]},
    "object": {"category": 1, "bbox": [5, 60, 7, 80]},
}


def write_vrd(root, annotations):
    files = {"objects": ["cat", "mat"], "predicates": ["on", "near"], "annotations_train": annotations}
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "annotations_test.json").write_text("{}")
    return root


def test_vrd_files_become_boxes_labels_and_relations(tmp_path):
    root = write_vrd(tmp_path, {"a.jpg": [ROW, ROW | {"predicate": 0}, ROW | {"object": ROW["subject"]}], "b.jpg": []})
    first, second = VRDDataset(root, "train", validation_images=0)
    assert first.boxes.tolist() == [[3, 1, 40, 20], [7, 5, 80, 60]] and first.labels.tolist() == [1, 2]
    assert first.relations.tolist() == [[0, 1, 2], [0, 1, 1], [0, 0, 2]]
    assert (first.width, first.height) == (81, 61)
    assert len(second.relations) == len(second.labels) == 0


def test_a_vrd_part_may_be_empty(tmp_path):
    assert len(VRDDataset(write_vrd(tmp_path, {"a.jpg": [ROW], "b.jpg": []}), "test")) == 0


@pytest.mark.parametrize(
    "annotations, message",
    [
        ({"a.jpg": {}}, r"image 'a\.jpg': must be a list of relations, got dict"),
        ({"a.jpg": [ROW, 3]}, r"image 'a\.jpg', row 1: must have subject, predicate and object"),
        ({"a.jpg": [{"predicate": 1}]}, "row 0: must have subject, predicate and object"),
        ({"a.jpg": [ROW | {"predicate": 2}]}, "row 0, predicate must be the id of a class \\(0, 1\\), got 2"),
        ({"a.jpg": [ROW | {"predicate": -1}]}, "row 0, predicate must .* got -1"),
        ({"a.jpg": [ROW | {"subject": {"category": 2, "bbox": [1, 2, 3, 4]}}]}, "subject, category must .* got 2"),
        ({"a.jpg": [ROW | {"object": {"category": "cat", "bbox": [1, 2, 3, 4]}}]}, "category must .* got 'cat'"),
        ({"a.jpg": [ROW | {"object": {"category": 1}}]}, "object: must have category and bbox"),
        ({"a.jpg": [ROW | {"object": {"category": 1, "bbox": [1, 2, 3]}}]}, "object: bbox must be 4 integers"),
        ({"a.jpg": [ROW | {"object": {"category": 1, "bbox": [1, 2, 3, None]}}]}, "object: bbox must be 4 integers"),
        ({"a.jpg": [ROW | {"object": {"category": 1, "bbox": [2, 2, 3, 4]}}]}, r"above 0, got \[2, 2, 3, 4\]"),
        ({"a.jpg": [ROW | {"object": {"category": 1, "bbox": [1, 2, 5, 4]}}]}, r"above 0, got \[1, 2, 5, 4\]"),
    ],
)  # fmt: skip
def test_wrong_vrd_annotations_are_refused_by_name(tmp_path, annotations, message):
    with pytest.raises(
        ValueError,
        match=rf"annotations_train\.json.*{message}.*the option bad_rows",
    ):
        VRDDataset(write_vrd(tmp_path, annotations), "train", validation_images=0)


def test_vrd_refuses_an_unknown_split(tmp_path):
    root = write_vrd(tmp_path, {"a.jpg": [ROW]})
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'val'"):
        VRDDataset(root, "val")


def test_an_unreadable_vrd_image_is_refused_by_name(tmp_path):
    pytest.importorskip("PIL")
    root = write_vrd(tmp_path, {"a.jpg": [ROW]})
    (root / "images").mkdir()
    (root / "images" / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.jpg: must be an image .* replace or remove it"):
        VRDDataset(root, "train", validation_images=0)[0]


def test_broken_vrd_files_are_refused_by_name(tmp_path):
    """The files are broken one after the other, so the first one that is read is named."""
    root = write_vrd(tmp_path, {"a.jpg": [ROW]})
    (root / "annotations_train.json").write_text('{"a.jpg": [{"pred')
    with pytest.raises(ValueError, match=r"annotations_train\.json: .* is not JSON or is cut short .* download"):
        VRDDataset(root, "train")
    (root / "predicates.json").write_text('{"on": 0}')
    with pytest.raises(ValueError, match=r"predicates\.json: must be a list of names"):
        VRDDataset(root, "test")
    (root / "objects.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"objects\.json not found: download"):
        VRDDataset(root, "test")


# ---- scenes


@pytest.fixture(scope="module")
def train_scenes():
    return list(ScenesDataset("train"))


def test_scenes_depend_only_on_seed_split_and_index():
    scenes = ScenesDataset("test", size=20)
    again = ScenesDataset("test", size=800)
    for index in (7, 0, 19):
        assert same(scenes[index], again[index])
    assert same(scenes[-1], scenes[19])
    others = [ScenesDataset("test", size=20, seed=1), ScenesDataset("validation", size=20)]
    assert not any(torch.equal(scenes[3].boxes, other[3].boxes) for other in others)


def test_an_index_after_the_last_scene_raises_index_error():
    with pytest.raises(IndexError):
        ScenesDataset("test", size=20)[20]


def test_scenes_have_parts_of_3000_500_and_800_images():
    assert [len(ScenesDataset(split)) for split in ("train", "validation", "test")] == [3000, 500, 800]


def test_bad_arguments_of_scenes_are_refused_by_name():
    with pytest.raises(ValueError, match="split"):
        ScenesDataset("val")
    with pytest.raises(ValueError, match="size"):
        ScenesDataset("train", size=-1)


def test_scenes_are_the_same_on_every_machine():
    """Every figure measured on the scenes depends on the generator, so change these numbers only on purpose."""
    scene = ScenesDataset("test")[0]
    assert scene.boxes.sum().item() == 7585.0
    assert scene.labels.tolist() == [6, 4, 2, 1, 1, 11, 8, 1, 13]
    assert scene.relations.flatten().tolist() == [
        0, 2, 4, 0, 5, 16, 1, 6, 2, 2, 5, 7, 3, 5, 8, 4, 3, 4, 4, 5, 8, 6, 1, 4, 7, 0, 13, 8, 0, 1, 8, 5, 2,
    ]  # fmt: skip


def test_training_scenes_are_generated_within_seconds():
    start = time.perf_counter()
    list(ScenesDataset("train", seed=3))
    assert time.perf_counter() - start < 15  # under 3 s on an idle core


def test_scenes_have_16_object_classes_and_20_predicates():
    names = ScenesDataset("train").predicate_names
    assert len(OBJECTS) == 16 and len(names) == 21 and set(CONFUSABLE) == set(names[1:])


def test_predicates_of_scenes_have_a_long_tail(train_scenes):
    names = ScenesDataset("train").predicate_names
    counts = torch.cat([g.relations for g in train_scenes])[:, 2].bincount(minlength=len(names))[1:]
    assert 30 < counts.max() / counts.min() < 60


def test_scenes_have_4_to_12_objects(train_scenes):
    assert {len(g.labels) for g in train_scenes} == set(range(4, 13))


def test_boxes_of_scenes_are_inside_the_image(train_scenes):
    for g in train_scenes:
        assert (g.boxes >= 0).all() and (g.boxes[:, 2] < g.width).all() and (g.boxes[:, 3] < g.height).all()


def test_a_pair_of_objects_in_a_scene_has_at_most_one_predicate(train_scenes):
    for g in train_scenes:
        assert len(g.relations[:, :2].unique(dim=0)) == len(g.relations)


def test_training_scenes_lack_30_percent_of_the_relations_and_5_percent_are_wrong(train_scenes, monkeypatch):
    monkeypatch.setattr("sgalign.data.scenes.MISSING_RELATIONS", 0.0)
    monkeypatch.setattr("sgalign.data.scenes.WRONG_LABELS", 0.0)
    names = [None, *PREDICATE_NAMES[1:]]
    total = kept = wrong = 0
    for noisy, clean in zip(train_scenes[:1000], ScenesDataset("train", size=1000), strict=True):
        assert torch.equal(noisy.boxes, clean.boxes)
        true = {(s, o): p for s, o, p in clean.relations.tolist()}
        total += len(true)
        for s, o, p in noisy.relations.tolist():
            kept += 1
            if p != true[s, o]:
                wrong += 1
                assert names[p] == CONFUSABLE[names[true[s, o]]]
    assert kept / total == pytest.approx(0.7, abs=0.02)
    assert wrong / kept == pytest.approx(0.05, abs=0.01)


def test_the_classes_of_a_pair_do_not_determine_its_predicate():
    """The most frequent predicate of two classes, counted on the same scenes, is wrong for a fifth of the relations."""
    counts = torch.zeros(17, 17, 21)
    for g in ScenesDataset("test"):
        s, o, p = g.relations.unbind(1)
        counts.index_put_((g.labels[s], g.labels[o], p), torch.ones(len(p)), accumulate=True)
    assert counts.amax(2).sum() / counts.sum() < 0.8
    shared = (counts > 0).sum(2)
    assert (shared >= 3).sum() > 20, "too few class pairs have several predicates"


def test_a_pickled_scene_draws_the_same_image_each_time():
    pytest.importorskip("PIL")
    scene = pickle.loads(pickle.dumps(ScenesDataset("validation")[2]))
    first, second = scene.image(), scene.image()
    assert first.size == (scene.width, scene.height) and first.mode == "RGB"
    assert first.tobytes() == second.tobytes() and len(first.getcolors(1 << 16)) > 3


# ---- word vectors


NAMES = ["__background__", "traffic light", "teddy bear", "bear cub", "board skate", "kite"]


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("light 1 2\ntraffic_light 3 4\nbear 5 6\nskate 7 8\n")
    return path


def test_a_name_gets_the_vector_of_the_whole_name_or_of_its_longest_word(vectors):
    table = read_word_vectors(vectors, NAMES)
    assert table.dtype == torch.float32 and table.shape == (6, 2)
    assert table[1].tolist() == [3, 4], "the vector of the whole name must be used"
    assert table[3].tolist() == [5, 6], "the vector of the longest word must be used"


def test_a_name_with_an_unknown_longest_word_gets_a_random_vector(vectors):
    table = read_word_vectors(vectors, NAMES)
    known = {(1, 2), (3, 4), (5, 6), (7, 8)}
    for row in (0, 2, 4, 5):
        assert tuple(table[row].tolist()) not in known
    # "board" is as long as "skate", and the first of equally long words is used.
    assert table[4].tolist() != [7, 8] and table[4].abs().max() < 6


def test_random_word_vectors_depend_only_on_the_name(vectors):
    assert torch.equal(read_word_vectors(vectors, ["kite", "bear"])[:1], read_word_vectors(vectors, NAMES)[5:])


def test_no_names_give_an_empty_table(vectors):
    assert read_word_vectors(vectors, []).shape == (0, 2)


def test_classes_without_a_word_vector_are_named(vectors, caplog):
    read_word_vectors(vectors, NAMES)
    assert "3 of 6 classes get random vectors: ['teddy bear', 'board skate', 'kite']" in caplog.text


def test_word_vectors_whose_last_line_has_no_end_are_named(vectors, caplog):
    vectors.write_text("light 1 2\nbear 5 6")
    read_word_vectors(vectors, ["light", "bear"])
    assert "the last line has no end, so the file may be cut short" in caplog.text


def test_a_byte_order_mark_is_no_part_of_the_first_word(vectors):
    vectors.write_bytes(b"\xef\xbb\xbfkite 1 2\nlight 3 4\n")
    assert read_word_vectors(vectors, ["kite"]).tolist() == [[1, 2]]


def test_files_of_word_vectors_may_have_tabs_and_empty_lines(vectors):
    vectors.write_text("\nlight\t1\t2\n\nkite\t3\t4\n")
    assert read_word_vectors(vectors, ["kite", "light"]).tolist() == [[3, 4], [1, 2]]


def test_a_vector_of_one_number_is_no_header(vectors):
    vectors.write_text("kite -0.5\nlight 2\n")
    assert read_word_vectors(vectors, ["kite", "light"]).tolist() == [[-0.5], [2]]


def test_random_word_vectors_are_standard_normal(tmp_path):
    (tmp_path / "v.txt").write_text("1 5000\nword " + "0 " * 5000)
    table = read_word_vectors(tmp_path / "v.txt", ["a", "b", "word"])
    assert table.shape == (3, 5000), "the header was read as a word"
    assert table[:2].std().item() == pytest.approx(1, abs=0.05) and not torch.equal(table[0], table[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty file"),
        ("cat 1 2\ndog 1\n", "line 2, word 'dog': must be 2 finite numbers, got 1"),
        ("cat 1 2\ndog 1 x\n", "line 2, word 'dog': must be 2 numbers"),
        ("cat 1 2\ndog 1 nan\n", "line 2, word 'dog': must be 2 finite numbers"),
        ("dog\ncat 1 2\n", "line 1, word 'dog': must be a vector of numbers, got none"),
        ("dog 1_5 2\n", "line 1, word 'dog': must be 2 numbers"),
        ("cat 1 2\n", "has a vector for none of the classes, such as 'dog'"),
    ],
)
def test_wrong_word_vectors_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "v.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"v\.txt.*{message}"):
        read_word_vectors(path, ["dog"])


def test_a_missing_file_of_word_vectors_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a text file"):
        read_word_vectors(tmp_path / "none.txt", ["dog"])


def test_vrd_word_vectors_have_the_names_of_all_its_objects(vrd_root, vrd_test):
    path = vrd_root / "objects_word2vec_300d.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    table = read_word_vectors(path, vrd_test.object_names)
    assert table.shape == (101, 300)
    assert table[1, :2].tolist() == pytest.approx([0.12083, -0.10840])
    names = {line.split()[0] for line in path.read_text().splitlines()}
    assert {name.replace(" ", "_") for name in vrd_test.object_names[1:]} == names


def test_importing_the_data_layer_imports_no_heavy_library():
    code = "import sys, sgalign.data; print([m for m in ('lightning', 'matplotlib', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
