"""A prediction run over many images, with a progress bar, and the pictures of its results."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from sgalign.data import Detections, load_image
from sgalign.errors import InputError
from sgalign.files import save_figure
from sgalign.prediction.image_paths import ImageFile
from sgalign.prediction.outputs import Failures, Output
from sgalign.prediction.predicting import FailedImage, predict_images
from sgalign.training import RelationModule
from sgalign.viewing import draw_scene_graph

PRINTED_FAILURES = 10  # the file of failures has all


def predict_to_files(
    module: RelationModule,
    files: Sequence[ImageFile],
    outputs: Sequence[Output],
    failures: Failures,
    *,
    detections: Mapping[str, Detections] | None,
    batch_size: int,
    workers: int,
) -> None:
    """Predict the images that any of the outputs lacks, and show the progress. Each output gets what it lacks.

    The outputs are closed in any case, also after an error or an interruption.
    """
    left = [file for file in files if any(file.image_id not in output.done for output in outputs)]
    workers = min(workers, len(left) - 1) if len(left) > 1 else 0
    results = predict_images(module, left, detections=detections, batch_size=batch_size, workers=workers)
    try:
        for result in progress(results, len(left), "predicting", done=len(files) - len(left)):
            if isinstance(result, FailedImage):
                failures.write(result)
                if failures.count <= PRINTED_FAILURES:
                    tqdm.write(f"sgalign: skipped: {result.reason}", file=sys.stderr)
                continue
            for output in outputs:
                if result.file.image_id not in output.done:
                    output.write(result)
    finally:
        for output in outputs:
            output.close()


def progress(items: Iterable[Any], total: int, what: str, done: int = 0) -> Iterator[Any]:
    """Yield the items with a progress bar that shows rate and remaining time. In a log file, show a line per minute."""
    quiet = not sys.stderr.isatty()
    bar = tqdm(
        total=total + done, initial=done, desc=what, unit="image", mininterval=60 if quiet else 0.1, disable=total < 2
    )
    with bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block with SystemExit 143, so that the block can close its files."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def over_processes(count: int) -> int:
    """Return the sum of a number over the processes that torchrun has started. Each waits for all others.

    Without this, torchrun would stop the other processes as soon as one ends with an error code.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return count
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return int(total)


def draw_graphs(graphs: Iterable[tuple[Path, dict[str, Any]]], total: int, folder: Path, since: float) -> int:
    """Draw each graph beside its image as a PNG file, and return the number of graphs that could not be drawn.

    Args:
        graphs: image files and their graphs, as `describe` returns them.
        total: number of graphs.
        folder: folder of the pictures.
        since: start of the run. Pictures that are not older are kept, so a run that was stopped can go on.
    """
    failed = 0
    for image, graph in progress(graphs, total, "drawing"):
        path = folder / f"{graph['image_id']}.png"
        try:
            if path.exists() and path.stat().st_mtime >= since:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            _draw(image, graph, path)
        except (OSError, InputError) as error:  # the image is gone, its name is too long with .png, the disk is full
            tqdm.write(f"sgalign: not drawn: {image}: {error}", file=sys.stderr)
            failed += 1
    return failed


def _draw(image: Path, graph: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_scene_graph(left, right, graph, load_image(image))
    save_figure(figure, path)
