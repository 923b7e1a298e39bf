"""Fuzz the operations: compare random cases with the reference, and run them under the sanitizers.

"core" runs each case with every instruction set of this processor and compares the results with the reference in
float64. It also checks that they equal those of one thread and tensors in the usual layout, up to the sign of zero, and
looks for writes outside of the results. "sanitized" runs the same cases in a core that reports accesses out of bounds
and undefined behavior. "triton" runs a few of them under Triton's interpreter, and "cuda" in the emulation of the CUDA
C++ kernels. Both are slow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if os.environ.get("SGALIGN_FUZZED"):  # the tree with the sanitized core
    sys.path.insert(0, os.environ["SGALIGN_FUZZED"])

import core_checks as checks  # noqa: E402
from core_cases import CORE, EMULATION, INTERPRETER, Mask, draw_case, release_far_buffer  # noqa: E402

RUNS = {"core": 1, "sanitized": 1, "triton": 300, "cuda": 300}  # name, and the part of the inputs that it runs: 1/n
SECONDS = 60  # a case that takes longer counts as a hang
DEATHS = 20  # a run ends after so many cases have ended its process
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def main() -> None:
    """Do the runs that the command line names, or all, and print a table of the outcomes.

    End with status 1 if a defect was found. Its case and traceback then are in the folder `--out`.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"any of {', '.join(RUNS)} (default: all)")
    help_ = "cases, of which triton and cuda run 1 in 300 (default: 100000)"
    parser.add_argument("--inputs", type=int, default=100_000, help=help_)
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz/core"), help="folder (default: build/fuzz/core)")
    parser.add_argument("--case", type=int, help="the number of a case: run only this one")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)  # the first case of a run in this process
    arguments = parser.parse_args()
    if unknown := set(arguments.runs) - set(RUNS):
        parser.error(f"unknown run: {', '.join(sorted(unknown))}; known: {', '.join(RUNS)}")
    if arguments.inputs < 1:
        parser.error(f"--inputs must be at least 1, got {arguments.inputs}")
    if arguments.here is not None:
        (name,) = arguments.runs
        worker(name, range(arguments.here, arguments.inputs), arguments.seed, arguments.out)
        return
    failed = False
    print("| run | cases | seconds | outcomes |\n|---|---|---|---|", flush=True)
    for name in arguments.runs or RUNS:
        out = (arguments.out / name).absolute()
        cases = range(-(-arguments.inputs // RUNS[name]))
        if arguments.case is not None:
            out, cases = out.with_name(f"{name}-one"), range(arguments.case, arguments.case + 1)
        out.mkdir(parents=True, exist_ok=True)
        for path in (*out.glob("case-*.txt"), out / "log.txt"):  # of an earlier run
            path.unlink(missing_ok=True)
        begin = time.monotonic()
        outcomes = supervise(name, cases, arguments.seed, out)
        failed |= not outcomes or any("DEFECT" in word for word in outcomes)
        words = ", ".join(f"{count} {word}" for word, count in outcomes.most_common())
        print(f"| {name} | {sum(outcomes.values())} | {time.monotonic() - begin:.0f} | {words} |", flush=True)
    sys.exit(int(failed))


def supervise(name: str, cases: range, seed: int, out: Path) -> Counter[str]:
    """Run the cases in a process, and in another one after a case that ends the process. Return the outcomes."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)} | environment_of(name, out)
    outcomes: Counter[str] = Counter()
    first = cases.start
    for _ in range(DEATHS):
        command = [
            sys.executable,
            __file__,
            name,
            "--here",
            first,
            "--inputs",
            cases.stop,
            "--seed",
            seed,
            "--out",
            out,
        ]
        (out / "progress").unlink(missing_ok=True)
        (out / "outcomes.json").write_text("{}")
        with open(out / "log.txt", "a") as log:
            status = subprocess.run(list(map(str, command)), env=environment, stdout=log, stderr=log).returncode
        outcomes.update(json.loads((out / "outcomes.json").read_text()))
        if status == 0:
            return outcomes
        if not (out / "progress").exists():
            break
        dead = int.from_bytes((out / "progress").read_bytes(), "little")
        outcomes.update([f"DEFECT status {status} in case {dead}, see {out / 'log.txt'}"])
        first = dead + 1
        if first >= cases.stop:
            return outcomes
    outcomes.update([f"DEFECT the run ended early, see {out / 'log.txt'}"])
    return outcomes


def environment_of(name: str, out: Path) -> dict[str, str]:
    """Return the environment variables of a run, and build what it needs."""
    if name == "triton":
        return {"TRITON_INTERPRET": "1"}
    if name != "sanitized":
        return {}
    tree = out.parent / "tree"
    for part in ("sgalign", "kernels", "csrc"):
        # Times are kept, so that a build compiles only changed files.
        shutil.copytree(
            ROOT / part, tree / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / part, tree)
    flags = {
        "SGALIGN_CUDA": "0",
        "CXXFLAGS": SANITIZE,
        "LDFLAGS": SANITIZE,
        "CPPFLAGS": "-DSGALIGN_POISON",
        "CXX": "g++",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    subprocess.run(command, cwd=tree, env=os.environ | flags, check=True, stdout=subprocess.DEVNULL)
    find = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() for words in find]
    return {
        "SGALIGN_FUZZED": str(tree),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def worker(name: str, cases: range, seed: int, out: Path) -> None:
    """Run cases in this process, and write the outcomes to `out`."""
    check = {"core": checks.Core, "sanitized": checks.Sanitized}.get(name, checks.Backend)(name)
    limits = {"triton": INTERPRETER, "cuda": EMULATION}.get(name, CORE)
    outcomes: Counter[str] = Counter()
    progress = os.open(out / "progress", os.O_CREAT | os.O_WRONLY)
    for number in cases:
        os.pwrite(progress, number.to_bytes(8, "little"), 0)
        signal.alarm(SECONDS)  # its default action ends the process, in a kernel too
        try:
            case = draw_case(seed, number, limits)
            check(case, number)
            word = type(case).__name__.lower()
            word += "" if isinstance(case, Mask) or not case.junk else " with infinite numbers or NaN"
        except Exception as error:
            word = f"DEFECT {type(error).__name__}"
            (out / f"case-{number}.txt").write_text("".join(traceback.format_exception(error)))
        signal.alarm(0)
        outcomes[word] += 1
        release_far_buffer()
        if number % 100 == 99 or number == cases.stop - 1 or "DEFECT" in word:
            (out / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
