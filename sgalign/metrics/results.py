"""Functions that format an evaluator's results as a text table and split the names of results."""

from __future__ import annotations

from collections.abc import Mapping

RANKS = ("PRank",)  # results that are mean ranks. All others are fractions


def table(figures: Mapping[str, float]) -> str:
    """Return the results as a table in percent, with one line per metric and one column per K.

    Results without a K follow after an empty line, one per line. Of these, the mean ranks in `RANKS` are not in
    percent. The results of single classes are left out. Results that are not defined are "nan".

    Args:
        figures: fractions by name, from an evaluator's `compute`.
    """
    rows: dict[str, dict[int, float]] = {}
    plain = {}
    for name, value in figures.items():
        metric, k, of = split_name(name)
        if is_of_class(name):
            continue
        if k is None:
            plain[metric] = value if metric in RANKS else 100 * value
        else:
            rows.setdefault(f"{metric} {of}".strip(), {})[k] = value
    width = max(map(len, (*rows, *plain))) + 2
    columns = sorted({k for row in rows.values() for k in row})
    lines = ["".join([" " * width, *(f"{'@' + str(k):>8}" for k in columns)])] if rows else []
    for name, row in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in columns))
    between = [""] if lines and plain else []
    return "\n".join([*lines, *between, *(f"{name:{width}}{value:8.2f}" for name, value in plain.items())])


def split_name(name: str) -> tuple[str, int | None, str]:
    """Split a result's name into metric, K and subset, such as "mR", 50 and "head" for "mR@50/head".

    K is None if the name has no number there, and the metric of "R@inf" is "R@inf". The subset is empty if the name has
    none.
    """
    name, _, of = name.partition("/")
    metric, _, k = name.partition("@")
    return (metric, int(k), of) if k.isdecimal() else (name, None, of)


def is_of_class(name: str) -> bool:
    """Return True if a result is that of a single class, such as "R@50/on" or "AP/dog". Its name may be any text."""
    return name.startswith(("R@", "AP/")) and "/" in name
