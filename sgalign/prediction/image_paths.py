"""The image files that paths, folders and patterns name."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sgalign.data.images import is_image
from sgalign.errors import InputError


class ImageFile(NamedTuple):
    """An image file and its name in the results."""

    path: Path
    image_id: str


def find_images(sources: Sequence[str | Path]) -> tuple[list[ImageFile], list[Path]]:
    """Return the images that paths, folders and patterns name, and the other files there, both in the order of names.

    A file is an image, whatever its name. Of a folder, the images directly in it count. A pattern may contain `*`, `?`,
    `[...]` and, for any number of folders, `**`. Hidden files are left out.

    The id of an image is its file name. If a pattern found it, the id is its path from the last folder before the
    pattern's first special character. An id must be UTF-8, so other bytes of a file name become `\\x..`.

    Args:
        sources: paths of files and folders, and patterns.

    Raises:
        FileNotFoundError: if a source has no image.
        ValueError: if two files would have the same id, if one id is the folder of another, or if a pattern has `..`
            after its first special character.
    """
    by_id: dict[str, Path] = {}
    others: set[Path] = set()
    for source in map(str, sources):
        found = False
        for path, name, certain in _entries(source):
            if not certain and not (path.is_file() and is_image(path)):
                others.add(path)
                continue
            found = True
            if ".." in Path(name).parts:  # pictures are written to a folder under the id
                raise InputError(f"{source}: a pattern must not go up after its first special character")
            image_id = os.fsencode(name).decode("utf-8", "backslashreplace")
            known = by_id.setdefault(image_id, path)
            if os.path.realpath(known) != os.path.realpath(path):
                raise InputError(
                    f"two images have the id {image_id!r}: {known} and {path}. Predict them into two files, or give "
                    "a pattern in quotation marks such as 'photographs/**/*.jpg', so the ids contain the folders"
                )
        if not found:
            raise FileNotFoundError(_nothing_in(source))
    for image_id, path in by_id.items():
        if parent := next((str(parent) for parent in PurePosixPath(image_id).parents if str(parent) in by_id), None):
            raise InputError(
                f"an id must not extend another one by a slash, but {path} has {image_id!r}, and {by_id[parent]} has "
                f"{parent!r}. Predict them into two files"
            )
    return [ImageFile(by_id[image_id], image_id) for image_id in sorted(by_id)], sorted(others)


def _nothing_in(source: str) -> str:
    if os.path.isdir(source):
        return f"{source}: this folder has no image directly in it. For those in its subfolders, give '{source}/**/*'"
    if glob.has_magic(source):
        return f"{source}: no image matches this pattern"
    source = source or repr(source)
    return f"{source}: must be an image, a folder of images or a pattern, but there is no such file or folder"


def _entries(source: str) -> Iterator[tuple[Path, str, bool]]:
    """Yield the path of each file and subfolder, the name for its id, and True if it must be taken for an image."""
    path = Path(source)
    if path.is_file():
        yield path, path.name, True
    elif path.is_dir():
        for entry in path.iterdir():
            if not entry.name.startswith("."):
                yield entry, entry.name, False
    elif glob.has_magic(source):
        parts = path.parts
        fixed = Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])
        for found in glob.iglob(source, recursive=True):
            if not os.path.isdir(found):
                yield Path(found), os.path.relpath(found, fixed), False


class Shard(NamedTuple):
    """One of several parts of the images, which different processes predict."""

    number: int  # from 1 to `total`
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def has(self, image: ImageFile) -> bool:
        """Return True if the image belongs to this part.

        This depends on the id alone. So an image stays in its part when other images are added or removed.
        """
        digest = blake2b(image.image_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.total == self.number - 1

    def path(self, path: Path) -> Path:
        """Return the path of this part's file, such as `graphs.1-of-4.jsonl` for `graphs.jsonl`."""
        return path if self.total == 1 else path.with_suffix(f".{self.number}-of-{self.total}{path.suffix}")
