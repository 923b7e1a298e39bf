"""Writes a data set in one of the layouts that are read: generated scenes, or another data set as COCO."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgalign.data import SceneGraph, ScenesDataset, open_dataset
from sgalign.data.coco import write_coco
from sgalign.data.scene_graph import SPLITS
from sgalign.data.vg150 import write_vg150
from sgalign.data.vrd import write_vrd
from sgalign.errors import InputError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgalign make-dataset", description=__doc__)
    parser.add_argument("out", type=Path, help="a new or an empty folder")
    parser.add_argument("--format", choices=["vg150", "vrd", "coco"], default="vg150", help="(default: %(default)s)")
    sizes = parser.add_argument
    sizes("--sizes", type=int, nargs=3, metavar="N", help="training, validation, test scenes (default: 300 50 80)")
    parser.add_argument("--source", metavar="FOLDER", help="converts this data set to COCO's format instead")
    parser.add_argument(
        "--few",
        type=int,
        metavar="N",
        help="of --source: the first N photographs of its test part, by name, as training, validation and test part, "
        "to see whether a model can memorise them",
    )
    parser.add_argument("--long-side", type=int, metavar="PIXELS", help="of --few: makes larger photographs smaller")
    parser.add_argument("--validation-images", type=int, metavar="N", help="of --source, as for fit")
    parser.add_argument("--no-images", action="store_true", help="annotations alone")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`sgalign make-dataset`. What is in `out` when it is interrupted is nothing at all."""
    options = parser().parse_args(arguments)
    if options.source is not None and options.sizes is not None:
        parser().error("--sizes is of generated scenes, not of --source")
    if options.few is not None and options.source is None:
        parser().error("--few needs --source")
    if options.validation_images is not None and (options.source is None or options.few is not None):
        parser().error("--validation-images needs --source, and is not of --few")
    if options.long_side is not None and options.few is None:
        parser().error("--long-side needs --few")
    for name in ("few", "long_side"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser().error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    sizes = options.sizes or (300, 50, 80)
    if min(sizes) < 0:
        parser().error(f"--sizes must be at least 0, got {sizes}")
    if options.source is not None and options.format != "coco":
        parser().error("--source needs --format coco")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser().error(f"out must be a new or an empty folder, {options.out} is not")
    if options.source is None:
        datasets: dict[str, Any] = {s: ScenesDataset(s, size=n) for s, n in zip(SPLITS, sizes)}  # type: ignore[arg-type]
    elif options.few is not None:
        datasets = dict.fromkeys(SPLITS, few_photographs(options.source, options.few, options.long_side))
    else:
        held_out = options.validation_images
        datasets = {split: open_dataset(options.source, split, validation_images=held_out) for split in SPLITS}
    parts: dict[str, list[SceneGraph]] = {split: list(dataset) for split, dataset in datasets.items()}
    of_names = datasets["train"] if options.few is None else open_dataset(options.source, "test")
    names = of_names.object_names, of_names.predicate_names
    out = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"{out.name}.partial_", dir=out.parent)
    partial = Path(temporary) / out.name
    try:
        WRITERS[options.format](parts, *names, partial, images=not options.no_images)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {options.out}: {', '.join(f'{len(graphs)} {split}' for split, graphs in parts.items())} images")
    return 0


def few_photographs(source: str, count: int, long_side: int | None) -> list[SceneGraph]:
    """The first `count` images of the test part, by name, that have relations and a file.

    Raises:
        ValueError: there are fewer.
    """
    dataset = open_dataset(source, "test")
    graphs = [graph for graph in dataset if graph.image is not None and len(graph.relations)]
    if len(graphs) < count:
        raise InputError(f"{source}: the test part must have {count} photographs with relations, has {len(graphs)}")
    graphs = sorted(graphs, key=lambda graph: graph.image_id)[:count]
    return graphs if long_side is None else [smaller(graph, long_side) for graph in graphs]


def smaller(graph: SceneGraph, long_side: int) -> SceneGraph:
    """The graph with its image's long side at most this, and its boxes with it."""
    scale = min(1.0, long_side / max(graph.width, graph.height))
    width, height = max(round(graph.width * scale), 1), max(round(graph.height * scale), 1)
    boxes = graph.boxes * torch.tensor([width / graph.width, height / graph.height] * 2)
    image = graph.image
    resized = None if image is None else lambda: image().resize((width, height))
    return replace(graph, width=width, height=height, boxes=boxes, image=resized)


WRITERS = {"vg150": write_vg150, "vrd": write_vrd, "coco": write_coco}
