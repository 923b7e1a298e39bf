"""Word vectors of class names, from the usual text format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sgalign.errors import InputError


def read_word_vectors(path: str | Path, names: list[str]) -> Tensor:
    """The vector of each name, from a GloVe or word2vec text file: a word a line, then its numbers.

    A name's row is that of the whole name (`_` for a space, as in `traffic_light`), else that of its longest word, else
    standard normal: the rule of Scene-Graph-Benchmark. `__background__` is in no such file, so its row is random.
    Random rows depend on the name alone, never on the others asked for.

    Args:
        path: the file; a first line with count and dimension (word2vec) is passed over.
        names: class names.

    Returns:
        float32 `[len(names), D]`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line asked for is not D finite numbers, or the file is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"word vectors {path} not found: give a text file such as glove.6B.200d.txt")
    # The first of equally long words, as there.
    candidates = {name: (name.replace(" ", "_"), max(name.split() or [name], key=len)) for name in names}
    wanted = {word for pair in candidates.values() for word in pair}
    rows: dict[str, Tensor] = {}
    dimension = 0
    # Public files have stray bytes in words that nobody asks for.
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            # Only rows asked for are split: GloVe has 400 thousand others.
            word, *rest = line.split(None, 1) or [""]
            if dimension and word not in wanted:
                continue
            numbers = "".join(rest).split()
            if number == 1 and len(numbers) == 1:
                continue
            dimension = dimension or len(numbers)
            if word in wanted and word not in rows:
                rows[word] = _vector(numbers, dimension, f"{path}, line {number}, word {word!r}")
    if not dimension:
        raise InputError(f"word vectors {path} must hold a word and its numbers a line, got an empty file")
    table = torch.empty(len(names), dimension)
    for row, name in zip(table, names, strict=True):
        known = [rows[word] for word in candidates[name] if word in rows]
        row.copy_(known[0] if known else _random_row(name, dimension))
    return table


def _vector(numbers: list[str], dimension: int, where: str) -> Tensor:
    try:
        vector = torch.tensor([float(number) for number in numbers])
    except ValueError as error:
        raise InputError(f"{where}: must be {dimension} numbers, {error}") from None
    if len(vector) != dimension or not vector.isfinite().all():
        raise InputError(f"{where}: must be {dimension} finite numbers, got {len(vector)}, is the file complete?")
    return vector


def _random_row(name: str, dimension: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randn(dimension, generator=torch.Generator().manual_seed(seed))
