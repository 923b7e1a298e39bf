"""Run commands of `sgalign` with random options, and judge how each one ends.

A command must write whole files and end with the code 0, or refuse with one sentence that names the option or the file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "campaigns")]

import command_inputs  # noqa: E402
from command_judging import Ended, State, expected, judge, state  # noqa: E402
from command_lines import SHARES, Lines  # noqa: E402

import sgalign_command  # noqa: E402
from sgalign.commands import doctor  # noqa: E402
from sgalign.commands import main as command_line  # noqa: E402
from sgalign.data import ScenesDataset  # noqa: E402
from sgalign.studies.plan import _Parsed  # noqa: E402
from sgalign.training import lightning_cli  # noqa: E402
from sgalign.training.lightning_cli import make_cli  # noqa: E402

SECONDS = 20  # a case that takes longer is stopped
LONG = 2  # a worker that spent more seconds in a case is replaced, because the case may have left state behind
MEMORY = 10 << 30  # address space of a process in bytes, of which the libraries take about 4 GiB
WORKERS = 2
OUTCOMES = ("finished", "refused", "usage error", "stopped", "DEFECT")


class Worker:
    """A process that runs cases one after the other, each in a fresh folder.

    Args:
        inputs: folder that has the folder `in`.
        lines: the command lines.
        seed: seed of the cases.
        out: file to which the outcome of each case is appended.
    """

    def __init__(self, inputs: Path, lines: Lines, seed: int, out: Path) -> None:
        self.whole, self.lines, self.seed, self.out = inputs, lines, seed, out
        self.inputs = Path(tempfile.mkdtemp(prefix="inputs_", dir="/dev/shm"))  # a copy that cases may damage
        self.cli = make_cli(["fit", "--model", "MotifsModule"], _Parsed)
        # For the process that watches: the number of the case and its start, which is 0 between cases.
        self.now = multiprocessing.RawArray("d", 2)
        self.folder = Path(tempfile.mkdtemp(prefix="case_", dir="/dev/shm"))
        self.pid = 0

    def start(self, cases: Sequence[int]) -> None:
        """Start the process. It ends when the cases are done, or after a case that was long or had a defect."""
        self.now[1] = 0.0
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)
            self._isolate()
            for case in cases:
                self.now[0], self.now[1] = case, time.monotonic()
                fresh = self._run(case)
                self.now[1] = 0.0
                if not fresh:
                    break
            code = 0
        except BaseException:
            traceback.print_exc(file=open(f"{self.out}.crash", "a"))
        finally:
            os._exit(code)

    def _isolate(self) -> None:
        """Give the process its own home, temporary folder and output, and no network."""
        environment = {"HOME": "home", "TMPDIR": "tmp", "MPLCONFIGDIR": "home", "XDG_CACHE_HOME": "home"}
        os.environ |= {name: str(self.folder / path) for name, path in environment.items()}
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        tempfile.tempdir = None
        connect = socket.socket.connect

        def local(self: socket.socket, address: Any) -> None:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
                raise OSError(f"no network for {address}")
            connect(self, address)

        socket.socket.connect = local  # type: ignore[method-assign]
        self.files = [tempfile.TemporaryFile(dir="/dev/shm") for _ in range(2)]
        for number, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.modules["__main__"].__spec__ = None
        reuse_parser(self.cli)
        doctor.missing = functools.cache(doctor.missing)  # the search for packages takes most of a refused case
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        self._copy_inputs()
        self.start_state: State = {}

    def _copy_inputs(self) -> None:
        shutil.rmtree(self.inputs)
        shutil.copytree(self.whole, self.inputs)
        self.before = state(self.inputs)

    def _fill(self) -> None:
        """Make the folder of a case: the current folder with the inputs and with old outputs, home and temporary."""
        os.chdir("/")
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("cwd/old/full", "cwd/old/empty", "home", "tmp"):
            (self.folder / name).mkdir(parents=True)
        cwd = self.folder / "cwd"
        (cwd / "in").symlink_to(self.inputs / "in")
        (cwd / "old/full/file.txt").write_text("old\n")
        (cwd / "old/file.json").write_text("{}\n")
        (cwd / "old/file.jsonl").write_text("")
        with h5py.File(cwd / "old/file.h5", "w"):
            pass
        (cwd / "old/link.json").symlink_to("file.json")
        (cwd / "old/dangling.json").symlink_to("absent.json")
        if (self.inputs / "study").is_dir():
            shutil.copytree(self.inputs / "study", cwd / "study")
        self.start_state = state(self.folder)

    def _run(self, case: int) -> bool:
        """Run a case, append its outcome, and return True if the process can run another one."""
        arguments = self.lines.line(self.seed, case)
        if not self.start_state:
            self._fill()
        os.chdir(self.folder / "cwd")
        for file in self.files:
            file.seek(0)
            file.truncate()
        begin = time.monotonic()
        ended = call(arguments, self.files)
        seconds = time.monotonic() - begin
        after = state(self.folder)
        outcome = judge(arguments, ended, self.folder, self.start_state, after, self.lines.names(arguments))
        if ended.code != 2 and (now := state(self.inputs)) != self.before:
            changed = sorted(name for name in now.keys() | self.before.keys() if now.get(name) != self.before.get(name))
            if strays := [name for name in changed if not expected(arguments, f"cwd/{name}")]:
                outcome = f"DEFECT {arguments[0]}: changed an input: {strays[0]}"
            self._copy_inputs()
        row = {"case": case, "command": _name(arguments), "outcome": outcome, "seconds": round(seconds, 3)}
        if outcome.startswith("DEFECT"):
            error = "".join(traceback.format_exception(ended.error)) if ended.error else ""
            row |= {"arguments": arguments, "err": ended.err[-3000:], "out": ended.out[-1000:], "error": error[-6000:]}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if after != self.start_state:
            self.start_state = {}
        return seconds < LONG and not outcome.startswith("DEFECT")


def reuse_parser(made: lightning_cli.CLI) -> None:
    """Let all training commands of this process use one parser, because making it takes longer than a case."""
    original = lightning_cli.CLI.setup_parser

    def setup(self: Any, run: bool, options: dict[str, Any], *args: Any) -> None:
        if options:  # studies parse with other options
            original(self, run, options, *args)
            return
        vars(self).update(
            {name: value for name, value in vars(made).items() if "parser" in name or "subcommand_" in name}
        )

    lightning_cli.CLI.setup_parser = setup  # type: ignore[method-assign]


def call(arguments: Sequence[str], files: Sequence[Any]) -> Ended:
    """Run a command line in this process, as the installed command does."""
    sys.argv = [str(TESTS.parent / "sgalign_command.py"), *arguments]
    code, error = None, None
    try:
        code = sgalign_command.run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as raised:
        error = raised
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (os.pread(file.fileno(), 1 << 20, 0).decode("utf-8", "replace") for file in files)
    return Ended(code, error, out, err)


def _name(arguments: Sequence[str]) -> str:
    """Return the command of a case for the table. `predict` of Lightning has a row of its own."""
    command = arguments[0] if arguments else ""
    if command == "predict" and not command_line.LIGHTNING_OPTIONS.isdisjoint(
        option.partition("=")[0].split(".")[0] for option in arguments
    ):
        return "predict --config"
    return command if command in ("doctor", *command_line.COMMANDS, *command_line.TRAINER_COMMANDS) else "no command"


def campaign(
    cases: Sequence[int],
    seed: int,
    out: Path,
    commands: Sequence[str] = (),
    *,
    seconds: float = float("inf"),
    trained: bool = True,
) -> list[dict[str, Any]]:
    """Run cases of some commands, or of all, in `WORKERS` processes. Return their outcomes.

    Args:
        cases: numbers of the cases.
        seed: seed of the cases.
        out: folder for the file of outcomes.
        commands: names of the commands, as in `SHARES`. If it is empty, all commands.
        seconds: time after which the run stops.
        trained: False to make no models, so commands that need one refuse. It saves a minute.
    """
    with tempfile.TemporaryDirectory(prefix="commands_", dir="/dev/shm") as folder:
        inputs = Path(folder)
        prepare(inputs, trained=trained)
        lines = Lines(command_inputs.listed(inputs), commands)
        rows = out / "outcomes.jsonl"
        rows.unlink(missing_ok=True)
        workers = [Worker(inputs, lines, seed, rows) for _ in range(WORKERS)]
        waiting = {worker: list(cases[number::WORKERS]) for number, worker in enumerate(workers)}
        end = time.monotonic() + seconds
        for worker in workers:
            if waiting[worker]:  # one case leaves the second worker without any
                worker.start(waiting[worker])
        while any(worker.pid for worker in workers):
            time.sleep(0.02)
            for worker in workers:
                if worker.pid:
                    _watch(worker, waiting[worker], time.monotonic() > end)
        for worker in workers:
            shutil.rmtree(worker.folder, ignore_errors=True)
            shutil.rmtree(worker.inputs, ignore_errors=True)
    return [json.loads(line) for line in rows.read_text().splitlines()]


def _watch(worker: Worker, waiting: list[int], over: bool) -> None:
    """Stop a case that takes too long, and start the worker's process again if it has ended."""
    begin = worker.now[1]
    late = begin > 0 and time.monotonic() - begin > SECONDS
    if late or over:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    pid, status = os.waitpid(worker.pid, 0 if late or over else os.WNOHANG)
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):  # processes that the case has started
        os.killpg(pid, signal.SIGKILL)
    worker.pid = 0
    if over:
        return
    inside = worker.now[1] > 0
    early = status != 0 and not inside and not late  # the process ended before its next case began
    case = waiting[0] if early else int(worker.now[0])
    if inside or early:
        arguments = worker.lines.line(worker.seed, case)
        outcome = "stopped" if late else f"DEFECT {_name(arguments)}: ended by status {status}"
        row = {"case": case, "command": _name(arguments), "outcome": outcome, "seconds": SECONDS}
        with worker.out.open("a") as file:
            file.write(json.dumps(row | {"arguments": arguments}) + "\n")
    del waiting[: waiting.index(case) + 1]
    if waiting:
        worker.start(waiting)


def prepare(folder: Path, *, trained: bool) -> None:
    """Write the inputs in a child process, and import here what the commands import there.

    This process must not train, because torch's autograd does not work in a process that was forked after it.
    """
    names = folder / "modules.txt"
    for name in (*command_line.COMMANDS, "predict"):
        importlib.import_module(f"sgalign.commands.{name.replace('-', '_')}")
    for split in ("train", "validation", "test"):
        list(ScenesDataset(split))
    pid = os.fork()
    if not pid:
        try:
            with open(folder / "log.txt", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                command_inputs.make(folder, trained=trained)
            names.write_text("\n".join(sys.modules))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if not names.is_file():
        raise RuntimeError((folder / "log.txt").read_text())
    for name in names.read_text().splitlines():
        if name != "__main__" and name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the outcomes as a Markdown table, with one line per command."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["command"]][row["outcome"].split(" ")[0].replace("usage", "usage error")] += 1
    lines = ["| command | inputs | finished | refused | usage error | stopped | defects |", "|---" * 7 + "|"]
    total: Counter[str] = Counter()
    for command, count in sorted(counts.items()):
        total += count
        lines.append(f"| {command} | {count.total()} | " + " | ".join(str(count[one]) for one in OUTCOMES) + " |")
    lines.append(f"| together | {total.total()} | " + " | ".join(str(total[one]) for one in OUTCOMES) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases that the options name, print the table, and return 1 if there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ", ".join(filter(None, SHARES))
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"any of {known} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="number of cases (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz/commands"), help="folder for outcomes (default: %(default)s)"
    )
    parser.add_argument("--case", type=int, metavar="N", help="run only this case, and print how it ended")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time (default: never)")
    options = parser.parse_args()
    if unknown := set(options.commands) - set(SHARES):
        parser.error(f"unknown command: {', '.join(sorted(unknown))}; known: {known}")
    if options.inputs < 1:
        parser.error(f"--inputs must be at least 1, got {options.inputs}")
    out = options.out.resolve() / ("" if options.case is None else "one")
    out.mkdir(parents=True, exist_ok=True)
    cases = range(options.inputs) if options.case is None else [options.case]
    begin = time.monotonic()
    rows = campaign(cases, options.seed, out, options.commands, seconds=options.seconds)
    if options.case is not None:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    kinds: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row["outcome"].startswith("DEFECT"):
            kinds[row["outcome"]].append(row["case"])
    print(table(rows))
    print(f"\n{time.monotonic() - begin:.0f} seconds, seed {options.seed}")
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{kind}: {len(found)} cases, such as --case {found[0]}")
    missing = 0 if options.seconds < float("inf") else len(cases) - len(rows)
    if missing:
        print(f"{missing} cases have no outcome")
    return int(bool(kinds) or missing != 0)


if __name__ == "__main__":
    sys.exit(main())
