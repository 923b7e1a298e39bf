"""Train and evaluate the frequency baseline, Motifs and Align-Motifs on one data set, and measure the mirror's cost."""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from sgalign.commands.reading_options import add_reading_options, reading_options
from sgalign.data import GraphBatch, SceneGraph, collate, count_predicates
from sgalign.errors import InputError
from sgalign.files import save_figure, write_json
from sgalign.training import (
    AlignMotifsModule,
    FrequencyModule,
    MotifsModule,
    RelationModule,
    SceneGraphData,
)
from sgalign.viewing import describe, describe_annotations, draw_scene_graph
from sgalign.viewing.drawing import MOST_TRIPLETS, count_annotated

if TYPE_CHECKING:
    from PIL import Image

METRICS = ("R@20", "R@50", "R@100", "mR@20", "mR@50", "mR@100")
COST_STEPS = 40  # timed training steps of each module
DRAWN_IMAGES = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign compare", description=__doc__)
    parser.add_argument(
        "--data", metavar="FOLDER", help="folder of a data set in any layout (default: generated scenes)"
    )
    add_reading_options(parser)
    parser.add_argument("--epochs", type=int, default=6, help="number of training epochs (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, masks and image order (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for results (default: a new one in runs/)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign compare` and return the exit code."""
    options = parser().parse_args(arguments)
    if options.epochs < 1:
        parser().error(f"--epochs must be at least 1, got {options.epochs}")
    out = options.out or Path("runs") / time.strftime("compare_%Y-%m-%d_%H-%M-%S")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser().error(f"--out must be a new or an empty folder, got {out}")
    # Lightning's advice on worker processes and devices does not apply, because batches take a millisecond to make.
    warnings.filterwarnings("ignore", module="lightning.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)

    data = SceneGraphData(options.data, seed=options.seed, **reading_options(options))
    data.require_relations("test")
    print(f"{data.name}: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test images")
    out.mkdir(parents=True, exist_ok=True)
    modules: dict[str, RelationModule] = {}
    history: dict[str, list[dict[str, float]]] = {}
    results: dict[str, dict[str, float]] = {}
    for name, make in (("Frequency", FrequencyModule), ("Motifs", MotifsModule), ("Align-Motifs", AlignMotifsModule)):
        pl.seed_everything(options.seed, verbose=False)
        modules[name] = make()
        trainer, history[name] = _trainer(out / name, options.epochs, trains=name != "Frequency")
        if name != "Frequency":
            print(f"training {name}, epochs: {options.epochs}")
            trainer.fit(modules[name], datamodule=data)
        trainer.test(modules[name], datamodule=data, verbose=False)
        results[name] = {key: float(value) for key, value in modules[name].recall.compute().items()}

    motifs, mirrored = (modules[name] for name in ("Motifs", "Align-Motifs"))
    assert isinstance(motifs, MotifsModule) and isinstance(mirrored, AlignMotifsModule)
    seconds = step_seconds([motifs.to(DEVICE), mirrored.to(DEVICE)], list(data.train_dataloader()))
    report: dict[str, Any] = {"data": data.name, "epochs": options.epochs, "seed": options.seed}
    report |= {"test": results, "validation": history, "step_seconds": dict(zip(("Motifs", "Align-Motifs"), seconds))}
    write_json(out / "results.json", report, indent=1)

    print(f"\n{table(results)}\n")
    print(
        f"PredCls recall on the test split of {data.name}, in percent. "
        f"Motifs and Align-Motifs were each trained once, with seed {options.seed}."
    )
    print("One run does not show whether alignment helps. docs/results/README.md has runs with several seeds.")
    print(
        f"A training step takes {1e3 * seconds[0]:.1f} ms without the mirror and {1e3 * seconds[1]:.1f} ms with it, ",
        end="",
    )
    print(f"{seconds[1] / seconds[0]:.2f} times as long.")
    draw(out / "comparison.png", data, history, results)
    draw_predictions(out / "predictions.png", data, mirrored)
    print(f"pictures    {out / 'predictions.png'}, test images with the graphs that Align-Motifs predicts")
    print(f"figure      {out / 'comparison.png'}")
    print(f"numbers     {out / 'results.json'}")
    for name in ("Motifs", "Align-Motifs"):
        print(f"checkpoint  {out / name / 'last.ckpt'}")
    return 0


class _History(Callback):
    """The validation recall after each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RelationModule)
        recall = pl_module.recall.compute()
        self.epochs.append({name: float(recall[name]) for name in METRICS})


def _trainer(folder: Path, epochs: int, *, trains: bool) -> tuple[pl.Trainer, list[dict[str, float]]]:
    history = _History()
    checkpoint = ModelCheckpoint(folder, "last", enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=[CSVLogger(folder, "", ""), TensorBoardLogger(folder, "", "")] if trains else False,
        callbacks=[history, checkpoint, TQDMProgressBar(refresh_rate=10)] if trains else None,
        enable_checkpointing=trains,
        enable_progress_bar=trains,
        enable_model_summary=False,
    )
    return trainer, history.epochs


def step_seconds(modules: Sequence[MotifsModule], batches: Sequence[GraphBatch]) -> list[float]:
    """Return the median time of a training step of each module, in seconds.

    The modules take turns, so other load on the machine affects all of them alike.
    """
    device = modules[0].device
    optimizers = [module.make_optimizer() for module in modules]
    taken: list[list[float]] = [[] for _ in modules]
    for step in range(COST_STEPS):
        batch = modules[0].transfer_batch_to_device(batches[step % len(batches)], device, 0)
        for module, optimizer, times in zip(modules, optimizers, taken):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss, _ = module.train().losses(batch, step)
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the recalls in percent as text, with one line per model."""
    lines = [f"{'':14}" + "".join(f"{metric:>8}" for metric in METRICS)]
    for name, recall in results.items():
        lines.append(f"{name:14}" + "".join(f"{100 * recall[metric]:8.1f}" for metric in METRICS))
    return "\n".join(lines)


def draw(
    path: Path,
    data: SceneGraphData,
    history: dict[str, list[dict[str, float]]],
    results: dict[str, dict[str, float]],
) -> None:
    """Draw the recall by epoch, and by how much the mirror changes each predicate's recall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1, 2])
    for color, name in zip(("tab:gray", "tab:orange"), ("Motifs", "Align-Motifs")):
        epochs = range(1, len(history[name]) + 1)
        for style, metric in (("-", "R@50"), ("--", "mR@50")):
            values = [100 * epoch[metric] for epoch in history[name]]
            curves.plot(epochs, values, style, color=color, marker=".", label=f"{name} {metric}")
    curves.set(xlabel="epoch", ylabel="validation recall, %", title="Training")
    curves.legend(fontsize=8)

    counts = count_predicates(data.train, len(data.predicate_names) - 1)
    order = counts[1:].argsort(descending=True, stable=True) + 1
    names = [data.predicate_names[index] for index in order]
    change = [100 * (results["Align-Motifs"][f"R@50/{name}"] - results["Motifs"][f"R@50/{name}"]) for name in names]
    bars.bar(range(len(names)), change, color="tab:orange")
    bars.set_xticks(range(len(names)), names, rotation=90, fontsize=8 if len(names) <= 30 else 5, parse_math=False)
    bars.axhline(0, color="black", linewidth=0.5)
    bars.set(
        ylabel="points of R@50", title="Align-Motifs minus Motifs on the test split, most frequent predicate first"
    )
    save_figure(figure, path)


@torch.no_grad()
def draw_predictions(path: Path, data: SceneGraphData, module: MotifsModule) -> None:
    """Draw the first test images that have relations, each with its predicted graph below.

    A graph has as many triplets as the image has annotated relations, but at most `MOST_TRIPLETS`. Arrows of annotated
    triplets are green.
    """
    from matplotlib.figure import Figure

    names = data.object_names, data.predicate_names
    related = (graph for graph in data.test if len(graph.relations))
    graphs = list(itertools.islice(related, DRAWN_IMAGES))
    figure = Figure(figsize=(6 * len(graphs), 11), layout="constrained")
    axes = figure.subplots(2, len(graphs), squeeze=False)
    for (above, below), graph in zip(axes.T, graphs, strict=True):
        batch = collate([graph], len(data.predicate_names) - 1)
        (prediction,) = module.eval().predictions(module.transfer_batch_to_device(batch, module.device, 0))
        described = describe(prediction, *names, min(len(graph.relations), MOST_TRIPLETS))
        annotated = describe_annotations(graph, *names)
        draw_scene_graph(above, below, described, _image(graph), annotated)
        right, shown = count_annotated(described, annotated), len(described["triplets"])
        above.set_title(graph.image_id, parse_math=False)
        below.set_title(f"{right} of the best {shown} triplets are annotated (green)")
    save_figure(figure, path)


def _image(graph: SceneGraph) -> Image.Image | None:
    """Return the image of a scene graph, or None if it has none or its file cannot be read."""
    try:
        return graph.image() if graph.image else None
    except (OSError, InputError) as error:
        print(f"sgalign: cannot read an image, so only its boxes are drawn: {error}", file=sys.stderr)
        return None
