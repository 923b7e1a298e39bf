"""Write a page that shows predicted or annotated scene graphs in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgalign.commands.reading_options import add_reading_options, add_resized, reading_options
from sgalign.data import SceneGraph, load_image, open_dataset
from sgalign.data.findings import counted
from sgalign.data.graph_lines import GraphLine, is_graph_lines, read_graph_lines
from sgalign.data.image_files import ImageFiles, is_file
from sgalign.data.prediction_reading import Annotations, Predictions
from sgalign.data.scene_graph import check_range
from sgalign.data.splits import SPLITS
from sgalign.errors import InputError
from sgalign.files import real_path
from sgalign.matching import check_prediction, check_scores
from sgalign.viewing import PageImage, describe, describe_annotations, write_page

EPILOG = "The page is one file that needs no network. docs/view_predictions.md describes it."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign view", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSON Lines files of graphs, HDF5 or JSON files of predictions, or one folder of a data set",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder with the image files")
    parser.add_argument("--annotations", metavar="FOLDER", help="data set with the annotations of the predicted images")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of the data set (default: %(default)s)")
    add_reading_options(parser)
    add_resized(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE.html",
        help="file to write (default: the name of FILE with .html, in the current folder)",
    )
    parser.add_argument(
        "--top-k", type=int, default=20, metavar="N", help="predicted triplets per image (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign view FILE...` and return the exit code."""
    options = parser().parse_args(arguments)
    if options.top_k < 1:
        parser().error(f"--top-k must be at least 1, got {options.top_k}")
    if len(options.files) > 1 and options.out is None:
        parser().error("--out must be given for several files")
    first = real_path(options.files[0])
    out = options.out or Path((first.name if first.is_dir() else first.stem) + ".html")
    if out.suffix.lower() not in (".html", ".htm"):
        parser().error(f"--out must end in .html, got {out}")
    if real_path(out) in [real_path(path) for path in options.files]:
        parser().error(f"--out must not be one of the files to view, got {out}")
    if options.images is not None and not options.images.is_dir():
        raise FileNotFoundError(f"--images must be a folder, got {options.images}")
    for path in options.files:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    source = Source(options)
    title = f"Scene graphs of {', '.join(path.name or str(path) for path in options.files)}"
    content = write_page(out, source.images(), title, top_k=options.top_k)
    print(f"wrote {out}: {content}")
    if unpredicted := source.unpredicted():
        what = counted(unpredicted, "image")
        print(f"Left out: {what} of the {options.split} split, because no file has a prediction.")
    return 0


class Source:
    """The images to show, from the files of a command line.

    Args:
        options: options of the command, as `parser` returns them.

    Raises:
        ValueError: if the files do not belong together, or if annotations are needed or not allowed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.files = ImageFiles([] if options.images is None else [options.images])
        self.folder = options.annotations
        kinds = {_kind(path) for path in options.files}
        self.kind = kinds.pop()
        if kinds or (self.kind == "folder" and len(options.files) > 1):
            raise InputError(
                "FILE must be files of one kind (JSON Lines of graphs, or predictions) or one folder, "
                f"got {', '.join(map(str, options.files))}"
            )
        if self.kind == "folder":
            if self.folder is not None:
                raise InputError(f"--annotations must be left out for a folder, got {self.folder}")
            self.folder = options.files[0]
        if self.kind == "predictions" and self.folder is None:
            raise InputError(f"{options.files[0]}: a file of class numbers needs --annotations FOLDER for the names")
        self.dataset = None
        self.places: dict[str, int] = {}
        if self.folder is not None:
            self.dataset = open_dataset(self.folder, options.split, keep="everything", **reading_options(options))
            self.annotations = Annotations.of(self.dataset)
            self.places = {graph.image_id: place for place, graph in enumerate(self.annotations.graphs)}
            self.names = self.dataset.object_names, self.dataset.predicate_names
        self.seen: dict[str, str] = {}

    def images(self) -> Iterator[PageImage]:
        """Yield the images, one at a time.

        Raises:
            ValueError: if a file is damaged or does not fit the annotations. The error names the file and the place.
        """
        if self.kind == "folder":
            assert self.dataset is not None
            for graph in self.dataset:
                yield self._annotated(graph, None)
            return
        for path in self.options.files:
            yield from self._of_lines(path) if self.kind == "lines" else self._of_predictions(path)
        if not self.seen:
            raise InputError(f"{', '.join(map(str, self.options.files))}: must have at least one image, got none")

    def unpredicted(self) -> int:
        """Return the number of annotated images that no file has. Call it after `images` has ended."""
        return 0 if self.kind == "folder" else len(self.places.keys() - self.seen.keys())

    def _of_lines(self, path: Path) -> Iterator[PageImage]:
        for line in read_graph_lines(path):
            graph, image_id = line.graph, line.graph["image_id"]
            self._note(image_id, line.where)
            file = self.files.find(image_id)
            if file is None and "file" in graph:
                file = self.files.find(Path(graph["file"]).name) or _beside(Path(graph["file"]), path)
            if self.dataset is not None:
                self._check_names(line)
                self._check_size(line)
                yield self._annotated(self.dataset[self.places[image_id]], graph, file)
                continue
            load = None if file is None else partial(load_image, file)
            yield PageImage(image_id, load, graph.get("width"), graph.get("height"), graph)

    def _of_predictions(self, path: Path) -> Iterator[PageImage]:
        assert self.dataset is not None
        predictions = Predictions(path, self.annotations, resized=self.options.resized)
        for image_id in sorted(predictions.image_ids, key=lambda name: (self.places.get(name, -1), name)):
            where = f"{path}, image {image_id!r}"
            self._note(image_id, where)
            prediction = self._checked(f"{where}: ", predictions[image_id])
            # A ranking may come without the scores of objects, which `describe` needs.
            unscored = {"scores": torch.zeros(len(prediction["labels"])), "image_id": image_id}
            graph = describe(unscored | prediction, *self.names, self.options.top_k)
            if "scores" not in prediction:
                graph["objects"] = [{"label": item["label"], "box": item["box"]} for item in graph["objects"]]
            page_image = self._annotated(self.dataset[self.places[image_id]], graph)
            ranked = prediction["triplets" if "triplets" in prediction else "pairs"]
            yield replace(page_image, triplets=len(ranked))

    def _checked(self, where: str, prediction: dict[str, Any]) -> dict[str, Any]:
        check_prediction(where, prediction, len(self.names[1]) - 1)
        check_range(where, "labels", prediction["labels"], 1, len(self.names[0]) - 1)
        if "scores" in prediction:
            check_scores(where, "scores", prediction["scores"], (len(prediction["labels"]),))
        return prediction

    def _annotated(self, graph: SceneGraph, predicted: dict[str, Any] | None, file: Path | None = None) -> PageImage:
        size = graph.width, graph.height
        file = file or self.files.find(graph.image_id)
        load = graph.image if file is None else partial(load_image, file, size)
        return PageImage(graph.image_id, load, *size, predicted, describe_annotations(graph, *self.names))

    def _note(self, image_id: str, where: str) -> None:
        """Raise InputError if an image is unknown or occurs twice."""
        if image_id in self.seen:
            raise InputError(f"{where}: every image must occur once, but {image_id!r} is also in {self.seen[image_id]}")
        self.seen[image_id] = where
        if self.dataset is not None and image_id not in self.places:
            example = f", such as {min(self.places)!r}" if self.places else ""
            raise InputError(
                f"{where}: image ids must be in the {self.options.split} split of {self.folder}{example}, "
                f"got {image_id!r}"
            )

    def _check_names(self, line: GraphLine) -> None:
        """Raise InputError if a graph has a class that the annotations do not have."""
        for field, rows, known in (
            ("label", line.graph["objects"], self.names[0][1:]),
            ("predicate", line.graph["triplets"], self.names[1][1:]),
        ):
            if unknown := {row[field] for row in rows}.difference(known):
                raise InputError(
                    f"{line.where}: every {field} must be a class of {self.folder}, such as {known[0]!r}, "
                    f"got {min(unknown)!r}"
                )

    def _check_size(self, line: GraphLine) -> None:
        """Raise InputError if the boxes of a graph refer to an image of another size than the annotations."""
        assert self.dataset is not None
        annotated = self.dataset[self.places[line.graph["image_id"]]]
        size = line.graph.get("width"), line.graph.get("height")
        if size not in ((None, None), (annotated.width, annotated.height)):
            raise InputError(
                f"{line.where}: width and height must be {annotated.width} x {annotated.height}, the size of the image "
                f"in {self.folder}, got {size[0]} x {size[1]}"
            )


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "lines" if is_graph_lines(path) else "predictions"


def _beside(file: Path, lines: Path) -> Path:
    """Return the image file that a line names. A relative path may also start at the folder of the file of lines."""
    other = lines.parent / file
    return other if not is_file(file) and is_file(other) else file
