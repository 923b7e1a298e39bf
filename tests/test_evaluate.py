"""Tests of files of predictions and of `sgalign evaluate` on generated annotations."""

import csv
import json
import math
import re
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("lightning")
from trainers import trainer  # noqa: E402

from sgalign.commands.main import main  # noqa: E402
from sgalign.data import open_dataset  # noqa: E402
from sgalign.data.prediction_reading import Annotations, Predictions  # noqa: E402
from sgalign.data.predictions import PredictionFile  # noqa: E402
from sgalign.metrics import zero_shot_triplets  # noqa: E402
from sgalign.metrics.results import split_name, table  # noqa: E402
from sgalign.training import FrequencyModule, PredictionWriter  # noqa: E402
from sgalign.training.datamodule import SceneGraphData  # noqa: E402


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotations") / "vrd"
    assert main(["make-dataset", str(folder), "--format", "vrd", "--sizes", "30", "0", "12"]) == 0
    return folder


@pytest.fixture(scope="module")
def graphs(annotations):
    dataset = open_dataset(annotations, "test")
    return [dataset[index] for index in range(len(dataset))]


# Names for predictions with 16 classes and 20 predicates, without annotated images.
NAMES = Annotations([f"class {n}" for n in range(17)], [f"predicate {n}" for n in range(21)], [], {})


def perfect(graph, predicates=20):
    """Return the ground truth as a prediction. The first relation of a pair has its highest predicate score."""
    pairs, row = graph.relations[:, :2], torch.arange(len(graph.relations))
    scores = torch.zeros(len(pairs), predicates + 1)
    scores[row, graph.relations[:, 2]] = 1 - 0.01 * row
    return {
        "boxes": graph.boxes,
        "labels": graph.labels,
        "scores": torch.ones(len(graph.labels)),
        "pairs": pairs,
        "predicate_scores": scores,
    }


def write(path, graphs):
    if path.suffix == ".h5":
        with PredictionFile(path) as file:
            for graph in graphs:
                file.write(graph.image_id, perfect(graph))
    else:
        images = {g.image_id: {name: value.tolist() for name, value in perfect(g).items()} for g in graphs}
        path.write_text(json.dumps(images))
    return path


def evaluate(path, annotations, *options, protocol="predcls"):
    data = "--annotations", str(annotations), "--validation-images", "5"
    return main(["evaluate", str(path), *data, "--protocol", protocol, *options])


@pytest.mark.parametrize("name", ["p.h5", "p.json"])
@pytest.mark.parametrize("protocol", ["predcls", "phrdet", "vrd-relationship", "open-images", "sgbench"])
def test_the_ground_truth_as_prediction_has_perfect_figures(tmp_path, annotations, graphs, name, protocol, capsys):
    path = write(tmp_path / name, graphs)
    figures, rows = tmp_path / "figures.json", tmp_path / "figures.csv"
    assert evaluate(path, annotations, "--json", str(figures), "--csv", str(rows), protocol=protocol) == 0
    result = json.loads(figures.read_text())
    for name in {"R@100", "ngR@100", "A@100", "relationship@100", "R@50", "wmAP_rel", "R@inf", "InstR"} & result.keys():
        assert result[name] == pytest.approx(1), name
    with rows.open() as file:
        assert {
            f"{r['metric']}{'@' if r['k'] else ''}{r['k']}": float(r["value"])
            for r in csv.DictReader(file)
            if not r["of"]
        } == pytest.approx(
            {name: math.nan if value is None else value for name, value in result.items() if "/" not in name},
            nan_ok=True,
        )
    assert "100.00" in capsys.readouterr().out


def test_images_without_prediction_count_0_unless_they_are_skipped(tmp_path, annotations, graphs, capsys):
    path = write(tmp_path / "half.h5", graphs[: len(graphs) // 2])
    with_relations = [bool(len(graph.relations)) for graph in graphs]
    missing = sum(with_relations[len(graphs) // 2 :])
    assert evaluate(path, annotations, "--json", str(tmp_path / "a.json")) == 0
    assert f"no prediction for {missing} images with relations: their recall is 0" in capsys.readouterr().err
    share = 1 - missing / sum(with_relations)
    assert json.loads((tmp_path / "a.json").read_text())["R@100"] == pytest.approx(share)
    assert evaluate(path, annotations, "--skip-missing", "--json", str(tmp_path / "b.json")) == 0
    assert json.loads((tmp_path / "b.json").read_text())["R@100"] == pytest.approx(1)


def test_a_zero_shot_file_gives_the_same_result_as_the_training_part(tmp_path, annotations, graphs):
    """Its columns are subject, object and predicate, as in the public file."""
    train = open_dataset(annotations, "train", validation_images=0)
    unseen = zero_shot_triplets([train[i] for i in range(len(train))], graphs)
    assert len(unseen), "the generated test part needs unseen triplets"
    listed = tmp_path / "zero_shot.csv"
    listed.write_text("subject,object,predicate\n" + "".join(f"{s},{o},{p}\n" for s, p, o in unseen.tolist()))
    path = write(tmp_path / "p.h5", graphs)
    results = []
    for options in ((), ("--zero-shot", str(listed))):
        assert evaluate(path, annotations, "--json", str(tmp_path / "r.json"), *options) == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
    assert results[0] == results[1] and results[0]["zR@100"] == pytest.approx(1)


def test_an_interrupted_file_of_predictions_does_not_appear(tmp_path, graphs):
    path = tmp_path / "p.h5"
    with pytest.raises(KeyboardInterrupt), PredictionFile(path) as file:
        file.write("a", perfect(graphs[0]))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_has_each_prediction_whole(tmp_path, graphs, monkeypatch):
    create = h5py.Group.create_group
    monkeypatch.setattr(
        h5py.Group, "create_group", lambda *where: (create(*where), signal.raise_signal(signal.SIGINT))[0]
    )
    with PredictionFile(tmp_path / "p.h5") as file:
        with pytest.raises(KeyboardInterrupt):
            file.write("a", perfect(graphs[0]))
    assert Predictions(tmp_path / "p.h5", NAMES)["a"].keys() == perfect(graphs[0]).keys()


def test_a_repeated_image_id_is_refused_and_no_file_appears(tmp_path, graphs):
    with pytest.raises(ValueError, match="image_id must be new, but 'a'"), PredictionFile(tmp_path / "p.h5") as file:
        file.write("a", perfect(graphs[0]))
        file.write("a", perfect(graphs[0]))
    assert not list(tmp_path.iterdir())


def test_an_error_before_the_first_prediction_is_not_hidden_by_the_writer(tmp_path, annotations):
    data = SceneGraphData(str(annotations), validation_images=5)
    module = FrequencyModule()
    module.setup = lambda stage: int("nothing to predict with")
    with pytest.raises(ValueError, match="nothing to predict with"):
        trainer(callbacks=[PredictionWriter(str(tmp_path / "p.h5"))]).predict(module, datamodule=data)


def test_a_model_and_its_file_of_predictions_score_the_same(tmp_path, annotations):
    held_out = 20  # enough to move predicates between head, body and tail if the command ignored the number
    data = SceneGraphData(str(annotations), validation_images=held_out)
    module, path = FrequencyModule(), tmp_path / "p.h5"
    run = trainer(callbacks=[PredictionWriter(str(path))])
    run.test(module, datamodule=data, verbose=False)
    run.predict(module, datamodule=data)
    options = "--validation-images", str(held_out), "--json", str(tmp_path / "r.json")
    assert evaluate(path, annotations, *options) == 0
    expected = {name: value.item() for name, value in module.recall.compute().items()}
    assert json.loads((tmp_path / "r.json").read_text()) == pytest.approx(expected, abs=1e-12)
    assert expected["R@50"] > 0


def test_an_interrupted_prediction_leaves_the_file_as_it_was(tmp_path, annotations, monkeypatch):
    data = SceneGraphData(str(annotations), validation_images=5, batch_size=4)
    path = tmp_path / "p.h5"
    path.write_text("before")
    module, seen = FrequencyModule(), []

    def interrupt(batch):
        seen.append(batch)
        if len(seen) == 2:
            raise RuntimeError("interrupted")
        return FrequencyModule.predictions(module, batch)

    monkeypatch.setattr(module, "predictions", interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callbacks=[PredictionWriter(str(path))]).predict(module, datamodule=data)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not JSON or is cut short .*; docs/evaluation.md lists the files"),
        (b"\x89HDF\r\n\x1a\n cut", "cut short"),
        (b"[1, 2]", "row 0: must have image_id, file_name or id"),
        (b"7", "object with image ids as keys, or a list of images, got int"),
        (b'{"nowhere.jpg": {}}', "image ids must be in the test split .* got 1 other, such as 'nowhere.jpg'"),
        (b'{"IMAGE": 3}', "image 'IMAGE': must have fields such as boxes"),
        (b'{"IMAGE": {"boxes": [[1, 2], [3]]}}', "image 'IMAGE': boxes must be numbers in rows of equal length"),
        (b'{"IMAGE": {"boxes": [[1, 2, 3, 4]], "labels": [1.5]}}', "labels must be whole numbers, got torch.float32"),
        (b'{"IMAGE": {"boxes": [[1, 2, 3, 4]], "labels": [1]}}', "image 'IMAGE': prediction must have scores"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, annotations, graphs, content, message, capsys):
    path = tmp_path / "bad"
    image = next(graph.image_id for graph in graphs if len(graph.relations))
    path.write_bytes(content.replace(b"IMAGE", image.encode()))
    assert evaluate(path, annotations) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message.replace("IMAGE", image), error), error


SCORES = [0.5 + 1e-9, 0.5]  # equal in float32


@pytest.fixture
def exact(tmp_path):
    """A JSON and an HDF5 file with scores in float64. HDF5 stores them with the highest byte first."""
    (tmp_path / "p.json").write_text(json.dumps({"a": {"scores": SCORES, "labels": [1, 2]}}))
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["a/scores"], file["a/labels"] = np.array(SCORES, ">f8"), np.array([1, 2], ">i4")
        file["b/scores"] = np.array(SCORES, np.complex64)
    return tmp_path


@pytest.mark.parametrize("name", ["p.json", "p.h5"])
def test_numbers_are_read_without_rounding(exact, name):
    fields = Predictions(exact / name, NAMES)["a"]
    assert fields["scores"].tolist() == SCORES and fields["labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "value", ["text", np.array([True]), h5py.Empty("i4"), np.array([2**64 - 1], np.uint64), np.array([0.5])], ids=str
)
def test_labels_that_are_no_whole_numbers_are_refused_by_name(tmp_path, value):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["a/labels"] = value
    with pytest.raises(ValueError, match="image 'a': labels must be (numbers|whole numbers)"):
        Predictions(tmp_path / "p.h5", NAMES)["a"]


def test_true_is_not_a_number_and_wide_numbers_are_read(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"a": {"labels": [True, False]}, "b": {"scores": [10**400]}}))
    for image_id in "ab":
        with pytest.raises(ValueError, match=f"image '{image_id}': (labels|scores) must be numbers"):
            Predictions(tmp_path / "p.json", NAMES)[image_id]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["a/scores"], file["a/labels"] = np.array([0.5], np.longdouble), np.array([7], ">u2")
    fields = Predictions(tmp_path / "p.h5", NAMES)["a"]
    assert fields["scores"].tolist() == [0.5] and fields["labels"].tolist() == [7]


def test_complex_numbers_are_refused_by_name(exact):
    with pytest.raises(ValueError, match="image 'b': scores must be real numbers, got torch.complex64"):
        Predictions(exact / "p.h5", NAMES)["b"]


@pytest.mark.parametrize(
    "ids", [["a//b"], ["./a"], [""], ["a\0b"], ["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]], ids=str
)
def test_image_ids_that_hdf5_cannot_tell_apart_are_refused(tmp_path, graphs, ids):
    with pytest.raises(ValueError, match="image_id must "), PredictionFile(tmp_path / "p.h5") as file:
        for image_id in ids:
            file.write(image_id, perfect(graphs[0]))


def test_results_do_not_overwrite_the_file_of_predictions(tmp_path, annotations, capsys):
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "p.json", annotations, "--json", str(tmp_path / "p.json"))
    assert "must all be different files" in capsys.readouterr().err
    triplets = tmp_path / "zero_shot.csv"
    triplets.write_text("1,2,1\n")
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "p.json", annotations, "--zero-shot", str(triplets), "--csv", str(triplets))
    assert "zero_shot.csv must not be written, because the command reads it" in capsys.readouterr().err


def test_labels_beyond_the_classes_are_refused(tmp_path, annotations, graphs, capsys):
    path, graph = tmp_path / "p.h5", next(graph for graph in graphs if len(graph.relations))
    with PredictionFile(path) as file:
        file.write(graph.image_id, perfect(graph) | {"labels": graph.labels + 100})
    assert evaluate(path, annotations, protocol="sgdet") == 1
    assert f"image {graph.image_id!r}: labels must be from 1 to 16, got 1" in capsys.readouterr().err


def test_a_file_accepts_tensors_with_gradients_and_in_bfloat16(tmp_path, graphs):
    given = perfect(graphs[0])
    given |= {"scores": torch.rand(len(given["scores"]), requires_grad=True)}
    given |= {"predicate_scores": given["predicate_scores"].bfloat16()}
    with PredictionFile(tmp_path / "p.h5") as file:
        file.write("a", given)
    fields = Predictions(tmp_path / "p.h5", NAMES)["a"]
    assert torch.equal(fields["scores"], given["scores"].detach())
    assert torch.equal(fields["predicate_scores"], given["predicate_scores"].float())


def test_image_ids_may_have_slashes(tmp_path, graphs):
    path = tmp_path / "p.h5"
    ids = ["a/b/1.jpg", "a/b/2.jpg", "a/3.jpg", "4.jpg"]
    with PredictionFile(path) as file:
        for image_id in ids:
            file.write(image_id, perfect(graphs[0]))
    predictions = Predictions(path, NAMES)
    assert predictions.image_ids == set(ids)
    assert torch.equal(predictions["a/b/2.jpg"]["boxes"], graphs[0].boxes)


def test_an_incomplete_hdf5_file_is_refused(tmp_path, annotations, graphs, capsys):
    path = write(tmp_path / "p.h5", graphs)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert evaluate(path, annotations) == 1 and "cut short" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["dangling link", "circular links", "flipped bytes", "group instead of field"])
def test_a_damaged_hdf5_file_is_refused_in_one_sentence(tmp_path, annotations, graphs, damage, capsys):
    path = write(tmp_path / "p.h5", graphs)
    image = next(graph.image_id for graph in graphs if len(graph.relations))
    with h5py.File(path, "r+") as file:
        if damage == "dangling link":
            del file[image]
            file[image] = h5py.SoftLink("/nowhere")
        elif damage == "circular links":
            group = file.create_group("circle").create_group("a")
            group["b"] = group
        elif damage == "group instead of field":
            del file[image]["boxes"]
            file[image].create_group("boxes")
        place = file.get(image)["labels"].id.get_offset() if damage == "flipped bytes" else 0
    if damage == "flipped bytes":
        content = bytearray(path.read_bytes())
        headers = [i for i in range(len(content)) if content.startswith(b"TREE", i) and i != place]
        for header in headers:
            content[header : header + 4] = b"EERT"
        path.write_bytes(content)
    assert evaluate(path, annotations) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error, error


def test_lines_without_objects_are_refused(tmp_path, annotations, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"image_id": "a"}\n{"image_id": "b"}\n')
    assert evaluate(path, annotations) == 1 and "line 1: objects must be a list" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_before_reading_predictions(tmp_path, annotations, capsys):
    assert evaluate(tmp_path / "nowhere.h5", annotations, "--csv", str(tmp_path)) == 1
    assert "must be a file, but is a folder" in capsys.readouterr().err


def test_json_of_an_image_without_objects_keeps_shapes_and_dtypes(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"a": {"boxes": [], "labels": [], "triplets": [], "triplet_scores": []}}')
    fields = Predictions(path, NAMES)["a"]
    assert fields["boxes"].shape == (0, 4) and fields["triplets"].shape == (0, 3)
    assert fields["labels"].dtype == torch.int64


def test_json_of_an_image_without_pairs_is_evaluated(tmp_path, annotations, graphs):
    """The image has a single detected object."""
    graph = next(graph for graph in graphs if len(graph.relations))
    prediction = {"boxes": graph.boxes[:1].tolist(), "labels": graph.labels[:1].tolist(), "scores": [1.0]}
    path = tmp_path / "p.json"
    path.write_text(json.dumps({graph.image_id: prediction | {"pairs": [], "predicate_scores": []}}))
    assert evaluate(path, annotations, protocol="sgdet") == 0


def test_an_image_without_fields_is_refused(annotations, tmp_path, capsys):
    graph = open_dataset(annotations, "test")[0]
    path = tmp_path / "p.json"
    path.write_text(json.dumps({graph.image_id: {}}))
    assert evaluate(path, annotations, protocol="sgdet") == 1
    assert "prediction must have boxes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, protocol",
    [
        (["--skip-missing"], "open-images"),
        (["--predicates-per-pair", "2"], "sgdet"),
        (["--zero-shot", "f"], "open-images"),
        (["--top-k", "20"], "open-images"),
        (["--strict-constraint"], "open-images"),
        (["--strict-constraint"], "vrd-phrase"),
        (["--strict-constraint"], "sgbench"),
        (["--skip-missing"], "sgbench"),
        (["--no-plus-one"], "sgbench"),
        (["--zero-shot", "f"], "sgbench"),
        (["--predicates-per-pair", "2"], "sgbench"),
    ],
)
def test_options_that_a_protocol_does_not_have_are_refused(annotations, capsys, options, protocol):
    with pytest.raises(SystemExit):
        evaluate("p.h5", annotations, *options, protocol=protocol)
    assert f"{options[0]} cannot be used with --protocol {protocol}" in capsys.readouterr().err


def test_names_of_metrics_have_a_k_and_a_group():
    assert split_name("mR@50/head") == ("mR", 50, "head") and split_name("score_wtd") == ("score_wtd", None, "")
    assert split_name("R@inf") == ("R@inf", None, "")


def test_the_table_has_a_row_per_metric_and_a_column_per_k():
    lines = table({"R@20": 0.5, "R@50": 0.75, "R@50/on": 1, "mR@50/head": 0.25, "score_wtd": 0.1}).splitlines()
    assert [line.split() for line in lines] == [
        ["@20", "@50"],
        ["R", "50.00", "75.00"],
        ["mR", "head", "25.00"],
        [],
        ["score_wtd", "10.00"],
    ]


def test_the_table_has_mean_ranks_and_undefined_values_as_they_are():
    lines = table({"R@20": 0.5, "mR@20": math.nan, "R@inf": 0.75, "PRank": 1.5}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["R", "50.00"],
        ["mR", "nan"],
        [],
        ["R@inf", "75.00"],
        ["PRank", "1.50"],
    ]


@pytest.mark.parametrize(
    "protocol, names",
    [("predcls", ["R", "ngR", "mR_pooled", "A"]), ("vrd-phrase", ["phrase"]), ("sgbench", ["R", "mR", "PairR"])],
)
def test_the_values_of_k_can_be_chosen(tmp_path, annotations, graphs, protocol, names):
    path, figures = write(tmp_path / "p.h5", graphs), tmp_path / "r.json"
    assert evaluate(path, annotations, "--top-k", "3", "70", "--json", str(figures), protocol=protocol) == 0
    places = [split_name(name) for name in json.loads(figures.read_text())]
    assert {k for _, k, _ in places} - {None} == {3, 70}
    assert {(name, k) for name in names for k in (3, 70)} <= {(metric, k) for metric, k, _ in places}


def test_values_of_k_below_1_are_refused(tmp_path, annotations, graphs, capsys):
    assert evaluate(write(tmp_path / "p.h5", graphs), annotations, "--top-k", "0", "20") == 1
    assert "top_k must be integers from 1 to 2^31 - 1, got [0, 20]" in capsys.readouterr().err


def test_the_strict_constraint_keeps_one_triplet_per_pair(tmp_path, annotations, graphs):
    """Before each triplet of the ground truth stands one of the same pair with another predicate."""
    path, figures = tmp_path / "p.h5", tmp_path / "r.json"
    with PredictionFile(path) as file:
        for graph in graphs:
            other = graph.relations.clone()
            other[:, 2] = other[:, 2] % 20 + 1
            triplets = torch.stack((other, graph.relations), 1).flatten(0, 1)
            fields = {"boxes": graph.boxes, "labels": graph.labels, "triplets": triplets}
            file.write(graph.image_id, fields | {"triplet_scores": torch.ones(len(triplets))})
    results = []
    for options in ((), ("--strict-constraint",)):
        assert evaluate(path, annotations, "--json", str(figures), *options) == 0
        results.append(json.loads(figures.read_text()))
    assert results[0]["R@100"] == 1 and results[1]["R@100"] < 0.5
    assert results[0]["ngR@100"] == results[1]["ngR@100"] == 1


def test_undefined_values_are_null_in_json(tmp_path, annotations, graphs):
    """A predicate that never occurs has no recall, so SGBench's mean recall is not defined."""
    shutil.copytree(annotations, tmp_path / "vrd")
    listed = tmp_path / "vrd" / "predicates.json"
    listed.write_text(json.dumps([*json.loads(listed.read_text()), "never"]))
    path, figures, rows = tmp_path / "p.h5", tmp_path / "r.json", tmp_path / "r.csv"
    with PredictionFile(path) as file:
        for graph in graphs:
            file.write(graph.image_id, perfect(graph, predicates=21))
    options = "--json", str(figures), "--csv", str(rows)
    assert evaluate(path, tmp_path / "vrd", *options, protocol="sgbench") == 0
    result = json.loads(figures.read_text(), parse_constant=lambda name: pytest.fail(f"JSON has no {name}"))
    assert result["mR@50"] is result["mR@inf"] is None and result["R@50"] == 1 and result["PRank"] == 0
    assert "mR,50,,nan" in rows.read_text().splitlines()


def test_vrd_has_1170_zero_shot_relations_in_7638(vrd_root):
    """The numbers are counted from the released files."""
    parts = {part: open_dataset(vrd_root, part) for part in ("train", "validation", "test")}
    graphs = {part: [data[index] for index in range(len(data))] for part, data in parts.items()}
    unseen = {tuple(t) for t in zero_shot_triplets(graphs["train"] + graphs["validation"], graphs["test"]).tolist()}
    triplets = [
        (int(graph.labels[s]), p, int(graph.labels[o]))
        for graph in graphs["test"]
        for s, o, p in graph.relations.tolist()
    ]
    assert len(triplets) == 7638 and sum(triplet in unseen for triplet in triplets) == 1170
