"""The compiled core `sgalign._C`, which is loaded at its first use."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

from sgalign.ops._source_digest import source_digest

ROOT = Path(__file__).resolve().parents[2]  # root of the source tree, or site-packages
BUILD = "run `pip install .` in the root of sgalign's source tree"

_forked = False  # True in a process that was forked after this import


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def threads() -> int:
    """Return the number of threads for a call of the core: torch's number, or 1 in a forked process.

    A forked process does not have its parent's threads, and GNU's OpenMP would wait for them forever.
    """
    return 1 if _forked else torch.get_num_threads()


@functools.cache
def load() -> ModuleType:
    """Load and return `sgalign._C`.

    Raises:
        ImportError: if it was never built, was built from other sources, or does not load. If a build is needed, the
            message names the command.
    """
    try:
        core = importlib.import_module("sgalign._C")
    except ModuleNotFoundError as error:
        if error.name != "sgalign._C":
            raise
        raise ImportError(f"sgalign's compiled core is not built in {ROOT}: {BUILD}") from None
    if (ROOT / "csrc" / "kernels.h").exists() and core.sources != source_digest(ROOT / "csrc"):
        raise ImportError(f"sgalign's compiled core was built from other sources than those in {ROOT}: {BUILD}")
    return core


@functools.cache
def problem() -> str | None:
    """Return a sentence that says why the core cannot be used, or None if it can."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return None
