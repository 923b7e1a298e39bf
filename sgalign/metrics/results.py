"""Names of the figures that an evaluator computes, and a text table of them."""

from __future__ import annotations

from collections.abc import Mapping


def table(figures: Mapping[str, float]) -> str:
    """Return a table in percent, a line a metric, a column a K; then what has no K. Single predicates are left out.

    Args:
        figures: of an evaluator's `compute`, fractions by name.
    """
    rows: dict[str, dict[int, float]] = {}
    plain = {}
    for name, value in figures.items():
        metric, k, of = split_name(name)
        if k is None:
            plain[metric] = value
        elif metric != "R" or not of:
            rows.setdefault(f"{metric} {of}".strip(), {})[k] = value
    width = max(map(len, (*rows, *plain))) + 2
    columns = sorted({k for row in rows.values() for k in row})
    lines = ["".join([" " * width, *(f"{'@' + str(k):>8}" for k in columns)])]
    for name, row in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in columns))
    return "\n".join([*lines, *(f"{name:{width}}{100 * value:8.2f}" for name, value in plain.items())])


def split_name(name: str) -> tuple[str, int | None, str]:
    """Return metric, K and subset of a figure's name: of "mR@50/head" they are "mR", 50 and "head".

    K is None and the subset empty where the name has none.
    """
    name, _, of = name.partition("/")
    metric, _, k = name.partition("@")
    return metric, int(k) if k else None, of
