"""The names of images, found by what the files of other systems call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sgalign.data.images import image_suffixes
from sgalign.errors import InputError


class ImageIds:
    """The names of a data set's images.

    Args:
        names: names of the images.
        image_names: names of images by their ids, see `SceneGraphDataset`.
    """

    def __init__(self, names: Iterable[str], image_names: Mapping[str, str]) -> None:
        self._names = list(names)
        self._known, self._image_names = set(self._names), image_names
        self._by_part: dict[str, list[str]] = {}  # images by file name, with and without suffix
        for name in self._names:
            for part in _parts(name):
                self._by_part.setdefault(part, []).append(name)

    @property
    def example(self) -> str:
        """An id or a name that an image has."""
        ids = (given for given, name in self._image_names.items() if name in self._known)
        return next(ids, None) or next(iter(self._names), "")

    def find(self, where: str, given: str) -> str | None:
        """Return the name of an image, or None if it is unknown.

        Args:
            where: the place of `given`, for messages.
            given: the name of the image, its id in the files of the data set, or the name's last part, with or without
                the suffix of an image. The first of these that fits counts. Folders in front of the last part are
                ignored.

        Raises:
            ValueError: if several images have this last part.
        """
        if given in self._known:
            return given
        if given in self._image_names:  # it may be the id of an image of another split
            named = self._image_names[given]
            return named if named in self._known else None
        for part in _parts(given):
            if len(found := self._by_part.get(part, [])) > 1:
                raise InputError(f"{where} must name one image, but {given!r} fits {found[0]!r} and {found[1]!r}")
            if found:
                return found[0]
        return None


def _parts(name: str) -> list[str]:
    """Return the last part of a name. If it has the suffix of an image, also return it without the suffix."""
    path = Path(name)
    return [path.name, path.stem] if path.suffix.lower() in image_suffixes() else [path.name]
