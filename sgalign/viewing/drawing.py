"""Drawing scene graphs: the boxes of the objects on their image, and the graph of their relations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

MOST_TRIPLETS = 12  # more triplets in one picture would be hard to tell apart
BEND = 0.15  # curvature of the arrows. It keeps two opposite arrows apart


def draw_scene_graph(
    left: Axes,
    right: Axes,
    graph: dict[str, Any],
    image: Image.Image | None = None,
    annotated: dict[str, Any] | None = None,
) -> None:
    """Draw an image with the boxes of its objects, and beside it the graph of their relations.

    Only the 12 best triplets and their objects are drawn.

    Args:
        left: axes for the image.
        right: axes for the graph.
        graph: an image's objects and triplets, as `describe` and `describe_annotations` return them.
        image: the image. If None, only the boxes are drawn.
        annotated: the annotations of the same objects, as `describe_annotations` returns them. Arrows of annotated
            triplets are green, and all others are gray.
    """
    from matplotlib import colormaps

    triplets = graph["triplets"][:MOST_TRIPLETS]
    used = sorted({end for triplet in triplets for end in (triplet["subject"], triplet["object"])})
    colors = {index: colormaps["tab20"](place % 20) for place, index in enumerate(used)}
    right_ones = {_parts(triplet) for triplet in annotated["triplets"]} if annotated else set()
    _draw_boxes(left, graph, colors, image)
    _draw_relations(right, graph, triplets, colors, right_ones)


def _parts(triplet: dict[str, Any]) -> tuple[int, str, int]:
    return triplet["subject"], triplet["predicate"], triplet["object"]


def count_annotated(graph: dict[str, Any], annotated: dict[str, Any]) -> int:
    """Return how many triplets of a graph are annotated. Both arguments describe the same objects."""
    return len({_parts(triplet) for triplet in graph["triplets"]} & {_parts(t) for t in annotated["triplets"]})


def _draw_boxes(axes: Axes, graph: dict[str, Any], colors: dict[int, Any], image: Image.Image | None) -> None:
    from matplotlib.patches import Rectangle

    if image is not None:
        axes.imshow(image)
    for index, color in colors.items():
        x1, y1, x2, y2 = graph["objects"][index]["box"]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2, edgecolor=color))
        label = {"facecolor": color, "pad": 1}
        axes.text(x1, y1, _name(graph, index), fontsize=8, va="bottom", bbox=label, parse_math=False)
    if image is None:
        axes.autoscale_view()
        axes.set_aspect("equal")
        axes.invert_yaxis()
    axes.set_axis_off()


def _draw_relations(
    axes: Axes,
    graph: dict[str, Any],
    triplets: list[dict[str, Any]],
    colors: dict[int, Any],
    annotated: set[tuple[int, str, int]],
) -> None:
    """Draw the objects on a ring and the relations as arrows.

    Around the ring, the objects are sorted by the direction of their box centers, seen from the mean of all centers.
    """
    middles = {i: [sum(graph["objects"][i]["box"][axis::2]) / 2 for axis in (0, 1)] for i in colors}
    center = [sum(middle[axis] for middle in middles.values()) / max(len(middles), 1) for axis in (0, 1)]
    order = sorted(middles, key=lambda i: math.atan2(middles[i][1] - center[1], middles[i][0] - center[0]))
    angles = {index: 2 * math.pi * place / len(order) - math.pi for place, index in enumerate(order)}
    points = {index: (math.cos(angle), math.sin(angle)) for index, angle in angles.items()}
    labels = {}
    for index, (x, y) in points.items():
        box = {"facecolor": colors[index], "pad": 4}
        labels[index] = axes.text(
            x, y, _name(graph, index), ha="center", va="center", bbox=box, parse_math=False, zorder=4
        )
    for triplet in triplets:
        subject, predicate, object_ = _parts(triplet)
        (x1, y1), (x2, y2) = points[subject], points[object_]
        color = "tab:green" if (subject, predicate, object_) in annotated else "gray"
        arrow: dict[str, Any] = {"arrowstyle": "->", "color": color, "connectionstyle": f"arc3,rad={BEND}"}
        arrow |= {"patchA": labels[subject].get_bbox_patch(), "patchB": labels[object_].get_bbox_patch()}
        axes.annotate("", (x2, y2), (x1, y1), arrowprops=arrow)
        # Put the label nearer to the subject, because the labels of two opposite arrows would overlap otherwise.
        x, y = 0.6 * x1 + 0.4 * x2 - BEND / 2 * (y2 - y1), 0.6 * y1 + 0.4 * y2 + BEND / 2 * (x2 - x1)
        style: dict[str, Any] = {"fontsize": 9, "ha": "center", "va": "center", "color": "darkblue"}
        label = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(x, y, predicate, bbox=label, parse_math=False, **style)
    axes.set(xlim=(-1.2, 1.2), ylim=(1.2, -1.2), aspect="equal")
    axes.set_axis_off()


def _name(graph: dict[str, Any], index: int) -> str:
    return f"{graph['objects'][index]['label']} {index}"
