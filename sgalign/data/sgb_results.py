"""Readers of the two files of results that Scene-Graph-Benchmark and its forks write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgalign.data.scene_graph import SceneGraph
from sgalign.errors import InputError, shown
from sgalign.files import read_json, read_tensors
from sgalign.numbers import whole_number

SUFFIXES = (".pytorch", ".pth", ".pt")
# Packages whose module `structures.bounding_box` has the class BoxList.
PACKAGES = ("maskrcnn_benchmark", "pysgg", "sgg_benchmark")
FIELDS = ("pred_labels", "pred_scores", "rel_pair_idxs", "pred_rel_scores")
CLIPPED = 1.5  # pixels by which Scene-Graph-Benchmark's clipping may move the boxes of annotated objects


class BoxList:
    """A stand-in for the class of boxes in Scene-Graph-Benchmark's files, so that no code of theirs runs."""

    bbox: Tensor
    size: tuple[int, int]
    mode: str
    extra_fields: dict[str, Any]


def is_results(path: Path) -> bool:
    """Return True if a file has the suffix of files that `torch.save` writes."""
    return path.suffix.lower() in SUFFIXES


def read_results(path: Path, graphs: Sequence[SceneGraph]) -> dict[str, dict[str, Any]]:
    """Return the fields of each image of `eval_results.pytorch`, by the name of the image.

    Only tensors, plain values and boxes are unpickled. The names of the images come from `visual_info.json` beside the
    file, which the same programs write. Without it, the images are those of the split that have relations, in order.
    The annotations in the file must be those of the data set, image by image. If a system was given the boxes, they are
    replaced by those of the data set, because Scene-Graph-Benchmark clips them.

    Args:
        path: the file.
        graphs: scene graphs of the split.

    Raises:
        ValueError: if the file has other content, or does not fit the data set.
    """
    classes = [(BoxList, f"{package}.structures.bounding_box.BoxList") for package in PACKAGES]
    content = read_tensors(path, "file of results", classes, mapped=True)
    keys = ("predictions", "groundtruths")
    lists: list[Any] = [content.get(key) if isinstance(content, dict) else None for key in keys]
    if not all(isinstance(images, list) and all(isinstance(i, BoxList) for i in images) for images in lists):
        raise InputError(f"{path}: must have predictions and groundtruths, two lists of BoxList, got {shown(content)}")
    predictions, truths = lists
    image_names = _image_names(path, len(predictions), graphs)
    if len(truths) != len(predictions):
        raise InputError(f"{path}: must have as many groundtruths as predictions, got {len(truths)}")
    by_name = {Path(graph.image_id).name: graph for graph in graphs}
    return {
        name: _fields(f"{path}, image {name!r}", prediction, truth, by_name.get(name))
        for name, prediction, truth in zip(image_names, predictions, truths, strict=True)
    }


def _image_names(path: Path, count: int, graphs: Sequence[SceneGraph]) -> list[str]:
    info = path.with_name("visual_info.json")
    if info.exists():
        rows = read_json(info)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "img_file" in row for row in rows):
            raise InputError(f"{info}: must be a list of images with img_file, got {shown(rows)}")
        names, where = [Path(str(row["img_file"])).name for row in rows], str(info)
    else:
        names = [Path(graph.image_id).name for graph in graphs if len(graph.relations)]
        where = "the split that has relations"
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise InputError(f"{path}: every image of {where} must have its own file name, but {twice!r} occurs twice")
    if len(names) != count:
        raise InputError(f"{path}: must have a prediction for each of the {len(names)} images of {where}, got {count}")
    return names


def _fields(where: str, prediction: BoxList, truth: BoxList, graph: SceneGraph | None) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = {field: prediction.extra_fields[field].detach() for field in FIELDS}
        fields["boxes"] = boxes = _corners(prediction)
        if graph is None:  # the evaluation refuses an image of another split
            return fields
        given, labels = _corners(truth), truth.extra_fields["labels"].tolist()
        relations = {tuple(row) for row in truth.extra_fields["relation_tuple"].tolist()}
        scale, true_scale = (
            torch.tensor([graph.width / image.size[0], graph.height / image.size[1]] * 2)
            for image in (prediction, truth)
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{where}: must have boxes, size, {', '.join(FIELDS)}, and annotations with boxes, size, labels and "
            f"relation_tuple ({type(error).__name__}: {error})"
        ) from error
    # Repeated relations are left out of the comparison, because some forks remove them.
    same = labels == graph.labels.tolist() and relations == {tuple(row) for row in graph.relations.tolist()}
    if not (same and _close(given * true_scale, _clipped(graph))):
        raise InputError(
            f"{where}: its annotated boxes, classes and relations must be those of the data set, but differ; the "
            "images or the classes are in another order, or the file belongs to other data"
        )
    fields["boxes"] = graph.boxes if _close(boxes * scale, given * true_scale) else boxes * scale
    return fields


def _close(boxes: Tensor, others: Tensor) -> bool:
    return boxes.shape == others.shape and torch.allclose(boxes, others, rtol=0, atol=CLIPPED)


def _clipped(graph: SceneGraph) -> Tensor:
    """Return the boxes of a graph, clipped to the image as Scene-Graph-Benchmark does."""
    last = torch.tensor([graph.width - 1.0, graph.height - 1.0] * 2)
    return graph.boxes.clamp(min=0).minimum(last)


def _corners(boxes: BoxList) -> Tensor:
    """Return x1, y1, x2, y2, float32 `[N, 4]`. An extent counts the last pixel, as in Scene-Graph-Benchmark."""
    numbers = boxes.bbox.detach().float()
    if boxes.mode not in ("xyxy", "xywh") or numbers.dim() != 2 or numbers.shape[1] != 4:
        raise ValueError(f"mode {boxes.mode!r} and boxes of shape {list(numbers.shape)}")
    if boxes.mode == "xyxy":
        return numbers
    return torch.cat([numbers[:, :2], numbers[:, :2] + (numbers[:, 2:] - 1).clamp(min=0)], 1)


def read_custom(path: Path, images: Mapping[str, Any], predicate_names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of each image of `custom_prediction.json`, by the name of the image and with class names.

    `custom_data_info.json` beside the file names the images and the classes. The system's predicates may be in another
    order than the data set's, but must be the same.

    Args:
        path: the file.
        images: its content.
        predicate_names: names of the data set's predicates, background first.

    Raises:
        FileNotFoundError: if there is no `custom_data_info.json`.
        ValueError: if that file is malformed, or its predicates differ from the data set's.
    """
    info = path.with_name("custom_data_info.json")
    content = read_json(info, f"it names the images and classes of {path.name}")
    keys = ("idx_to_files", "ind_to_classes", "ind_to_predicates")
    lists: list[Any] = [content.get(key) if isinstance(content, dict) else None for key in keys]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise InputError(f"{info}: must have {', '.join(keys)}, which are lists of names, got {shown(content)}")
    files, classes, predicates = lists
    if len(set(predicates)) < len(predicates):
        raise InputError(f"{info}: ind_to_predicates must have different names, got {shown(predicates)}")
    if set(predicates[1:]) != set(predicate_names[1:]):
        differ = set(predicates[1:]) ^ set(predicate_names[1:])
        raise InputError(f"{info}: ind_to_predicates must be those of the data set, but differ in {min(differ)!r}")
    columns = [0, *(predicates.index(name) for name in predicate_names[1:])]
    read: dict[str, Any] = {}
    for key, image in images.items():
        try:
            name = Path(_at(files, whole_number(key))).name
            fields: dict[str, Any] = {"bbox_labels": [_at(classes, label) for label in image["bbox_labels"]]}
            if "rel_labels" in image:
                fields["rel_labels"] = [_at(predicates, label) for label in image["rel_labels"]]
            if any(len(row) != len(predicates) for row in image.get("rel_all_scores", ())):
                raise ValueError(f"rows of rel_all_scores must have {len(predicates)} numbers")
            if "rel_all_scores" in image:
                fields["rel_all_scores"] = [[row[column] for column in columns] for row in image["rel_all_scores"]]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, image {key!r}: must fit the lists of {info.name} ({error})") from error
        if name in read:
            raise InputError(f"{info}: every image must have its own file name, but {name!r} occurs twice")
        read[name] = image | fields
    return read


def _at(names: Sequence[str], number: Any) -> str:
    """Return a name by its number. Python would count a negative number from the end."""
    if type(number) is not int or number < 0:
        raise IndexError(f"{number!r} is no number of a name")
    return names[number]
