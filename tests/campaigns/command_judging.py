"""The judgement of one run of a command: the exit code, the message, and the files that it left."""

from __future__ import annotations

import csv
import json
import os
import re
import traceback
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import yaml
from PIL import Image

State = dict[str, tuple[int, int, int]]  # size, time and number of each file, by its path
DEFAULTS = (
    "lightning_logs/", "checkpoints/", "runs/", "graphs.", "predictions.jsonl", "predictions.h5", "detections.json",
    "config.yaml", "study/",
)  # fmt: skip
LINKS = {"old/link.json": "old/file.json", "old/dangling.json": "old/absent.json"}  # in the folder of a case
OUTPUTS = {("export", "folder"), ("report", "folder"), ("make-dataset", "out")}  # positional arguments that are written
OUTPUT_OPTIONS = {"out", "json", "csv", "hdf5", "default_root_dir"}
UNNAMED = {".", "/", "in"}  # parents of all relative paths, all absolute paths and all inputs
WARNINGS = re.compile(r"Warning|warn\(|^\s|^$|Seed set|^GPU|^TPU|^`Trainer|^HINT|it/s|image/s|💡")


class Ended(NamedTuple):
    """The end of a command: its exit code or the error that left it, and its output."""

    code: int | None
    error: BaseException | None
    out: str
    err: str


def state(folder: Path) -> State:
    """Return the state of all files in a folder, without following links."""
    found: State = {}
    folders = [str(folder)]
    for place in folders:  # grows while it is walked
        for entry in os.scandir(place):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            status = entry.stat(follow_symlinks=False)
            size = -1 if entry.is_dir(follow_symlinks=False) else status.st_size
            found[os.path.relpath(entry.path, folder)] = size, (status.st_mtime_ns if size >= 0 else 0), status.st_ino
    return found


def judge(
    arguments: Sequence[str], ended: Ended, folder: Path, before: State, after: State, options: Collection[str] = ()
) -> str:
    """Return the outcome: "finished", "refused", "usage error" or a text that begins with "DEFECT".

    `options` are names that a refusal may have beside those on the command line, because they are in a config.
    """
    command = arguments[0] if arguments else "none"
    if ended.error is not None:
        return f"DEFECT {command}: {type(ended.error).__name__} {_place(ended.error)}"
    changed = [name for name in after if before.get(name) != after[name]]
    gone = [name for name in before if name not in after]
    if "Traceback (most recent call last)" in ended.err:
        last = [line for line in ended.err.splitlines() if line.strip()][-1]
        return f"DEFECT {command}: traceback on stderr: {last[:100]}"
    if left := [name for name in changed if ".partial" in name or name.startswith("tmp/")]:
        return f"DEFECT {command}: partial file left: {re.sub('[0-9]+', 'N', left[0])}"
    if strays := [name for name in changed if not expected(arguments, name)] + [f"{name} removed" for name in gone]:
        return f"DEFECT {command}: wrote where no option says so: {strays[0]}"
    for name in changed:
        if problem := _damage(folder / name):
            return f"DEFECT {command}: {Path(name).suffix} file is not whole: {problem}"
    if ended.code == 0:
        return "finished"
    if ended.code == 2:
        said = [line for line in ended.err.splitlines() if "error:" in line or "there is no command" in line]
        return "usage error" if len(said) >= 1 else f"DEFECT {command}: code 2 without a message"
    if ended.code == 1:
        return _refusal(command, arguments, ended, options)
    return f"DEFECT {command}: exit code {ended.code}"


def _refusal(command: str, arguments: Sequence[str], ended: Ended, options: Collection[str]) -> str:
    lines = ended.err.splitlines()
    said = [place for place, line in enumerate(lines) if line.startswith("sgalign: ")]
    if not said:
        reports = {"check": "refused", "ablate": "runs failed"}
        if reports.get(command, "\0") in ended.out:
            return "refused"
        return f"DEFECT {command}: code 1 without a message"
    # `predict` says first which images it has skipped, and then how many.
    skipped = [line for line in lines[: said[-1]] if line.startswith("sgalign: skipped: ")]
    message = "\n".join([*skipped, *lines[said[-1] :]])
    more = [line for line in lines[said[-1] + 1 :] if not WARNINGS.search(line)]
    if more and not any("\n" in argument for argument in arguments):
        return f"DEFECT {command}: more than a sentence: {lines[said[-1]][9:79]} // {more[0][:60]}"
    named = _names(arguments, message) or any(option in message for option in options)
    if not named and "not enough memory" not in message:
        return f"DEFECT {command}: names no option: {message[9:120]}"
    return "refused"


def _names(arguments: Sequence[str], message: str) -> bool:
    """Return True if a message contains, as whole words, the name of an option or a value of the command line."""
    words: set[str] = set()
    for argument in arguments[1:]:
        option, equals, value = argument.partition("=")
        names = {option.lstrip("-"), option.rpartition(".")[2].lstrip("-")}
        words |= {name for name in names if len(name) > 1} | {value, argument, Path(argument).name}
        words |= {str(parent) for parent in Path(value or argument).parents} - UNNAMED
        words |= {word.replace("-", "_") for word in words} | {repr(word)[1:-1] for word in words}
        words |= {".", "''"} if not argument or (equals and not value) else set()  # names of an empty path
    # A word of UNNAMED counts only in quotes or at the begin, because most messages have them.
    starts = {word: r"(?:^sgalign: |')" if word in UNNAMED else r"(?<!\w)" for word in words - {""}}
    return any(re.search(rf"{start}{re.escape(word)}(?!\w)", message) for word, start in starts.items())


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sgalign/" in frame.filename] or frames
    text = re.sub(r"\d+", "N", " ".join(str(error).split()))[:90]
    return f"in {Path(ours[-1].filename).name}:{ours[-1].name}, {Path(frames[-1].filename).name}: {text}"


def expected(arguments: Sequence[str], name: str) -> bool:
    """Return True if a command line says that the file `name` may be written."""
    if name.split("/")[0] in ("home", "tmp"):
        return True
    local = os.path.relpath(name, "cwd")
    if local.startswith(DEFAULTS) or f"{local}/" in DEFAULTS:
        return True
    if arguments[:1] == ["view"] and "/" not in local and local.endswith(".html"):  # the default of its --out
        return True
    for output in outputs(arguments):
        place = os.path.normpath(f"cwd/{LINKS.get(output, output)}")
        stem = os.path.splitext(place)[0]  # begins the names of files beside the results
        if place == "cwd":  # "" and ".", which do not stand for the inputs in the folder
            return not local.startswith("in/")
        if name == place or name.startswith((f"{place}/", f"{stem}.")) or place.startswith(f"{name}/"):
            return True
    return False


def outputs(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line that name outputs."""
    command = arguments[0] if arguments else ""
    positional = command in {command for command, _ in OUTPUTS}
    found = []
    for place, argument in enumerate(arguments[1:], 1):
        option, equals, value = argument.partition("=")
        if option.startswith("--") and option.lstrip("-").rpartition(".")[2] in OUTPUT_OPTIONS:
            found += [value] if equals else list(arguments[place + 1 : place + 2])
        elif positional and not option.startswith("--"):
            found.append(argument)
    return found


def _damage(path: Path) -> str | None:
    """Return why a file is not whole, or None. A file of JSON, YAML or CSV may have any name."""
    if not path.is_file() or path.suffix == ".txt":
        return None
    problems = []
    for reader in filter(None, (READERS.get(path.suffix), *TEXT_READERS)):
        try:
            reader(path)
            return None
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error)[:60]}")
    return problems[0] if path.suffix in READERS else None


def _hdf5(path: Path) -> None:
    with h5py.File(path) as file:
        file.visit(lambda name: None)


def _archive(path: Path) -> None:
    if zipfile.ZipFile(path).testzip() is not None:
        raise ValueError("damaged")


def _picture(path: Path) -> None:
    Image.open(path).verify()


def _page(path: Path) -> None:
    if not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("the page has no end")


def _lines(path: Path) -> None:
    content = path.read_text()
    [json.loads(line) for line in content.splitlines()]
    if content and not content.endswith("\n"):
        raise ValueError("the last line has no end")


def _table(path: Path) -> None:
    rows = list(csv.reader(path.read_text().splitlines(), strict=True))
    if not rows or len(rows[0]) < 2:
        raise ValueError("no columns")


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".jsonl": _lines,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".ckpt": _archive,
    ".png": _picture,
    ".jpg": _picture,
    ".html": _page,
    ".yaml": lambda path: yaml.unsafe_load(path.read_text()),
    ".csv": _table,
}
TEXT_READERS = (READERS[".json"], _table)
