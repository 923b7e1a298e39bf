"""Small sets of test cases that still combine the values of any few parameters in every way."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def cover(*parameters: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Return cases that contain every combination of values of any `strength` parameters at least once.

    Most defects depend on one or two parameters, so a cover finds them with far fewer cases than the whole grid. Cases
    are chosen greedily, in an order that is the same on every machine.
    """
    indices = list(itertools.product(*(range(len(values)) for values in parameters)))
    groups = list(itertools.combinations(range(len(parameters)), strength))

    def meetings(case: tuple[int, ...]) -> set[tuple[Any, ...]]:
        return {(group, tuple(case[place] for place in group)) for group in groups}

    missing = set().union(*map(meetings, indices))
    chosen = []
    while missing:
        best = max(indices, key=lambda case: len(missing & meetings(case)))
        missing -= meetings(best)
        chosen.append(tuple(values[index] for values, index in zip(parameters, best)))
    return chosen


def slow_except(fast: Sequence[str], names: Iterable[str]) -> list[Any]:
    """Return names as cases of a test that is slow for all names except those in `fast`."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]
