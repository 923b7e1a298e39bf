"""Predict the scene graphs of images with a trained model, and write them as JSON and as pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgalign.data import SceneGraph, collate, collate_detected, load_image, read_detections
from sgalign.data.images import is_image
from sgalign.errors import InputError
from sgalign.files import check_writable, save_figure, write_json
from sgalign.training import MotifsModule, SGTRModule, load_module
from sgalign.training.checkpoints import some_of
from sgalign.viewing import describe, draw_scene_graph

EPILOG = """\
A model with protocol sgdet finds the objects itself. Any other model needs --detections, a file of boxes and classes.
docs/data.md describes its format."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign predict", description=__doc__, epilog=EPILOG)
    parser.add_argument("images", type=Path, help="image or folder of images")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint written by sgalign fit")
    parser.add_argument("--out", type=Path, default=Path("graphs.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="also write pictures, in a folder named like the JSON file")
    parser.add_argument("--detections", metavar="FILE", help="file of the images' objects")
    parser.add_argument("--top-k", type=int, default=20, help="triplets per image (default: %(default)s)")
    parser.add_argument("--all-predicates", action="store_true", help="for Motifs: allow several predicates per pair")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign predict IMAGE_OR_FOLDER` and return the exit code.

    Images that cannot be read are reported and skipped. The exit code is then 1. Subfolders and files that are not
    images are also reported, but do not change the exit code.
    """
    options = parser().parse_args(arguments)
    if options.top_k < 1:
        parser().error(f"--top-k must be at least 1, got {options.top_k}")
    folder = options.out.with_suffix("")
    if options.draw and not options.out.suffix:
        parser().error(
            "--out must have a suffix such as .json, because --draw writes to a folder without the suffix, "
            f"got {options.out}"
        )
    read = options.images if options.images.is_dir() else options.images.parent
    if options.draw and folder.resolve() == read.resolve():
        parser().error(f"--out must not name the folder of the images, because --draw writes to it, got {options.out}")
    module = _load(options.checkpoint, options.detections)
    detections = None
    if options.detections is not None:
        detections = read_detections(options.detections, len(module.object_names) - 1)
    paths, others = image_files(options.images)
    own = options.out.resolve(), folder.resolve()
    if names := [path.name for path in others if path.resolve() not in own]:
        what = "1 entry that is not an image" if len(names) == 1 else f"{len(names)} entries that are not images"
        print(f"sgalign: skipped {what}: {some_of(names)}", file=sys.stderr)
    check_writable(options.out)
    if options.draw:
        folder.mkdir(parents=True, exist_ok=True)
    graphs, failed = [], 0
    for path in paths:
        try:
            graph = predict_image(module, path, detections, options.top_k, options.all_predicates)
        except InputError as error:
            reason = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"sgalign: skipped: {reason}", file=sys.stderr)
            failed += 1
            continue
        graphs.append(graph)
        if options.draw:
            try:
                draw(path, graph, folder / f"{path.name}.png")
            except OSError as error:  # the name is too long with .png added, or the disk is full
                print(f"sgalign: not drawn: {path}: {error}", file=sys.stderr)
                failed += 1
    if not graphs:
        print(f"sgalign: {options.out} was not written, because there is no result for any image", file=sys.stderr)
        return 1
    write_json(options.out, graphs, indent=1)
    print(
        f"wrote {options.out}: {len(graphs)} of {len(paths)} images" + (f", drawn in {folder}" if options.draw else "")
    )
    return 1 if failed else 0


def _load(path: Path, detections: str | None) -> MotifsModule | SGTRModule:
    """Return the model of a checkpoint, after checking that it can predict with or without a file of detections."""
    module = load_module(path).to("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(module, MotifsModule | SGTRModule):
        raise InputError(f"{path} must be a checkpoint of Motifs or SGTR, got {type(module).__name__}")
    if isinstance(module, MotifsModule) and module.options.vision == "cached":
        raise InputError(f"{path}: the model must read images, but it was trained on cached features")
    if detections is None and module.protocol != "sgdet":
        raise InputError(f"{path}: a model with protocol {module.protocol} needs --detections FILE")
    if detections is not None and module.protocol == "sgdet":
        raise InputError(f"{path}: a model with protocol sgdet finds objects itself, so leave out --detections")
    return module


def image_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the images and the other entries of a folder, sorted by name. Hidden ones are left out.

    If `path` is a file, it is taken for an image.

    Raises:
        FileNotFoundError: if `path` is neither a file nor a folder with images.
    """
    if path.is_file():
        return [path], []
    entries = sorted(p for p in path.glob("*") if not p.name.startswith("."))
    images = [p for p in entries if p.is_file() and is_image(p)]
    if not images:
        raise FileNotFoundError(f"{path}: must be an image or a folder of images")
    return images, sorted(set(entries) - set(images))


@torch.no_grad()
def predict_image(
    module: MotifsModule | SGTRModule, path: Path, detections: dict[str, Any] | None, top_k: int, all_predicates: bool
) -> dict[str, Any]:
    """Return the scene graph of an image file in the form of `describe`.

    Args:
        module: trained model.
        path: image file.
        detections: objects of each image by file name. If None, the model finds them.
        top_k: maximum number of triplets.
        all_predicates: if True, a pair may have several predicates.

    Raises:
        ValueError: if the image cannot be read, or is not in `detections`.
    """
    image = load_image(path)
    objects = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)
    # JSON cannot hold bytes of a file name that are not UTF-8.
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
    graph = SceneGraph(name, *image.size, *objects, lambda: image)
    predicates, pixels = len(module.predicate_names) - 1, module.looks_at_images
    if detections is None:
        batch = collate([graph], predicates, pixels=pixels)
    elif name in detections:
        batch = collate_detected([graph], detections, predicates, pixels=pixels)
    else:
        raise InputError(f"{path}: there is no image {path.name!r} in --detections")
    (prediction,) = module.predictions(module.transfer_batch_to_device(batch, module.device, 0))
    names = module.object_names, module.predicate_names
    return describe(prediction, *names, top_k, all_predicates=all_predicates)


def draw(image: Path, graph: dict[str, Any], out: Path) -> None:
    """Draw the image with the boxes of its objects, and beside it the graph of the best triplets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_scene_graph(left, right, graph, load_image(image))
    save_figure(figure, out)
