"""What a model says of images, as JSON and as pictures."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from sgalign.data import SceneGraph, collate, collate_detected, load_image, read_detections
from sgalign.evaluate import PredictionFile
from sgalign.files import check_writable, save_figure, write_json, written_whole
from sgalign.metrics.matching import rank_triplets
from sgalign.sgtr import EntityDetectorModule, SGTRModule
from sgalign.training import DetectorModule, MotifsModule, RelationModule, module_named, read_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = 12  # triplets of a picture; more are not to be told apart
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
EPILOG = """\
A model of protocol sgdet finds the objects itself. Any other needs to be told: --detections takes a file of boxes and
classes, as docs/data.md describes it."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgalign predict", description=__doc__, epilog=EPILOG)
    parser.add_argument("images", type=Path, help="an image or a folder of images")
    parser.add_argument("--checkpoint", type=Path, required=True, help="that sgalign fit has written")
    parser.add_argument("--out", type=Path, default=Path("graphs.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="pictures too, in a folder named like the JSON file")
    parser.add_argument("--detections", metavar="FILE", help="the images' objects")
    parser.add_argument("--top-k", type=int, default=20, help="triplets an image (default: %(default)s)")
    parser.add_argument("--all-predicates", action="store_true", help="of Motifs: a pair may have several predicates")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`sgalign predict IMAGE_OR_FOLDER`. Images that cannot be read are named and left out; the exit code is 1 then."""
    options = parser().parse_args(arguments)
    if options.top_k < 1:
        parser().error(f"--top-k must be at least 1, got {options.top_k}")
    folder = options.out.with_suffix("")
    if options.draw and not options.out.suffix:
        parser().error(f"--out must end in .json, so that pictures go into a folder of the rest, got {options.out}")
    read = options.images if options.images.is_dir() else options.images.parent
    if options.draw and folder.resolve() == read.resolve():
        parser().error(f"--out must not name the folder of the images, pictures would go there, got {options.out}")
    module = load_module(options.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(module, MotifsModule | SGTRModule):
        raise ValueError(f"{options.checkpoint}: must be a checkpoint of Motifs or SGTR, got {type(module).__name__}")
    if module.vision == "cached":
        raise ValueError(f"{options.checkpoint} reads cached features: it has no detector to look at images with")
    if options.detections is None and module.protocol != "sgdet":
        raise ValueError(f"{options.checkpoint} is of protocol {module.protocol}: it needs --detections FILE")
    if options.detections is not None and module.protocol == "sgdet":
        raise ValueError(f"{options.checkpoint} is of protocol sgdet: it finds objects itself, without --detections")
    detections = None
    if options.detections is not None:
        detections = read_detections(options.detections, len(module.object_names) - 1)
    paths = image_files(options.images)
    check_writable(options.out)
    if options.draw:
        folder.mkdir(parents=True, exist_ok=True)
    graphs, failed = [], 0
    for path in paths:
        try:
            graph = predict_image(module, path, detections, options.top_k, options.all_predicates)
        except ValueError as error:
            reason = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"sgalign: left out: {reason}", file=sys.stderr)
            failed += 1
            continue
        graphs.append(graph)
        if options.draw:
            try:
                draw(path, graph, folder / f"{path.name}.png")
            except OSError as error:  # a name too long for an ending, a full disk
                print(f"sgalign: not drawn: {path}: {error}", file=sys.stderr)
                failed += 1
    if not graphs:
        print(f"sgalign: {options.out} is not written: no image could be read", file=sys.stderr)
        return 1
    write_json(options.out, graphs, indent=1)
    print(
        f"wrote {options.out}: {len(graphs)} of {len(paths)} images" + (f", drawn in {folder}" if options.draw else "")
    )
    return 1 if failed else 0


def load_module(path: str | Path) -> RelationModule:
    """The module of a checkpoint, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    name = read_checkpoint(path)["sgalign"].get("module", "")
    kind = module_named(name)
    if kind is None:
        raise ValueError(f"{path}: must be of a module of this package, got {name!r}")
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def image_files(path: Path) -> list[Path]:
    """The image, or the images of a folder by name.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES and p.is_file()) if path.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{path}: must be an image or a folder of images ({', '.join(sorted(SUFFIXES))})")
    return files


@torch.no_grad()
def predict_image(
    module: MotifsModule | SGTRModule, path: Path, detections: dict[str, Any] | None, top_k: int, all_predicates: bool
) -> dict[str, Any]:
    """The scene graph of an image file, as `describe` puts it."""
    image = load_image(path, upright=True)
    objects = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)
    # What is not UTF-8 in a file's name cannot be in JSON.
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
    graph = SceneGraph(name, *image.size, *objects, lambda: image)
    predicates, pixels = len(module.predicate_names) - 1, module.vision == "images"
    if detections is None:
        batch = collate([graph], predicates, pixels=pixels)
    elif name in detections:
        batch = collate_detected([graph], detections, predicates, pixels=pixels)
    else:
        raise ValueError(f"{path}: the detections know no image {path.name!r}")
    (prediction,) = module.predictions(module.transfer_batch_to_device(batch, module.device, 0))
    names = module.object_names, module.predicate_names
    return describe(prediction, *names, top_k, all_predicates=all_predicates)


def draw(image: Path, graph: dict[str, Any], out: Path) -> None:
    """The image with the boxes of the graph's objects, and the graph of its best triplets beside it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pixels = load_image(image, upright=True)
    triplets = graph["triplets"][:DRAWN]
    used = sorted({end for triplet in triplets for end in (triplet["subject"], triplet["object"])})
    colors = {index: colormaps["tab20"](place % 20) for place, index in enumerate(used)}
    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(pixels)
    for index in used:
        x1, y1, x2, y2 = graph["objects"][index]["box"]
        left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2, edgecolor=colors[index]))
        box = {"facecolor": colors[index], "pad": 1}
        left.text(x1, y1, _name(graph, index), fontsize=8, va="bottom", bbox=box, parse_math=False)
    left.set_axis_off()
    _draw_graph(right, graph, triplets, colors)
    save_figure(figure, out)


def _draw_graph(axes: Axes, graph: dict[str, Any], triplets: list[dict[str, Any]], colors: dict[int, Any]) -> None:
    """Objects on a ring, in the order in which their boxes' middles lie around the image's; relations as arrows."""
    middles = {i: [sum(graph["objects"][i]["box"][axis::2]) / 2 for axis in (0, 1)] for i in colors}
    centre = [sum(middle[axis] for middle in middles.values()) / max(len(middles), 1) for axis in (0, 1)]
    around = sorted(middles, key=lambda i: math.atan2(middles[i][1] - centre[1], middles[i][0] - centre[0]))
    angles = {index: 2 * math.pi * place / len(around) - math.pi for place, index in enumerate(around)}
    at = {index: (math.cos(angle), math.sin(angle)) for index, angle in angles.items()}
    bend = 0.15
    for triplet in triplets:
        (x1, y1), (x2, y2) = at[triplet["subject"]], at[triplet["object"]]
        style = {"arrowstyle": "->", "color": "gray", "shrinkA": 16, "shrinkB": 16}
        axes.annotate("", (x2, y2), (x1, y1), arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"})
        # Nearer to the subject than to the object, so that two opposite arrows keep their labels apart.
        x, y = 0.6 * x1 + 0.4 * x2 - bend / 2 * (y2 - y1), 0.6 * y1 + 0.4 * y2 + bend / 2 * (x2 - x1)
        label = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(
            x,
            y,
            triplet["predicate"],
            fontsize=9,
            ha="center",
            va="center",
            color="darkblue",
            bbox=label,
            parse_math=False,
        )
    for index, (x, y) in at.items():
        box = {"facecolor": colors[index], "pad": 4}
        axes.text(x, y, _name(graph, index), ha="center", va="center", bbox=box, parse_math=False)
    axes.set(xlim=(-1.2, 1.2), ylim=(1.2, -1.2), aspect="equal")
    axes.set_axis_off()


def _name(graph: dict[str, Any], index: int) -> str:
    return f"{graph['objects'][index]['label']} {index}"


class FileWriter(BasePredictionWriter):
    """Writes what a model predicts for the test part into a file, which appears when the prediction is complete.

    Args:
        path: the file; what was there is replaced.

    Raises:
        ValueError: the trainer has several processes, which would write one file.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self._stack = ExitStack()

    def open(self, module: pl.LightningModule) -> None:
        """Makes ready for a file, with `self._stack` to close it; refuses modules whose predictions do not fit."""
        raise NotImplementedError(f"{type(self).__name__} must override open")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_one_process(trainer)
        self.open(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stack.__exit__(type(exception), exception, None)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stack.close()
        print(f"wrote {self.path}")


class TripletWriter(FileWriter):
    """Writes what `sgalign predict` finds, an image a line of JSON.

    A line has `image_id`, `objects` (`label`, `box` x1, y1, x2, y2 in pixels) and `triplets` by falling score
    (`subject` and `object`, indices of objects; `predicate`; `score`), as `describe` chooses them.

    Args:
        path: of `FileWriter`.
        top_k: triplets an image.
        all_predicates: of `describe`.
    """

    _file: TextIO

    def __init__(self, path: str = "predictions.jsonl", top_k: int = 100, all_predicates: bool = False) -> None:
        super().__init__(path)
        self.top_k, self.all_predicates = top_k, all_predicates

    def open(self, module: pl.LightningModule) -> None:
        check_relates(module)
        partial = self._stack.enter_context(written_whole(self.path))
        self._file = self._stack.enter_context(partial.open("w", encoding="utf-8"))

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        assert isinstance(pl_module, RelationModule)
        for image in prediction:
            names = pl_module.object_names, pl_module.predicate_names
            graph = describe(image, *names, self.top_k, all_predicates=self.all_predicates)
            self._file.write(json.dumps(graph) + "\n")


class DetectionWriter(FileWriter):
    """Writes the objects that a detector finds in the test part, as `sgalign.data.read_detections` reads them.

        sgalign predict --config CONFIG --ckpt_path CHECKPOINT --trainer.callbacks+=sgalign.prediction.DetectionWriter

    Args:
        path: of `FileWriter`.
    """

    def __init__(self, path: str = "detections.json") -> None:
        super().__init__(path)

    def open(self, module: pl.LightningModule) -> None:
        check_writable(self.path)
        self._found: dict[str, Any] = {}

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        for image in prediction:
            self._found[image["image_id"]] = {
                "boxes_xyxy": image["boxes"].tolist(),
                "labels": (image["labels"] - 1).tolist(),
                "scores": image["scores"].tolist(),
            }

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_json(self.path, self._found)
        super().on_predict_end(trainer, pl_module)


class PredictionWriter(FileWriter):
    """Writes what `sgalign predict --config` finds, whole, for `sgalign evaluate`: `PredictionFile`'s HDF5.

    Args:
        path: of `FileWriter`.
    """

    _file: PredictionFile

    def __init__(self, path: str = "predictions.h5") -> None:
        super().__init__(path)

    def open(self, module: pl.LightningModule) -> None:
        check_relates(module)
        self._file = self._stack.enter_context(PredictionFile(self.path))

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Iterable[dict[str, Any]], *args: Any
    ) -> None:
        for image in prediction:
            self._file.write(image["image_id"], image)


def check_one_process(trainer: pl.Trainer) -> None:
    if trainer.world_size > 1:
        raise ValueError(f"trainer must predict in one process (--trainer.devices 1), got {trainer.world_size}")


def check_relates(module: pl.LightningModule) -> None:
    if isinstance(module, DetectorModule | EntityDetectorModule):
        raise ValueError(
            f"{type(module).__name__} relates nothing: predict with a model that has it as detector_weights, or write "
            "its boxes with sgalign.prediction.DetectionWriter"
        )


def describe(
    prediction: dict[str, Any],
    object_names: list[str],
    predicate_names: list[str],
    top_k: int,
    *,
    all_predicates: bool = False,
) -> dict[str, Any]:
    """A prediction of `RelationModule.predictions` in names and plain numbers, best triplets first.

    A triplet's score is that of both objects and of the predicate, multiplied. Each pair has its best predicate (the
    graph constraint), or with `all_predicates` all of them; SGTR ranks triplets itself, some of them of one pair.
    """
    best = rank_triplets(prediction, top_k, len(predicate_names) - 1 if all_predicates else 1)
    return {
        "image_id": prediction["image_id"],
        "objects": [
            {"label": object_names[label], "box": box, "score": round(score, 6)}
            for label, box, score in zip(
                prediction["labels"].tolist(), prediction["boxes"].tolist(), prediction["scores"].tolist(), strict=True
            )
        ],
        "triplets": [
            {
                "subject": subject,
                "predicate": predicate_names[predicate],
                "object": object_,
                "score": round(score, 6),
            }
            for (subject, object_), predicate, score in zip(*(field.tolist() for field in best), strict=True)
        ],
    }
