"""Drawing scene graphs: the boxes of the objects on their image, and the graph of their relations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sgalign.viewing.fonts import UNKNOWN, families_for
from sgalign.viewing.graph_layout import Rectangle, free_place, place_nodes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from PIL import Image

MOST_TRIPLETS = 12  # more triplets in one picture would be hard to tell apart
BEND = 0.16  # curvature of the arrows. It keeps two opposite arrows apart
HEAD = 16  # size of an arrowhead, in points
LINE = 4  # width of the surroundings of an arrow's line, in pixels of the figure
LONGEST_NAME = 24  # letters
LABEL_PLACES = (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74)  # of a label on its arrow, from the subject to the object


def draw_scene_graph(
    left: Axes,
    right: Axes,
    graph: dict[str, Any],
    image: Image.Image | None = None,
    annotated: dict[str, Any] | None = None,
) -> None:
    """Draw an image with the boxes of its objects, and beside it the graph of their relations.

    Only the 12 best triplets and their objects are drawn. Objects of one class have the same color. Boxes are clipped
    to the image.

    Args:
        left: axes for the image.
        right: axes for the graph.
        graph: an image's objects and triplets, as `describe` and `describe_annotations` return them.
        image: the image. If None, only the boxes are drawn.
        annotated: the annotations of the same objects, as `describe_annotations` returns them. Arrows of annotated
            triplets are green. All others are gray and dashed.
    """
    from matplotlib import colormaps

    triplets = graph["triplets"][:MOST_TRIPLETS]
    used = sorted({end for triplet in triplets for end in (triplet["subject"], triplet["object"])})
    classes = list(dict.fromkeys(graph["objects"][index]["label"] for index in used))
    shades = [*range(0, 20, 2), *range(1, 20, 2)]  # tab20 has pairs of a strong and a pale color. Strong ones first
    palette = {name: colormaps["tab20"](shades[number % 20]) for number, name in enumerate(classes)}
    colors = {index: palette[graph["objects"][index]["label"]] for index in used}
    names = {index: f"{_short(graph['objects'][index]['label'])} {index}" for index in used}
    families, missing = families_for([*names.values(), *(_short(triplet["predicate"]) for triplet in triplets)])
    style = {"fontfamily": families, "parse_math": False}
    unknown = str.maketrans(dict.fromkeys(missing, UNKNOWN))
    names = {index: name.translate(unknown) for index, name in names.items()}
    _draw_boxes(left, graph, names, colors, image, style)
    groups: dict[tuple[int, int, bool | None], list[str]] = {}
    right_ones = {_parts(triplet) for triplet in annotated["triplets"]} if annotated else set()
    for triplet in triplets:
        is_right = None if annotated is None else _parts(triplet) in right_ones
        group = groups.setdefault((triplet["subject"], triplet["object"], is_right), [])
        group.append(_short(triplet["predicate"]).translate(unknown))
    _draw_relations(right, graph, names, colors, groups, style)


def _parts(triplet: dict[str, Any]) -> tuple[int, str, int]:
    return triplet["subject"], triplet["predicate"], triplet["object"]


def count_annotated(graph: dict[str, Any], annotated: dict[str, Any]) -> int:
    """Return how many triplets of a graph are annotated. Both arguments describe the same objects."""
    return len({_parts(triplet) for triplet in graph["triplets"]} & {_parts(t) for t in annotated["triplets"]})


def _short(name: str) -> str:
    """Return a name on one line, cut to `LONGEST_NAME` letters."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _draw_boxes(
    axes: Axes,
    graph: dict[str, Any],
    names: dict[int, str],
    colors: dict[int, Any],
    image: Image.Image | None,
    style: dict[str, Any],
) -> None:
    """Draw the boxes on the image, larger ones first, and then their labels."""
    from matplotlib.patches import Rectangle as Box

    boxes = {index: graph["objects"][index]["box"] for index in names}
    if image is not None:
        axes.imshow(image)
        width, height = image.size
    else:
        ends = [(box[2], box[3]) for box in boxes.values()]
        width = graph.get("width") or max([1, *(x for x, _ in ends)])
        height = graph.get("height") or max([1, *(y for _, y in ends)])
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    area = axes.get_window_extent()
    pixel = max(width / area.width, height / area.height)  # pixels of the image per pixel of the figure
    clipped = {}
    for index, (x1, y1, x2, y2) in boxes.items():
        x1, x2 = max(x1, 0), min(x2, width)
        y1, y2 = max(y1, 0), min(y2, height)
        if x1 <= x2 and y1 <= y2:
            clipped[index] = x1, y1, x2, y2
    taken: list[Rectangle] = []
    for index, (x1, y1, x2, y2) in sorted(clipped.items(), key=lambda item: -_area(item[1])):
        axes.add_patch(Box((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2, edgecolor=colors[index]))
        label = _label(axes, names[index], colors[index], {"fontsize": 8} | style)
        w, h = (pixel * side for side in _size(label))
        corners = [(x1 + w / 2, y1 - h / 2), (x1 + w / 2, y1 + h / 2), (x2 - w / 2, y1 + h / 2)]
        corners += [(x1 + w / 2, y2 - h / 2), (x2 - w / 2, y2 - h / 2), ((x1 + x2) / 2, (y1 + y2) / 2)]
        corners += [(x2 - w / 2, y1 - h / 2), (x1 + w / 2, y2 + h / 2), (x2 - w / 2, y2 + h / 2)]
        corners += [(x, y) for x in (x1 - w / 2, x2 + w / 2) for y in (y1 + h / 2, y2 - h / 2)]
        inside = [Rectangle(x, y, w, h).moved_into(width, height) for x, y in corners]
        taken.append(free_place(inside, taken))
        label.set_position(taken[-1][:2])


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _label(axes: Axes, text: str, color: Any, style: dict[str, Any]) -> Text:
    light = [0.5 + 0.5 * channel for channel in color[:3]]  # black letters are readable on it
    box = {"facecolor": light, "edgecolor": color, "pad": 2, "linewidth": 1.2}
    return axes.text(0, 0, text, ha="center", va="center", bbox=box, zorder=4, **style)


def _size(text: Text) -> tuple[float, float]:
    """Return the width and height of a text with its box, in pixels of the figure."""
    from matplotlib.backends.backend_agg import RendererAgg

    figure = text.get_figure()
    assert figure is not None
    extent = text.get_window_extent(RendererAgg(1, 1, figure.dpi))  # measures the text without drawing the figure
    return extent.width + 6, extent.height + 6


def _draw_relations(
    axes: Axes,
    graph: dict[str, Any],
    names: dict[int, str],
    colors: dict[int, Any],
    groups: dict[tuple[int, int, bool | None], list[str]],
    style: dict[str, Any],
) -> None:
    """Draw the objects as nodes and the relations as arrows. Relations of one pair share an arrow."""
    area = axes.get_window_extent()
    axes.set(xlim=(0, area.width), ylim=(area.height, 0), aspect="equal")
    axes.set_axis_off()
    labels = {index: _label(axes, name, colors[index], {"fontsize": 10} | style) for index, name in names.items()}
    boxes = {index: graph["objects"][index]["box"] for index in names}
    nodes = place_nodes(
        {index: ((x1 + x2) / 2, (y1 + y2) / 2) for index, (x1, y1, x2, y2) in boxes.items()},
        {index: _size(label) for index, label in labels.items()},
        [(subject, object_) for subject, object_, _ in groups],
        (area.width, area.height),
    )
    for index, label in labels.items():
        label.set_position(nodes[index][:2])
    arrows = []
    number = Counter(frozenset(group[:2]) for group in groups)
    seen: Counter[tuple[int, int]] = Counter()
    for (subject, object_, is_right), predicates in groups.items():
        ends = nodes[subject], nodes[object_]
        alone = number[frozenset((subject, object_))] == 1
        others = [node for index, node in nodes.items() if index not in (subject, object_)]
        points = _route(*ends, seen[subject, object_], others, alone)
        seen[subject, object_] += 1
        _draw_arrow(axes, points, "tab:green" if is_right else "dimgray", dashed=is_right is False)
        arrows.append((points, predicates))
    taken = [*nodes.values(), *(_head(points) for points, _ in arrows)]
    for points, predicates in arrows:
        text = axes.text(0, 0, "\n".join(predicates), fontsize=9, ha="center", va="center", color="darkblue", **style)
        text.set_bbox({"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})
        text.set_zorder(5)
        places = _places_along(points, *_size(text))
        # A label on another arrow would seem to belong to that one.
        crossed = [Rectangle(*point, LINE, LINE) for other, _ in arrows if other is not points for point in other[::3]]
        taken.append(free_place([place.moved_into(area.width, area.height) for place in places], taken, crossed))
        text.set_position(taken[-1][:2])


def _route(
    start: Rectangle, end: Rectangle, nth: int, others: Sequence[Rectangle], alone: bool
) -> list[tuple[float, float]]:
    """Return points of an arrow between the edges of two nodes. It avoids other nodes if one of its curves does.

    Args:
        start, end: the nodes. If they are equal, the arrow is a loop above the node.
        nth: number of the arrow among those from `start` to `end`. Each bends more than the one before.
        others: the other nodes.
        alone: if True, no other arrow joins the two nodes, so this one may bend to both sides.
    """
    if start == end:
        size = 26 + 14 * nth
        controls = [(start.x + 8, start.y), (start.x + 2 * size, start.y - 2 * size)]
        controls += [(start.x - 2 * size, start.y - 2 * size), (start.x - 8, start.y)]
        return _between(controls, start, end)
    bend = BEND * (1 + 1.5 * nth)
    routes = []
    for curvature in (bend, -bend, 2 * bend, -2 * bend) if alone else (bend, 2 * bend):
        dx, dy = end.x - start.x, end.y - start.y
        middle = (start.x + end.x) / 2 - 2 * curvature * dy, (start.y + end.y) / 2 + 2 * curvature * dx
        routes.append(_between([start[:2], middle, end[:2]], start, end))
    return min(routes, key=lambda route: sum(_inside(point, node, 0) for point in route for node in others))


def _between(controls: Iterable[tuple[float, ...]], start: Rectangle, end: Rectangle) -> list[tuple[float, float]]:
    """Return the points of a Bezier curve that lie outside the nodes at its ends."""
    points = [_bezier(controls, step / 80) for step in range(81)]
    outside = [point for point in points if not (_inside(point, start, 1) or _inside(point, end, 3))]
    return outside if len(outside) >= 4 else points  # the nodes may be too near for an arrow between their edges


def _draw_arrow(axes: Axes, points: list[tuple[float, float]], color: str, *, dashed: bool) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    arrow = FancyArrowPatch(path=Path(points), arrowstyle="-|>,head_length=0.5,head_width=0.28", mutation_scale=HEAD)
    arrow.set(clip_on=False, color=color, linewidth=1.4, linestyle="--" if dashed else "-", zorder=3)
    axes.add_patch(arrow)


def _head(points: list[tuple[float, float]]) -> Rectangle:
    """Return the surroundings of an arrow's head, which lies before the end of the arrow."""
    (x, y), (dx, dy) = points[-1], _direction(points, len(points) - 1)
    return Rectangle(x - HEAD / 2 * dx, y - HEAD / 2 * dy, 1.4 * HEAD, 1.4 * HEAD)


def _direction(points: list[tuple[float, float]], place: int) -> tuple[float, float]:
    """Return the direction of an arrow at one of its points, as a vector of length 1."""
    (x1, y1), (x2, y2) = points[max(place - 2, 0)], points[min(place + 2, len(points) - 1)]
    length = math.hypot(x2 - x1, y2 - y1) or 1.0
    return (x2 - x1) / length, (y2 - y1) / length


def _places_along(points: list[tuple[float, float]], width: float, height: float) -> list[Rectangle]:
    """Return places for a label on its arrow, and then places on both sides of it."""
    on_arrow, beside = [], []
    for t in LABEL_PLACES:
        place = round(t * (len(points) - 1))
        (x, y), (dx, dy) = points[place], _direction(points, place)
        on_arrow.append(Rectangle(x, y, width, height))
        reach = (abs(dy) * width + abs(dx) * height) / 2  # half of the label's extent across the arrow
        beside += [Rectangle(x - side * reach * dy, y + side * reach * dx, width, height) for side in (1, -1)]
    return on_arrow + beside


def _bezier(controls: Iterable[tuple[float, ...]], t: float) -> tuple[float, float]:
    """Return the point of a Bezier curve at `t`, from 0 to 1."""
    controls = list(controls)
    last = len(controls) - 1
    weights = [math.comb(last, k) * t**k * (1 - t) ** (last - k) for k in range(last + 1)]
    return sum(w * p[0] for w, p in zip(weights, controls)), sum(w * p[1] for w, p in zip(weights, controls))


def _inside(point: tuple[float, float], node: Rectangle, margin: float) -> bool:
    return abs(point[0] - node.x) < node.width / 2 + margin and abs(point[1] - node.y) < node.height / 2 + margin
