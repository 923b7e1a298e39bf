"""Open all splits of a data set, and list their faults, all at once."""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from sgalign.commands.reading_options import add_resized, add_validation_options, check_kept
from sgalign.data import SceneGraph, open_dataset
from sgalign.data.box_checks import PredictedBoxes
from sgalign.data.class_names import first_difference
from sgalign.data.findings import Findings, Outcome, counted
from sgalign.data.images import same_proportions
from sgalign.data.open import annotation_files, splits_of
from sgalign.data.prediction_reading import Annotations, Predictions
from sgalign.data.scene_graph import check_range, without_apart
from sgalign.data.splits import Split
from sgalign.errors import InputError
from sgalign.files import check_writable, write_json
from sgalign.matching import check_prediction

LISTED = 10  # names per line of text; --json has all of them
EPILOG = "The exit code is 1 if anything is refused. docs/data.md explains the findings."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign check", description=__doc__, epilog=EPILOG)
    parser.add_argument("folder", metavar="FOLDER", help="data set in any layout of docs/data.md")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="also check predictions of the test split")
    add_resized(parser)
    add_validation_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings and class counts to this file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign check FOLDER` and return the exit code, 1 if anything in the data is refused."""
    options = parser().parse_args(arguments)
    if options.json is not None:
        check_writable(options.json)
        check_kept(parser(), [options.predictions, *annotation_files(options.folder)], [options.json])
    with _quiet():  # the report has the lines that the readers log
        validation = {name: getattr(options, name) for name in ("validation_images", "validation_choice")}
        report = check(options.folder, options.predictions, resized=options.resized, **validation)
    print(text(report))
    if options.json is not None:
        write_json(options.json, report, indent=1)
    return 1 if report["refused"] else 0


def check(
    folder: str, predictions: Path | None = None, *, resized: tuple[int, int] | None = None, **validation: Any
) -> dict[str, Any]:
    """Return a report on a data set, as plain values.

    Args:
        folder: folder of the data set.
        predictions: file of predictions for the test split. If None, only the data set is checked.
        resized: as in `sgalign.data.prediction_reading.Predictions`.
        validation: `validation_images` and `validation_choice`, as for `open_dataset`.

    Raises:
        FileNotFoundError: if the folder has no files of a known layout.
        ValueError: if the folder has files of several layouts, or several files of a split.
    """
    graphs: dict[Split, Sequence[SceneGraph]] = {}
    test: Annotations | None = None
    names: dict[str, list[str]] = {}
    parts: dict[str, Any] = {}
    for split in splits_of(folder):
        try:
            dataset = open_dataset(folder, split, bad_rows="skip", keep="everything", **validation)
        except (InputError, OSError) as error:
            findings = Findings(split)
            findings.refuse("split that cannot be read", str(error))
            parts[split] = {"counts": {}, "findings": _listed(findings), "causes": []}
            continue
        findings, annotations = dataset.findings, Annotations.of(dataset)
        graphs[split] = annotations.graphs
        if split == "test":
            test = annotations
        for kind in ("object_names", "predicate_names"):
            if names.setdefault(kind, getattr(dataset, kind)) != getattr(dataset, kind):
                what = first_difference(names[kind], getattr(dataset, kind))
                findings.refuse(f"split with other {kind.replace('_', ' ')}", f"{folder}, {split}: {what}")
        counts = _count(graphs[split], findings)
        counts["image files"] = _check_files(graphs[split], findings, split)
        if split == "train":
            _count_apart(graphs[split], findings)
        parts[split] = {"counts": counts, "findings": _listed(findings), "causes": findings.causes}
    report: dict[str, Any] = {"folder": folder, "parts": parts, "classes": _class_counts(graphs, names)}
    report["shared"] = {
        f"{one} and {other}": sorted({g.image_id for g in graphs[one]} & {g.image_id for g in graphs[other]})
        for place, one in enumerate(graphs)
        for other in list(graphs)[place + 1 :]
    }
    if predictions is not None:
        parts["predictions"] = _check_predictions(predictions, test, resized)
    outcomes = [finding["outcome"] for part in parts.values() for finding in part["findings"]]
    report["refused"] = "refused" in outcomes
    return report


def _count(graphs: Sequence[SceneGraph], findings: Findings) -> dict[str, int]:
    unrelated = [graph.image_id for graph in graphs if not len(graph.relations)]
    if len(unrelated) == len(graphs):
        kind = "split without relations" if graphs else "split without images"
        findings.add("found", kind, "no relation model can be trained or evaluated on it")
    return {
        "images": len(graphs),
        "without relations": len(unrelated),
        "objects": sum(len(graph.labels) for graph in graphs),
        "relations": sum(len(graph.relations) for graph in graphs),
    }


def _count_apart(graphs: Iterable[SceneGraph], findings: Findings) -> None:
    apart = Findings("")
    for graph in graphs:
        without_apart(graph, apart)
    for finding in apart:
        findings.add("found", f"{finding.kind}, which Motifs with SGDet leaves out", count=finding.count)


def _check_files(graphs: Sequence[SceneGraph], findings: Findings, split: str) -> int:
    """Read all image files of a split, record those that do not fit, and return their number."""
    present = [graph for graph in graphs if graph.image is not None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding Python's lock
        checked = pool.map(_check_file, present)
        progress = tqdm(checked, f"{split}: image files", len(present), leave=False, disable=None if present else True)
        for outcome, what, example in (found for found in progress if found is not None):
            findings.add(outcome, what, example)
    return len(present)


def _check_file(graph: SceneGraph) -> Any:
    """Return the finding about one image file, or None if it fits its annotation."""
    assert graph.image is not None
    try:
        size = graph.image().size
    except InputError as error:
        return "refused", "image file that cannot be read", str(error)
    annotated = f"{graph.image_id}: {size[0]} x {size[1]} pixels, annotated as {graph.width} x {graph.height}"
    if not same_proportions(size, (graph.width, graph.height)):
        return "found", "image file of other proportions than annotated", annotated
    return None


def _class_counts(graphs: Mapping[Split, Sequence[SceneGraph]], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the number of objects of each class, and of relations of each predicate, by split."""
    counts: dict[str, Any] = {}
    for kind, of_kind in names.items():
        counts[kind.removesuffix("_names")] = {}
        for split, of_split in graphs.items():
            classes = Counter[int]()
            for graph in of_split:
                classes.update((graph.labels if kind == "object_names" else graph.relations[:, 2]).tolist())
            of_name = {name: classes[number] for number, name in enumerate(of_kind) if number}
            counts[kind.removesuffix("_names")][split] = of_name
    return counts


def _check_predictions(path: Path, test: Annotations | None, resized: tuple[int, int] | None) -> dict[str, Any]:
    """Return a part of the report about predictions of the test split. `test` is None if it cannot be read."""
    findings, boxes = Findings(str(path)), PredictedBoxes()
    if test is None:
        findings.refuse("file of predictions", "it cannot be checked, because there is no test split that can be read")
        return {"counts": {}, "findings": _listed(findings), "causes": []}
    predicates = len(test.predicate_names) - 1
    try:
        predictions = Predictions(path, test, resized=resized)
    except (InputError, OSError) as error:
        findings.refuse("file of predictions that cannot be read", str(error))
        return {"counts": {}, "findings": _listed(findings), "causes": []}
    known = {graph.image_id: graph for graph in test.graphs}
    for image_id in sorted(predictions.image_ids - known.keys()):
        expected = f", expected one such as {min(known)!r}" if known else ""
        findings.refuse("image outside the test split", f"{path}: image {image_id!r} is unknown{expected}")
    missing = [name for name, graph in known.items() if name not in predictions.image_ids and len(graph.relations)]
    findings.add("found", "image with relations but without a prediction", missing, len(missing))
    for image_id in tqdm(sorted(predictions.image_ids & known.keys()), "predictions", leave=False, disable=None):
        where = f"{path}, image {image_id!r}: "
        try:
            prediction = predictions[image_id]
            check_prediction(where, prediction, predicates)
            check_range(where, "labels", prediction["labels"], 1, len(test.object_names) - 1)
        except InputError as error:
            findings.refuse("image with a malformed prediction", str(error))
            continue
        boxes.add(known[image_id], prediction["boxes"])
    counts = {"images": len(predictions.image_ids)}
    return {"counts": counts, "findings": _listed(findings), "causes": boxes.causes()}


def _listed(findings: Findings) -> list[dict[str, Any]]:
    return [vars(finding) for finding in findings]


# ---- text


def text(report: Mapping[str, Any]) -> str:
    """Return a report as text."""
    lines = [report["folder"]]
    rows = ("images", "without relations", "objects", "relations", "image files")
    parts = {name: part for name, part in report["parts"].items() if name != "predictions"}
    lines.append(f"{'':20}" + "".join(f"{name:>12}" for name in parts))
    for row in rows:
        lines.append(f"{row:20}" + "".join(f"{part['counts'].get(row, '-'):>12}" for part in parts.values()))
    for name, part in report["parts"].items():
        lines += _faults(name, part)
    for pair, shared in report["shared"].items():
        if shared:
            lines.append(f"\n{pair} share {counted(len(shared), 'image')}: {_some(shared)}")
    for kind, by_split in report["classes"].items():
        lines += _classes(kind, by_split)
    verdict = "bad rows or files were refused (exit code 1)" if report["refused"] else "nothing was refused"
    if any(part["causes"] for part in report["parts"].values()):
        verdict += ", but likely mistakes are named above"
    return "\n".join([*lines, f"\n{verdict}"])


def _faults(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    if part["findings"] or part["causes"]:
        yield f"\n{name}"
    yield from (f"  likely mistake: {cause}" for cause in part["causes"])
    for finding in sorted(part["findings"], key=lambda finding: get_args(Outcome).index(finding["outcome"])):
        yield f"  {finding['outcome']}: {counted(finding['count'], finding['kind'])}"
        yield from (f"      {example}" for example in finding["examples"])


def _classes(kind: str, by_split: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for split, counts in by_split.items():
        if split == "train" or "train" not in by_split:
            most = sorted(counts.items(), key=lambda item: -item[1])
            yield f"\n{len(counts)} {kind} classes, {split}: {_some([f'{name} {count}' for name, count in most])}"
            if never := [name for name, count in counts.items() if not count]:
                yield f"  never in {split}: {_some(never)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("sgalign")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
