"""A record of everything that a reader refuses, leaves out, changes or finds odd in a data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sgalign.errors import InputError

BadRows = Literal["error", "skip"]
Outcome = Literal["refused", "left out", "clipped", "found"]
EXAMPLES = 3  # examples per finding, enough to see the pattern
REMEDY = "sgalign check lists all bad rows of a data set, and bad_rows: skip leaves them out"


@dataclass
class Finding:
    """Rows of a data set with the same fault or the same fate.

    Attributes:
        outcome: what happens to the rows. "refused" rows raise an error, unless `bad_rows` is "skip".
        what: noun phrase for one of the rows, such as "relation to a missing object".
        count: number of rows.
        examples: up to `EXAMPLES` sentences, each about one row.
    """

    outcome: Outcome
    what: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return counted(self.count, self.what)


class Findings:
    """The findings of one reader.

    A reader records bad rows and skips them. At its end it calls `settle`, which raises an error about the bad rows
    unless they are to be skipped, and says in one line which rows were left out or changed.

    Args:
        where: the file or folder and the split that is read, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.causes: list[str] = []  # sentences about the likely cause of many findings
        self._found: dict[tuple[Outcome, str], Finding] = {}

    def __iter__(self) -> Any:
        return iter(self._found.values())

    def add(self, outcome: Outcome, what: str, examples: str | Sequence[str] = (), count: int | None = None) -> None:
        """Count rows.

        Args:
            outcome: as in `Finding`.
            what: as in `Finding`.
            examples: sentence about the row, or sentences about some of the rows.
            count: number of rows. If None, 1.
        """
        count = 1 if count is None else count
        if count:
            finding = self._found.setdefault((outcome, what), Finding(outcome, what))
            finding.count += count
            some = [examples] if isinstance(examples, str) else examples
            finding.examples += some[: EXAMPLES - len(finding.examples)]

    def refuse(self, what: str, example: str) -> None:
        """Count a bad row. `example` is the message of the error."""
        self.add("refused", what, example)

    def of(self, outcome: Outcome) -> list[Finding]:
        """Return the findings with this outcome."""
        return [finding for finding in self if finding.outcome == outcome]

    def settle(self, bad_rows: BadRows) -> None:
        """Raise an error if there are bad rows and they must not be skipped. Otherwise, log the findings in one line.

        Raises:
            ValueError: if `bad_rows` is "error" and a row was refused. The message is about the first such row.
        """
        if bad_rows not in ("error", "skip"):
            raise InputError(f"bad_rows must be 'error' or 'skip', got {bad_rows!r}")
        refused = self.of("refused")
        if refused and bad_rows == "error":
            more = sum(finding.count for finding in refused) - 1
            others = f" ({more:,} more bad row{'s' * (more > 1)})" if more else ""
            raise InputError(f"{refused[0].examples[0]}{others}; {REMEDY}")
        self.say()

    def say(self) -> None:
        """Log one line with all findings, and one line per likely cause, if there are any."""
        for line in (*([str(self)] if self._found else ()), *(f"{self.where}: {cause}" for cause in self.causes)):
            say(line)

    def __str__(self) -> str:
        parts = []
        for verb, outcomes in (("left out", ("refused", "left out")), ("clipped", ("clipped",)), ("found", ("found",))):
            if of_verb := [str(finding) for finding in self if finding.outcome in outcomes]:
                parts.append(f"{verb} {', '.join(of_verb)}")
        return f"{self.where}: {'; '.join(parts)}"


def say(line: str) -> None:
    """Log a line about the data, as a warning of the logger "sgalign".

    If several processes read the data, only the first one logs.
    """
    if next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0") == "0":
        logging.getLogger("sgalign").warning(line)


def counted(count: int, what: str) -> str:
    """Return a count with a noun phrase, such as "2 boxes beyond the image". The phrase begins with the noun."""
    noun, space, rest = what.partition(" ")
    plural = "" if count == 1 else "es" if noun.endswith("x") else "s"
    return f"{count:,} {noun}{plural}{space}{rest}"
