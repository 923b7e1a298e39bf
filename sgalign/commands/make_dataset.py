"""Write generated scenes in one of three layouts, or convert a data set of any layout to COCO's with relations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgalign.commands.reading_options import add_reading_options, reading_options
from sgalign.data import SceneGraph, ScenesDataset, open_dataset
from sgalign.data.coco_writing import write_coco
from sgalign.data.open import check_same_classes, splits_of
from sgalign.data.splits import SPLITS, Split
from sgalign.data.vg150 import write_vg150
from sgalign.data.vrd import write_vrd
from sgalign.errors import InputError
from sgalign.files import folder_written_whole


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign make-dataset", description=__doc__)
    parser.add_argument("out", type=Path, help="new or empty folder to write")
    parser.add_argument(
        "--format",
        choices=["vg150", "vrd", "coco"],
        help="layout of the files (default: coco with --source, otherwise vg150)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        metavar="N",
        help="number of training, validation and test scenes (default: 300 50 80)",
    )
    parser.add_argument(
        "--source",
        metavar="FOLDER",
        help="with --format coco: convert this data set instead of generating scenes",
    )
    parser.add_argument(
        "--few",
        type=int,
        metavar="N",
        help="with --source: use only N photographs, the first by name that have relations in the test split. They "
        "form all three splits, to check that a model can memorize them",
    )
    parser.add_argument(
        "--long-side",
        type=int,
        metavar="PIXELS",
        help="with --few: shrink larger images to this length of the long side",
    )
    add_reading_options(parser)
    parser.add_argument("--no-images", action="store_true", help="write annotations without images")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign make-dataset OUT` and return the exit code.

    The folder appears when it is complete. An interrupted command leaves nothing in it.
    """
    options = parser().parse_args(arguments)
    if options.source is not None and options.sizes is not None:
        parser().error("--sizes is for generated scenes and cannot be used with --source")
    if options.few is not None and options.source is None:
        parser().error("--few needs --source")
    chooses = options.validation_images is not None or options.validation_choice != "hash"
    if chooses and (options.source is None or options.few is not None):
        parser().error("--validation-images and --validation-choice need --source and cannot be used with --few")
    if options.bad_rows != "error" and options.source is None:
        parser().error("--bad-rows needs --source")
    if options.long_side is not None and options.few is None:
        parser().error("--long-side needs --few")
    for name in ("few", "long_side"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser().error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    sizes = options.sizes or (300, 50, 80)
    if min(sizes) < 0 or max(sizes) >= 1 << 31:
        parser().error(f"--sizes must be at least 0 and below 2^31, got {sizes}")
    if not any(sizes):
        parser().error("--sizes must give at least one split a scene, got 0 0 0")
    options.format = options.format or ("vg150" if options.source is None else "coco")
    if options.source is not None and options.format != "coco":
        parser().error("--source needs --format coco")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser().error(f"out must be a new or an empty folder, got {options.out}")
    if options.source is None:
        datasets: dict[Split, Any] = {s: ScenesDataset(s, size=n) for s, n in zip(SPLITS, sizes)}
    elif options.few is not None:
        test = open_dataset(options.source, "test", bad_rows=options.bad_rows)
        datasets = dict.fromkeys(SPLITS, few_photographs(test, options.source, options.few, options.long_side))
    else:
        splits, reading = splits_of(options.source), reading_options(options)
        datasets = {split: open_dataset(options.source, split, keep="everything", **reading) for split in splits}
        for split, dataset in datasets.items():
            check_same_classes(options.source, datasets[splits[0]], split, dataset)
    parts: dict[str, list[SceneGraph]] = {split: list(dataset) for split, dataset in datasets.items()}
    of_names = next(iter(datasets.values())) if options.few is None else test
    names = of_names.object_names, of_names.predicate_names
    with folder_written_whole(options.out) as partial:
        WRITERS[options.format](parts, *names, partial, images=not options.no_images)
    print(f"wrote {options.out}: {', '.join(f'{len(graphs)} {split}' for split, graphs in parts.items())} images")
    return 0


def few_photographs(test: Any, source: str, count: int, long_side: int | None) -> list[SceneGraph]:
    """Return the first scene graphs of the test split, sorted by image name, that have relations and an image.

    Args:
        test: test split of a data set.
        source: folder of the data set, for the error message.
        count: number of images.
        long_side: maximum long side in pixels. Larger images are shrunk. If None, all images keep their size.

    Raises:
        ValueError: if there are fewer than `count` such images.
    """
    graphs = [graph for graph in test if graph.image is not None and len(graph.relations)]
    if len(graphs) < count:
        raise InputError(f"{source}: the test split must have {count} photographs with relations, got {len(graphs)}")
    graphs = sorted(graphs, key=lambda graph: graph.image_id)[:count]
    return graphs if long_side is None else [smaller(graph, long_side) for graph in graphs]


def smaller(graph: SceneGraph, long_side: int) -> SceneGraph:
    """Return the graph with its image and its boxes shrunk to a long side of at most `long_side` pixels."""
    scale = min(1.0, long_side / max(graph.width, graph.height))
    width, height = max(round(graph.width * scale), 1), max(round(graph.height * scale), 1)
    boxes = graph.boxes * torch.tensor([width / graph.width, height / graph.height] * 2)
    image = graph.image
    resized = None if image is None else lambda: image().resize((width, height))
    return replace(graph, width=width, height=height, boxes=boxes, image=resized)


WRITERS: dict[str, Any] = {"vg150": write_vg150, "vrd": write_vrd, "coco": write_coco}
