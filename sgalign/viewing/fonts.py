"""Fonts that can show names in any script."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from sgalign.data.findings import warn

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # DejaVu Sans, which comes with matplotlib, has it
_warned: set[str] = set()


def families_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return the fonts that together show the most characters of some texts, and the characters that none has.

    The first font is DejaVu Sans. Others are added only for the characters that it lacks. matplotlib takes each
    character from the first font that has it. Letters of scripts that are written from right to left, or that change
    their form beside others, appear in the order and form of the text.
    """
    from matplotlib.font_manager import fontManager

    families, missing = ["DejaVu Sans"], {letter for text in texts for letter in text}
    for path in (entry.fname for entry in fontManager.ttflist if entry.name == families[0]):
        missing -= _characters(path)
    candidates = sorted((entry.name, entry.fname) for entry in fontManager.ttflist) if missing else []
    for family, path in candidates:
        if found := missing & _characters(path):
            families.append(family)
            missing -= found
    unseen = missing - _warned
    if unseen and not _warned:
        some = "".join(sorted(unseen)[:10])
        warn(
            f"no installed font has the characters {some!r}, so pictures show {UNKNOWN} instead. Install a font for "
            "them, such as one of the Noto fonts"
        )
    _warned.update(unseen)
    return families, "".join(sorted(missing))


@cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters of a font file. A font that cannot be read has none."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
