"""The files that `sgalign ablate` writes. Each has the results of one run, which is an arm of a study with a seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from sgalign.errors import InputError
from sgalign.files import read_json, write_json

DEPTH = 100  # number of best triplets per image that are searched for relations


class Run(TypedDict):
    """The content of one run's file."""

    seed: int
    settings: dict[str, Any]  # with `data` and `epochs`; runs with equal settings differ only in the seed
    seconds: int  # duration of training and test
    curve: list[dict[str, float]]  # validation results after each epoch
    epoch: int  # best epoch, from 1
    test: dict[str, float]  # test results of the best epoch
    groups: dict[str, list[str]]  # names of the predicates in each group
    predicates: list[list[int]]  # predicate of each relation, for each test image
    ranks: list[list[int]]  # rank from 0 of the first triplet that finds each relation; `DEPTH` if none does


def run_path(folder: Path, settings: dict[str, Any], seed: int) -> Path:
    """Return the path of the file for a run with these settings and this seed."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / "runs" / f"{digest[:12]}_{seed}.json"


def write_run(path: Path, run: Run) -> None:
    """Write a run to its file, whose path comes from `run_path`. The file appears only when it is complete."""
    write_json(path, run)


def read_runs(folder: Path) -> list[Run]:
    """Return all runs in a folder.

    Raises:
        ValueError: if `write_run` did not write a file, or if a file was renamed. The message names the file.
    """
    runs = []
    remedy = "delete it and run sgalign ablate again"
    for path in sorted((folder / "runs").glob("*.json")):
        run = read_json(path, remedy)
        is_run = isinstance(run, dict) and run.keys() >= Run.__required_keys__
        # The name encodes settings and seed, so copies and edited files are refused.
        if not is_run or path != run_path(folder, run["settings"], run["seed"]):
            raise InputError(f"{path}: must be a file that sgalign ablate wrote, under its original name: {remedy}")
        runs.append(run)
    return runs
