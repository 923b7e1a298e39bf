"""A record of the rows of a data set that a reader refuses, leaves out, clips or finds unusual."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sgalign.errors import InputError

BadRows = Literal["error", "skip"]
Outcome = Literal["refused", "left out", "clipped", "found"]
EXAMPLES = 3  # examples per finding, enough to see the pattern
REMEDY = "sgalign check lists all bad rows of a data set, and the option bad_rows with the value skip leaves them out"


@dataclass
class Finding:
    """Rows of a data set with the same fault and the same outcome.

    Attributes:
        outcome: what happens to the rows. "refused" rows raise an error, unless `bad_rows` is "skip".
        kind: noun phrase for one of the rows, such as "relation to a missing object".
        count: number of rows.
        examples: up to `EXAMPLES` sentences, each about one row.
    """

    outcome: Outcome
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return counted(self.count, self.kind)


class Findings:
    """The findings of one reader.

    A reader records bad rows and skips them. At its end it calls `raise_or_log`, which raises an error about the bad
    rows unless they are to be skipped, and logs the number of rows that were left out or clipped.

    Args:
        source: the file or folder and the split that is read, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.causes: list[str] = []  # sentences about the likely cause of many findings
        self._found: dict[tuple[Outcome, str], Finding] = {}

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found.values())

    def add(self, outcome: Outcome, kind: str, examples: str | Sequence[str] = (), count: int = 1) -> None:
        """Count rows.

        Args:
            outcome: as in `Finding`.
            kind: as in `Finding`.
            examples: sentence about the row, or sentences about some of the rows.
            count: number of rows.
        """
        if count:
            finding = self._found.setdefault((outcome, kind), Finding(outcome, kind))
            finding.count += count
            some = [examples] if isinstance(examples, str) else examples
            finding.examples += some[: EXAMPLES - len(finding.examples)]

    def refuse(self, kind: str, example: str) -> None:
        """Count a bad row. `example` is the message of the error."""
        self.add("refused", kind, example)

    def with_outcome(self, outcome: Outcome) -> list[Finding]:
        """Return the findings with this outcome."""
        return [finding for finding in self if finding.outcome == outcome]

    def raise_or_log(self, bad_rows: BadRows) -> None:
        """Raise an error if there are bad rows and they must not be skipped. Otherwise, log the findings.

        Raises:
            ValueError: if `bad_rows` is "error" and a row was refused. The message is about the first such row.
        """
        if bad_rows not in ("error", "skip"):
            raise InputError(f"bad_rows must be 'error' or 'skip', got {bad_rows!r}")
        refused = self.with_outcome("refused")
        if refused and bad_rows == "error":
            more = sum(finding.count for finding in refused) - 1
            others = f" ({more:,} more bad row{'s' * (more > 1)})" if more else ""
            raise InputError(". ".join([f"{refused[0].examples[0]}{others}; {REMEDY}", *self.causes]))
        self.log()

    def log(self) -> None:
        """Log one line with all findings, and one line per likely cause, if there are any."""
        for line in (*([str(self)] if self._found else ()), *(f"{self.source}: {cause}" for cause in self.causes)):
            warn(line)

    def __str__(self) -> str:
        parts = []
        for verb, outcomes in (("left out", ("refused", "left out")), ("clipped", ("clipped",)), ("found", ("found",))):
            if of_verb := [str(finding) for finding in self if finding.outcome in outcomes]:
                parts.append(f"{verb} {', '.join(of_verb)}")
        return f"{self.source}: {'; '.join(parts)}"


def warn(line: str) -> None:
    """Log a line about the data, as a warning of the logger "sgalign".

    If several processes read the data, only the first one logs.
    """
    ranks = ("RANK",) if os.environ.get("RANK") else ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    if all(os.environ.get(name, "").strip("0") == "" for name in ranks):
        logging.getLogger("sgalign").warning(line)


def counted(count: int, kind: str) -> str:
    """Return a count with a noun phrase, such as "2 boxes beyond the image". The phrase begins with the noun."""
    noun, space, rest = kind.partition(" ")
    plural = "" if count == 1 else "es" if noun.endswith("x") else "s"
    return f"{count:,} {noun}{plural}{space}{rest}"
