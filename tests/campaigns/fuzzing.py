"""Fuzzing with atheris: run a reader on many inputs, guided by the code that they reach, and count the outcomes.

A target reads one input. It may return a word for the outcome, refuse the input with an error that names the file, or
fail an assertion if a wrong value was accepted. Any other exception is a defect.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import atheris
import h5py
import numpy as np

Draw = atheris.FuzzedDataProvider
Target = Callable[[Draw, Path], str | None]

SECONDS = 10  # an input that takes longer counts as a hang
MEBIBYTES = 1024  # an allocation that counts as too large; the whole process may have four times as much
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, 2**53, 2**63, 10**30,
    0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "0", "1", "../x", "//x", "a/b", "\x00", "\ud800", "é", "x" * 300, "9" * 5000,
    [], [0], [[]], [[1, 2], [3]], {}, {"": 0},
]  # fmt: skip


def one_of(draw: Draw, *values: Any) -> Any:
    """Return one of some values, the first of them if no bytes of the input are left."""
    return values[draw.ConsumeIntInRange(0, len(values) - 1)]


def changed_json(draw: Draw, content: Any, most: int = 4) -> Any:
    """Return a JSON value with up to `most` of its parts replaced, removed, repeated, renamed or exchanged."""
    content = _copied(content)
    for _ in range(draw.ConsumeIntInRange(0, most)):
        parts = [(holder, key) for holder in _holders(content) for key in _keys(holder)]
        if not parts:
            break
        holder, key = one_of(draw, *parts)
        action = draw.ConsumeIntInRange(0, 5)
        if action <= 1:
            holder[key] = _copied(one_of(draw, *ODD))
        elif action == 2:
            del holder[key]
        elif action == 3 and isinstance(holder, list):
            holder.append(_copied(holder[key]))
        elif action == 3:
            holder[draw.ConsumeUnicode(8)] = holder.pop(key)
        elif action == 4:
            other, place = one_of(draw, *parts)
            holder[key] = _copied(other[place])
        else:
            holder[key] = draw.ConsumeInt(8) if draw.ConsumeBool() else draw.ConsumeFloat()
    return content


def _copied(content: Any) -> Any:
    """Return a value with copies of its lists and dictionaries, and with the same tensors. A deep copy takes longer."""
    if not isinstance(content, list | dict):
        return content
    copied = copy.copy(content)
    for key in _keys(copied):
        copied[key] = _copied(copied[key])
    return copied


def _holders(content: Any) -> list[Any]:
    """Return the lists and objects in a JSON value, the outermost first."""
    found = [content] if isinstance(content, list | dict) else []
    for holder in found:  # grows while it is walked
        found += [holder[key] for key in _keys(holder) if isinstance(holder[key], list | dict)]
    return found


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def changed_bytes(draw: Draw, content: bytes, most: int = 8) -> bytes:
    """Return bytes of which up to `most` were changed, or that were cut short or continued."""
    changed = bytearray(content)
    for _ in range(draw.ConsumeIntInRange(0, most)):
        if not changed:
            break
        place = draw.ConsumeIntInRange(0, len(changed) - 1)
        action = draw.ConsumeIntInRange(0, 9)
        if action == 0:
            del changed[place:]
        elif action == 1:
            changed += draw.ConsumeBytes(16)
        elif action == 2:
            changed[place : place + 8] = draw.ConsumeBytes(8)
        else:
            changed[place] = draw.ConsumeIntInRange(0, 255)
    return bytes(changed)


def changed_csv(draw: Draw, rows: list[list[str]], most: int = 4) -> bytes:
    """Return a CSV file with up to `most` cells or rows replaced, removed, repeated or exchanged."""
    rows = [list(row) for row in rows]
    for _ in range(draw.ConsumeIntInRange(0, most)):
        if not rows:
            break
        row = one_of(draw, *rows)
        action = draw.ConsumeIntInRange(0, 6)
        if action == 0:
            rows.remove(row)
        elif action == 1:
            rows.append(list(row))
        elif action == 2 and row:
            del row[draw.ConsumeIntInRange(0, len(row) - 1)]
        elif row:
            texts = [*(str(value) for value in ODD if value != "\ud800"), *row, '"', "a\nb", "a,b", "nan", "0.5"]
            row[draw.ConsumeIntInRange(0, len(row) - 1)] = one_of(draw, *texts)
    text = io.StringIO()
    csv.writer(text, lineterminator=["\n", "\r\n"][draw.ConsumeIntInRange(0, 1)]).writerows(rows)
    return text.getvalue().encode()


def changed_array(draw: Draw, values: np.ndarray) -> np.ndarray:
    """Return an array with another dtype, shape or value."""
    values = np.array(values)
    action = draw.ConsumeIntInRange(0, 5)
    if action == 0 and values.dtype.kind != "S":  # numpy refuses texts that are no whole numbers
        dtype = ["u1", "i1", "<i2", ">i4", "<i8", "<u8", "<f2", "<f4", "<f8", "?", "S3"][draw.ConsumeIntInRange(0, 10)]
        with np.errstate(all="ignore"):
            return values.astype(dtype)
    if action == 1:
        return values.reshape(-1)
    if action == 2:
        return values[: draw.ConsumeIntInRange(0, len(values))] if values.ndim else values[None]
    if action == 3 and values.ndim:
        return np.concatenate([values, values[-1:]])
    if action == 4:
        return values[..., None]
    if values.size:
        place = draw.ConsumeIntInRange(0, values.size - 1)
        special = [-1, 0, 1, 2, 127, 2**31 - 1, 2**40, np.nan, np.inf, -np.inf, draw.ConsumeInt(4)]
        value = one_of(draw, *special)
        with np.errstate(all="ignore"):
            values.reshape(-1)[place] = np.asarray(value, "f8").astype(values.dtype)
    return values


def write_hdf5(
    draw: Draw, path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any], most: int = 3
) -> None:
    """Write an HDF5 file of which up to `most` data sets or attributes were changed, renamed or left out."""
    arrays, attributes = dict(arrays), dict(attributes)
    for _ in range(draw.ConsumeIntInRange(0, most)):
        names = [*arrays, *attributes]
        if not names:
            break
        name = one_of(draw, *names)
        group = arrays if name in arrays else attributes
        action = draw.ConsumeIntInRange(0, 4)
        if action == 0:
            del group[name]
        elif action == 1:
            arrays[draw.ConsumeUnicodeNoSurrogates(4).replace("\0", "").strip("/.") or "x"] = np.asarray(
                group.pop(name)
            )
        elif group is attributes:
            odd = [value for value in ODD if isinstance(value, bool | int | float | str) and str(value).isascii()]
            odd = [value for value in odd if not isinstance(value, int) or abs(value) < 2**63]
            group[name] = one_of(draw, *odd)
        else:
            group[name] = changed_array(draw, group[name])
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values.dtype.kind != "U" and name not in file:
                file[name] = values
        for name, value in attributes.items():
            file.attrs[name] = value.replace("\0", "") if isinstance(value, str) else value
    if draw.ConsumeIntInRange(0, 3) == 0:
        path.write_bytes(changed_bytes(draw, path.read_bytes()))


def instrumented() -> AbstractContextManager[None]:
    """Let atheris follow the code of sgalign's modules that the block imports, in processes that fuzz."""
    return atheris.instrument_imports(include=["sgalign"]) if "--here" in sys.argv else nullcontext()


def main(targets: dict[str, Target]) -> None:
    """Run the targets named on the command line, or all, each in a process of its own. Print a table of the outcomes.

    End with status 1 if a defect was found. Its input and traceback then are in the folder `--out`.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(targets)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs for each target (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the inputs (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder for defects (default: build/fuzz)")
    parser.add_argument("--input", type=Path, help="an input that a run has left: run only this one, and write nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(targets):
        parser.error(f"unknown target: {', '.join(sorted(unknown))}; known: {', '.join(targets)}")
    if arguments.inputs < 1:
        parser.error(f"--inputs must be at least 1, got {arguments.inputs}")
    if arguments.input is not None:
        if len(arguments.targets) != 1 or not arguments.input.is_file():
            parser.error("--input must be a file, and needs the name of its target")
        outcome, error = run(targets[arguments.targets[0]], arguments.input.read_bytes())
        print(outcome if error is None else "".join([*traceback.format_exception(error), outcome]))
        sys.exit(int(outcome.startswith("DEFECT")))
    if arguments.here:
        (name,) = arguments.targets
        fuzz(targets[name], arguments.inputs, arguments.seed, arguments.out)
    failed = False
    print("| target | inputs | seconds | outcomes |\n|---|---|---|---|", flush=True)
    for name in arguments.targets or targets:
        out = arguments.out / name
        out.mkdir(parents=True, exist_ok=True)
        (out / "outcomes.json").unlink(missing_ok=True)
        options = ["--inputs", arguments.inputs, "--seed", arguments.seed, "--out", out]
        begin = time.monotonic()
        with open(out / "log.txt", "w") as log:
            command = [sys.executable, sys.argv[0], name, "--here", *map(str, options)]
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        seconds = time.monotonic() - begin
        try:
            outcomes = json.loads((out / "outcomes.json").read_text())
        except FileNotFoundError:
            outcomes = {}
        failed |= status != 0 or not outcomes or any(word.startswith("DEFECT") for word in outcomes)
        words = ", ".join(f"{count} {word}" for word, count in outcomes.items())
        words += "" if status == 0 else f" DEFECT: status {status}, see {out / 'log.txt'}"
        print(f"| {name} | {sum(outcomes.values())} | {seconds:.0f} | {words} |", flush=True)
    sys.exit(int(failed))


def fuzz(target: Target, inputs: int, seed: int, out: Path) -> None:
    """Run a target in this process and write the outcomes. This function ends the process.

    libFuzzer ends the process with an artifact in `out` if an input takes longer than `SECONDS` or allocates more than
    `MEBIBYTES` at once. Defects that Python can catch do not end it, so that one run finds several.
    """
    outcomes: Counter[str] = Counter()
    found: set[str] = set()

    def one(content: bytes) -> None:
        word, error = run(target, content)
        if word.startswith("DEFECT") and word not in found:
            found.add(word)
            stem = out / f"defect-{len(found)}"
            stem.with_suffix(".input").write_bytes(content)
            stem.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
        outcomes[word] += 1
        if sum(outcomes.values()) % 1000 == 0 or sum(outcomes.values()) >= inputs:
            (out / "outcomes.json").write_text(json.dumps(dict(outcomes.most_common())))

    one(b"")  # makes what all inputs share, which may take longer than one input
    options = {"runs": inputs - 1, "seed": seed, "timeout": SECONDS, "malloc_limit_mb": MEBIBYTES, "max_len": 4096}
    options |= {"rss_limit_mb": 4 * MEBIBYTES, "artifact_prefix": f"{out}/", "len_control": 0}
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items())], one)
    atheris.Fuzz()


def run(target: Target, content: bytes) -> tuple[str, Exception | None]:
    """Run a target on one input, and return the outcome and the error that it has raised."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            return target(Draw(content), Path(folder)) or "loaded", None
        except Exception as error:
            return judged(error, folder), error


def judged(error: Exception, folder: str) -> str:
    """Return "refused" for an error that names a file in `folder`. Return a description of the defect for any other."""
    from sgalign.errors import InputError

    if isinstance(error, InputError | OSError) and folder in str(error):
        return "refused"
    kind = type(error).__name__
    if isinstance(error, InputError | OSError):
        return f"DEFECT {kind} that names no file: {str(error)[:80]}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "campaigns" not in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "assertion"
    return f"DEFECT {kind} at {place}: {str(error)[:80]}"
