"""A writer of scene graphs in COCO's format with relations in `rel.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sgalign.data.box_checks import EXTENTS, checked_corners
from sgalign.data.class_names import is_background
from sgalign.data.coco import FILES
from sgalign.data.images import check_file_name, load_image, save_image, writable_suffixes
from sgalign.data.scene_graph import SceneGraph
from sgalign.data.splits import Split
from sgalign.errors import InputError
from sgalign.files import write_json


def write_coco(
    parts: Mapping[Split, Iterable[SceneGraph]],
    object_names: list[str],
    predicate_names: list[str],
    root: str | Path,
    *,
    images: bool = False,
) -> None:
    """Write scene graphs of any data set in the layout that `CocoDataset` reads.

    Args:
        parts: scene graphs by split: "train", "validation" and "test".
        object_names, predicate_names: class names of the data set, background first.
        root: output folder, created if it does not exist.
        images: if True, also write the images into `images/`. An image id with the suffix of an image is the file name,
            and the suffix determines the format. Other ids get the suffix .jpg, and an underscore for each slash.

    Raises:
        ValueError: if two images of a split would have the same file name, or two different images of two splits, if a
            class has a name of the background, or if a box has no width, no height or a coordinate that is too large.
    """
    _check_names([*object_names[1:], *predicate_names[1:]])
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    categories = [{"id": index, "name": name} for index, name in enumerate(object_names)][1:]
    relations: dict[str, Any] = {"rel_categories": predicate_names}
    saved: dict[str, Any] = {}
    for part, graphs in parts.items():
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        names = set[str]()
        of_part: dict[str, Any] = {}
        relations[FILES[part]] = of_part
        for number, graph in enumerate(graphs):
            name = _file_name(graph.image_id)
            check_file_name("image_id", name)
            if name in names:
                raise InputError(f"image ids must give different file names, but {name!r} occurs twice in {part}")
            names.add(name)
            if images and graph.image is not None:
                if saved.get(name, source := _source(graph)) != source:
                    raise InputError(f"images of different splits must have different file names, got {name!r} twice")
                if name not in saved:
                    save_image(graph, root / "images" / name)
                saved[name] = source
            content["images"].append({"id": number, "file_name": name, "width": graph.width, "height": graph.height})
            for (x1, y1, x2, y2), label in zip(graph.boxes.tolist(), graph.labels.tolist(), strict=True):
                checked_corners(f"image {graph.image_id!r}: bbox", box := [x1, y1, x2 - x1, y2 - y1], EXTENTS)
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]),
                        "image_id": number,
                        "category_id": label,
                        "bbox": box,
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
            of_part[str(number)] = graph.relations.tolist()
        write_json(root / f"{FILES[part]}.json", content)
    write_json(root / "rel.json", relations)


def _check_names(names: list[str]) -> None:
    """Raise InputError if a class has a name of the background, because `CocoDataset` would not read it as a class."""
    if ours := [name for name in names if is_background(name)]:
        raise InputError(f"names of classes must not be those of the background in this layout, got {ours[0]!r}")


def _file_name(image_id: str) -> str:
    if Path(image_id).suffix.lower() in writable_suffixes():
        return image_id
    return f"{image_id.replace('/', '_')}.jpg"


def _source(graph: SceneGraph) -> Any:
    """Return what tells the image of a graph from other images: its file, or the function that draws it."""
    if isinstance(graph.image, partial) and graph.image.func is load_image:
        return graph.image.args[0]
    return graph.image
