"""JSON files of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str = "download or write it again") -> Any:
    """What a file says.

    Args:
        remedy: ends the sentence where it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path}: not JSON, or cut short ({error}); {remedy}") from error


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
