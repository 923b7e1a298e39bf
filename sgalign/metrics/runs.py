"""Files of training runs, as `sgalign ablate` writes them: what one arm of a study reached with one seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sgalign.errors import InputError
from sgalign.files import read_json

DEPTH = 100  # of the ranks that are kept
FIELDS = {"seed", "settings", "curve", "epoch", "test", "groups", "predicates", "ranks"}

Run = dict[str, Any]


def run_path(folder: Path, of: dict[str, Any], seed: int) -> Path:
    """The file of a run of these `settings`."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder / "runs" / f"{digest[:12]}_{seed}.json"


def read_runs(folder: Path) -> list[Run]:
    """All runs of a folder.

    Raises:
        ValueError: a file is not of a run; names it.
    """
    runs = []
    remedy = "delete it, run sgalign ablate again"
    for path in sorted((folder / "runs").glob("*.json")):
        run = read_json(path, remedy)
        is_run = isinstance(run, dict) and run.keys() >= FIELDS
        # The name tells settings and seed: copies and what was edited are no runs.
        if not is_run or path != run_path(folder, run["settings"], run["seed"]):
            raise InputError(f"{path}: not a run of sgalign ablate, or renamed: {remedy}")
        runs.append(run)
    return runs
