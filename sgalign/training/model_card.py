"""The model card of a model: what it is, how it was trained, what it reached and how to use it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgalign.errors import InputError, shown
from sgalign.files import read_json
from sgalign.metrics.results import is_of_class, split_name
from sgalign.numbers import parse_number
from sgalign.training.pretrained import training_of, without_paths

SYSTEMS = {
    "AlignMotifsModule": "Neural Motifs with a mirrored relation branch (Align-Motifs)",
    "AlignSGTRModule": "SGTR with a mirrored relation branch (Align-SGTR)",
    "DetectorModule": "Faster R-CNN, the object detector of Motifs",
    "EntityDetectorModule": "DETR, the object detector of SGTR",
    "MotifsModule": "Neural Motifs",
    "SGTRModule": "SGTR",
}
PROTOCOLS = {
    "predcls": "PredCls: it gets the boxes and classes of the objects, and predicts the relations",
    "sgcls": "SGCls: it gets the boxes of the objects, and predicts their classes and relations",
    "sgdet": "SGDet: it gets only the image, and predicts objects and relations",
}
FIGURES = (
    "R@K is the recall of the K best triplets, mR@K its mean over the predicates, F@K the harmonic mean of both, and "
    "A@K the accuracy on pairs that have a relation. `z` stands for triplets that training does not have, `ng` for no "
    "graph constraint. `found` and `relations_found` are the shares of objects and of relations whose boxes and "
    "classes are found."
)


def model_card(
    checkpoint: Mapping[str, Any], name: str, results: Mapping[str, float] | None = None, license: str | None = None
) -> str:
    """Return the text of a model card, made from a checkpoint.

    Args:
        checkpoint: the content of a checkpoint or of a folder, as for `write_pretrained`.
        name: title of the card.
        results: figures of the test split by name, such as `R@50`, from 0 to 1. If None, the card says that there are
            none.
        license: license of the weights, as an identifier such as `apache-2.0`. If None, the card names no license.
    """
    saved, options = checkpoint["sgalign"], without_paths(checkpoint["hyper_parameters"])
    training = training_of(checkpoint)
    head = ["---", "library_name: sgalign", "tags:", "- scene-graph-generation"]
    if license is not None:
        head.append(f"license: {json.dumps(license)}")
    objects, predicates = saved["object_names"][1:], saved["predicate_names"][1:]
    protocol = PROTOCOLS.get(str(options.get("protocol")), "")
    parts = [
        "\n".join([*head, "---"]),
        f"# {name}",
        f"{SYSTEMS.get(saved['module'], saved['module'])}, trained for "
        f"{checkpoint.get('global_step', 0)} steps" + (f". Protocol {protocol}." if protocol else "."),
        _usage(str(options.get("protocol"))),
        "## Results",
        _results(training.get("best", {}), results),
        "## Classes",
        f"{len(objects)} object classes: {', '.join(objects)}.",
        f"{len(predicates)} predicates: {', '.join(predicates)}.",
        "The model knows no other classes. Do not expect useful predictions on images that differ from its training "
        "data.",
        "## Training",
        _table("option", training.get("data", {}), prefix="data."),
        _table("option", options, prefix="model."),
        "Options that are paths are reduced to their last part.",
        "## Source",
        "Bicheng Xu, Renjie Liao and Leonid Sigal: Self-Supervised Relation Alignment for Scene Graph Generation, WACV "
        "2024. This model comes from an implementation by others, and is not the authors' model.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(protocol: str) -> str:
    given = "" if protocol == "sgdet" else " --detections FILE"
    return f"""## Use

Give the folder of this file, or its id on the Hugging Face Hub, as `--checkpoint`:

```sh
pip install 'sgalign[train]'
sgalign predict IMAGES --checkpoint FOLDER{given} --html
```

In Python, `sgalign.training.load_module("FOLDER")` returns the model. A training run cannot resume from it."""


def _results(best: Mapping[str, float], results: Mapping[str, float] | None) -> str:
    lines = [
        f"Best figure on the validation split: {name.removeprefix('val/')} {100 * value:.1f} %."
        for name, value in best.items()
    ]
    if results is None:
        lines.append("This card has no figures of the test split.")
        return " ".join(lines)
    names = sorted((name for name in results if not is_of_class(name)), key=_place)
    percent = {name: f"{100 * results[name]:.1f}" for name in names}
    return "\n\n".join([*lines, "On the test split, in percent:", _table("figure", percent), FIGURES])


def _place(name: str) -> tuple[bool, str, str, int]:
    """Return the place of a figure in the table: recall and mean recall first, each with rising numbers of triplets."""
    metric, k, group = split_name(name)
    return metric not in ("R", "mR"), metric, group, k or 0


def _table(kind: str, values: Mapping[str, Any], prefix: str = "") -> str:
    if not values:
        return ""
    rows = [f"| {prefix}{name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"| {kind} | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")


def read_results(path: Path) -> dict[str, float]:
    """Return the figures of the test split in a file.

    Args:
        path: `metrics.csv` of `sgalign test`, or the JSON file of `sgalign evaluate --json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no figures of the test split.
    """
    if path.suffix == ".json":
        content = read_json(path)
        figures = content if isinstance(content, dict) else {}
    else:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file)
                rows, columns = list(table), list(table.fieldnames or ())
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: must be a CSV file in UTF-8 ({error})") from error
        if twice := [name for name in columns if name.startswith("test/") and columns.count(name) > 1]:
            raise InputError(f"{path}: must have columns with different names, but {shown(twice[0])} occurs twice")
        figures = {
            name.removeprefix("test/"): row[name]
            for row in rows
            for name in row
            if name and name.startswith("test/") and row[name]
        }
    numbers = {}
    for name, value in figures.items():
        try:
            numbers[name] = parse_number(str(value))
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise InputError(f"{path}: {shown(name)} must be a finite number, got {shown(value)}")
    if not numbers:
        raise InputError(f"{path}: must have figures of the test split, got none")
    return numbers
