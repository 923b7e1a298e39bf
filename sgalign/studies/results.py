"""The results of runs, one file in the folder of each run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from sgalign.errors import InputError, shown
from sgalign.files import read_json, write_json

DEPTH = 100  # number of best triplets per image that are searched for relations
RESULT = "result.json"
REMEDY = "delete the folder and run sgalign ablate again"


class Cost(TypedDict, total=False):
    """The time and memory that a run takes. Other programs on the machine make the times longer."""

    device: str  # name of the processor or GPU
    parameters: int  # number of trained parameters
    step: float  # median seconds per training step, with the reading of the batch
    training: float  # seconds of training and validation
    test: float  # seconds of the test
    memory: int  # largest memory in bytes: of the GPU if one was used, otherwise of the process


class Result(TypedDict):
    """The content of the file of one run."""

    seed: int
    settings: dict[str, Any]  # runs with equal settings differ only in the seed
    curve: list[dict[str, float]]  # figures of each validation, with its `epoch` and `step`
    epoch: int  # index of the tested validation in `curve`, from 1
    test: dict[str, float]  # test figures of the weights of this validation
    groups: dict[str, list[str]]  # names of the predicates in each group
    images: list[str]  # ids of the test images
    predicates: list[list[int]]  # predicate of each relation, for each test image
    ranks: list[list[int]]  # rank from 0 of the first triplet that finds each relation; `DEPTH` if none does
    cost: Cost


def digest(content: Any) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def run_folder(out: Path, settings: dict[str, Any], seed: int) -> Path:
    """Return the folder of a run with these settings and this seed."""
    return out / "runs" / f"{digest(settings)}_{seed}"


def write_result(folder: Path, result: Result) -> None:
    """Write the result of a run, with a digest of it. The file appears only when it is complete."""
    write_json(folder / RESULT, {**result, "digest": digest(result)})


def _malformed(result: dict[str, Any]) -> str | None:
    """Return the name of the first entry that does not have the form of `Result`, or None."""

    def figures(values: Any) -> bool:
        return isinstance(values, dict) and all(type(value) in (int, float) for value in values.values())

    def rows(values: Any, kind: type) -> bool:
        lists = isinstance(values, list) and all(isinstance(row, list) for row in values)
        return lists and all(type(value) is kind for row in values for value in row)

    def lengths(name: str, lowest: int, highest: int) -> list[int] | None:
        """Return the number of values for each image, or None unless all values are whole numbers in the range."""
        values = result[name]
        fits = rows(values, int) and all(lowest <= value <= highest for row in values for value in row)
        return list(map(len, values)) if fits else None

    curve, images, cost = result["curve"], result["images"], result["cost"]
    others = {key: value for key, value in cost.items() if key != "device"} if isinstance(cost, dict) else None
    groups = result["groups"]
    are_groups = isinstance(groups, dict) and rows(list(groups.values()), str)
    grouped = [name for names in groups.values() for name in names] if are_groups else []  # every predicate
    predicates, ranks = lengths("predicates", 1, len(grouped)), lengths("ranks", 0, DEPTH)
    needed = {"epoch", "step", *curve[0]} if isinstance(curve, list) and curve and figures(curve[0]) else set()
    forms = {
        "seed": type(result["seed"]) is int,
        "settings": isinstance(result["settings"], dict),
        "curve": bool(needed) and all(figures(point) and point.keys() >= needed for point in curve),
        "epoch": type(result["epoch"]) is int and isinstance(curve, list) and 1 <= result["epoch"] <= len(curve),
        "test": figures(result["test"]),
        "groups": are_groups and len(set(grouped)) == len(grouped),
        "images": rows([images], str),
        "predicates": predicates is not None and isinstance(images, list) and len(predicates) == len(images),
        "ranks": ranks is not None and ranks == predicates,
        "cost": figures(others)
        and isinstance(cost.get("device"), str)
        and cost.keys() >= {"training", "parameters", "memory"},
    }
    return next((name for name, fits in forms.items() if not fits), None)


def read_result(folder: Path) -> Result | None:
    """Return the result of a run, or None if it is not complete.

    Raises:
        ValueError: if the file was edited, or if the folder was renamed or copied. The message names the file.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_json(path, REMEDY)
    if not isinstance(result, dict) or not result.keys() >= Result.__required_keys__ | {"digest"}:
        raise InputError(f"{path}: must be a result that sgalign ablate wrote: {REMEDY}")
    if result.pop("digest") != digest(result):
        raise InputError(f"{path}: must be as sgalign ablate wrote it, but was edited: {REMEDY}")
    if wrong := _malformed(result):
        raise InputError(f"{path}: {wrong} must be as sgalign ablate wrote it, got {shown(result[wrong])}: {REMEDY}")
    if folder.name != run_folder(folder, result["settings"], result["seed"]).name:
        raise InputError(f"{path}: must be in its own folder, but the folder was renamed or the file copied: {REMEDY}")
    return result  # type: ignore[return-value]
