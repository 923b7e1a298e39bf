"""Figures of an evaluator: which one a protocol takes, and its results as a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgalign.data import SceneGraph, count_predicates, open_dataset
from sgalign.data.scene_graph import check_range
from sgalign.data.triplets import zero_shot_triplets
from sgalign.data.vg150 import read_zero_shot_triplets
from sgalign.errors import InputError
from sgalign.metrics.open_images import OpenImagesEvaluator
from sgalign.metrics.recall import SceneGraphEvaluator, predicate_groups
from sgalign.metrics.vrd import VRDEvaluator

VRD_TASKS = ("relationship", "phrase", "predicate")


def make_evaluator(options: argparse.Namespace, dataset: Any, graphs: Sequence[SceneGraph]) -> Any:
    """The evaluator of the command's options, with zero-shot triplets and groups as the data set's other parts tell."""
    predicates = len(dataset.predicate_names) - 1
    if options.protocol == "open-images":
        return OpenImagesEvaluator(predicates, predicates_per_pair=options.predicates_per_pair)
    others = {"train": (), "validation": ("train",), "test": ("train", "validation")}[options.split]
    held_out = options.validation_images
    parts = [open_dataset(options.annotations, other, validation_images=held_out) for other in others]
    seen: list[SceneGraph] = sum(map(list, parts), [])
    for kind in ("object_names", "predicate_names"):
        if any(getattr(part, kind) != getattr(dataset, kind) for part in parts):
            raise InputError(f"{options.annotations}: {kind} must be the same in all parts, those of {others} differ")
    zero_shot = None
    if options.zero_shot is not None:
        # The public list has subject, object, predicate.
        zero_shot = read_zero_shot_triplets(options.zero_shot)[:, [0, 2, 1]]
        where = f"{options.zero_shot}: "
        check_range(where, "classes of objects", zero_shot[:, [0, 2]], 1, len(dataset.object_names) - 1)
        check_range(where, "predicates", zero_shot[:, 1], 1, predicates)
    elif seen:
        zero_shot = zero_shot_triplets(seen, graphs)
    if options.protocol.startswith("vrd-"):
        task = options.protocol.removeprefix("vrd-")
        return VRDEvaluator(task, predicates, predicates_per_pair=options.predicates_per_pair, zero_shot=zero_shot)
    # By frequency in the training part alone, as in training.
    counts = count_predicates(seen[: len(parts[0])] if parts else graphs, predicates)
    return SceneGraphEvaluator(
        options.protocol,
        predicates,
        zero_shot=zero_shot,
        groups=predicate_groups(dataset.predicate_names, counts[1:]),
        predicate_names=dataset.predicate_names,
        missing="skip" if options.skip_missing else "zero",
        plus_one=not options.no_plus_one,
    )


def nothing() -> dict[str, Tensor]:
    """The prediction for an image of which a file says nothing."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "triplets": torch.zeros(0, 3, dtype=torch.int64),
        "triplet_scores": torch.zeros(0),
    }


def table(figures: Mapping[str, float]) -> str:
    """Figures in percent, a line a metric, a column a K; groups, but no single predicates; then what has no K."""
    rows: dict[str, dict[int, float]] = {}
    plain = {}
    for name, value in figures.items():
        metric, k, of = split_name(name)
        if k is None:
            plain[metric] = value
        elif metric != "R" or not of:
            rows.setdefault(f"{metric} {of}".strip(), {})[k] = value
    width = max(map(len, (*rows, *plain))) + 2
    columns = sorted({k for row in rows.values() for k in row})
    lines = ["".join([" " * width, *(f"{'@' + str(k):>8}" for k in columns)])]
    for name, row in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in columns))
    return "\n".join([*lines, *(f"{name:{width}}{100 * value:8.2f}" for name, value in plain.items())])


def split_name(name: str) -> tuple[str, int | None, str]:
    """Metric, K and subset of a figure's name: of "mR@50/head" they are "mR", 50 and "head"."""
    name, _, of = name.partition("/")
    metric, _, k = name.partition("@")
    return metric, int(k) if k else None, of
