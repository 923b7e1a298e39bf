"""Score the predictions or detections of any system, read from files, against the annotations of a data set."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgalign.commands.reading_options import add_reading_options, add_resized, check_kept, reading_options
from sgalign.data import SceneGraph, count_predicates, open_dataset, read_detections
from sgalign.data.box_checks import PredictedBoxes
from sgalign.data.detections import NOTHING, check_detections, coco_ids
from sgalign.data.findings import counted, warn
from sgalign.data.open import NO_TRAINING, annotation_files, check_same_classes, splits_of
from sgalign.data.prediction_reading import Annotations, PredictionFiles
from sgalign.data.scene_graph import check_has_relations, check_range
from sgalign.data.splits import SPLITS
from sgalign.data.triplets import read_zero_shot_triplets
from sgalign.data.vg150 import Keep
from sgalign.errors import InputError
from sgalign.files import check_writable, real_path, write_json, written_whole
from sgalign.metrics import (
    PROTOCOLS,
    DetectionEvaluator,
    OpenImagesEvaluator,
    SceneGraphEvaluator,
    SGBenchEvaluator,
    VRDEvaluator,
    predicate_groups,
    zero_shot_triplets,
)
from sgalign.metrics.detection import MOST_DETECTIONS
from sgalign.metrics.results import split_name, table

VRD_TASKS = ("relationship", "phrase", "predicate")
EPILOG = "docs/evaluation.md describes the format of the file, every rule, and the effect of each choice."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "predictions", nargs="*", type=Path, help="files of predictions, also of other systems (docs/evaluation.md)"
    )
    parser.add_argument(
        "--detections",
        type=Path,
        metavar="FILE",
        help="JSON file of detected objects, for mean average precision",
    )
    parser.add_argument("--annotations", metavar="FOLDER", required=True, help="data set in any layout of docs/data.md")
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "validation", "test"),
        help="split of the data set to evaluate (default: test)",
    )
    add_reading_options(parser)
    _add_options_of_predictions(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures to this file, one per line")
    return parser


def _add_options_of_predictions(parser: argparse.ArgumentParser) -> None:
    """Add the options that only files of predictions have."""
    add_resized(parser)
    parser.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, *(f"vrd-{task}" for task in VRD_TASKS), "open-images", "sgbench"),
        help="what the model predicts (predcls, sgcls, sgdet, phrdet), or the protocol of VRD's paper (vrd-*), of Open "
        "Images or of the package SGBench; required for predictions",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        nargs="+",
        metavar="K",
        help="values of K of recall at K; not for open-images (default: 20 50 100, and 50 100 for vrd-*)",
    )
    parser.add_argument(
        "--zero-shot",
        metavar="FILE",
        help="public list of zero-shot triplets; not for open-images and sgbench (default: the class triplets that no "
        "split before --split contains)",
    )
    parser.add_argument(
        "--predicates-per-pair",
        type=int,
        default=1,
        metavar="N",
        help="number of best predicates that compete per pair; only for vrd-* and open-images (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave images without a prediction out of the mean, instead of giving them a recall of 0; only for "
        "predcls, sgcls, sgdet and phrdet",
    )
    parser.add_argument(
        "--no-plus-one",
        action="store_true",
        help="take x2 - x1 as a box's width, not x2 - x1 + 1; only for predcls, sgcls, sgdet and phrdet",
    )
    parser.add_argument(
        "--strict-constraint",
        action="store_true",
        help="count only the first triplet of each pair in metrics with the graph constraint, also if the predictions "
        "are ranked triplets; only for predcls, sgcls, sgdet and phrdet",
    )


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign evaluate --annotations FOLDER` for predictions, detections or both, and return the exit code."""
    options = parser().parse_args(arguments)
    _check_given(options)
    written = [path for path in (options.json, options.csv) if path is not None]
    files = options.predictions + ([] if options.detections is None else [options.detections]) + written
    if len({real_path(path) for path in files}) < len(files):
        parser().error("the files of predictions, --detections, --json and --csv must all be different files")
    for path in written:
        check_writable(path)
    check_kept(parser(), [options.zero_shot, *annotation_files(options.annotations)], written)
    figures: dict[str, float] = {}
    if options.detections is not None:
        figures |= evaluate_detections(options)
    if options.predictions:
        figures |= evaluate_predictions(options)
    _write(options, figures)
    return 0


def _check_given(options: argparse.Namespace) -> None:
    """End the program with the code 2 if options are missing, or if they do not belong to the given files."""
    if not options.predictions and options.detections is None:
        parser().error("must have files of predictions, --detections, or both")
    if options.predictions and options.protocol is None:
        parser().error("files of predictions need --protocol")
    of_predictions = argparse.ArgumentParser()
    _add_options_of_predictions(of_predictions)
    given = [name for name, value in vars(of_predictions.parse_args([])).items() if getattr(options, name) != value]
    if given and not options.predictions:
        parser().error(f"--{given[0].replace('_', '-')} needs files of predictions")
    if options.predictions:
        _check_protocol(options)


def evaluate_predictions(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of the files of predictions.

    Args:
        options: options of the command, as `parser` returns them.
    """
    # Predictions may contain images without relations, which do not count. Only training boxes are clipped.
    keep: Keep = "objects" if options.split == "train" else "everything"
    dataset = open_dataset(options.annotations, options.split, keep=keep, **reading_options(options))
    annotations = Annotations.of(dataset)
    graphs = annotations.graphs
    predictions = PredictionFiles(options.predictions, annotations, resized=options.resized)
    check_has_relations(graphs, f"{options.annotations}: the {options.split} split")
    known = {graph.image_id for graph in graphs}
    read = ", ".join(map(str, options.predictions))
    if unknown := predictions.image_ids - known:
        raise InputError(
            f"{read}: image ids must be in the {options.split} split of {options.annotations}, such as "
            f"{min(known)!r}, got {counted(len(unknown), 'other')}, such as {min(unknown)!r}"
        )
    metric = make_evaluator(options, dataset, graphs)
    missing, boxes, lengths = 0, PredictedBoxes(), Counter[int]()
    for graph in graphs:
        prediction = predictions[graph.image_id] if graph.image_id in predictions.image_ids else None
        missing += prediction is None and len(graph.relations) > 0
        metric.update([nothing() if prediction is None else prediction], [graph.truth])
        if prediction is not None:
            where = f"{read}, image {graph.image_id!r}: "
            check_range(where, "labels", prediction["labels"], 1, len(dataset.object_names) - 1)
            boxes.add(graph, prediction["boxes"])
            lengths[len(prediction.get("triplets", ()))] += 1
    figures = {name: value.item() for name, value in metric.compute().items()}
    for cause in boxes.causes():
        warn(f"{read}: {cause}")
    most = max(lengths, default=0)
    if 0 < most < max(getattr(metric, "top_k", (100,))) and 2 * lengths[most] > lengths.total():
        warn(f"{read}: most images have exactly {most} triplets, so recall at a larger K counts only {most}")
    if missing:
        result = "they are skipped" if options.skip_missing else "their recall is 0"
        print(f"sgalign: no prediction for {counted(missing, 'image with relations')}: {result}", file=sys.stderr)
    return figures


def evaluate_detections(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of the file of detections.

    The images are those of `sgalign test`: of VG150, the images with relations.

    Args:
        options: options of the command, as `parser` returns them.
    """
    dataset = open_dataset(options.annotations, options.split, **reading_options(options))
    graphs = list(dataset)
    metric = DetectionEvaluator(dataset.object_names)
    if not any(len(graph.labels) for graph in graphs):
        raise InputError(f"{options.annotations}: the {options.split} split must have objects, got none")
    detections = read_detections(options.detections, dataset.object_names, partial(coco_ids, dataset))
    check_detections(detections, graphs, options.split)
    many = 0
    for graph in graphs:
        found = detections.get(graph.image_id, NOTHING)
        many += bool((found.labels.bincount() > MOST_DETECTIONS).any())
        metric.update([found._asdict()], [graph.truth])
    if many:
        warn(
            f"{options.detections}: {counted(many, 'image')} with more than {MOST_DETECTIONS} detections of a class: "
            f"the best {MOST_DETECTIONS} of them count"
        )
    return {name: value.item() for name, value in metric.compute().items()}


def _write(options: argparse.Namespace, figures: dict[str, float]) -> None:
    """Write the figures to the files that the options name, and print the table."""
    if options.json is not None:
        # JSON has no NaN, so a value that is not defined becomes null.
        write_json(options.json, {name: None if math.isnan(v) else v for name, v in figures.items()}, indent=1)
    if options.csv is not None:
        with written_whole(options.csv) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [("metric", "k", "of", "value"), *(split_name(n) + (v,) for n, v in figures.items())]
            )
    print(table(figures))


def _check_protocol(options: argparse.Namespace) -> None:
    """Exit with an error if an option cannot be used with the protocol."""
    with_pairs = options.protocol == "open-images" or options.protocol.startswith("vrd-")
    wrong = {
        "--skip-missing": options.skip_missing and options.protocol not in PROTOCOLS,
        "--no-plus-one": options.no_plus_one and options.protocol not in PROTOCOLS,
        "--strict-constraint": options.strict_constraint and options.protocol not in PROTOCOLS,
        "--zero-shot": options.zero_shot is not None and options.protocol in ("open-images", "sgbench"),
        "--top-k": options.top_k is not None and options.protocol == "open-images",
        "--predicates-per-pair": options.predicates_per_pair != 1 and not with_pairs,
    }
    for option in (option for option, given in wrong.items() if given):
        parser().error(f"{option} cannot be used with --protocol {options.protocol}")


def make_evaluator(options: argparse.Namespace, dataset: Any, graphs: Sequence[SceneGraph]) -> Any:
    """Return the evaluator that the options select.

    Without --zero-shot, a class triplet is zero-shot if it occurs in no split before the evaluated one. The head, body
    and tail groups are the published ones for VG150. For other data they depend on the predicates' frequency in the
    training split.

    Args:
        options: options of the command, as `parser` returns them.
        dataset: split of the data set to evaluate.
        graphs: scene graphs of this split.
    """
    predicates = len(dataset.predicate_names) - 1
    if options.protocol == "open-images":
        return OpenImagesEvaluator(predicates, predicates_per_pair=options.predicates_per_pair)
    top_k = {} if options.top_k is None else {"top_k": options.top_k}
    if options.protocol == "sgbench":
        return SGBenchEvaluator(predicates, **top_k)
    before = SPLITS[: SPLITS.index(options.split)]
    others = [split for split in splits_of(options.annotations) if split in before]
    parts = [open_dataset(options.annotations, other, **reading_options(options)) for other in others]
    seen: list[SceneGraph] = sum(map(list, parts), [])
    if (len(others) < len(before) or (before and not seen)) and options.zero_shot is None:
        warn(f"{options.annotations}: {NO_TRAINING}")
    for other, part in zip(others, parts, strict=True):
        check_same_classes(options.annotations, dataset, other, part)
    zero_shot = None
    if options.zero_shot is not None:
        zero_shot = read_zero_shot_triplets(options.zero_shot)
        where = f"{options.zero_shot}: "
        check_range(where, "classes of objects", zero_shot[:, [0, 2]], 1, len(dataset.object_names) - 1)
        check_range(where, "predicates", zero_shot[:, 1], 1, predicates)
    elif "train" in others and seen:
        zero_shot = zero_shot_triplets(seen, graphs)
        if not len(zero_shot):
            warn(f"{options.annotations}: no zero-shot recall, as the {options.split} split has no zero-shot relations")
            zero_shot = None
    if options.protocol.startswith("vrd-"):
        task, per_pair = options.protocol.removeprefix("vrd-"), options.predicates_per_pair
        return VRDEvaluator(task, predicates, predicates_per_pair=per_pair, zero_shot=zero_shot, **top_k)
    # `seen` may include the validation split. The groups use the training split only, as in training.
    training: Sequence[SceneGraph] | None = graphs
    if options.split != "train":
        training = seen[: len(parts[0])] if seen else None
    counts = None if training is None else count_predicates(training, predicates)[1:]
    return SceneGraphEvaluator(
        options.protocol,
        predicates,
        zero_shot=zero_shot,
        groups=predicate_groups(dataset.predicate_names, counts),
        predicate_names=dataset.predicate_names,
        missing="skip" if options.skip_missing else "zero",
        plus_one=not options.no_plus_one,
        strict_constraint=options.strict_constraint,
        **top_k,
    )


def nothing() -> dict[str, Tensor]:
    """Return a prediction without objects and triplets, for an image that is not in the file."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "triplets": torch.zeros(0, 3, dtype=torch.int64),
        "triplet_scores": torch.zeros(0),
    }
