"""A reader of scene graphs in JSON Lines, which `sgalign predict` and `sgalign.training.TripletWriter` write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sgalign.data.findings import warn
from sgalign.data.images import parse_size
from sgalign.errors import InputError, shown
from sgalign.files import unique_keys

MOST = sys.float_info.max


class GraphLine(NamedTuple):
    """A line of a file of graphs.

    Attributes:
        where: the file and the number of the line, for messages.
        graph: the graph in the form of `sgalign.viewing.describe`. It may also have `file`, `width` and `height`.
    """

    where: str
    graph: dict[str, Any]


def is_graph_lines(path: Path) -> bool:
    """Return True if a file is JSON Lines by its suffix .jsonl, or if its first line has the fields of a graph."""
    if path.suffix == ".jsonl":
        return True
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and {"image_id", "objects", "triplets"} <= first.keys()


def read_graph_lines(path: Path) -> Iterator[GraphLine]:
    """Yield the graphs of a JSON Lines file, one at a time. Blank lines are skipped.

    A last line without its end is what a killed run leaves. If it is not complete, it is left out with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not JSON or not a graph. The error names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of graphs")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                graph = json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:  # from the JSON or the UTF-8 decoder
                if not line.endswith(b"\n"):
                    warn(f"{where}: left out, because the last line of the file is cut short")
                    break
                raise InputError(f"{where}: must be a JSON object, but is damaged ({error})") from error
            _check_graph(where, graph)
            yield GraphLine(where, graph)


def _check_graph(where: str, graph: Any) -> None:
    """Raise InputError unless a value has the form of `sgalign.viewing.describe`."""
    if not isinstance(graph, dict):
        raise InputError(f"{where}: must be a JSON object, got {shown(graph)}")
    _check_text(where, "image_id", graph.get("image_id"))
    for field in ("objects", "triplets"):
        rows = graph.get(field)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{where}: {field} must be a list of JSON objects, got {shown(rows)}")
    for place, item in enumerate(graph["objects"]):
        name = f"objects[{place}]"
        _check_text(where, f"{name}.label", item.get("label"))
        _check_box(where, f"{name}.box", item.get("box"))
        _check_score(where, f"{name}.score", item.get("score"))
    for place, triplet in enumerate(graph["triplets"]):
        name, count = f"triplets[{place}]", len(graph["objects"])
        for end in ("subject", "object"):
            index = triplet.get(end)
            if type(index) is not int or not 0 <= index < count:
                raise InputError(
                    f"{where}: {name}.{end} must be the index of one of {count} objects, got {shown(index)}"
                )
        _check_text(where, f"{name}.predicate", triplet.get("predicate"))
        _check_score(where, f"{name}.score", triplet.get("score"))
    if "file" in graph:
        _check_text(where, "file", graph["file"])
    if "width" in graph or "height" in graph:
        graph["width"], graph["height"] = parse_size(where, graph)


def _check_text(where: str, field: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {field} must be text that is not empty, got {shown(value)}")


def _check_box(where: str, field: str, box: Any) -> None:
    numbers = isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))
    if not numbers or not (box[0] <= box[2] and box[1] <= box[3]):
        raise InputError(f"{where}: {field} must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {shown(box)}")


def _check_score(where: str, field: str, score: Any) -> None:
    if not _is_finite(score) or score < 0:
        raise InputError(f"{where}: {field} must be a finite number of at least 0, got {shown(score)}")


def _is_finite(value: Any) -> bool:
    """Return True for a number that a float, and so a browser, can hold."""
    return type(value) in (int, float) and -MOST <= value <= MOST
