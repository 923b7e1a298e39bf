"""Fonts that can show names in any script."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cache

from sgalign.data.findings import warn

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # DejaVu Sans, which comes with matplotlib, has it
BOXES = "Last Resort", "LastResort", ".LastResort"  # fonts that have a box for every character. One is matplotlib's
_warned: set[str] = set()


def families_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return the fonts that together show the most characters of some texts, and the characters that none has.

    The first font is DejaVu Sans. Others are added only for the characters that it lacks. matplotlib takes each
    character from the first font that has it. Before matplotlib 3.11, scripts that are written from right to left are
    drawn from left to right, and letters do not change their form beside others.
    """
    from matplotlib.font_manager import fontManager

    families, missing = ["DejaVu Sans"], {letter for text in texts for letter in text}
    for path in (entry.fname for entry in fontManager.ttflist if entry.name == families[0]):
        missing -= _characters(path)
    if missing:
        _find_new_fonts()
    candidates = sorted((entry.name, entry.fname) for entry in fontManager.ttflist) if missing else []
    for family, path in candidates:
        if family.startswith(BOXES):
            continue
        if found := missing & _characters(path):
            families.append(family)
            missing -= found
    unseen = missing - _warned
    if unseen and not _warned:
        some = "".join(sorted(unseen)[:10])
        warn(
            f"no installed font has the characters {some!r}, so pictures show {UNKNOWN} instead. Install fonts for "
            "them, for example Debian's packages fonts-noto-core, fonts-noto-cjk and fonts-symbola"
        )
    _warned.update(unseen)
    return families, "".join(sorted(missing))


@cache
def _find_new_fonts() -> None:
    """Add fonts that were installed after matplotlib wrote its list of fonts to a file."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # matplotlib cannot read fonts of color bitmaps
            fontManager.addfont(path)


@cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters of a font file. A font that cannot be read has none."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
