"""Word vectors of class names, read from GloVe or word2vec text files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sgalign.data.class_names import BACKGROUND
from sgalign.data.findings import warn
from sgalign.errors import InputError, shown
from sgalign.numbers import parse_number


def read_word_vectors(path: str | Path, names: list[str]) -> Tensor:
    """Return the word vector of each name from a GloVe or word2vec text file.

    Each line of the file has a word followed by its numbers. As in Scene-Graph-Benchmark, the vector of a name is the
    first of these that is available:

    - the vector of the whole name, with `_` for a space, as in `traffic_light`;
    - the vector of its longest word;
    - a standard normal vector.

    No such file contains `__background__`, so its vector is random. Each random vector depends only on its own name. A
    warning names the other classes that get one.

    Args:
        path: the file. If the first line contains only count and dimension, as in word2vec files, it is skipped.
        names: class names.

    Returns:
        The vectors, float32 `[len(names), D]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a needed line does not have D finite numbers, or the file has a vector for none of the names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"word vectors {path} not found: give a text file such as glove.6B.200d.txt")
    # If several words are longest, the first of them is used, as in Scene-Graph-Benchmark.
    candidates = {name: (name.replace(" ", "_"), max(name.split() or [name], key=len)) for name in names}
    rows, dimension = _read(path, {word for pair in candidates.values() for word in pair})
    table = torch.empty(len(names), dimension)
    missing = []
    for row, name in zip(table, names, strict=True):
        known = [rows[word] for word in candidates[name] if word in rows]
        row.copy_(known[0] if known else _random_row(name, dimension))
        missing += [] if known or name == BACKGROUND else [name]
    if missing and not rows:
        raise InputError(f"word vectors {path} has a vector for none of the classes, such as {missing[0]!r}")
    if missing:
        warn(f"word vectors {path}: {len(missing)} of {len(names)} classes get random vectors: {shown(missing)}")
    return table


def _read(path: Path, wanted: set[str]) -> tuple[dict[str, Tensor], int]:
    """Return the vectors of the wanted words that a file has, and the dimension of its vectors."""
    rows: dict[str, Tensor] = {}
    dimension, line = 0, ""
    # Invalid bytes are replaced, because public files have them only in words that are not needed here.
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            # Only needed lines are split into numbers, because GloVe has 400 thousand lines.
            word, *rest = line.split(None, 1) or [""]
            if dimension and word not in wanted:
                continue
            numbers = "".join(rest).split()
            if number == 1 and len(numbers) == 1 and f"{word}{numbers[0]}".isdecimal():  # their number and dimension
                continue
            dimension = dimension or len(numbers)
            if word in wanted and word not in rows:
                rows[word] = _vector(numbers, dimension, f"{path}, line {number}, word {word!r}")
    if not dimension:
        raise InputError(f"word vectors {path} must have a word and its numbers on each line, got an empty file")
    if not line.endswith("\n"):
        warn(f"word vectors {path}: the last line has no end, so the file may be cut short")
    return rows, dimension


def _vector(numbers: list[str], dimension: int, where: str) -> Tensor:
    if not numbers:
        raise InputError(f"{where}: must be a vector of numbers, got none; the file may be incomplete")
    try:
        vector = torch.tensor([parse_number(number) for number in numbers])
    except ValueError as error:
        raise InputError(f"{where}: must be {dimension} numbers ({error})") from None
    if len(vector) != dimension or not vector.isfinite().all():
        raise InputError(
            f"{where}: must be {dimension} finite numbers, got {len(vector)} numbers, of which "
            f"{int(vector.isfinite().sum())} are finite; the file may be incomplete"
        )
    return vector


def _random_row(name: str, dimension: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randn(dimension, generator=torch.Generator().manual_seed(seed))
