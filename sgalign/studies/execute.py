"""One run of a study: `python -m sgalign.studies.execute FOLDER`.

The command does what is left of the run: `sgalign fit` with the config in the folder, from the run's latest checkpoint
if it has one, then `sgalign test` with the best checkpoint. It also works under torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sgalign.errors import InputError, shown
from sgalign.files import read_tensors
from sgalign.studies import claims
from sgalign.studies.recording import BEST, LAST, PROGRESS, TRAINING, WITHIN
from sgalign.studies.results import RESULT
from sgalign.training.lightning_cli import main as lightning

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # set by torchrun, by Lightning for further processes, and by srun


def execute(folder: Path) -> int:
    """Do what is left of a run, and return the exit code. It is `claims.LOST` if another process does the run.

    Args:
        folder: folder of the run, with its config.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder}: must be the folder of a run that sgalign ablate has made")
    if (folder / RESULT).is_file():
        return 0
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    if rank != "0":
        return _execute(folder) if claims.follow(folder) else claims.LOST
    claim = claims.take(folder)
    if claim is None:
        return claims.LOST
    try:
        for left in [*folder.glob("*.ckpt.*.partial"), folder / PROGRESS]:  # left by a kill
            left.unlink(missing_ok=True)
        return 0 if (folder / RESULT).is_file() else _execute(folder)
    finally:
        claim.release()


def _execute(folder: Path) -> int:
    config = ["--config", str(folder / "config.yaml")]
    if not (folder / TRAINING).is_file():
        checkpoint = latest_checkpoint(folder)
        resume = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        if code := lightning(["fit", *config, *resume]):
            return code
    for checkpoint in [*folder.glob(f"{BEST}-step=*.ckpt"), folder / f"{WITHIN}.ckpt"]:  # only training needs them
        checkpoint.unlink(missing_ok=True)
    return lightning(["test", *config, "--ckpt_path", str(folder / f"{BEST}.ckpt")])


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the latest step that a run can resume from, or None if it has none."""
    # If both are of the same step, the one from the end of the epoch was written later.
    there = [path for name in (LAST, WITHIN) if (path := folder / f"{name}.ckpt").is_file()]
    try:
        steps = {path: _step(path) for path in there}
    except InputError as error:
        raise InputError(f"{error}. Delete it, and the run goes on from an earlier step") from error
    return max(steps, key=lambda path: steps[path], default=None)


def _step(path: Path) -> int:
    checkpoint = read_tensors(path, "checkpoint")
    step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
    if type(step) is not int:
        raise InputError(f"{path}: global_step must be a whole number, got {shown(step)}")
    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser("python -m sgalign.studies.execute", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the run, which sgalign ablate has made")
    folder = parser.parse_args(arguments).folder
    try:
        return execute(folder)
    except (InputError, OSError) as error:
        print(f"sgalign: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
