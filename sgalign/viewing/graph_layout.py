"""Places for the nodes of a graph and for labels, such that they do not cover each other where it can be helped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

GAP = 44.0  # between two nodes, in the unit of their sizes. An arrow with a label fits into it
EDGE = 0.06  # share of the area that stays free of nodes on each side, for arrows that bend outwards


class Rectangle(NamedTuple):
    """A rectangle by its center and size."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Rectangle) -> float:
        """Return the common area of two rectangles."""
        width = (self.width + other.width) / 2 - abs(self.x - other.x)
        height = (self.height + other.height) / 2 - abs(self.y - other.y)
        return max(width, 0.0) * max(height, 0.0)

    def moved_into(self, width: float, height: float) -> Rectangle:
        """Return the rectangle, moved into the area from 0 to `width` and `height` if it fits there."""
        x = min(max(self.x, self.width / 2), max(width - self.width / 2, self.width / 2))
        y = min(max(self.y, self.height / 2), max(height - self.height / 2, self.height / 2))
        return self._replace(x=x, y=y)


def place_nodes(
    starts: Mapping[int, tuple[float, float]],
    sizes: Mapping[int, tuple[float, float]],
    edges: Iterable[tuple[int, int]],
    area: tuple[float, float],
) -> dict[int, Rectangle]:
    """Return the places of a graph's nodes, from 0 to the width and height of an area.

    The distances follow the number of edges between two nodes (Kamada and Kawai, 1989), starting from given points.
    Then nodes that cover each other move apart. If the area is too small for all nodes, they may still overlap.

    Args:
        starts: starting point of each node. Only the relative places count.
        sizes: width and height of each node.
        edges: pairs of nodes.
        area: width and height of the area.
    """
    import networkx

    nodes = list(starts)
    graph = networkx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edge for edge in edges if edge[0] != edge[1])
    steps = {
        node: dict.fromkeys(nodes, 3.0) | lengths for node, lengths in networkx.all_pairs_shortest_path_length(graph)
    }
    points = np.array([starts[node] for node in nodes], dtype=np.float64).reshape(-1, 2)
    # Equal starting points would stay together, so each node also starts at a place of its own on a small circle.
    angles = 2 * np.pi * np.arange(len(nodes)) / max(len(nodes), 1)
    points = _scaled(points) + 0.01 * np.stack([np.cos(angles), np.sin(angles)], 1)
    if len(nodes) > 2:
        found = networkx.kamada_kawai_layout(graph, dist=steps, pos=dict(zip(nodes, points)))
        points = np.array([found[node] for node in nodes])
    extents = np.array([sizes[node] for node in nodes], dtype=np.float64).reshape(-1, 2)
    margin = EDGE * np.array(area)
    low, high = extents / 2 + margin, np.maximum(np.array(area) - margin - extents / 2, extents / 2 + margin)
    points = low + _scaled(points) * (high - low)
    points = _apart(points, extents, low, high)
    return {node: Rectangle(*point, *size) for node, point, size in zip(nodes, points.tolist(), extents.tolist())}


def _scaled(points: np.ndarray) -> np.ndarray:
    """Return points that are scaled to the range from 0 to 1 in each direction. A range of 0 becomes 0.5."""
    if not len(points):
        return points
    low, extent = points.min(0), np.ptp(points, axis=0)
    return np.where(extent > 1e-9, (points - low) / np.maximum(extent, 1e-9), 0.5)


def _apart(points: np.ndarray, extents: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Move rectangles apart until none is nearer to another than `GAP`, or for 300 rounds."""
    wanted = (extents[:, None] + extents[None]) / 2 + GAP
    for _ in range(300):
        between = points[:, None] - points[None]
        missing = wanted - np.abs(between)
        near = (missing > 0).all(-1) & ~np.eye(len(points), dtype=bool)
        if not near.any():
            break
        # Each pair moves along the direction in which the shorter way parts it.
        along = missing == missing.min(-1, keepdims=True)
        away = np.where(
            between == 0,
            np.sign(np.arange(len(points))[:, None, None] - np.arange(len(points))[:, None]),
            np.sign(between),
        )
        points = np.clip(points + 0.3 * (np.where(near[..., None] & along, missing * away, 0)).sum(1), low, high)
    return points


def free_place(
    candidates: Sequence[Rectangle], taken: Sequence[Rectangle], lines: Sequence[Rectangle] = ()
) -> Rectangle:
    """Return the candidate that covers the least of the taken rectangles, and among equal ones the least of the lines.

    If several candidates cover the same, the first of them wins.
    """

    def covered(candidate: Rectangle) -> tuple[float, float]:
        return sum(map(candidate.overlap, taken)), sum(map(candidate.overlap, lines))

    return min(candidates, key=covered)
