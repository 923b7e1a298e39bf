"""Tests of the mean average precision of detections: in Python, from files and of the modules that detect objects."""

import contextlib
import csv
import io
import json
import sys

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("lightning")
pytest.importorskip("pycocotools")
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402
from torchvision.ops import box_convert  # noqa: E402
from trainers import SMALL_DETR, trainer_without_sanity_check  # noqa: E402

from sgalign.commands.main import main  # noqa: E402
from sgalign.data import open_dataset  # noqa: E402
from sgalign.metrics import DetectionEvaluator  # noqa: E402
from sgalign.metrics.results import table  # noqa: E402
from sgalign.models.detector import ObjectDetections  # noqa: E402
from sgalign.models.entity_detector import DetectedEntities  # noqa: E402
from sgalign.training import DetectionWriter, DetectorModule, EntityDetectorModule, SceneGraphData  # noqa: E402

NAMES = ["__background__", "cat", "dog", "cup", "hat"]
BOX, PART, APART = [0.0, 0, 10, 10], [0.0, 0, 10, 7.2], [50.0, 50, 60, 60]  # BOX and PART have an IoU of 0.72


def objects(*rows):
    """Return objects of rows with a box, a label and, if they are detections, a score."""
    boxes, labels, *scores = zip(*rows) if rows else ((), ())
    fields = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
    return fields | ({"scores": torch.tensor(scores[0])} if scores else {})


NONE = objects() | {"scores": torch.zeros(0)}


def evaluated(predictions, targets, names=NAMES):
    evaluator = DetectionEvaluator(names)
    evaluator.update(predictions, targets)
    return {name: value.item() for name, value in evaluator.compute().items()}


def test_average_precision_is_as_computed_by_hand():
    """The first and the third detection find one of three cats each.

    Precision is 1 up to a recall of 1/3 (34 of the 101 points from 0 to 1) and 2/3 up to a recall of 2/3 (33 points).
    The dog is found at the thresholds 0.5, 0.55, 0.6, 0.65 and 0.7 of ten. Hats are not annotated.
    """
    targets = [objects((BOX, 1), (APART, 1), (BOX, 2)), objects((BOX, 1))]
    predictions = [objects((BOX, 1, 0.9), (PART, 2, 0.3), (BOX, 4, 1.0)), objects((APART, 1, 0.8), (BOX, 1, 0.7))]
    cat = (34 + 33 * 2 / 3) / 101
    assert evaluated(predictions, targets) == pytest.approx(
        {
            "mAP": (cat + 0.5) / 2,
            "mAP_50": (cat + 1) / 2,
            "mAP_75": cat / 2,
            "mAR_100": (2 / 3 + 0.5) / 2,
            "AP/cat": cat,
            "AP/dog": 0.5,
        }
    )


def test_an_object_is_claimed_once_and_detections_of_images_without_objects_count():
    once = evaluated([objects((BOX, 1, 0.9))], [objects((BOX, 1))])
    assert once["mAP"] == pytest.approx(1)
    twice = evaluated([objects((BOX, 1, 0.9), (BOX, 1, 0.8))], [objects((BOX, 1), (APART, 1))])
    assert twice["mAP"] == pytest.approx(51 / 101)
    elsewhere = evaluated([objects((BOX, 1, 0.9)), objects((BOX, 1, 0.95))], [objects((BOX, 1)), objects()])
    assert elsewhere["mAP"] == pytest.approx(0.5)


def test_images_without_detections_have_found_nothing_and_without_objects_there_are_no_figures():
    assert evaluated([NONE], [objects((BOX, 1))]) == {
        "mAP": 0, "mAP_50": 0, "mAP_75": 0, "mAR_100": 0, "AP/cat": 0
    }  # fmt: skip
    assert evaluated([objects((BOX, 1, 0.9))], [objects()]) == evaluated([NONE], [objects()]) == {}


def test_names_are_optional():
    figures = evaluated([objects((BOX, 1, 0.9))], [objects((BOX, 1))], names=None)
    assert list(figures) == ["mAP", "mAP_50", "mAP_75", "mAR_100"]


def some_boxes(generator, count):
    corner, size = torch.rand(2, count, 2, generator=generator) * 40
    return torch.cat((corner, corner + size + 1), 1)


def test_the_figures_are_those_of_pycocotools():
    """Some images have more than 100 detections of a class. Recalls lie at the sampled points, such as 0.3."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = [], []
    for count in (120, 30, 0, 7, 250):
        true = some_boxes(generator, 2 * 10)
        labels = torch.arange(20) % 2 + 1
        boxes = torch.cat((true + 2 * torch.randn(true.shape, generator=generator), some_boxes(generator, count)))
        boxes[:, 2:] = boxes[:, :2].maximum(boxes[:, 2:])
        classes = torch.cat((labels, torch.randint(1, 4, (count,), generator=generator)))
        scores = torch.rand(len(boxes), generator=generator)
        predictions.append({"boxes": boxes, "labels": classes, "scores": scores})
        targets.append({"boxes": true, "labels": labels})
    assert predictions[-1]["labels"].bincount().max() < 100 < len(predictions[-1]["boxes"])
    predictions[0]["labels"][20:] = 1
    assert predictions[0]["labels"].bincount().max() > 100
    rows, truth = [], []
    for image, (found, true) in enumerate(zip(predictions, targets)):
        xywh = (box_convert(each["boxes"], "xyxy", "xywh").tolist() for each in (found, true))
        for box, label, score in zip(next(xywh), found["labels"].tolist(), found["scores"].tolist()):
            rows.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
        for box, label in zip(next(xywh), true["labels"].tolist()):
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": label, "bbox": box, "iscrowd": 0})
            truth[-1]["area"] = box[2] * box[3]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "images": [{"id": i} for i in range(5)], "annotations": truth}
        coco.dataset["categories"] = [{"id": i, "name": NAMES[i]} for i in range(1, 5)]
        coco.createIndex()
        public = COCOeval(coco, coco.loadRes(rows), "bbox")
        public.evaluate()
        public.accumulate()
        public.summarize()
    figures = evaluated(predictions, targets)
    expected = dict(zip(("mAP", "mAP_50", "mAP_75"), public.stats)) | {"mAR_100": public.stats[8]}
    by_class = public.eval["precision"][:, :, :, 0, 2].mean((0, 1))
    expected |= {"AP/cat": by_class[0], "AP/dog": by_class[1]}
    assert figures == pytest.approx(expected, abs=1e-6) and 0.1 < figures["mAP"] < 0.9


def test_pycocotools_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pycocotools: pip install 'sgalign\[train\]'"):
        DetectionEvaluator()


# ---- files


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotations") / "coco"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "12", "3", "6"]) == 0
    return folder


@pytest.fixture(scope="module")
def graphs(annotations):
    return list(open_dataset(annotations, "test"))


def perfect(graphs):
    """Return COCO results that are the annotations."""
    return [
        {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.5}
        for image, graph in enumerate(graphs)
        for (x1, y1, x2, y2), label in zip(graph.boxes.tolist(), graph.labels.tolist())
    ]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def evaluate(annotations, *options):
    return main(["evaluate", "--annotations", str(annotations), *map(str, options)])


def test_the_annotations_as_detections_are_perfect_in_both_forms(tmp_path, annotations, graphs, capsys, caplog):
    ours = {
        g.image_id: {"boxes_xyxy": g.boxes.tolist(), "labels": (g.labels - 1).tolist(), "scores": [1] * len(g.labels)}
        for g in graphs
    }
    results = []
    for name, content in (("ours", ours), ("coco", perfect(graphs))):
        path, out, rows = write(tmp_path / f"{name}.json", content), tmp_path / "r.json", tmp_path / "r.csv"
        assert evaluate(annotations, "--detections", path, "--json", out, "--csv", rows) == 0
        results.append(json.loads(out.read_text()))
        printed = capsys.readouterr().out
        assert "mAP" in printed and "100.00" in printed and "AP/" not in printed and not caplog.messages
        with rows.open() as file:
            values = {(row["metric"], row["of"]): float(row["value"]) for row in csv.DictReader(file)}
        assert values == {tuple(f"{key}/".split("/")[:2]): value for key, value in results[-1].items()}
    assert results[0] == results[1] and results[0] == pytest.approx(dict.fromkeys(results[0], 1))
    names = open_dataset(annotations, "test").object_names
    annotated = {f"AP/{names[label]}" for graph in graphs for label in graph.labels.tolist()}
    assert annotated == {name for name in results[0] if "/" in name} and len(annotated) < len(names) - 1


def test_images_without_detections_are_counted_and_lower_the_figures(tmp_path, annotations, graphs, caplog):
    path = write(tmp_path / "d.json", [row for row in perfect(graphs) if row["image_id"] < 4])
    assert evaluate(annotations, "--detections", path, "--json", tmp_path / "r.json") == 0
    assert caplog.messages == ["detections: found 2 images of the test split without detections"]
    assert 0 < json.loads((tmp_path / "r.json").read_text())["mAR_100"] < 1


def test_detections_beyond_the_100_best_of_a_class_are_counted(tmp_path, annotations, graphs, caplog):
    rows = perfect(graphs)
    path = write(tmp_path / "d.json", rows + [rows[0] | {"score": 0.1}] * 101)
    assert evaluate(annotations, "--detections", path) == 0
    (message,) = caplog.messages
    assert message == f"{path}: 1 image with more than 100 detections of a class: the best 100 of them count"


def test_detections_and_predictions_can_be_evaluated_together(tmp_path, annotations, graphs, capsys):
    predictions = {
        graph.image_id: {
            "boxes": graph.boxes.tolist(),
            "labels": graph.labels.tolist(),
            "triplets": graph.relations.tolist(),
            "triplet_scores": [1.0] * len(graph.relations),
        }
        for graph in graphs
    }
    paths = write(tmp_path / "p.json", predictions), write(tmp_path / "d.json", perfect(graphs))
    out = tmp_path / "r.json"
    assert evaluate(annotations, paths[0], "--protocol", "sgdet", "--detections", paths[1], "--json", out) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert figures["mAP"] == pytest.approx(1) and figures["R@50"] == pytest.approx(1)
    assert [line.split()[0] for line in printed.splitlines() if line.startswith(("mAP", "R "))] == [
        "R", "mAP", "mAP_50", "mAP_75"
    ]  # fmt: skip


def test_the_table_of_detections_has_no_empty_lines():
    assert [line.split() for line in table({"mAP": 0.5, "mAP_50": 1, "AP/cat": 0.25}).splitlines()] == [
        ["mAP", "50.00"],
        ["mAP_50", "100.00"],
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "must have files of predictions, --detections, or both"),
        (["p.h5"], "files of predictions need --protocol"),
        (["--detections", "d.json", "--protocol", "sgdet"], "--protocol needs files of predictions"),
        (["--detections", "d.json", "--skip-missing"], "--skip-missing needs files of predictions"),
        (["--detections", "d.json", "--predicates-per-pair", "2"], "--predicates-per-pair needs files of predictions"),
        (["--detections", "d.json", "--json", "d.json"], "must all be different files"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(annotations, options, message, capsys):
    with pytest.raises(SystemExit):
        evaluate(annotations, *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image_id": 99}, "image_id must be the id of an image, such as '0', got 1 image that the data do not have"),
        ({"category_id": 99}, "row 0: category_id must be the id of a class (1 to 16), got 99"),
        ({"bbox": [0, 0, -1, 1]}, "row 0: bbox must have a width and a height of at least 0"),
    ],
)
def test_bad_detections_are_refused_in_one_sentence(tmp_path, annotations, graphs, row, message, capsys):
    path = write(tmp_path / "d.json", [perfect(graphs)[0] | row])
    assert evaluate(annotations, "--detections", path) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1


def test_a_split_without_objects_is_refused(tmp_path, capsys):
    images = [{"id": 1, "file_name": "a.jpg", "width": 60, "height": 50}]
    write(tmp_path / "test.json", {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]})
    write(tmp_path / "rel.json", {"rel_categories": ["on"], "test": {}})
    path = write(tmp_path / "d.json", [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}])
    assert evaluate(tmp_path, "--detections", path) == 1
    assert "the test split must have objects, got none" in capsys.readouterr().err


# ---- modules


def nearly(truth):
    """Return detections of an image's objects that are partly wrong: boxes are off, and one class is."""
    noise = 8 * torch.randn(truth["boxes"].shape, generator=torch.Generator().manual_seed(len(truth["labels"])))
    boxes, labels = (truth["boxes"] + noise).clamp(min=0), truth["labels"].clone()
    boxes[:, 2:] = boxes[:, :2].maximum(boxes[:, 2:])
    labels[0] = labels[0] % 16 + 1
    return boxes, labels, torch.linspace(0.9, 0.2, len(labels))


def faster_rcnn(monkeypatch):
    def detect(batch):
        found = [nearly(truth) for truth in batch.truth]
        return [ObjectDetections(*image, *torch.zeros(2, len(image[0]), 1)) for image in found]

    module = DetectorModule(backbone="resnet18", min_size=64, max_size=96)
    monkeypatch.setattr(module, "detect", detect)
    return module


def detr(monkeypatch):
    def detect(batch):
        """Return as many queries as the image with the most objects needs. The others detect a hat in the corner."""
        queries = max(len(truth["labels"]) for truth in batch.truth)
        shape = 1, len(batch.truth), queries
        logits, boxes = torch.zeros(*shape, 17), torch.full((*shape, 4), 0.1)
        for image, truth in enumerate(batch.truth):
            found, labels, scores = nearly(truth)
            rows = range(len(labels))
            logits[0, image, rows, labels - 1] = 5 + scores
            boxes[0, image, rows] = box_convert(found / torch.tensor(truth["size"]).repeat(2), "xyxy", "cxcywh")
        return [], DetectedEntities(*torch.zeros(4, 1), logits, boxes)

    module = EntityDetectorModule(**SMALL_DETR)
    monkeypatch.setattr(module, "detect", detect)
    return module


@pytest.mark.parametrize("make", [faster_rcnn, detr])
def test_a_module_logs_the_figures_of_the_file_that_it_writes(tmp_path, annotations, make, monkeypatch):
    module = make(monkeypatch)
    data = SceneGraphData(str(annotations), images=True, batch_size=4)
    run = trainer_without_sanity_check(callbacks=[DetectionWriter(tmp_path / "d.json")])
    (logged,) = run.test(module, data, verbose=False)
    run.predict(module, data)
    assert evaluate(annotations, "--detections", tmp_path / "d.json", "--json", tmp_path / "r.json") == 0
    expected = json.loads((tmp_path / "r.json").read_text())
    assert {name: logged[f"test/{name}"] for name in ("mAP", "mAP_50")} == pytest.approx(
        {name: expected[name] for name in ("mAP", "mAP_50")}, abs=1e-6
    )
    assert 0.01 < logged["test/mAP"] < logged["test/mAP_50"] < 0.99
    (validated,) = run.validate(module, data, verbose=False)
    assert {"val/mAP", "val/mAP_50", "val/found"} <= validated.keys()
    assert not [name for name in module.state_dict() if name.startswith("precision")]
