"""Numbers in files and options."""

from __future__ import annotations

import re
from typing import Any

LARGEST_WHOLE = 1 << 53  # float64 cannot tell larger whole numbers apart


def whole_number(value: Any) -> int | None:
    """Return the whole number that a value such as 7, 7.0 or "7" stands for. Return None if it stands for none.

    It also returns None for numbers of 2^53 and more, because float64 cannot tell them apart.
    """
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[0-9]{1,16}", value.strip()) else None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if type(value) is int and abs(value) < LARGEST_WHOLE else None


def parse_number(text: str) -> float:
    """Return the number in a text, as `float` does. Refuse 1_5, which Python reads as 15.

    Raises:
        ValueError: if the text is no number.
    """
    if "_" in text:
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text)
