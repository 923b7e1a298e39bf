"""A search for the image files of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sgalign.data.images import image_suffixes


class ImageFiles:
    """The image files in some folders, found by name. If there is no file of that name, its suffix may differ.

    Each folder is listed once, so a search does not touch the disk. If several files fit, the first folder wins.

    Args:
        folders: folders to search. They need not exist.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._by_name: dict[str, str] = {}
        self._by_stem: dict[str, str] = {}
        for folder in folders:
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                path = os.path.join(folder, name)
                self._by_name.setdefault(name, path)
                if Path(name).suffix.lower() in image_suffixes():
                    self._by_stem.setdefault(Path(name).stem, path)

    def find(self, name: str) -> Path | None:
        """Return the path of an image file, or None if there is none."""
        path = self._by_name.get(name) or self._by_stem.get(Path(name).stem)
        return None if path is None else Path(path)
