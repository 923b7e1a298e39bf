"""Tests of files of predictions that other systems write. Each file holds the annotations, so recall must be 1."""

import json
import sys
import types

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("lightning")

from sgalign.commands.main import main  # noqa: E402
from sgalign.data import open_dataset  # noqa: E402
from sgalign.data.image_ids import ImageIds  # noqa: E402
from sgalign.data.prediction_reading import _at_original_size  # noqa: E402
from sgalign.viewing import describe_annotations  # noqa: E402

PREDICATES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "coco"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "30", "5", "8", "--no-images"]) == 0
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return open_dataset(folder, "test")


@pytest.fixture(scope="module")
def graphs(dataset):
    return list(dataset)


def evaluate(path, folder, tmp_path, *options, protocol="sgdet"):
    """Return the figures of a file of predictions, or the exit code of a failure."""
    out = tmp_path / "figures.json"
    code = main(
        ["evaluate", str(path), "--annotations", str(folder), "--protocol", protocol, "--json", str(out), *options]
    )
    return json.loads(out.read_text()) if code == 0 else code


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def scores_of(graph, background=True):
    """Return the scores of each relation's predicates, with or without the background in front."""
    rows = torch.zeros(len(graph.relations), PREDICATES + 1)
    rows[torch.arange(len(graph.relations)), graph.relations[:, 2]] = 0.9
    return rows[:, 0 if background else 1 :]


def of_egtr(graph):
    return {
        "pred_boxes": graph.boxes.tolist(),
        "pred_classes": graph.labels.tolist(),
        "obj_scores": [1.0] * len(graph.labels),
        "pred_rel_inds": graph.relations[:, :2].tolist(),
        "rel_scores": scores_of(graph, background=False).tolist(),
    }


def of_reltr(graph, names="classes"):
    image = {}
    for column, end in enumerate(("sub", "obj")):
        rows = graph.relations[:, column]
        image[f"{end}_boxes"], image[f"{end}_{names}"] = graph.boxes[rows].tolist(), graph.labels[rows].tolist()
        image[f"{end}_scores"] = [1.0] * len(rows)
    return image | {"rel_scores": scores_of(graph).tolist()}


def of_pairs(graph):
    """Return fields with one predicate per pair, as number and score."""
    one = {name: value for name, value in of_egtr(graph).items() if name != "rel_scores"}
    return one | {"rel_labels": graph.relations[:, 2].tolist(), "rel_scores": [0.5] * len(graph.relations)}


@pytest.mark.parametrize("form", [of_egtr, of_reltr, lambda graph: of_reltr(graph, "labels"), of_pairs])
@pytest.mark.parametrize("kind", ["list", "object", "stems", "ids"])
def test_fields_of_other_systems_are_read(tmp_path, folder, dataset, graphs, form, kind):
    ids = {name: image_id for image_id, name in dataset.image_names.items()}
    if kind == "list":
        content = [{"file_name": f"some/folder/{graph.image_id}"} | form(graph) for graph in graphs]
    elif kind == "ids":
        content = [{"image_id": int(ids[graph.image_id])} | form(graph) for graph in graphs]
    else:
        cut = -4 if kind == "stems" else None
        content = {graph.image_id[:cut]: form(graph) for graph in graphs}
    assert evaluate(written(tmp_path / "p.json", content), folder, tmp_path)["R@100"] == 1


def test_classes_may_be_names(tmp_path, folder, dataset, graphs):
    content = {}
    for graph in graphs:
        names = [dataset.object_names[label] for label in graph.labels.tolist()]
        triplets = [[s, o, dataset.predicate_names[p]] for s, o, p in graph.relations.tolist()]
        content[graph.image_id] = {
            "boxes": graph.boxes.tolist(),
            "labels": names,
            "triplets": triplets,
            "triplet_scores": [0.5] * len(triplets),
        }
    assert evaluate(written(tmp_path / "p.json", content), folder, tmp_path)["R@100"] == 1
    content[graph.image_id]["labels"][0] = "unicorn"
    assert evaluate(written(tmp_path / "p.json", content), folder, tmp_path) == 1


def test_a_file_whose_triplets_were_cut_is_named(tmp_path, folder, graphs, caplog):
    content = {}
    for graph in graphs:
        triplets = graph.relations[:1].tolist() * 3
        content[graph.image_id] = {"boxes": graph.boxes.tolist(), "labels": graph.labels.tolist(), "triplets": triplets}
        content[graph.image_id]["triplet_scores"] = [0.5] * len(triplets)
    evaluate(written(tmp_path / "p.json", content), folder, tmp_path)
    assert "most images have exactly 3 triplets, so recall at a larger K counts only 3" in caplog.text
    caplog.clear()
    evaluate(tmp_path / "p.json", folder, tmp_path, "--top-k", "2", "3")
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_graphs_of_predict_are_read(tmp_path, folder, dataset, graphs, suffix):
    described = [describe_annotations(graph, dataset.object_names, dataset.predicate_names) for graph in graphs]
    for graph in described:
        graph["objects"] = [item | {"score": 0.5} for item in graph["objects"]]
        graph["triplets"] = [item | {"score": 0.5} for item in graph["triplets"]]
    path = tmp_path / f"p{suffix}"
    lines = "\n".join(map(json.dumps, described)) + "\n"
    path.write_text(lines if suffix == ".jsonl" else json.dumps(described))
    assert evaluate(path, folder, tmp_path)["R@100"] == 1


def test_the_file_of_sgbench_counts_classes_from_0(tmp_path, folder, dataset, graphs):
    ids = {name: image_id for image_id, name in dataset.image_names.items()}
    images = [
        {
            "id": ids[graph.image_id],
            "bboxes": graph.boxes.tolist(),
            "categories": (graph.labels - 1).tolist(),
            "triplets": [[s, o, p - 1] for s, o, p in graph.relations.tolist()],
        }
        for graph in graphs
    ]
    path = written(tmp_path / "p.json", {"version": 1, "images": images})
    assert evaluate(path, folder, tmp_path)["R@100"] == 1


@pytest.mark.parametrize(
    "change",
    [{"categories": 5}, {"triplets": None}, {"bboxes": {}}],
)
def test_a_malformed_file_of_sgbench_is_refused(tmp_path, folder, change, capsys):
    image = {"id": 1, "bboxes": [], "categories": [], "triplets": []} | change
    path = written(tmp_path / "p.json", {"version": 1, "images": [image]})
    assert evaluate(path, folder, tmp_path) == 1
    assert "images, row 0: must have id, and the lists bboxes, categories, triplets" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [("0", "1000"), ("600", "0"), ("1000", "600"), ("-1", "5")])
def test_impossible_sizes_are_refused(tmp_path, folder, graphs, sizes, capsys):
    path = written(tmp_path / "p.json", {graphs[0].image_id: of_egtr(graphs[0])})
    assert evaluate(path, folder, tmp_path, "--resized", *sizes) == 1
    assert "resized must be the short and the long side" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["pred_boxes", "pred_classes", "obj_scores", "pred_rel_inds", "rel_scores"])
@pytest.mark.parametrize("value", [3, {"a": 1}, [True, False], [[True, 1]], None], ids=str)
def test_wrong_values_are_refused_in_one_sentence(tmp_path, folder, graphs, field, value, capsys):
    graph = next(graph for graph in graphs if len(graph.relations))
    path = written(tmp_path / "p.json", {graph.image_id: of_egtr(graph) | {field: value}})
    assert evaluate(path, folder, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "damaged" not in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"boxes": []}, "row 0: must have image_id, file_name or id"),
        ({"image_id": None}, "row 0: must have image_id"),
        (3, "row 0: must have image_id"),
    ],
)
def test_a_row_without_a_name_is_refused(tmp_path, folder, row, message, capsys):
    assert evaluate(written(tmp_path / "p.json", [row]), folder, tmp_path) == 1
    assert message in capsys.readouterr().err


def test_coco_results_are_sent_to_their_option(tmp_path, folder, capsys):
    row = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    assert evaluate(written(tmp_path / "p.json", [row, row]), folder, tmp_path) == 1
    assert "pass it with --detections" in capsys.readouterr().err


def test_two_predictions_of_one_image_are_refused(tmp_path, folder, graphs, capsys):
    name, image = graphs[0].image_id, of_egtr(graphs[0])
    assert evaluate(written(tmp_path / "a.json", {name: image, f"x/{name}": image}), folder, tmp_path) == 1
    assert "every image must occur once" in capsys.readouterr().err
    assert evaluate(written(tmp_path / "b.json", [{"image_id": name} | image] * 2), folder, tmp_path) == 1
    assert "occurs twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_scores": [0.5]}, "rel_scores must have one number and one of rel_labels per pair"),
        ({"rel_labels": ["flies"]}, "triplets must be classes of the data set"),
        ({"pred_rel_inds": [[0, 99]]}, "pairs must be two rows of"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, folder, graphs, change, message, capsys):
    graph = next(graph for graph in graphs if len(graph.relations) > 1)
    image = of_pairs(graph) | change
    if "rel_scores" not in change:
        image |= {name: image[name][:1] for name in ("rel_scores", "rel_labels", "pred_rel_inds")}
    assert evaluate(written(tmp_path / "p.json", {graph.image_id: image}), folder, tmp_path) == 1
    assert message in capsys.readouterr().err


def test_a_subject_without_an_object_is_refused(tmp_path, folder, graphs, capsys):
    image = of_reltr(graphs[0])
    del image["obj_boxes"]
    assert evaluate(written(tmp_path / "p.json", {graphs[0].image_id: image}), folder, tmp_path) == 1
    assert "must have sub_boxes and obj_boxes" in capsys.readouterr().err


# ---- Scene-Graph-Benchmark


def write_custom(folder, dataset, graphs, *, scale):
    """Write `custom_prediction.json` and `custom_data_info.json`, with the predicates in another order."""
    order = [0, *range(PREDICATES, 0, -1)]
    content = {}
    for number, graph in enumerate(graphs):
        size = graph.width, graph.height
        new = {(480, 300): (960, 600), (400, 300): (800, 600), (360, 360): (600, 600)}[size] if scale else size
        boxes = graph.boxes * torch.tensor([new[0] / graph.width, new[1] / graph.height] * 2)
        scores = scores_of(graph)[:, order]
        content[str(number)] = {
            "bbox": boxes.tolist(),
            "bbox_labels": graph.labels.tolist(),
            "bbox_scores": [1.0] * len(graph.labels),
            "rel_pairs": graph.relations[:, :2].tolist(),
            "rel_labels": scores[:, 1:].argmax(1).add(1).tolist() if len(scores) else [],
            "rel_scores": scores.amax(1).tolist() if len(scores) else [],
            "rel_all_scores": scores.tolist(),
        }
    info = {
        "idx_to_files": [f"/home/user/pictures/{graph.image_id}" for graph in graphs],
        "ind_to_classes": dataset.object_names,
        "ind_to_predicates": [dataset.predicate_names[number] for number in order],
    }
    written(folder / "custom_data_info.json", info)
    return written(folder / "custom_prediction.json", content)


@pytest.mark.parametrize("all_scores", [True, False])
def test_custom_prediction_json_is_read(tmp_path, folder, dataset, graphs, all_scores, caplog):
    path = write_custom(tmp_path, dataset, graphs, scale=True)
    if not all_scores:
        content = json.loads(path.read_text())
        for image in content.values():
            del image["rel_all_scores"]
        written(path, content)
    assert evaluate(path, folder, tmp_path, "--resized", "600", "1000")["R@100"] == 1
    assert not caplog.records
    assert evaluate(path, folder, tmp_path)["R@100"] < 0.1
    assert "add --resized 600 1000" in caplog.text


@pytest.mark.parametrize(
    ("size", "resized"),
    [((300, 480), (600, 960)), ((1000, 400), (1000, 400)), ((1200, 500), (1000, 417)), ((600, 1000), (600, 1000))],
)
def test_boxes_of_resized_images_are_scaled_back(size, resized):
    """The sizes are computed by hand from the rules of Scene-Graph-Benchmark's `Resize`."""
    boxes = torch.tensor([[0.0, 0.0, *resized]])
    assert _at_original_size("", boxes, size, (600, 1000))[0].tolist() == pytest.approx([0, 0, *size])


def test_custom_prediction_json_needs_its_names(tmp_path, folder, dataset, graphs, capsys):
    path = write_custom(tmp_path, dataset, graphs, scale=False)
    assert evaluate(path, folder, tmp_path)["R@100"] == 1
    info = tmp_path / "custom_data_info.json"
    content = json.loads(info.read_text())
    for change, message in (
        ({"ind_to_predicates": ["__background__", "on"]}, "ind_to_predicates must be those of the data set"),
        ({"ind_to_classes": ["__background__", "person"]}, "must fit the lists of custom_data_info.json"),
        ({"idx_to_files": content["idx_to_files"][:2]}, "must fit the lists of custom_data_info.json"),
        ({"idx_to_files": [content["idx_to_files"][0]] * len(graphs)}, "must have its own file name"),
        ({"idx_to_files": None}, "must have idx_to_files, ind_to_classes, ind_to_predicates"),
    ):
        written(info, content | change)
        assert evaluate(path, folder, tmp_path) == 1
        assert message in capsys.readouterr().err
    info.unlink()
    assert evaluate(path, folder, tmp_path) == 1
    assert "custom_data_info.json not found: it names the images and classes" in capsys.readouterr().err


@pytest.fixture(params=["maskrcnn_benchmark", "pysgg", "sgg_benchmark"])
def box_list(request, monkeypatch):
    """The class BoxList of another system, under its full name."""
    names = [request.param, f"{request.param}.structures", f"{request.param}.structures.bounding_box"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("BoxList", (), {"__module__": names[-1], "__qualname__": "BoxList"})
    sys.modules[names[-1]].BoxList = kind

    def make(boxes, size, **fields):
        box_list = kind()
        vars(box_list).update(bbox=boxes, size=size, mode="xyxy", extra_fields=fields, triplet_extra_fields=[])
        return box_list

    make.hide = lambda: [monkeypatch.delitem(sys.modules, name) for name in names]
    return make


def write_results(
    path, box_list, graphs, *, clip=0.0, scale=1.0, legacy=False, info=True, permuted=False, half=False, change=None
):
    size = lambda graph: (graph.width * scale, graph.height * scale)  # noqa: E731
    related = [graph for graph in graphs if len(graph.relations)]
    order = torch.arange(PREDICATES + 1)
    order[1:] = order[1:].flip(0) if permuted else order[1:]
    truths = []
    for graph in related:
        relations = torch.cat([graph.relations[:, :2], order[graph.relations[:, 2:]]], 1)
        fields = {"labels": graph.labels, "relation_tuple": relations}
        truths.append(box_list(graph.boxes - clip, (graph.width, graph.height), **fields))
    predictions = [
        box_list(
            (graph.boxes * scale - clip).half() if half else graph.boxes * scale - clip,
            size(graph),
            pred_labels=graph.labels,
            pred_scores=torch.ones(len(graph.labels)),
            rel_pair_idxs=graph.relations[:, :2],
            pred_rel_scores=scores_of(graph)[:, order],
        )
        for graph in related
    ]
    vars(predictions[0]).update(change or {})
    content = {"groundtruths": truths, "predictions": predictions}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if info:
        written(path.with_name("visual_info.json"), [{"img_file": f"/data/{graph.image_id}"} for graph in related])
    box_list.hide()
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_eval_results_are_read_without_the_code_of_their_system(tmp_path, folder, graphs, box_list, legacy):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, legacy=legacy, scale=2.0)
    assert evaluate(path, folder, tmp_path)["R@100"] == 1


def test_given_boxes_may_be_clipped(tmp_path, folder, graphs, box_list):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, clip=1.0)
    assert evaluate(path, folder, tmp_path, protocol="predcls")["R@100"] == 1


def test_without_visual_info_the_images_are_in_the_order_of_the_data_set(tmp_path, folder, graphs, box_list, capsys):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, info=False)
    assert evaluate(path, folder, tmp_path)["R@100"] == 1
    info = [{"img_file": graph.image_id} for graph in reversed(graphs) if len(graph.relations)]
    written(tmp_path / "visual_info.json", info)
    assert evaluate(path, folder, tmp_path) == 1
    assert "its annotated boxes, classes and relations must be those of the data set" in capsys.readouterr().err
    written(tmp_path / "visual_info.json", info[1:])
    assert evaluate(path, folder, tmp_path) == 1
    assert "must have a prediction for each of the" in capsys.readouterr().err


def test_predicates_in_another_order_are_refused(tmp_path, folder, graphs, box_list, capsys):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, permuted=True)
    assert evaluate(path, folder, tmp_path) == 1
    assert "or the classes are in another order" in capsys.readouterr().err


def test_half_precision_is_read_and_resized_is_refused(tmp_path, folder, graphs, box_list, capsys):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, half=True, scale=0.5)
    assert evaluate(path, folder, tmp_path)["R@100"] == 1
    assert evaluate(path, folder, tmp_path, "--resized", "600", "1000") == 1
    assert "--resized must be left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"size": (0, 0)},
        {"size": None},
        {"mode": "cxcywh"},
        {"bbox": [1, 2]},
        {"bbox": torch.zeros(4)},
        {"extra_fields": {}},
    ],
    ids=str,
)
def test_malformed_boxes_of_results_are_refused(tmp_path, folder, graphs, box_list, change, capsys):
    path = write_results(tmp_path / "eval_results.pytorch", box_list, graphs, change=change)
    assert evaluate(path, folder, tmp_path) == 1
    assert "must have boxes, size, pred_labels" in capsys.readouterr().err


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_other_code_of_a_results_file_runs(tmp_path, folder, legacy, capsys):
    path = tmp_path / "eval_results.pytorch"
    torch.save({"predictions": [Evil()], "groundtruths": []}, path, _use_new_zipfile_serialization=not legacy)
    assert evaluate(path, folder, tmp_path) == 1 and not Evil.ran
    assert "must be a file of results, but is not one or is cut short" in capsys.readouterr().err


@pytest.mark.parametrize("content", [[], {"predictions": []}, {"predictions": [1], "groundtruths": [2]}])
def test_results_of_other_content_are_refused(tmp_path, folder, content, capsys):
    torch.save(content, tmp_path / "eval_results.pytorch")
    assert evaluate(tmp_path / "eval_results.pytorch", folder, tmp_path) == 1
    assert "must have predictions and groundtruths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "found"),
    [("a.jpg", "d/a.jpg"), ("a", "d/a.jpg"), ("x/a.png", "d/a.jpg"), ("a.v2", None), ("b", None), ("b.001", "b.001")],
)
def test_a_name_without_suffix_stands_for_an_image_only_if_the_suffix_is_an_images(given, found):
    assert ImageIds(["d/a.jpg", "b.001"], {}).find("here", given) == found
