"""Readers that raise clear errors, and writers that leave either a complete file or no file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch

from sgalign.errors import InputError, is_lack_of_memory, shown

PARTIAL = ".partial"  # ending of a file or a folder that is being written
LONGEST_STEM = 255 - len(".01234567.partial")  # bytes, because file systems allow names of 255
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, and a limit on the size of files
# Errors that h5py raises for damaged files and for links to nothing.
HDF5_DAMAGE = (AttributeError, KeyError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError)
SMALL = 1 << 28  # bytes that an array or a tensor may have, however few of them are stored
COMPRESSION = 100  # largest ratio of an array's bytes and its stored bytes, far beyond that of real data

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move the file written there to `path` when the block ends.

    If the block raises an error, the temporary file is deleted instead. An existing file at `path` stays unchanged
    until the block ends, so a full disk, an interruption or a kill does not damage it. After a kill, the temporary file
    remains until `path` is written again. If `path` is a symbolic link, its target is replaced and the link stays.
    Devices and other files that are not regular, such as pipes, are written directly and without this protection.

    Raises:
        OSError: if `path` cannot be written, as for `check_writable`, or if the disk is full. The error names `path`.
    """
    path = Path(path)
    _make_folder(path)
    if _is_device(path):
        with full_disk_named(path):
            yield path
        return
    with _partial(path) as partial:
        yield partial
        with suppress(OSError):  # there may be no older file, or the file system may have no permissions
            shutil.copymode(path, partial)
        partial.replace(real_path(path))


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the block. Raise OSError if another process holds it."""
    try:
        lock = _lock(folder)
    except BlockingIOError as error:
        raise OSError(f"{folder}: another process is writing to this folder") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, and move it to `folder` when the block ends.

    Errors, interruptions and kills have the same effect as in `written_whole`.

    Args:
        folder: the folder, which must be new or empty.

    Raises:
        OSError: if the folder cannot be made or is not empty, or if the disk is full. The error names it.
    """
    _check_link(folder)
    real_path(folder).parent.mkdir(parents=True, exist_ok=True)
    with _partial(folder, is_folder=True) as partial:
        yield partial
        partial.replace(real_path(folder))


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Name `path` in an error of a full disk that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_SPACE:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_writable(path: Path) -> None:
    """Raise OSError if `path` cannot be written, so a long computation fails before it starts.

    The check makes the folder of `path` and briefly writes a file beside `path`.

    Raises:
        OSError: if `path` is a folder, or if its folder cannot be created or written to. The error names `path` or a
            folder.
    """
    _make_folder(path)
    if not _is_device(path):
        with _partial(path):
            pass


def real_path(path: str | Path) -> Path:
    """Return an absolute path without symbolic links. Links in a loop stay, and opening them raises OSError.

    For such links, `Path.resolve` raises a RuntimeError in Python 3.12 and older.
    """
    return Path(os.path.realpath(path))


def _check_link(path: Path) -> None:
    """Raise OSError if a path is a symbolic link in a loop."""
    with suppress(FileNotFoundError):
        path.stat()


def _make_folder(path: Path) -> None:
    """Make the folder of a file. Raise IsADirectoryError if the file is a folder."""
    _check_link(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "must be a file, but is a folder", str(path))
    if not _is_device(path):
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _partial(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Yield an empty file or folder beside `path`. At the end of the block, it is deleted if it is still there.

    What killed processes have left of `path` is deleted first. The lock on the new one shows that this process lives.
    """
    partial = lock = None
    try:
        place = real_path(path)
        _delete_leftovers(place)
        while partial is None:
            partial = place.with_name(f"{_stem(place)}.{secrets.token_hex(4)}{PARTIAL}")
            partial.mkdir() if is_folder else partial.touch(exist_ok=False)
            try:
                lock = _lock(partial)
            except (BlockingIOError, FileNotFoundError):  # another process took it for a leftover before the lock
                partial = None
        yield partial
    except OSError as error:
        of_partial = partial is not None and str(error.filename).startswith(str(partial))
        if of_partial or (error.filename is None and error.errno in NO_SPACE):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if partial is not None:
            _delete(partial)
        if lock is not None:
            os.close(lock)


def _stem(path: Path) -> str:
    """Return the beginning of the names of partial files, which is the file's name unless it is too long."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= LONGEST_STEM else hashlib.sha256(name).hexdigest()


def _delete_leftovers(path: Path) -> None:
    """Delete the partial files and folders of `path` that no living process has locked."""
    pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{8}" + re.escape(PARTIAL))
    names: list[str] = []
    with suppress(PermissionError):  # of a folder that may be written but not read
        names = os.listdir(path.parent)
    for name in filter(pattern.fullmatch, names):
        with suppress(OSError):  # a living process has the lock, or another user owns the file
            if (lock := _lock(path.with_name(name))) is not None:
                try:
                    _delete(path.with_name(name))
                finally:
                    os.close(lock)


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a file or folder, or None where the file system has no locks.

    The lock ends with the process, whatever ends the process.

    Raises:
        BlockingIOError: if another process holds the lock.
        FileNotFoundError: if another process has deleted or moved the file meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.stat()
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return descriptor


def _delete(path: Path) -> None:
    """Delete a file, or a folder with its content, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    in_dev = path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")  # which is a file system like others
    return in_dev or (path.exists() and not path.is_file())


@contextmanager
def hdf5_written_whole(path: str | Path) -> Iterator[h5py.File]:
    """Yield an HDF5 file that is open for writing, and move it to `path` when the block ends, as `written_whole` does.

    HDF5 writes through a Python file object. HDF5's own driver crashes with a segmentation fault if a full disk or a
    quota stops the file from growing. The Python object raises an OSError instead.
    """
    with written_whole(path) as partial, partial.open("w+b") as raw:
        file = None
        try:
            with uninterrupted():
                file = h5py.File(raw, "w")
            yield file
        finally:
            if file is not None:
                with uninterrupted():
                    file.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM that arrive in the block take effect at its end.

    An exception in the middle of a call of h5py can leave the HDF5 file half open, or with half of a new item. The
    block should be short.
    """
    if threading.current_thread() is not threading.main_thread():  # signals interrupt the main thread only
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arrived: list[int] = []
    waits = True

    def note(number: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(number)]
        if waits:
            arrived.append(number)
        elif callable(handler):  # a signal between the end of the block and the return of its own handler
            handler(number, frame)

    try:
        for number, handler in handlers.items():
            if handler is not None:  # None means a handler that Python can neither call nor restore
                signal.signal(number, note)
        yield
    finally:
        waits = False
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for arrival in arrived:
            signal.raise_signal(arrival)


def check_regular(path: Path) -> None:
    """Raise InputError if a path is a pipe or a device, because opening a pipe waits for another process."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: must be a file, but is a pipe or a device")


def read_array(array: h5py.Dataset) -> np.ndarray:
    """Return the numbers of an HDF5 data set, which are in the file itself.

    Raises:
        TypeError: if it holds other values than numbers.
        ValueError: if it has many more numbers than the file stores, or if other files store them. Reading it would
            fill the memory, or read a file that the user has not named.
    """
    if not isinstance(array, h5py.Dataset):
        raise TypeError("it is a group of fields instead of numbers")
    if array.dtype.kind not in "iufc" or not array.shape:
        raise TypeError(f"it holds {array.dtype} of shape {array.shape} instead of rows of numbers")
    if array.external or array.is_virtual:
        raise ValueError("its numbers are in another file")
    size, stored = array.size * array.dtype.itemsize, array.id.get_storage_size()
    if size > SMALL and size > COMPRESSION * stored:
        raise ValueError(f"it would have {size:,} bytes, but the file stores only {stored:,} bytes of it")
    return np.asarray(array[()])


def read_json(path: Path, remedy: str = "download or write it again") -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        remedy: advice that is appended to the error message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not JSON, if an object has a key twice, or if the memory does not suffice. The error
            names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # accepts a byte order mark
        content = json.loads(text, object_pairs_hook=unique_keys)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a character, which cannot be printed or written, or both
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except MemoryError as error:
        size = path.stat().st_size
        raise InputError(f"{path}: has {size:,} bytes, and too little memory is free to read it") from error
    except (ValueError, RecursionError) as error:  # from the JSON or the UTF-8 decoder
        raise InputError(f"{path}: must be a JSON file, but is not JSON or is cut short ({error}); {remedy}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Python's reader would silently keep only the last value of a repeated key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return content


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    r"""Write a JSON file.

    A byte of a file name that is not UTF-8 becomes an escape such as `\udcff`. `read_json` refuses it.
    """
    text = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_figure(figure: Figure, path: Path) -> None:
    """Save the figure as a PNG file with 120 dots per inch."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def read_tensors(path: str | Path, what: str, classes: Sequence[tuple[type, str]] = (), *, mapped: bool = False) -> Any:
    """Return the content of a file that `torch.save` wrote, with its tensors on the CPU.

    Only tensors, plain values and objects of `classes` are unpickled.

    Args:
        path: the file.
        what: the expected kind of file, for error messages.
        classes: classes, each with the full name of the class in the file that it replaces.
        mapped: True to read a tensor from the disk only when it is used. The file may then be replaced, but must not be
            cut short. Otherwise the system ends the process with SIGBUS. Files that are no zip archives, as torch
            before 1.6 wrote them, are read whole.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if `torch.save` did not write the file, or if the file is damaged, cut short or holds objects other
            than tensors and plain values. The error names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such {what}")
    try:
        if is_archive := zipfile.is_zipfile(path):
            _check_parts(Path(path))
        with torch.serialization.safe_globals(list(classes)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
        _check_tensors(content)
        return content
    except InputError as error:
        raise InputError(f"{path}: must be a {what}, but {error}") from error
    except Exception as error:  # torch.load raises many kinds of exception for damaged files
        if is_lack_of_memory(error):
            raise
        of_objects = isinstance(error, UnpicklingError)
        note = "; objects other than tensors, numbers and text are refused" if of_objects else ""
        kind = type(error).__name__
        raise InputError(f"{path}: must be a {what}, but is not one or is cut short ({kind}{note})") from error


def _check_parts(path: Path) -> None:
    """Raise InputError if a part of an archive is damaged or compressed.

    `torch.load` does not compare the checksums. `torch.save` compresses no part, and such a part could be huge.
    """
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"its part {shown(part.filename)} is compressed")
        if damaged := archive.testzip():
            raise InputError(f"its part {shown(damaged)} is damaged, because it does not fit its checksum")


def _check_tensors(content: Any) -> None:
    """Raise InputError if a tensor is sparse, quantized or not on the CPU, or large with few stored numbers."""
    parts, seen = [content], {id(content)}
    for part in parts:  # grows while it is walked
        if isinstance(part, torch.Tensor):
            if part.layout != torch.strided or part.is_quantized or part.device.type != "cpu":
                raise InputError("it has a tensor that is sparse, quantized or without numbers")
            size = part.numel() * part.element_size()
            if size > SMALL and size > part.untyped_storage().nbytes():
                raise InputError(f"it has a tensor of shape {list(part.shape)} with fewer stored numbers")
            continue
        inner = (
            [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list | tuple | set) else ()
        )
        for value in (*inner, *getattr(part, "__dict__", {}).values()):
            if id(value) not in seen and not isinstance(value, int | float | str):
                seen.add(id(value))
                parts.append(value)
