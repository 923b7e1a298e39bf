"""Predict the scene graphs of images with a trained model.

The results go to a file with one line of JSON per image. If a run is stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgalign.commands.reading_options import check_kept
from sgalign.data import load_image, read_detections
from sgalign.data.detections import ids_of_names
from sgalign.data.findings import counted
from sgalign.data.graph_lines import read_graph_lines
from sgalign.errors import InputError
from sgalign.files import check_writable, real_path
from sgalign.prediction.image_paths import ImageFile, Shard, find_images
from sgalign.prediction.outputs import (
    Failures,
    GraphLines,
    PredictionParts,
    digest,
    options_of,
    parts_folder,
)
from sgalign.prediction.running import draw_graphs, ended_by_sigterm, over_processes, predict_to_files
from sgalign.training import MotifsModule, SGTRModule, load_module
from sgalign.training.checkpoints import some_of
from sgalign.viewing import PageImage, write_page

EPILOG = """\
A model with protocol sgdet finds the objects itself. Any other model needs --detections, a file of boxes and classes.
docs/predict_photographs.md describes all files. The exit code is 0 if all images have a result
and, with --draw, a picture."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign predict", description=__doc__, epilog=EPILOG)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image, folder of images, or quoted pattern with *")
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint, folder of an exported model, scenes, or OWNER/NAME on the Hub"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("graphs.jsonl"), help="file of the results (default: %(default)s)"
    )
    parser.add_argument("--hdf5", type=Path, metavar="FILE", help="also write all scores, for sgalign evaluate")
    parser.add_argument("--html", action="store_true", help="also write a page for the browser, named like --out")
    parser.add_argument(
        "--draw", action="store_true", help="also write pictures, in a folder named like --out, but with .pictures"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run first")
    parser.add_argument("--detections", metavar="FILE", help="file of the images' objects (docs/data.md)")
    parser.add_argument("--top-k", type=int, default=20, help="triplets per image (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="lowest score of a triplet in --out, from 0 to 1 (default: 0)"
    )
    parser.add_argument("--all-predicates", action="store_true", help="for Motifs: allow several predicates per pair")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images that the model gets together (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="predict one of N parts of the images, from 1/N to N/N"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign predict IMAGES... --checkpoint CHECKPOINT` and return the exit code.

    The code is 0 if all images have a result, 1 if some have none or could not be drawn, 130 after Ctrl-C and 143 after
    SIGTERM. Files that are not images are reported, but do not change the exit code.
    """
    options = parser().parse_args(arguments)
    _check(options)
    shard = options.shard or Shard(int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1)))
    out, hdf5 = (path and shard.path(path) for path in (options.out, options.hdf5))
    written = [out, *([hdf5] if hdf5 else [])]
    failed_file = out.with_suffix(".failed.jsonl")
    for path in written:
        check_writable(path)
    if options.draw and _drawings(out).exists() and not _drawings(out).is_dir():
        parser().error(f"--draw writes to the folder {_drawings(out)}, which must not be a file: choose another --out")
    files, others = find_images(options.images)
    beside = [place(path) for path in written for place in (options_of, parts_folder)]
    outputs = {*written, *beside, failed_file, _drawings(out), out.with_suffix(".html")}
    images = {real_path(file.path) for file in files}
    folders = {folder for path in images for folder in path.parents}
    read = [options.checkpoint, options.detections, *images, *folders]
    check_kept(parser(), read, outputs if options.draw else outputs - {_drawings(out)})
    _report(others, outputs)
    module = _load(options.checkpoint, options.detections)
    detections = None
    if options.detections is not None:
        ids = partial(ids_of_names, [file.image_id for file in files], module.object_names)
        detections = read_detections(options.detections, module.object_names, ids)
    files = [file for file in files if shard.has(file)]
    described = {name: getattr(options, name) for name in ("top_k", "threshold", "all_predicates")}
    made_from = {"model": digest(module), "detections": _digest(options.detections), "shard": str(shard)}
    lines = GraphLines(out, module, made_from, **described, overwrite=options.overwrite)
    lines.check_files(files)
    parts = PredictionParts(hdf5, made_from, overwrite=options.overwrite) if hdf5 else None

    failures = Failures(failed_file)
    reading = {"detections": detections, "batch_size": options.batch_size, "workers": options.workers}
    try:
        with ended_by_sigterm():
            predict_to_files(module, files, [lines, parts] if parts else [lines], failures, **reading)
            if parts is not None:
                parts.finish()
            not_drawn = _pictures(options, out, options_of(out).stat().st_mtime, files) if lines.done else 0
    except (KeyboardInterrupt, SystemExit) as stop:
        done = sum(file.image_id in lines.done for file in files)
        where = f"after {done} of {len(files)} images" if done < len(files) else "before all files were written"
        print(f"sgalign: stopped {where}. The same command goes on.", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    done = len(files) - failures.count
    print(f"wrote {out}: {done} of {len(files)} images")
    if options.threshold and lines.images and not lines.triplets:
        print(f"sgalign: no triplet has a score of at least --threshold {options.threshold}", file=sys.stderr)
    _report_earlier(lines, files, out.with_suffix(".html"), renewed=options.html)
    if failures.count:
        print(f"sgalign: {counted(failures.count, 'image')} without a result: see {failed_file}", file=sys.stderr)
    return 1 if over_processes(failures.count + not_drawn) else 0


def _check(options: argparse.Namespace) -> None:
    """End the program with the code 2 if an option has a wrong value."""
    for name, least in (("top_k", 1), ("batch_size", 1), ("workers", 0)):
        if not least <= (value := getattr(options, name)) < 1 << 31:
            parser().error(f"--{name.replace('_', '-')} must be at least {least} and below 2^31, got {value}")
    if not 0 <= options.threshold <= 1:
        parser().error(f"--threshold must be from 0 to 1, got {options.threshold}")
    if options.out.suffix != ".jsonl":
        parser().error(f"--out must end in .jsonl, got {options.out}")
    if options.out.name.endswith(".failed.jsonl"):
        parser().error(f"--out must not end in .failed.jsonl, which lists failures, got {options.out}")
    if options.hdf5 and options.hdf5.suffix not in (".h5", ".hdf5"):
        parser().error(f"--hdf5 must end in .h5 or .hdf5, got {options.hdf5}")
    if options.shard and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser().error(f"--shard must be left out under torchrun, which chooses the parts itself, got {options.shard}")


def _drawings(out: Path) -> Path:
    """Return the folder of the pictures of the graphs in `out`."""
    return out.with_suffix(".pictures")


def _shard(text: str) -> Shard:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 1/4, got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def _report(others: Sequence[Path], own: set[Path]) -> None:
    """Report the files that are not images, except for the command's own files."""
    paths = {os.path.realpath(path) for path in own}
    if names := [path.name for path in others if os.path.realpath(path) not in paths]:
        what = "1 entry that is not an image" if len(names) == 1 else f"{len(names)} entries that are not images"
        print(f"sgalign: skipped {what}: {some_of(names)}", file=sys.stderr)


def _report_earlier(lines: GraphLines, files: Sequence[ImageFile], page: Path, *, renewed: bool) -> None:
    """Report what earlier runs have left."""
    if others := len(lines.done.difference(file.image_id for file in files)):
        print(f"{lines.path} also has {counted(others, 'image')} of earlier runs")
    if page.exists() and not renewed:
        print(f"{page} comes from an earlier run. --html renews it")


def _digest(path: str | None) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else None


def _load(checkpoint: str, detections: str | None) -> MotifsModule | SGTRModule:
    """Return the model of a checkpoint, after checking that it can predict with or without a file of detections."""
    module = load_module(checkpoint)
    if not isinstance(module, MotifsModule | SGTRModule):
        raise InputError(f"{checkpoint} must be a checkpoint of Motifs or SGTR, got {type(module).__name__}")
    if isinstance(module, MotifsModule) and module.options.vision == "cached":
        raise InputError(f"{checkpoint}: the model must read images, but it was trained on cached features")
    if detections is None and module.protocol != "sgdet":
        raise InputError(f"{checkpoint}: a model with protocol {module.protocol} needs --detections FILE")
    if detections is not None and module.protocol == "sgdet":
        raise InputError(f"{checkpoint}: a model with protocol sgdet finds objects itself, so leave out --detections")
    return module.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def _pictures(options: argparse.Namespace, out: Path, since: float, files: Sequence[ImageFile]) -> int:
    """Make the page and the drawings of the given files from their graphs in `out`, if the options ask for them.

    Return the number of graphs that could not be drawn.
    """
    paths = {file.image_id: file.path for file in files}

    def graphs() -> Iterator[tuple[Path, dict[str, Any]]]:
        for _, graph in read_graph_lines(out):
            if graph["image_id"] in paths:
                yield paths[graph["image_id"]], graph

    if options.html:
        page = out.with_suffix(".html")
        images = (
            PageImage(graph["image_id"], partial(load_image, path), graph.get("width"), graph.get("height"), graph)
            for path, graph in graphs()
        )
        print(f"wrote {page}: {write_page(page, images, f'Scene graphs of {out.name}')}")
    if not options.draw:
        return 0
    not_drawn = draw_graphs(graphs(), len(paths), _drawings(out), since)
    print(f"drew the graphs in {_drawings(out)}")
    return not_drawn
