"""Scores any system's predictions, read from a file, against a data set's annotations."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import torch
from torch import Tensor

from sgalign.data import SceneGraph, count_predicates, open_dataset
from sgalign.data.scene_graph import check_range
from sgalign.data.vg150 import read_zero_shot_triplets
from sgalign.files import check_writable, hdf5_written_whole, read_json, write_json, written_whole
from sgalign.metrics import (
    PROTOCOLS,
    OpenImagesEvaluator,
    SceneGraphEvaluator,
    VRDEvaluator,
    predicate_groups,
    zero_shot_triplets,
)

FIELDS = {
    "boxes": torch.float32,
    "labels": torch.int64,
    "scores": torch.float32,
    "pairs": torch.int64,
    "predicate_scores": torch.float32,
    "triplets": torch.int64,
    "triplet_scores": torch.float32,
}
VRD_TASKS = ("relationship", "phrase", "predicate")
DAMAGE = (KeyError, MemoryError, OSError, RuntimeError, ValueError)  # what h5py raises of files that are not whole
WRITTEN = "it must be HDF5 or JSON of predictions, as the callback sgalign.prediction.PredictionWriter writes"
EPILOG = "docs/evaluation.md has the format of the file, every rule, and what each choice is worth."


class PredictionFile:
    """Writes the HDF5 file that `sgalign evaluate` reads; it appears when the `with` block ends without an error.

    What is written of it until then is beside it, ends in `.partial`, and goes with an error.

    Args:
        path: of the file, replaced if it is there.
    """

    def __init__(self, path: str | Path) -> None:
        self._written = hdf5_written_whole(path)
        self._folders: set[str] = set()

    def __enter__(self) -> PredictionFile:
        self._file = self._written.__enter__()
        return self

    def write(self, image_id: str, prediction: Mapping[str, Any]) -> None:
        """Adds an image: tensors or arrays, as `SceneGraphEvaluator.update` takes them.

        Raises:
            ValueError: the image was written before, or HDF5 has no such name.
            OSError: the disk has no space for it; perhaps only at the end of the block.
        """
        parts = image_id.split("/")
        folders = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if not {"", "."}.isdisjoint(parts) or "\0" in image_id:
            raise ValueError(f"image_id must be names with single slashes between, got {image_id!r}")
        if image_id in self._folders or any(folder in self._file and folder not in self._folders for folder in folders):
            raise ValueError(f"image_id must not be a folder of another image's, got {image_id!r}")
        if image_id in self._file:
            raise ValueError(f"image_id must be new, {image_id!r} was written before")
        self._folders |= folders
        fields = {name: torch.as_tensor(prediction[name]).detach().cpu() for name in FIELDS if name in prediction}
        group = self._file.create_group(image_id)
        for name, tensor in fields.items():
            group[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._written.__exit__(kind, error, trace)


class Predictions:
    """The images of a file of predictions, read one at a time from HDF5, at once from JSON.

    Args:
        path: HDF5, a group an image named by its id, with a data set for each field; or JSON, an object of image ids,
            each with lists by field.
        num_predicates: without the background.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or cut short; a field of an image is not of numbers; names file, image and field.
    """

    def __init__(self, path: str | Path, num_predicates: int) -> None:
        self.path = Path(path)
        # JSON's empty list has no second dimension.
        self._widths = {"boxes": 4, "pairs": 2, "predicate_scores": num_predicates + 1, "triplets": 3}
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file of predictions")
        self._images: Mapping[str, Any]
        if h5py.is_hdf5(self.path):
            try:
                self._images = h5py.File(self.path, "r")
                self.image_ids = set(_image_ids(self._images))
            except DAMAGE as error:
                raise ValueError(f"{self.path}: HDF5, but cut short or damaged ({error})") from error
            return
        self._images = read_json(self.path, WRITTEN)
        if not isinstance(self._images, dict):
            raise ValueError(
                f"{self.path}: must be an object of image ids, got {type(self._images).__name__}; {WRITTEN}"
            )
        self.image_ids = set(self._images)

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """The fields of an image that are there, as `SceneGraphEvaluator.update` takes them."""
        where = f"{self.path}, image {image_id!r}"
        try:
            image = self._images[image_id]
            there = FIELDS.keys() & image.keys() if isinstance(image, Mapping) else None
        except DAMAGE as error:
            raise ValueError(f"{where}: damaged ({error})") from error
        if there is None:
            raise ValueError(f"{where}: must have {', '.join(FIELDS)}, got {type(image).__name__}")
        fields = {}
        for field in there:
            try:
                value = self._read(image[field], FIELDS[field].is_floating_point)
            except (*DAMAGE, TypeError) as error:
                raise ValueError(f"{where}: {field} must be numbers in equally long rows ({error})") from error
            fields[field] = self._typed(where, field, value)
        return fields

    def _read(self, values: Any, fractions: bool) -> Tensor:
        """Of a data set, or of lists, whose fractions are as exact as they stand."""
        if isinstance(values, h5py.Group):
            raise TypeError("it is a group")
        if isinstance(values, h5py.Dataset):
            array = values[()]
            return torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False))
        return torch.as_tensor(values, dtype=torch.float64 if fractions else None)

    def _typed(self, where: str, field: str, value: Tensor) -> Tensor:
        whole = FIELDS[field] == torch.int64
        if whole and value.is_floating_point() and value.numel():
            raise ValueError(f"{where}: {field} must be whole numbers, got {value.dtype}")
        if value.is_complex():
            raise ValueError(f"{where}: {field} must be real numbers, got {value.dtype}")
        value = value.long() if whole else value if value.is_floating_point() else value.float()
        return value.reshape(0, self._widths[field]) if field in self._widths and value.shape == (0,) else value


def _image_ids(group: h5py.Group, prefix: str = "") -> Iterator[str]:
    """Of an id with slashes HDF5 makes groups of groups."""
    for name, item in group.items():
        if isinstance(item, h5py.Group) and len(item) and all(isinstance(c, h5py.Group) for c in item.values()):
            yield from _image_ids(item, f"{prefix}{name}/")
        else:
            yield prefix + name


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgalign evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument("predictions", type=Path, help="HDF5 or JSON file of predictions")
    parser.add_argument("--annotations", metavar="FOLDER", required=True, help="a data set: VRD, VG150 or COCO layout")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(default: test)")
    parser.add_argument(
        "--validation-images", type=int, metavar="N", help="held out of training images (default: the data set's)"
    )
    parser.add_argument(
        "--protocol",
        required=True,
        choices=(*PROTOCOLS, *(f"vrd-{task}" for task in VRD_TASKS), "open-images"),
        help="what was given to the model, or the protocol of VRD's paper or of Open Images",
    )
    parser.add_argument("--zero-shot", metavar="FILE", help="the public list (default: what other parts do not have)")
    parser.add_argument(
        "--predicates-per-pair",
        type=int,
        default=1,
        metavar="N",
        help="of vrd-* and open-images only (default: %(default)s)",
    )
    parser.add_argument("--skip-missing", action="store_true", help="images without prediction do not count")
    parser.add_argument("--no-plus-one", action="store_true", help="a box is x2 - x1 wide, not x2 - x1 + 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="writes all figures, one a line")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`sgalign evaluate PREDICTIONS --annotations FOLDER --protocol PROTOCOL`."""
    options = parser().parse_args(arguments)
    special = options.protocol not in PROTOCOLS
    if special and (options.skip_missing or options.no_plus_one):
        parser().error(f"--skip-missing and --no-plus-one are not for --protocol {options.protocol}")
    if options.protocol == "open-images" and options.zero_shot is not None:
        parser().error("--zero-shot is not for --protocol open-images")
    if not special and options.predicates_per_pair != 1:
        parser().error(f"--predicates-per-pair is not for --protocol {options.protocol}")
    files = [path for path in (options.predictions, options.json, options.csv) if path is not None]
    if len({path.resolve() for path in files}) < len(files):
        parser().error("--json and --csv must be two files, and not that of the predictions")
    for path in files[1:]:
        check_writable(path)
    dataset = open_dataset(options.annotations, options.split, validation_images=options.validation_images)
    predictions = Predictions(options.predictions, len(dataset.predicate_names) - 1)
    graphs = list(dataset)
    if unknown := predictions.image_ids - {graph.image_id for graph in graphs}:
        raise ValueError(
            f"{options.predictions}: image ids must be those of the {options.split} part of {options.annotations}, "
            f"got {len(unknown)} others, such as {min(unknown)!r}"
        )
    metric = make_evaluator(options, dataset, graphs)
    missing = 0
    for graph in graphs:
        prediction = predictions[graph.image_id] if graph.image_id in predictions.image_ids else None
        missing += prediction is None and len(graph.relations) > 0
        metric.update([nothing() if prediction is None else prediction], [graph.truth])
        if prediction is not None:
            where = f"{options.predictions}, image {graph.image_id!r}: "
            check_range(where, "labels", prediction["labels"], 1, len(dataset.object_names) - 1)
    figures = {name: value.item() for name, value in metric.compute().items()}
    if missing:
        counted = "do not count" if options.skip_missing else "count 0"
        print(f"sgalign: {missing} images with relations have no prediction and {counted}", file=sys.stderr)
    if options.json is not None:
        write_json(options.json, figures, indent=1)
    if options.csv is not None:
        with written_whole(options.csv) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [("metric", "k", "of", "value"), *(split_name(n) + (v,) for n, v in figures.items())]
            )
    print(table(figures))
    return 0


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
            raise ValueError(f"{options.annotations}: {kind} must be the same in all parts, those of {others} differ")
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
