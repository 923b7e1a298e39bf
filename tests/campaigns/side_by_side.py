"""Call the operations from many threads and processes at once, and check that all results equal the serial ones.

    python tests/campaigns/side_by_side.py --rounds 200 --seed 0

A round calls each operation once, with a random seed, dtype, backend and number of threads. All parts make the same
calls. "equal" means that all results have the same bits as in a plain loop with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from operations import CALLS, WRONG_CALLS
from torch.utils.data import DataLoader, Dataset

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
THREADS = 8  # Python threads
SECONDS = 600  # after which a process counts as one that waits forever


class Work(NamedTuple):
    """One call of an operation."""

    name: str
    seed: int
    dtype: torch.dtype
    backend: str | None
    threads: int  # of OpenMP

    @property
    def uses_torch(self) -> bool:
        """True if torch multiplies matrices in the call. Its results depend on its number of threads."""
        return self.backend == "reference" or self.name == "MaskedMultiheadAttention"


def draw_work(rounds: int, seed: int) -> list[Work]:
    """Return the calls of all parts."""
    draw = random.Random(seed)
    settings = [(None, 1), (None, 2), (None, 3), ("cpu", 1), ("cpu", 2), ("reference", 1)]
    work = [
        Work(name, draw.randrange(2**31), draw.choice(DTYPES), *draw.choice(settings))
        for _ in range(rounds)
        for name in CALLS
    ]
    return [one._replace(threads=1) if one.uses_torch else one for one in work]


def digest(work: Work) -> str:
    """Return a digest of the results of a call."""
    torch.set_num_threads(work.threads)
    results = CALLS[work.name](work.seed, work.dtype, work.backend)
    content = b"".join(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for x in results)
    return hashlib.sha256(content).hexdigest()


def serial(work: Sequence[Work]) -> list[str]:
    """Return the digests of all calls, made one after another with one thread."""
    return [digest(one._replace(threads=1)) for one in work]


def compare(found: Sequence[str], expected: Sequence[str]) -> str:
    different = sum(one != other for one, other in zip(found, expected, strict=True))
    return "equal" if not different else f"DIFFERENT: {different} of {len(expected)}"


# ------------------------------------------------------------------------------------------------------ threads


def one_after_another(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make the calls in a plain loop, but with their own numbers of OpenMP threads."""
    return compare([digest(one) for one in work], expected)


def in_threads(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make the calls in 8 Python threads at once, while every thread also makes wrong calls."""
    start = threading.Barrier(THREADS)

    def run(thread: int) -> list[str]:
        start.wait()
        found = []
        for one in work[thread::THREADS]:
            found.append(digest(one))
            with contextlib.suppress(ValueError, TypeError, IndexError, RuntimeError):
                WRONG_CALLS[one.name][0]()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(run, range(THREADS)))
    return compare([parts[number % THREADS][number // THREADS] for number in range(len(work))], expected)


def same_in_threads(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make each call in 8 Python threads at the same time, which use up to 3 OpenMP threads each."""

    def copies(one: Work) -> list[Work]:
        return [one._replace(threads=1 if one.uses_torch else 1 + n % 3) for n in range(THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        different = sum(
            found != wanted for one, wanted in zip(work, expected) for found in pool.map(digest, copies(one))
        )
    return f"DIFFERENT: {different}" if different else "equal"


# ------------------------------------------------------------------------------------------------------ processes


class Digests(Dataset[str]):
    """A data set whose items are digests."""

    def __init__(self, work: Sequence[Work]) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> str:
        return digest(self.work[index])


def in_workers(method: str, work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make the calls in the workers of a data loader."""
    _use_openmp()
    loader = DataLoader(Digests(work), None, num_workers=2, multiprocessing_context=method, timeout=SECONDS)
    return compare(list(loader), expected)


def _use_openmp() -> None:
    """Start the threads of OpenMP, for torch's operations and for those of the core."""
    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()
    CALLS["fused_masked_attention"](0, torch.float32, None)


def _in_fork(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make the calls in a forked process that may not end."""
    process = os.fork()
    if not process:
        try:
            os._exit(int(any(digest(one) != wanted for one, wanted in zip(work, expected))))
        finally:
            os._exit(2)
    end = time.monotonic() + SECONDS
    while not (result := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "WAITS FOREVER"
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(result[1])
    return {0: "equal", 1: "DIFFERENT"}.get(code, f"FAILED with exit code {code}")


def after_fork(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Fork a process that has used OpenMP, and make the calls in the new process."""
    _use_openmp()
    return _in_fork(work, expected)


def fork_in_thread(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Fork in one Python thread while other threads make calls."""
    _use_openmp()
    ended = threading.Event()

    def run(thread: int) -> None:
        while not ended.is_set():
            digest(work[thread])

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(run, thread) for thread in range(2)]
        outcome = pool.submit(_in_fork, work, expected).result()
        ended.set()
        for other in others:
            other.result()
    return outcome


def in_pool(work: Sequence[Work], expected: Sequence[str]) -> str:
    """Make the calls in new processes that import everything again."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return compare(pool.map_async(digest, work).get(SECONDS), expected)


# ------------------------------------------------------------------------------------------------------ interpreters

SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
try:
    problem = interpreters.run_string(interpreters.create(), "import {module}")
except Exception as error:
    problem = error
print(getattr(problem, "formatted", problem) or "imported")
"""


def in_subinterpreter(module: str) -> str:
    """Return the outcome of importing a module in a subinterpreter, as one line."""
    command = [sys.executable, "-W", "ignore", "-c", SUBINTERPRETER.format(module=module)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "does not return within 60 seconds"
    if result.returncode:
        return f"the process ends with exit code {result.returncode}"
    return result.stdout.strip().splitlines()[-1]


def gil() -> str:
    """Return a phrase that says whether Python's threads run at the same time."""
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    return "with a global lock" if enabled else "without a global lock"


# ------------------------------------------------------------------------------------------------------ command

Part = Callable[[Sequence[Work], Sequence[str]], str]
PARTS: dict[str, Part] = {
    "one-after-another": one_after_another,
    "threads": in_threads,
    "same-in-threads": same_in_threads,
    "fork": after_fork,
    "fork-in-thread": fork_in_thread,
    "workers-fork": lambda work, expected: in_workers("fork", work, expected),
    "workers-spawn": lambda work, expected: in_workers("spawn", work, expected),
    "workers-forkserver": lambda work, expected: in_workers("forkserver", work, expected),
    "pool-spawn": in_pool,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=200, help="calls of each operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    work = draw_work(options.rounds, options.seed)
    expected = serial(work)
    print(f"Python {sys.version.split()[0]} {gil()}, torch {torch.__version__}, seed {options.seed}\n")
    print("| part | calls | seconds | outcome |\n|---|---|---|---|", flush=True)
    failed = False
    for part in options.parts or PARTS:
        start = time.monotonic()
        outcome = PARTS[part](work, expected)
        failed |= outcome != "equal"
        print(f"| {part} | {len(work)} | {time.monotonic() - start:.0f} | {outcome} |", flush=True)
    if not options.parts:
        for module in ("numpy", "torch", "sgalign"):
            # A limit of other packages, and not a failure.
            print(f"| `import {module}` in a subinterpreter | 1 | | {in_subinterpreter(module)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
