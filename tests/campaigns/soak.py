"""Repeat calls, training, evaluation and prediction for hours, and check that memory, handles and speed stay flat.

    python tests/campaigns/soak.py --out build/soak                         # all parts
    python tests/campaigns/soak.py --out build/soak --hours 1 training      # one part

The parts run one after another in this process. For each quantity, the median of the last third of the samples may be
above that of the middle third (speed: below it) by at most a small limit (`Limits` in soaking.py). It writes soak.csv
and soak.png.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from operations import CALLS, WRONG_CALLS
from soaking import HEADER, Limits, Monitor, Sample, plot, row_of, verdicts, write_samples

from sgalign.commands.main import main as sgalign
from sgalign.data import ScenesDataset, open_dataset
from sgalign.data.predictions import PredictionFile
from sgalign.metrics import (
    DetectionEvaluator,
    OpenImagesEvaluator,
    SceneGraphEvaluator,
    SGBenchEvaluator,
    VRDEvaluator,
)
from sgalign.ops import _operands
from sgalign.prediction.image_paths import find_images
from sgalign.prediction.outputs import Failures, GraphLines, PredictionParts
from sgalign.prediction.predicting import PredictedImage
from sgalign.prediction.running import draw_graphs, predict_to_files
from sgalign.training import AlignMotifsModule, SceneGraphData, SimulatedData, load_module
from sgalign.viewing import describe

SMALL = {"embed_dim": 24, "hidden_dim": 32, "relation_dim": 64, "relations_per_image": 128}
Part = Callable[[Monitor, Path], None]


# ------------------------------------------------------------------------------------------------------ calls


def must_raise(call: Callable[[], Any], *errors: type[Exception]) -> None:
    """Raise AssertionError unless a call raises one of these errors."""
    try:
        call()
    except errors:
        return
    raise AssertionError(f"{call} must raise an error")


def repeat_calls(name: str, monitor: Monitor, _: Path) -> None:
    """Call an operation forward and backward, and a wrong call that must raise an error before every tenth call."""
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    while not monitor.finished:
        if monitor.step % 10 == 0:
            wrong = WRONG_CALLS[name][monitor.step // 10 % len(WRONG_CALLS[name])]
            must_raise(wrong, ValueError, TypeError, IndexError, RuntimeError)
        CALLS[name](monitor.step, dtypes[monitor.step % len(dtypes)], None)
        monitor.count()


# ------------------------------------------------------------------------------------------------------ training


class Pace(pl.Callback):
    """A callback that counts the training steps, and ends the training when the part is finished."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.monitor.count()
        trainer.should_stop = self.monitor.finished


class PersistentData(SceneGraphData):
    """Generated scenes, which workers read that stay from epoch to epoch."""

    def _loader(self, *arguments: Any, **options: Any) -> Any:
        return super()._loader(*arguments, **options, persistent_workers=True)


def train(data: Callable[[str], SceneGraphData], vision: str, monitor: Monitor, folder: Path) -> None:
    """Train Align-Motifs with a validation and two checkpoints in each epoch."""
    _quiet(["make-dataset", str(folder / "scenes"), "--format", "vrd", "--sizes", "240", "20", "20"])
    checkpoints: list[Any] = [
        ModelCheckpoint(folder, filename="best", monitor="val/R@50", mode="max"),
        ModelCheckpoint(folder, filename="last", enable_version_counter=False),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[*checkpoints, Pace(monitor)],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    relation_dim = 1024 if vision == "cached" else SMALL["relation_dim"]
    module = AlignMotifsModule(**SMALL | {"relation_dim": relation_dim}, vision=vision)
    # Each batch has other shapes, so what the operations remember of them would grow for thousands of steps.
    with mock.patch.object(_operands, "REMEMBERED", 1):
        trainer.fit(module, data(str(folder / "scenes")))


# ------------------------------------------------------------------------------------------------------ evaluation


def _perfect(graph: Any, predicates: int) -> dict[str, Any]:
    """Return the annotations as a prediction."""
    pairs, row = graph.relations[:, :2], torch.arange(len(graph.relations))
    scores = torch.zeros(len(pairs), predicates + 1)
    scores[row, graph.relations[:, 2]] = 1 - 0.01 * row
    prediction = {"boxes": graph.boxes, "labels": graph.labels, "scores": torch.ones(len(graph.labels))}
    return prediction | {"pairs": pairs, "predicate_scores": scores}


def compute_metrics(monitor: Monitor, _: Path) -> None:
    """Update, compute and reset all evaluators."""
    graphs, predicates = list(ScenesDataset("test", size=20)), 20
    evaluators: list[Any] = [SceneGraphEvaluator(protocol, predicates) for protocol in ("predcls", "sgdet", "phrdet")]
    evaluators += [VRDEvaluator("relationship", predicates), OpenImagesEvaluator(predicates)]
    evaluators += [SGBenchEvaluator(predicates), DetectionEvaluator(ScenesDataset("test").object_names)]
    while not monitor.finished:
        graph = graphs[monitor.step % len(graphs)]
        prediction = _perfect(graph, predicates)
        for evaluator in evaluators:
            lacking = partial(evaluator.update, [{}], [graph.truth])  # lacks the fields of a prediction
            must_raise(lacking, ValueError, KeyError)
            evaluator.update([prediction], [graph.truth])
            evaluator.compute()
            evaluator.reset()
        monitor.count()


def run_evaluate(monitor: Monitor, folder: Path) -> None:
    """Run `sgalign evaluate` in this process, and every tenth time on a file that does not exist."""
    _quiet(["make-dataset", str(folder / "scenes"), "--format", "vrd", "--sizes", "12", "0", "6"])
    graphs = open_dataset(folder / "scenes", "test")
    with PredictionFile(folder / "perfect.h5") as file:
        for graph in graphs:
            file.write(graph.image_id, _perfect(graph, 20))
    command = ["evaluate", "--annotations", str(folder / "scenes"), "--protocol", "predcls"]
    while not monitor.finished:
        if monitor.step % 10 == 0 and not _quiet([*command, str(folder / "missing.h5")]):
            raise AssertionError("sgalign evaluate must refuse a file that does not exist")
        if _quiet([*command, str(folder / "perfect.h5"), "--json", str(folder / "figures.json")]):
            raise AssertionError("sgalign evaluate must accept the file")
        monitor.count()


def _quiet(command: list[str]) -> int:
    """Run a command of the command line in this process without its output, and return its exit code."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return sgalign(command)
        except SystemExit as end:
            return int(end.code or 0)


# ------------------------------------------------------------------------------------------------------ prediction


class Counted:
    """An output that counts the images that pass through."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.done = monitor, set[str]()

    def write(self, image: PredictedImage) -> None:
        self.monitor.count()

    def close(self) -> None:
        pass


def _linked_scenes(folder: Path, images: int) -> None:
    """Fill a folder with links to 40 drawn scenes."""
    drawn = [graph.image() for graph in ScenesDataset("test", size=min(40, images))]
    for number, image in enumerate(drawn):
        image.save(folder / f"{number}.png")
    (folder / "images").mkdir()
    for number in range(images):
        os.link(folder / f"{number % len(drawn)}.png", folder / "images" / f"{number}.png")


def predict(monitor: Monitor, folder: Path) -> None:
    """Predict images in one run with two reading processes, and write both kinds of results."""
    assert monitor.steps is not None
    _linked_scenes(folder, monitor.steps)
    module: Any = load_module("scenes")
    described: Any = {"top_k": 20, "threshold": 0.0, "all_predicates": False}
    lines = GraphLines(folder / "graphs.jsonl", module, {}, **described)
    parts = PredictionParts(folder / "predictions.h5", {})
    failures = Failures(folder / "graphs.failed.jsonl")
    files, _ = find_images([folder / "images"])
    with contextlib.redirect_stderr(io.StringIO()):
        predict_to_files(
            module,
            files,
            [lines, parts, Counted(monitor)],
            failures,
            detections=None,
            batch_size=1,
            workers=2,
        )
    parts.finish()
    assert not failures.count and len((folder / "graphs.jsonl").read_text().splitlines()) == monitor.steps


def draw(monitor: Monitor, folder: Path) -> None:
    """Draw scene graphs beside their images."""
    dataset = ScenesDataset("test", size=20)
    _linked_scenes(folder, 20)
    graphs = [
        describe(
            _perfect(graph, 20) | {"image_id": str(number)}, dataset.object_names, dataset.predicate_names, top_k=20
        )
        for number, graph in enumerate(dataset)
    ]

    def endless() -> Iterator[tuple[Path, dict[str, Any]]]:
        while not monitor.finished:
            number = monitor.step % len(graphs)
            yield folder / f"{number}.png", graphs[number]
            (folder / "pictures" / f"{number}.png").unlink()  # otherwise it would be kept
            monitor.count()

    with contextlib.redirect_stderr(io.StringIO()):
        assert not draw_graphs(endless(), 2, folder / "pictures", 0)


# ------------------------------------------------------------------------------------------------------ command

TRAINING: dict[str, Part] = {
    "training": partial(train, SceneGraphData, "none"),
    "training-workers": partial(train, partial(SceneGraphData, num_workers=2), "none"),
    "training-persistent": partial(train, partial(PersistentData, num_workers=2), "none"),
    "training-simulated": partial(train, SimulatedData, "cached"),
}
PARTS: dict[str, Part] = {
    **{name: partial(repeat_calls, name) for name in CALLS},
    "metrics": compute_metrics,
    "evaluate": run_evaluate,
    "predict": predict,
    "draw": draw,
    **TRAINING,
}
# Allocators keep the pages of earlier, larger batches.
LIMITS = {name: Limits(memory=8.0) for name in TRAINING}
LIMITS |= {name: Limits(memory=4.0) for name in ("predict", "draw")}


def monitor_for(part: str, options: argparse.Namespace) -> Monitor:
    """Return the monitor of a part with the size in the options."""
    if part in TRAINING:
        return Monitor(part, seconds=3600 * options.hours)
    sizes = {"metrics": options.evaluations, "evaluate": options.evaluations, "predict": options.images}
    return Monitor(part, steps=sizes.get(part, options.images // 10 if part == "draw" else options.calls))


def run(part: str, monitor: Monitor) -> list[Sample]:
    """Run a part in a temporary folder and return its samples."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        PARTS[part](monitor, Path(folder))
    gc.unfreeze()
    return monitor.samples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--calls", type=int, default=100_000, help="calls of each operation (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=3.0, help="hours of each kind of training (default: 3)")
    parser.add_argument("--evaluations", type=int, default=10_000, help="number per kind (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="predicted images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="folder of the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    for name in ("calls", "hours", "evaluations", "images"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(options, name)}")
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("sgalign").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(HEADER, flush=True)
    parts: list[list[Sample]] = []
    failed = False
    for part in options.parts or PARTS:
        samples = run(part, monitor_for(part, options))
        results = verdicts(samples, LIMITS.get(part, Limits()))
        failed |= not all(result.flat for result in results)
        print(row_of(samples, results), flush=True)
        parts.append(samples)
        write_samples(options.out / "soak.csv", [sample for of_part in parts for sample in of_part])
        plot(options.out / "soak.png", parts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
