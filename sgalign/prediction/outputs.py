"""The files that a prediction run writes. A run that is stopped can continue them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import torch

from sgalign.data.predictions import PredictionFile, prediction_ids
from sgalign.errors import InputError
from sgalign.files import (
    HDF5_DAMAGE,
    check_writable,
    full_disk_named,
    hdf5_written_whole,
    read_array,
    read_json,
    unique_keys,
    write_json,
)
from sgalign.prediction.image_paths import ImageFile
from sgalign.prediction.predicting import FailedImage, PredictedImage
from sgalign.training import RelationModule
from sgalign.training.pretrained import without_paths
from sgalign.viewing import describe

PART_SECONDS = 60.0  # a kill loses at most the HDF5 predictions of this time
LOCK_SECONDS = 10.0  # the workers of a killed run keep its lock for some seconds
REMEDY = "choose other names for the results, or replace them with --overwrite"


class Output(Protocol):
    """A file of results, to which a run adds one image at a time."""

    done: set[str]  # ids of the images that the file has

    def write(self, image: PredictedImage) -> None:
        """Add an image that the file does not have."""

    def close(self) -> None:
        """Save what was written. A later run can go on."""


class GraphLines:
    """A file with one line of JSON per image. After a kill or on a full disk, it still has all complete lines.

    A line has the fields of `describe`, and before them `image_id`, `file`, `bytes` (size of this file), `width` and
    `height`.

    Args:
        path: the file. If it exists, the new lines are added to it. An incomplete last line is then removed.
        module: the model, for the names of its classes.
        made_from: what determines the predictions. A run that continues the file must have the same.
        top_k, threshold, all_predicates: as for `describe`.
        overwrite: if True, the lines in the file are deleted.

    Raises:
        OSError: if the file cannot be written, or if another process writes it.
        ValueError: if the file is not a regular one, has a line that is not a graph, or comes from other options.
    """

    def __init__(
        self,
        path: Path,
        module: RelationModule,
        made_from: Mapping[str, Any],
        *,
        top_k: int,
        threshold: float,
        all_predicates: bool,
        overwrite: bool = False,
    ) -> None:
        check_writable(path)
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: must be a regular file")
        self.path = path
        self._names = module.object_names, module.predicate_names
        self._options: dict[str, Any] = {"top_k": top_k, "threshold": threshold, "all_predicates": all_predicates}
        self._file = _locked(path)
        if overwrite:
            self._file.truncate(0)
        _start_or_continue(path, {**made_from, **self._options}, path.stat().st_size > 0)
        self._origins, self._size = _complete_lines(path)
        self._file.truncate(self._size)  # removes an incomplete last line
        self.done = set(self._origins)
        self.images = self.triplets = 0  # written by this run

    def check_files(self, files: Sequence[ImageFile]) -> None:
        """Raise InputError if the file has a graph for another image of the same id, or for an older version of it."""
        for file in files:
            if (origin := self._origins.get(file.image_id)) is None:
                continue
            # Path.is_file would raise an error for a name that is too long.
            if os.path.isfile(origin.file) and not file.path.samefile(origin.file):
                raise InputError(
                    f"{self.path} has the graph of {origin.file} under the id {file.image_id!r}, which {file.path} "
                    f"now has: {REMEDY}"
                )
            if origin.bytes not in (None, size := _size(file.path)):
                raise InputError(
                    f"{self.path} has a graph for {file.path} of {origin.bytes:,} bytes, but this image now has "
                    f"{size or 0:,} bytes: {REMEDY}"
                )

    def write(self, image: PredictedImage) -> None:
        graph = describe(image.prediction, *self._names, **self._options)
        path = image.file.path
        where = {"image_id": graph.pop("image_id"), "file": printable(path), "bytes": _size(path)}
        line = json.dumps(where | {"width": image.width, "height": image.height} | graph, ensure_ascii=False)
        data = line.encode() + b"\n"
        left = memoryview(data)
        try:
            with full_disk_named(self.path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(self._size)  # removes the part of the line that fit on the disk
            raise
        self._size += len(data)
        self.done.add(image.file.image_id)
        self.images += 1
        self.triplets += len(graph["triplets"])

    def close(self) -> None:
        self._file.close()


def _locked(path: Path) -> FileIO:
    """Open a file for appending that no other process may open in this way at the same time."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            file = path.open("ab", buffering=0)
        except FileNotFoundError:  # another process has deleted the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # the process that had the lock has deleted the file
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise OSError(f"{path}: another process is writing this file") from error
            time.sleep(0.2)
        file.close()


class _Origin(NamedTuple):
    """The image file from which a line was made."""

    file: str
    bytes: int | None  # None if unknown


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _complete_lines(path: Path) -> tuple[dict[str, _Origin], int]:
    """Return the origin of each id in a file of `GraphLines`, and the number of bytes of its complete lines."""
    origins, size = {}, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            if line.strip():
                try:
                    graph = json.loads(line, object_pairs_hook=unique_keys)
                    if not isinstance(graph["image_id"], str):
                        raise TypeError("image_id is not text")
                    file_size = graph.get("bytes")
                    origins[graph["image_id"]] = _Origin(
                        str(graph.get("file", "")), file_size if isinstance(file_size, int) else None
                    )
                except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                    where = f"{path}, line {number}"
                    raise InputError(
                        f"{where}: must be the graph of an image in JSON ({error}); correct or delete this line"
                    ) from error
            size += len(line)
    return origins, size


class PredictionParts:
    """An HDF5 file for `sgalign evaluate`, with the complete predictions.

    HDF5 files that are being written do not survive a kill. So the predictions go to a folder of small files, each of
    which appears when it is complete. `finish` joins them.

    Args:
        path: the HDF5 file. If it exists, its images count as done, and `finish` adds the new ones.
        made_from: what determines the predictions. A run that continues the file must have the same.
        overwrite: if True, the file and its parts are deleted first.

    Raises:
        OSError: if the file cannot be written, or if another process writes it.
        ValueError: if the file or a part is damaged, or comes from other options.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any], *, overwrite: bool = False) -> None:
        check_writable(path)
        self.path, self._folder = path, parts_folder(path)
        self._lock = _locked(self._folder / "lock")
        try:
            if overwrite:
                path.unlink(missing_ok=True)
                self._delete_parts()
            _start_or_continue(path, made_from, bool(self._sources()))
            self.done = self._ids()
        except BaseException:
            self._unlock()
            raise
        self._part: PredictionFile | None = None
        self._started = 0.0

    def _ids(self) -> set[str]:
        try:
            return {image_id for source in self._sources() for image_id in prediction_ids(source)}
        except InputError as error:
            raise InputError(f"{error}; delete this file, and its images are predicted again") from error

    def _sources(self) -> list[Path]:
        return [path for path in (self.path, *_parts(self._folder)) if path.exists()]

    def write(self, image: PredictedImage) -> None:
        if self._part is not None and time.monotonic() - self._started > PART_SECONDS:
            self.close()
        if self._part is None:
            number = 1 + max((int(path.stem) for path in _parts(self._folder)), default=0)
            self._part, self._started = PredictionFile(self._folder / f"{number:06}.h5").__enter__(), time.monotonic()
        with full_disk_named(self.path):
            self._part.write(image.file.image_id, image.prediction)
        self.done.add(image.file.image_id)

    def close(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.__exit__(None, None, None)

    def finish(self) -> None:
        """Join the parts into one file, and delete them."""
        self.close()
        sources = self._sources()
        if sources != [self.path]:
            with hdf5_written_whole(self.path) as joined:
                for source in sources:
                    _add_images(joined, source)
        self._delete_parts()
        self._unlock()

    def _unlock(self) -> None:
        (self._folder / "lock").unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # other files are in it, or another process has locked or deleted it
            self._folder.rmdir()

    def _delete_parts(self) -> None:
        """Delete the parts and what kills have left of them, but no other files in their folder."""
        for part in [*_parts(self._folder), *self._folder.glob("*.h5.*.partial")]:
            part.unlink()


def _add_images(joined: h5py.File, source: Path) -> None:
    """Copy the predictions of a file for the images that `joined` lacks. Raise InputError if the file is damaged."""
    try:
        with h5py.File(source, "r") as part:
            for image_id in prediction_ids(source):
                if image_id not in joined:
                    # HDF5's own copy of a group can end the process if the file is damaged.
                    group = joined.create_group(image_id)
                    for name, values in part[image_id].items():
                        group[name] = read_array(values)
    except HDF5_DAMAGE as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):  # a full disk
            raise
        raise InputError(
            f"{source}: is damaged ({error}); delete this file, and its images are predicted again"
        ) from error


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.h5") if path.stem.isdecimal())


class Failures:
    """A file that lists the images without a result, one line of JSON per image. It exists only if there are any.

    Args:
        path: the file. One of an earlier run is deleted, because the run tries its images again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.unlink(missing_ok=True)

    def write(self, failed: FailedImage) -> None:
        """Add an image."""
        self.count += 1
        line = {
            "image_id": failed.file.image_id,
            "file": printable(failed.file.path),
            "reason": printable(failed.reason),
        }
        with full_disk_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def options_of(path: Path) -> Path:
    """Return the file with the options of the run that wrote a file of results."""
    return path.with_name(f"{path.name}.options.json")


def parts_folder(path: Path) -> Path:
    """Return the folder in which `PredictionParts` collects the predictions for a file."""
    return path.with_name(f"{path.name}.parts")


def printable(text: str | Path) -> str:
    """Return a path or a message as text that JSON can hold. Bytes of file names that are not UTF-8 become `\\x..`."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _start_or_continue(path: Path, made_from: Mapping[str, Any], has_results: bool) -> None:
    """Write what determines the results of a run beside its file. If it has results, check that it is the same.

    The caller has locked the file, so another run cannot change either of them at the same time.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are results that come from something else or something unknown.
    """
    options_file = options_of(path)
    if not has_results:
        write_json(options_file, made_from, indent=1)
        return
    if not options_file.exists():
        raise InputError(f"{path} exists, but not {options_file}, which says how it was made: {REMEDY}")
    before = read_json(options_file, REMEDY)
    if not isinstance(before, dict):
        raise InputError(f"{options_file}: must be a JSON object, got {type(before).__name__}: {REMEDY}")
    differ = [
        f"{name} was {before.get(name)!r} and is now {now!r}"
        for name, now in made_from.items()
        if before.get(name) != now
    ]
    if differ:
        raise InputError(f"{path} comes from a run with other options ({'; '.join(differ)}): {REMEDY}")


def digest(module: RelationModule) -> str:
    """Return a digest of a model's class names, options and weights, to recognize the same model."""
    options = json.dumps(without_paths(module.hparams), sort_keys=True, default=str)
    what = type(module).__name__, options, module.object_names, module.predicate_names
    hashed = hashlib.sha256(repr(what).encode())
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]
