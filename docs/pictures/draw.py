"""Draw the pictures of README.md. Run from the root of the source tree: python -m docs.pictures.draw"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from sgalign.data import ScenesDataset
from sgalign.files import save_figure
from sgalign.viewing import describe_annotations, draw_scene_graph

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "nvidia-h200" / "report.json"
SCENE = 25  # a generated scene with few objects and several kinds of relation
SHAPES = (
    "8, 8, 180, 100, 32",
    "8, 8, 180, 475, 32",
    "8, 8, 180, 608, 32",
    "8, 8, 180, 1024, 32",
    "1, 8, 180, 16384, 32",
    "1, 8, 16384, 16384, 64",
    "1, 8, 4096, 4096, 128",
)
CONTENDERS = {
    "triton dual": ("sgalign", "tab:orange"),
    "flex": ("FlexAttention, mask from a hash", "tab:blue"),
    "sdpa twice": ("SDPA twice, dense mask", "tab:gray"),
    "sdpa concatenated": ("SDPA once on both queries, dense mask", "lightgray"),
}
SHARED, SUPERVISED, MIRRORED, LOSS = "#dbe9f6", "#e3f1de", "#fde5cf", "#f3e3f3"


def scene_graph() -> Figure:
    """Return a picture of a generated scene beside its annotated scene graph."""
    scenes = ScenesDataset("test")
    scene = scenes[SCENE]
    assert scene.image is not None
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    graph = describe_annotations(scene, scenes.object_names, scenes.predicate_names)
    draw_scene_graph(*figure.subplots(1, 2), graph, scene.image())
    return figure


def branches() -> Figure:
    """Return a diagram of the supervised and the mirrored branch of relation alignment."""
    figure = Figure(figsize=(12, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 120), ylim=(0, 42))
    axes.set_axis_off()
    axes.add_patch(FancyBboxPatch((41, 4.5), 43, 33, "round,pad=1", facecolor="none", edgecolor="gray", linestyle="--"))
    fused = "attention or relation head of both branches in one pass"
    axes.text(62.5, 39.5, fused, ha="center", va="center", color="dimgray", style="italic")
    _box(axes, 2, 16, 14, 10, "image", "white")
    _box(axes, 21, 16, 15, 10, "detector and\nshared layers", SHARED)
    _box(axes, 43, 24, 39, 11, "supervised branch:\nrelation layers", SUPERVISED)
    mirror = "mirrored branch: the same weights,\ninput masked with p = 0.1,\nleft out after training"
    _box(axes, 43, 7, 39, 11, mirror, MIRRORED)
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
    axes.text(105, 21, "no gradient", va="center", fontsize=10, style="italic")
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    corners = FancyBboxPatch((x + 1, y + 1), width - 2, height - 2, "round,pad=1", facecolor=color, edgecolor="black")
    axes.add_patch(corners)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=12)


def speed() -> Figure:
    """Return a chart of the times of attention for both branches in the report of the NVIDIA H200."""
    rows: dict[str, Any] = json.loads(REPORT.read_text())["attention bfloat16"]["rows"]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(CONTENDERS)
    for place, (contender, (label, color)) in enumerate(CONTENDERS.items()):
        times = [rows[f"{shape}, bfloat16, forward and backward"]["contenders"] for shape in SHAPES]
        ratios = [
            time[contender]["graph"] / time["triton dual"]["graph"] if contender in time else 0.0 for time in times
        ]
        at = [group + (place - (len(CONTENDERS) - 1) / 2) * width for group in range(len(SHAPES))]
        bars = axes.bar(at, ratios, width, label=label, color=color)
        axes.bar_label(bars, [f"{ratio:.1f}" if ratio else "not\nmeasured" for ratio in ratios], fontsize=8)
    axes.set_xticks(range(len(SHAPES)), SHAPES)
    axes.set(ylabel="time, in multiples of sgalign's", xlabel="B, H, Lq, Lk, D. The first four are SGTR's shapes.")
    axes.set_title("Attention of both branches, forward and backward, bfloat16, NVIDIA H200, CUDA graph")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    for draw in (scene_graph, branches, speed):
        save_figure(draw(), folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main(Path(__file__).parent)
