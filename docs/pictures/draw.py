"""Draw the pictures of README.md. Run from the root of the source tree: python docs/pictures/draw.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from sgalign.commands.drawing import draw_scene_graph
from sgalign.data import ScenesDataset
from sgalign.files import save_figure

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "nvidia-h200" / "report.json"
SCENE = 25  # a generated scene with few objects and several kinds of relation
SHAPES = {
    "8, 8, 180, 100, 32": "180 queries,\n100 keys",
    "8, 8, 180, 475, 32": "180 queries,\n475 keys",
    "8, 8, 180, 1024, 32": "180 queries,\n1024 keys",
    "1, 8, 180, 16384, 32": "180 queries,\n16384 keys",
    "1, 8, 16384, 16384, 64": "16384 queries,\n16384 keys",
    "1, 8, 4096, 4096, 128": "4096 queries, 4096\nkeys, 128 channels",
}
CONTENDERS = {
    "triton dual": ("sgalign", "tab:orange"),
    "flex": ("FlexAttention, mask from a hash", "tab:blue"),
    "sdpa twice": ("SDPA twice, dense mask", "tab:gray"),
    "eager": ("plain PyTorch", "lightgray"),
}
SHARED, SUPERVISED, MIRRORED, LOSS = "#dbe9f6", "#e3f1de", "#fde5cf", "#f3e3f3"


def scene_graph() -> Figure:
    """Return a picture of a generated scene beside its annotated scene graph."""
    scenes = ScenesDataset("test")
    scene = scenes[SCENE]
    objects = [
        {"label": scenes.object_names[label], "box": box}
        for label, box in zip(scene.labels.tolist(), scene.boxes.tolist())
    ]
    triplets = [
        {"subject": subject, "predicate": scenes.predicate_names[predicate], "object": object_}
        for subject, object_, predicate in scene.relations.tolist()
    ]
    assert scene.image is not None
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_scene_graph(left, right, {"objects": objects}, triplets, scene.image())
    return figure


def branches() -> Figure:
    """Return a diagram of the supervised and the mirrored branch of relation alignment."""
    figure = Figure(figsize=(12, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 120), ylim=(0, 42))
    axes.set_axis_off()
    axes.add_patch(FancyBboxPatch((41, 4.5), 43, 33, "round,pad=1", facecolor="none", edgecolor="gray", linestyle="--"))
    axes.text(62.5, 39.5, "one pass of fused kernels", ha="center", va="center", color="dimgray", style="italic")
    _box(axes, 2, 16, 14, 10, "image", "white")
    _box(axes, 21, 16, 15, 10, "detector and\nshared layers", SHARED)
    _box(axes, 43, 24, 39, 11, "supervised branch\nattention to all objects", SUPERVISED)
    _box(axes, 43, 7, 39, 11, "mirrored branch, same weights\neach entry dropped with p = 0.1", MIRRORED)
    _box(axes, 89, 24, 12, 11, "predicates", SUPERVISED)
    _box(axes, 89, 7, 12, 11, "predicates", MIRRORED)
    _box(axes, 106.5, 24, 12, 11, "loss on the\nlabels", LOSS)
    _box(axes, 106.5, 7, 12, 11, "alignment\nloss, λ = 10", LOSS)
    arrows = (
        ((16, 21), (21, 21)), ((36, 22.5), (43, 28)), ((36, 19.5), (43, 14)),
        ((82, 29.5), (89, 29.5)), ((82, 12.5), (89, 12.5)),
        ((101, 29.5), (106.5, 29.5)), ((101, 12.5), (106.5, 12.5)), ((101, 26), (106.5, 16.5)),
    )  # fmt: skip
    for start, end in arrows:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 2, "shrinkB": 2})
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    corners = FancyBboxPatch((x + 1, y + 1), width - 2, height - 2, "round,pad=1", facecolor=color, edgecolor="black")
    axes.add_patch(corners)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=12)


def speed() -> Figure:
    """Return a chart of the times of attention for both branches in the report of the NVIDIA H200."""
    rows: dict[str, Any] = json.loads(REPORT.read_text())["attention bfloat16"]["rows"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(CONTENDERS)
    for place, (contender, (label, color)) in enumerate(CONTENDERS.items()):
        at, ratios = [], []
        for group, shape in enumerate(SHAPES):
            times = rows[f"{shape}, bfloat16, forward and backward"]["contenders"]
            if contender not in times:
                continue  # not measured at this shape
            at.append(group + (place - (len(CONTENDERS) - 1) / 2) * width)
            ratios.append(times[contender]["graph"] / times["triton dual"]["graph"])
        bars = axes.bar(at, ratios, width, label=label, color=color)
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize=9)
    axes.set_xticks(range(len(SHAPES)), SHAPES.values())
    axes.set(ylabel="time, in multiples of sgalign's")
    axes.set_title("Attention of both branches, forward and backward, bfloat16, NVIDIA H200, CUDA graph")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    rcParams["font.family"] = "DejaVu Sans"
    for draw in (scene_graph, branches, speed):
        save_figure(draw(), folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
