"""A search for the image files of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sgalign.data.images import image_suffixes


class ImageFiles:
    """The image files in some folders, found by name.

    If there is no file of that name, its suffix may differ. Names with folders must match. Each folder is listed once.
    If several files fit, the first folder wins.

    Args:
        folders: folders to search. They need not exist.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [folder for folder in folders if folder.is_dir()]
        self._by_name: dict[str, str] = {}
        self._by_stem: dict[str, str] = {}
        for folder in self._folders:
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                self._by_name.setdefault(name, path)
                if Path(name).suffix.lower() in image_suffixes():
                    self._by_stem.setdefault(Path(name).stem, path)

    def expects(self, name: str) -> bool:
        """Return True if there are images where an image of this name would be.

        That is the case if a folder has image files, or has the subfolder in which the name lies.
        """
        parent = Path(name).parent
        return bool(self._by_stem) or (bool(parent.name) and any((f / parent).is_dir() for f in self._folders))

    def find(self, name: str) -> Path | None:
        """Return the path of an image file, or None if there is none."""
        wanted = Path(name)
        if wanted.is_absolute() or ".." in wanted.parts:
            return None  # it would lie outside the folders
        if len(wanted.parts) > 1:
            return next((path for folder in self._folders if is_file(path := folder / name)), None)
        found = self._by_name.get(name)
        if found is None and wanted.suffix.lower() in {"", *image_suffixes()}:
            found = self._by_stem.get(wanted.stem)
        return None if found is None else Path(found)


def is_file(path: Path) -> bool:
    """Return True if there is such a file. A name that is too long for the file system has none."""
    try:
        return path.is_file()
    except OSError:
        return False
