"""Drawing scene graphs: the boxes of the objects on their image, and the graph of their relations."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

MOST_TRIPLETS = 12  # triplets per picture, because more would be hard to tell apart
BEND = 0.15  # curvature of the arrows. It keeps two opposite arrows apart
Triplet = dict[str, Any]


def draw_scene_graph(
    scene: Axes,
    graph: Axes,
    described: dict[str, Any],
    triplets: Sequence[Triplet],
    pixels: Image.Image | None = None,
    annotated: Collection[tuple[int, str, int]] = (),
) -> None:
    """Draw the objects of some triplets on one pair of axes, and the graph of these triplets on another.

    Args:
        scene: axes for the image and the boxes.
        graph: axes for the graph.
        described: an image's objects and triplets, in the form of `sgalign.training.describe`.
        triplets: the triplets to draw, of those in `described`.
        pixels: the image. If None, only the boxes are drawn.
        annotated: subject, predicate and object of each triplet whose arrow is drawn in green.
    """
    from matplotlib import colormaps

    used = sorted({end for triplet in triplets for end in (triplet["subject"], triplet["object"])})
    colors = {index: colormaps["tab20"](place % 20) for place, index in enumerate(used)}
    _draw_boxes(scene, described, colors, pixels)
    _draw_relations(graph, described, triplets, colors, annotated)


def _draw_boxes(axes: Axes, described: dict[str, Any], colors: dict[int, Any], pixels: Image.Image | None) -> None:
    from matplotlib.patches import Rectangle

    if pixels is not None:
        axes.imshow(pixels)
    for index, color in colors.items():
        x1, y1, x2, y2 = described["objects"][index]["box"]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2, edgecolor=color))
        label = {"facecolor": color, "pad": 1}
        axes.text(x1, y1, _name(described, index), fontsize=8, va="bottom", bbox=label, parse_math=False)
    if pixels is None:
        axes.autoscale_view()
        axes.set_aspect("equal")
        axes.invert_yaxis()
    axes.set_axis_off()


def _draw_relations(
    axes: Axes,
    described: dict[str, Any],
    triplets: Sequence[Triplet],
    colors: dict[int, Any],
    annotated: Collection[tuple[int, str, int]],
) -> None:
    """Draw the objects on a ring and the relations as arrows.

    Around the ring, the objects are sorted by the direction of their box centers, seen from the mean of all centers.
    """
    middles = {i: [sum(described["objects"][i]["box"][axis::2]) / 2 for axis in (0, 1)] for i in colors}
    center = [sum(middle[axis] for middle in middles.values()) / max(len(middles), 1) for axis in (0, 1)]
    around = sorted(middles, key=lambda i: math.atan2(middles[i][1] - center[1], middles[i][0] - center[0]))
    angles = {index: 2 * math.pi * place / len(around) - math.pi for place, index in enumerate(around)}
    at = {index: (math.cos(angle), math.sin(angle)) for index, angle in angles.items()}
    for triplet in triplets:
        subject, predicate, object_ = (triplet[name] for name in ("subject", "predicate", "object"))
        (x1, y1), (x2, y2) = at[subject], at[object_]
        color = "tab:green" if (subject, predicate, object_) in annotated else "gray"
        arrow = {"arrowstyle": "->", "color": color, "shrinkA": 16, "shrinkB": 16}
        axes.annotate("", (x2, y2), (x1, y1), arrowprops=arrow | {"connectionstyle": f"arc3,rad={BEND}"})
        # Put the label nearer to the subject, because the labels of two opposite arrows would overlap otherwise.
        x, y = 0.6 * x1 + 0.4 * x2 - BEND / 2 * (y2 - y1), 0.6 * y1 + 0.4 * y2 + BEND / 2 * (x2 - x1)
        style: dict[str, Any] = {"fontsize": 9, "ha": "center", "va": "center", "color": "darkblue"}
        label = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(x, y, predicate, bbox=label, parse_math=False, **style)
    for index, (x, y) in at.items():
        box = {"facecolor": colors[index], "pad": 4}
        axes.text(x, y, _name(described, index), ha="center", va="center", bbox=box, parse_math=False)
    axes.set(xlim=(-1.2, 1.2), ylim=(1.2, -1.2), aspect="equal")
    axes.set_axis_off()


def _name(described: dict[str, Any], index: int) -> str:
    return f"{described['objects'][index]['label']} {index}"
