"""Test and measure this package on a GPU with one command: `python -m benchmarks.gpu_report [--out DIR]`.

The parts of the report are the installed versions, the tests on the device, attention, whole training steps, the
relation head, the alignment loss, and some tests under compute-sanitizer. Every operation is measured beside its
alternatives. The measurements run in a separate process. If it dies, only the case that it was measuring is lost.

DIR/report.json holds all figures and is complete after every case. DIR/report.md is made from it. If a run was cut off
or a part's time was up, the same command resumes there. It measures a case again if the versions, the code or the
case's entries in the kernels' table have changed. A report of another card is refused.

Times are medians. "graph" is the time in the replay of a CUDA graph, and includes only the device's time. "call" is the
time of a plain call. At small shapes, the launch takes most of it. Each failure is recorded as a sentence.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

try:
    from benchmarks import attention_part, device_tests, environment_part, measuring, relation_part, steps_part
    from benchmarks.measuring import Figures
    from benchmarks.record import DeviceLost, Part, Record, planned, settled
    from benchmarks.report_markdown import NOT_REACHED, failures, markdown, unfinished
    from sgalign.files import check_writable, read_json, write_json
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.gpu_report needs {error.name}: pip install '.[train,test]'")

PARTS: dict[str, Part] = {  # most important first
    "environment": environment_part.run,
    "tests": device_tests.run,
    "attention bfloat16": functools.partial(attention_part.run, "bfloat16"),
    "steps": steps_part.run,
    "relation": relation_part.relation,
    "loss": relation_part.loss,
    "attention float32": functools.partial(attention_part.run, "float32"),
    "attention float16": functools.partial(attention_part.run, "float16"),
    "sanitizer": device_tests.run_sanitized,
}
# Seconds that one command may spend on each part, 15 minutes in total. Nine minutes were not enough on an H200, because
# most of the time is compilation.
SECONDS = dict(zip(PARTS, (20, 300, 240, 110, 50, 10, 80, 40, 60)))


def measure(parts: Mapping[str, Part], known: Figures, limits: Mapping[str, float], connection: Connection) -> None:
    """Run parts one after the other in a separate process, and send a part's figures whenever they change.

    Args:
        limits: seconds that each part may take, including the seconds that its known figures took.
    """
    os.setsid()  # otherwise, ctrl-C reaches this process twice
    measuring.end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, part in parts.items():
        figures, start = known[name], time.monotonic() - known[name].get("seconds", 0)

        def send(figures: Figures, name: str = name, start: float = start) -> None:
            figures["seconds"] = time.monotonic() - start
            connection.send((name, figures))

        send(figures)
        try:
            part(Record(figures, figures, start + limits[name], send))
        except (DeviceLost, KeyboardInterrupt):
            with suppress(OSError):  # the listener may be gone
                send(figures)
            os._exit(0)  # skips torch's cleanup, which may fail without a device
        except Exception as error:
            figures["failure"] = measuring.sentence(error)
        send(figures)


def in_own_process(
    parts: Mapping[str, Part], known: Figures, limits: Mapping[str, float]
) -> Iterator[tuple[str, Figures]]:
    """Yield a part's name and figures whenever they change, until all parts are done or their process has ended.

    An interruption ends the process. KeyboardInterrupt is raised after the last figures.
    """
    context = multiprocessing.get_context("spawn")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(parts, known, limits, sent))
    process.start()
    assert process.pid is not None
    pid = process.pid
    sent.close()
    interruptions: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interruptions.append(number)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGINT if len(interruptions) == 1 else signal.SIGKILL)

    before = signal.signal(signal.SIGINT, interrupt)
    name, figures = next(iter(parts)), known[next(iter(parts))]
    try:
        with suppress(EOFError):
            while True:
                name, figures = received.recv()
                yield name, settled(figures, NOT_REACHED)
        process.join(10)
    finally:
        process.kill()
        process.join()
        signal.signal(signal.SIGINT, before)
    if interruptions:
        raise KeyboardInterrupt
    if process.exitcode:
        died = f"the process died with status {process.exitcode}"
        of_case = settled(figures, died)
        yield name, of_case if of_case != figures else figures | {"failure": died}


def write_report(
    out: Path,
    parts: Mapping[str, Part],
    only: Iterable[str] = (),
    again: bool = False,
    run: Callable[..., Iterator[tuple[str, Figures]]] = in_own_process,
) -> Figures:
    """Measure the cases that the report in `out` lacks, and return the whole report.

    Args:
        out: folder of the report.
        parts: all parts of the report, by name.
        only: names of the parts to run. If empty, all of them. "attention" stands for attention in all dtypes.
        again: if True, the cases that `out` already has are measured again.
        run: function that measures parts, such as `in_own_process`.

    Raises:
        ValueError: if the report in `out` was measured on another card, or the file is not a report.
    """
    file, remedy = out / "report.json", "remove it, or give another --out"
    check_writable(file)
    report: Figures = read_json(file, remedy) if file.exists() else {}
    left = {name: part for name, part in parts.items() if not only or {name, name.split()[0]} & {*only}}
    known: Figures = {} if again else report
    try:
        markdown(report)  # reads the whole report, so a malformed one fails here
        plans = {name: planned(part, known.get(name, {})) for name, part in left.items()}
        spent = {name: known.get(name, {}).get("seconds", 0) for name in left}
        if not all(0 <= seconds < math.inf for seconds in spent.values()):
            raise ValueError(f"seconds must be finite and at least 0, got {spent}")
        card = report.get("environment", {}).get("installed", {}).get("card")
    except Exception as error:  # a malformed report can cause any error
        if not file.exists():
            raise
        raise ValueError(f"{file} is not a report ({type(error).__name__}: {error}); {remedy}") from error
    if card and card != torch.cuda.get_device_name():
        raise ValueError(f"{file} was measured on {card}, but this card is {torch.cuda.get_device_name()}; {remedy}")

    def save(name: str, figures: Figures) -> None:
        report[name] = figures
        write_json(file, {name: report[name] for name in [*parts, *report] if name in report}, indent=1)
        (out / "report.md").write_text(markdown(report))

    limits = {}
    for name in left:
        save(name, plans[name] | {"seconds": spent[name]})
        limits[name] = spent[name] + SECONDS.get(name, 60)
    begun = ""
    while left := {name: part for name, part in left.items() if is_left(report[name], limits[name])}:
        for name, figures in run(left, report, limits):
            if name != begun:
                print(f"{name} ...", flush=True)
                begun = name
            save(name, figures)
    return report


def is_left(figures: Figures, limit: float) -> bool:
    """Return whether a part is unfinished and has time left."""
    return unfinished(figures) and "failure" not in figures and figures["seconds"] < limit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the report (default: benchmarks/results/<card>)")
    choices = sorted({*PARTS, *(name.split()[0] for name in PARTS)})
    parser.add_argument("--only", nargs="+", default=[], choices=choices, metavar="PART", help=", ".join(choices))
    parser.add_argument("--again", action="store_true", help="also measure what the report already has")
    parser.add_argument(
        "--rehearse", action="store_true", help="run everything on tiny inputs without a GPU; the figures mean nothing"
    )
    options = parser.parse_args(arguments)
    parts = PARTS
    if options.rehearse:
        from benchmarks import rehearsal

        parts = rehearsal.of_report()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu_report: torch finds no GPU here, so there is nothing to report; --rehearse runs without one"
        )
    out = options.out or measuring.results()
    try:
        measuring.check_environment()
        report = write_report(out, parts, options.only, options.again)
    except KeyboardInterrupt:
        sys.exit(f"benchmarks.gpu_report: interrupted; {measuring.kept(out / 'report.json')}")
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.gpu_report: {error}")
    print(f"wrote {out / 'report.md'} and report.json")
    found = list(failures(report))
    print("failed, or left for another run:" if found else "nothing failed")
    for sentence in found:
        print(f"  {sentence}")
    return 1 if options.rehearse and found else 0


if __name__ == "__main__":
    from benchmarks import gpu_report as module  # the module that its processes import

    sys.exit(module.main())
