"""Functions that read the names of classes from the forms that data sets use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from sgalign.errors import InputError
from sgalign.numbers import whole_number

BACKGROUND = "__background__"
# Names of the background in public data sets, in lower case and without punctuation.
BACKGROUND_NAMES = {"background", "bg", "norelation", "norel", "nopredicate", "noobject", "nothing", "none", "na"}


class Classes(NamedTuple):
    """The classes of a file.

    Attributes:
        names: `__background__`, then the class names in the order of their ids.
        numbers: number of each class by its id in the file, as `id_text` writes it. Classes count from 1, and the
            file's background, if it has one, is 0.
    """

    names: list[str]
    numbers: dict[str, int]

    def number(self, where: str, class_id: Any) -> int:
        """Return the number of a class.

        Raises:
            ValueError: if there is no such class, or if it is the background.
        """
        number = self.numbers.get(id_text(class_id) or "")
        if number is None:
            ids = [known for known, number in self.numbers.items() if number]
            first = whole_number(ids[0])
            if len(ids) > 3 and first is not None and ids == [str(first + place) for place in range(len(ids))]:
                some = f"{ids[0]} to {ids[-1]}"
            else:
                some = ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
            raise InputError(f"{where} must be the id of a class ({some}), got {class_id!r}")
        if number == 0:
            raise InputError(f"{where} must not be the background, got {class_id!r}")
        return number


def read_classes(where: str, entries: Iterable[tuple[Any, Any]], *, has_background: bool = True) -> Classes:
    """Return the classes of a file. The background may be the first of them, under any of its usual names.

    Args:
        where: the file and field, for messages.
        entries: id and name of each class. A name may also be an object with the key `name`, and then its key `id`, if
            it has one, replaces the id.
        has_background: False if the background is never among the classes, so every name stands for a class.

    Raises:
        ValueError: if there is no class, a name is not text or is empty, an id or a name occurs twice, or a class other
            than the first one has a name of the background.
    """
    named = [_entry(where, class_id, name) for class_id, name in entries]
    # Python converts at most 4300 digits to a number.
    if all(re.fullmatch(r"-?[0-9]{1,16}", class_id) for class_id, _ in named):
        named.sort(key=lambda entry: int(entry[0]))
    for what, values in (("id", [i for i, _ in named]), ("name", [name for _, name in named])):
        if len(set(values)) < len(values):
            twice = next(value for place, value in enumerate(values) if value in values[:place])
            raise InputError(f"{where}: every class must have its own {what}, but {twice!r} occurs twice; rename one")
    first = 0 if has_background and named and is_background(named[0][1]) else 1
    wrong = [name for _, name in named[1 - first :] if name == BACKGROUND or (has_background and is_background(name))]
    if wrong:
        raise InputError(
            f"{where}: the background must be the first class, but {wrong[0]!r} is not; move it there, or rename the "
            "class if it is not the background"
        )
    if len(named) + first < 2:
        raise InputError(f"{where}: must have a class besides the background, got {[name for _, name in named]}")
    names = [BACKGROUND, *(name for _, name in named[1 - first :])]
    return Classes(names, {class_id: number for number, (class_id, _) in enumerate(named, first)})


def first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """Return a phrase about the first class in which two lists of names differ."""
    number = next(i for i, pair in enumerate(zip_longest(names, others)) if pair[0] != pair[1])
    one, other = (repr(of[number]) if number < len(of) else "missing" for of in (names, others))
    return f"class {number} is {other} instead of {one}"


def is_background(name: str) -> bool:
    """Return True if a name is one of the usual names of the background, in any case and with any punctuation."""
    return re.sub(r"[\W_]+", "", name).lower() in BACKGROUND_NAMES


def id_text(value: Any) -> str | None:
    """Return an id as text, so that 7, 7.0 and "7" are the same id. Return None if the value cannot be an id."""
    if isinstance(value, str):
        return value
    whole = whole_number(value)
    return None if whole is None else str(whole)


def _entry(where: str, class_id: Any, name: Any) -> tuple[str, str]:
    if isinstance(name, dict):
        class_id, name = name.get("id", class_id), name.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: every class must have a name that is text and not empty, got {name!r}")
    text = id_text(class_id)
    if text is None:
        raise InputError(f"{where}: every class must have an id that is an integer or text, got {class_id!r}")
    return text, name
