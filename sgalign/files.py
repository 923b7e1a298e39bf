"""Files that are read with a clear error, and that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import torch

from sgalign.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file, beside `path`; it takes its place when the block ends without an error, and goes with one.

    What was at `path` stays as it was until then, whatever happens: a full disk, an interruption, a kill, which leaves
    the file beside it. A link stays one; devices and pipes are written to themselves.

    Raises:
        OSError: as `check_writable`.
    """
    path = Path(path)
    check_writable(path)
    if _is_device(path):
        yield path
        return
    partial = _beside(path)
    try:
        yield partial
        partial.replace(path.resolve())
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Tries to write beside a file, whose folder is made: what cannot be is known before the work, not after it.

    Raises:
        OSError: `path` is a folder, or nothing can be written in its own; names it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, must be a file", str(path))
    if not _is_device(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _beside(path).touch()
        _beside(path).unlink()


def _beside(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _is_device(path: Path) -> bool:
    return (path.exists() and not path.is_file()) or path.is_relative_to("/dev")


@contextmanager
def hdf5_written_whole(path: str | Path) -> Iterator[h5py.File]:
    """`written_whole` of an HDF5 file.

    HDF5 writes through Python: by itself it ends in a segmentation fault where a file cannot grow, because of a full
    disk or a quota. This way that is an OSError.
    """
    with written_whole(path) as partial, partial.open("w+b") as raw, h5py.File(raw, "w") as file:
        yield file


def read_json(path: Path, remedy: str = "download or write it again") -> Any:
    """What a file says.

    Args:
        remedy: ends the sentence where it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # with a mark of the byte order or without
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise InputError(f"{path}: not JSON, or cut short ({error}); {remedy}") from error


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def save_figure(figure: Figure, path: Path) -> None:
    """A picture of 120 dots an inch, PNG."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def read_tensors(path: str | Path, what: str) -> Any:
    """What `torch.save` has written, on the CPU; nothing but tensors and plain values is unpickled from the file.

    Args:
        what: the file should be, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of torch's, is cut short, or holds other objects; names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything
        raise InputError(f"{path}: not a {what}, or cut short ({type(error).__name__})") from error
