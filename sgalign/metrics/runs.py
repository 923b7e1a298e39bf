"""Files of training runs, as `sgalign ablate` writes them: what one arm of a study reached with one seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from sgalign.errors import InputError
from sgalign.files import read_json, write_json

DEPTH = 100  # of the ranks that are kept


class Run(TypedDict):
    """The content of a run's file: the results of one arm of a study with one seed."""

    seed: int
    settings: dict[str, Any]  # with `data` and `epochs`: runs of equal settings differ in the seed alone
    seconds: int  # that training and test took
    curve: list[dict[str, float]]  # validation figures after each epoch
    epoch: int  # the best, from 1
    test: dict[str, float]  # figures of the best epoch
    groups: dict[str, list[str]]  # names of predicates
    predicates: list[list[int]]  # of the relations of each test image
    ranks: list[list[int]]  # of the first triplet that finds each of these relations, from 0, at most `DEPTH`


def run_path(folder: Path, settings: dict[str, Any], seed: int) -> Path:
    """Return the file of a run of these settings and this seed."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / "runs" / f"{digest[:12]}_{seed}.json"


def write_run(path: Path, run: Run) -> None:
    """Write a run to a file, of `run_path`, which appears when it is complete."""
    write_json(path, run)


def read_runs(folder: Path) -> list[Run]:
    """Return all runs of a folder.

    Raises:
        ValueError: a file is not of a run; names it.
    """
    runs = []
    remedy = "delete it, run sgalign ablate again"
    for path in sorted((folder / "runs").glob("*.json")):
        run = read_json(path, remedy)
        is_run = isinstance(run, dict) and run.keys() >= Run.__required_keys__
        # The name tells settings and seed: copies and what was edited are no runs.
        if not is_run or path != run_path(folder, run["settings"], run["seed"]):
            raise InputError(f"{path}: not a run of sgalign ablate, or renamed: {remedy}")
        runs.append(run)
    return runs
