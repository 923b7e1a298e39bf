"""Everything that a GPU can say about this package, by one command: `python -m benchmarks.gpu_report [--out DIR]`.

Part by part, each in a process of its own, so that one that crashes takes no other with it: what is installed, the
tests on the device, attention, the relation head, the alignment loss, and whole training steps, beside what one would
use instead. DIR/report.json holds all figures and is written after every part; the same command goes on where a run was
cut off or a part's time was up, and `--only PART` measures a part again. DIR/report.md is read from it.

Times are medians, "graph" those of a CUDA graph's replay, which are the device's alone, "call" those of plain calls,
which small shapes spend on launching. What fails is recorded as a sentence.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.report_markdown import NOT_REACHED, markdown, unfinished
from sgalign import _version, relation_alignment_loss
from sgalign.ops import backends

try:
    import pytest

    from sgalign.files import check_writable, read_json, write_json
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.gpu_report needs {error.name}: pip install '.[train,test]'")

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
Figures = dict[str, Any]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# What a part may take; all in all ten minutes.
SECONDS = {"tests": 170, "attention bfloat16": 140, "attention float16": 35, "attention float32": 45, "steps": 80}
TEST_FILES = ("tests/test_attention.py", "tests/test_relation.py", "tests/test_alignment.py", "tests/test_gpu.py")
PYTEST = (sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider")
SANITIZER_EXIT = 9  # of compute-sanitizer where it has found something
SANITIZER_MARK = "========= "
SANITIZER_FINDS = SANITIZER_MARK + r"(Invalid|Misaligned|Uninitialized|Race|Barrier|Program hit|.*SUMMARY: [1-9])"
DEVICE_LOST = 7  # of pytest, as tests/conftest.py ends it after an illegal access
SANITIZED = "test_each_branch_is_the_single_one or test_rows_with_nothing_kept"

# B, H, Lq, Lk, D. The goals are set at SGTR's shapes (180 queries; 100 entities or an image's memory).
SGTR_SHAPES = [(batch, 8, 180, keys, 32) for batch in (8, 4) for keys in (1024, 608, 475, 100)]
LONG_SHAPES = [(1, 8, 180, 16384, 32), (1, 8, 4096, 4096, 64), (1, 8, 16384, 16384, 64), (1, 8, 300, 2000, 32)]
LONG_SHAPES += [(2, 8, 128, 512, 64), (1, 8, 4096, 4096, 128)]
SHAPES = {
    "bfloat16": SGTR_SHAPES + LONG_SHAPES,
    "float16": [*SGTR_SHAPES[:2], *LONG_SHAPES[:2]],
    "float32": [*SGTR_SHAPES[:4], *LONG_SHAPES[:2]],
}
FLEX_SHAPES = [*SGTR_SHAPES[:4], *LONG_SHAPES[:2]]  # compiled for each shape, which takes seconds
CHECKED_SHAPES = [(2, 3, 45, 300, 32), (1, 8, 1024, 300, 64), (1, 8, 1024, 300, 128)]  # keys split, and not
# ||out - ref|| / ||ref||: a few roundings of the dtype, and of float32 sums of products
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
RELATION_SHAPES = [(1024, 40, 4096, 51), (4096, 160, 4096, 51)]  # R, N, C, K of one image and of four


# ------------------------------------------------------------------------------------------------------ measuring


def graph_ms(calls: list[Callable[[], object]]) -> float:
    """Device time of one call when all are captured in one graph, which holds several of short ones."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in itertools.islice(itertools.cycle(calls), 3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    calls = list(itertools.islice(itertools.cycle(calls), max(len(calls), min(16, int(2 / event_ms(calls[0])) + 1))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return median_ms(lambda: event_ms(graph.replay)) / len(calls)


def call_ms(call: Callable[[], object]) -> float:
    """Time of one of several calls in a row, as a training loop makes them."""
    call()
    torch.cuda.synchronize()
    count = 10

    def several() -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / count

    return median_ms(several, least=3)


def event_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ms(measure: Callable[[], float], *, least: int = 5, seconds: float = 0.15) -> float:
    """Of as many rounds as fit, at least `least`."""
    times: list[float] = []
    deadline = time.monotonic() + seconds
    while len(times) < least or (time.monotonic() < deadline and len(times) < 100):
        times.append(measure())
    return statistics.median(times)


def timed(calls: list[Callable[[], object]]) -> Figures:
    """All that is measured of a contender; `calls` differ in their inputs alone."""
    from benchmarks import conftest

    for call in calls:  # compiles, and draws what a call draws once
        call()
    before, peak = conftest.memory(calls[0], DEVICE)
    return {"graph": graph_ms(calls), "call": call_ms(calls[0]), "peak": peak - before}


def attempt(
    measure: Callable[..., Figures],
    *arguments: Any,
    deadline: float = float("inf"),
    before: Figures | None = None,
) -> Figures:
    """What `measure` gives, or a sentence about why it gives nothing; `before` where an earlier run came to this."""
    if before and before.get("failure") != NOT_REACHED:
        return before
    if time.monotonic() > deadline or not usable():
        return {"failure": NOT_REACHED}
    try:
        return measure(*arguments)
    except (Exception, pytest.skip.Exception) as error:  # benchmarks skip what is not installed
        return {"failure": sentence(error)}
    finally:
        gc.collect()
        if usable():
            torch.cuda.empty_cache()


def known_contenders(before: Figures, shape: Sequence[int], dtype: str, backward: bool) -> Figures:
    """What a run that was cut off has measured of a row."""
    case = [*shape], dtype, backward
    rows = (row for row in before.get("rows", []) if ([*row["shape"]], row["dtype"], row["backward"]) == case)
    return next(rows, {"contenders": {}})["contenders"]


def usable() -> bool:
    """Whether the device answers: after an illegal access this process never gets it back."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def sets_beyond_cache(mebibytes: float) -> int:
    """How many sets of inputs no cache holds, at most 8."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size / 2**20
    return max(1, min(8, int(2 * cache / mebibytes) + 1))


def available() -> list[str]:
    """Backends for GPUs."""
    return [name for name in backends.BACKENDS if name not in ("cpu", "reference") and not backends.unavailable(name)]


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated without being filled starts as NaN, so that an unwritten element shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with (
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest of ||got - expected|| / ||expected||; NaN where one is."""
    errors = [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def checked(got: Callable[[], list[Tensor]], expected: Callable[[], list[Tensor]], dtype: str) -> Figures:
    """Compares with float64 and poisoned memory before anything is timed."""
    with poisoned():
        found = got()
    error = relative_error(found, expected())
    return {"error": error, "allowed": TOLERANCE[dtype], "right": error <= TOLERANCE[dtype]}


# ------------------------------------------------------------------------------------------------------ parts


def environment(before: Figures) -> Figures:
    """What is installed, and two rates that everything is held against: of copying and of matrix products."""
    properties = torch.cuda.get_device_properties(DEVICE)
    smi = shutil.which("nvidia-smi")
    query = [smi or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] if smi else "unknown"
    found: Figures = {
        "card": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "CUDA or ROCm": torch.version.cuda or torch.version.hip,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "sgalign": _version.__version__,
    }
    for package in ("triton", "xformers", "flash_attn"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["backends"] = {name: backends.unavailable(name) or "available" for name in backends.BACKENDS}
    source = torch.empty(2**29, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    found["bytes per second"] = 2 * source.numel() / (1e-3 * graph_ms([lambda: target.copy_(source)]))
    found["FLOP per second"] = {}
    for dtype in SHAPES:
        size = 4096 if dtype == "float32" else 8192
        a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPES[dtype])
        found["FLOP per second"][dtype] = 2 * size**3 / (1e-3 * graph_ms([functools.partial(torch.mm, a, b)]))
        if dtype == "float32":  # three products of TF32 have its digits, too
            torch.set_float32_matmul_precision("high")
            thirds = 2 * size**3 / (1e-3 * graph_ms([functools.partial(torch.mm, a, b)])) / 3
            torch.set_float32_matmul_precision("highest")
            found["FLOP per second"][dtype] = max(found["FLOP per second"][dtype], thirds)
    return found


def tests(before: Figures) -> Figures:
    """The tests of the operations on the device, cut into pieces that run side by side: compiling takes longest.

    "not run" has those that time did not reach, which are all that a run that goes on does.
    """
    deadline = time.monotonic() + SECONDS["tests"]
    sanitizer = shutil.which("compute-sanitizer")
    found: Figures = {}
    started: list[tuple[str, list[str], subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in available():
                suites: dict[str, list[str]] = {name: []}
                if name == "cuda" and sanitizer:
                    suites["cuda under compute-sanitizer"] = [sanitizer, f"--error-exitcode={SANITIZER_EXIT}"]
                for suite, watched in suites.items():
                    known = before.get(suite) or collected(name, ["-k", SANITIZED] if watched else [])
                    found[suite] = {"counts": Counter(known["counts"]), "failed": [*known["failed"]], "not run": []}
                    pieces = 1 if watched else min(12, os.cpu_count() or 1)
                    for piece in range(pieces):
                        if ids := known["not run"][piece::pieces]:
                            log = Path(folder, f"{suite} {piece}")
                            started.append((suite, ids, start([*watched, *PYTEST, "-v", *ids], name, log), log))
            for suite, ids, process, log in started:
                status: int | None = None
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(max(1.0, deadline - time.monotonic()))
                stop(process)
                counts, failed, left = outcomes(log.read_text(errors="replace"), status, ids)
                found[suite]["counts"] += counts
                found[suite]["failed"] += failed
                found[suite]["not run"] += left
        finally:  # interrupted: nothing stays on the device
            for _, _, process, _ in started:
                stop(process)
    return found


def start(command: Sequence[str], backend: str, log: Path) -> subprocess.Popen[bytes]:
    """In a group of its own, since compute-sanitizer has children."""
    with log.open("w") as output:  # not a pipe, which fills up while another process is waited for
        return subprocess.Popen(
            command, cwd=ROOT, env=test_environment(backend), stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collected(backend: str, chosen: Sequence[str]) -> Figures:
    """What is known of the tests before they run: their ids, and what keeps pytest from collecting them."""
    listing = [*PYTEST, "-q", "--collect-only", *chosen, *TEST_FILES]
    listed = subprocess.run(listing, cwd=ROOT, env=test_environment(backend), capture_output=True, text=True)
    lines = (listed.stdout + listed.stderr).splitlines()
    failed = [line[:300] for line in lines if line.startswith(("ERROR", "E  "))] or lines[-3:]
    ids = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    return {"counts": {}, "failed": failed if listed.returncode else [], "not run": ids}


def outcomes(log: str, status: int | None, ids: Sequence[str]) -> tuple[Counter[str], list[str], list[str]]:
    """Of a run of pytest with -v: how many tests passed, failed, ...; lines that say what failed; what was not run.

    `status` is None where time was up. A run that died has failed at the first test without an outcome, and one that
    had time for no test at its first.
    """
    lines = log.splitlines()
    of_pytest = "\n".join(line for line in lines if not line.startswith(SANITIZER_MARK))
    outcome_of = dict(re.findall(r"^(\S+::.*?)\s+(PASSED|FAILED|SKIPPED|ERROR)\b", of_pytest, re.MULTILINE))
    failed = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) \S+\.py", line)]  # with the reason, at the end
    failed = failed or [f"{outcome} {name}" for name, outcome in outcome_of.items() if outcome in ("FAILED", "ERROR")]
    failed += [line for line in lines if re.match(SANITIZER_FINDS, line)][:20]
    if status == DEVICE_LOST:
        failed.append(f"the device was lost in {next(reversed(outcome_of), 'the beginning')}")
    left = [name for name in ids if name not in outcome_of]
    died = status not in (None, 0, 1, SANITIZER_EXIT, DEVICE_LOST)
    if died or (status is None and left == list(ids)):
        said = f"status {status}" if died else "time was up"
        failed.append(f"{said} in {left[0] if left else 'the end'}: {lines[-1][:200] if lines else ''}")
        left = left[1:]
    return Counter(map(str.lower, outcome_of.values())), failed, [] if status in (0, 1, SANITIZER_EXIT) else left


def test_environment(backend: str) -> dict[str, str]:
    return os.environ | {"SGALIGN_TEST_BACKEND": backend}


def attention(dtype: str, before: Figures) -> Figures:
    """Both branches at many shapes, forward and with the backward, ours and theirs."""
    from benchmarks.test_attention import ours

    deadline = time.monotonic() + SECONDS[f"attention {dtype}"]
    checked_before = before.get("checks", {})
    checks = {
        name: attempt(check_attention, backend, kind, dtype, before=checked_before.get(name))
        for backend in available()
        for kind in ours(backend)
        for name in [f"{backend} {kind}"]
    }
    rows = []
    for shape, backward in itertools.product(SHAPES[dtype], (True, False)):
        torch._dynamo.reset()  # or its limit of compiled versions is reached
        known = known_contenders(before, shape, dtype, backward)
        contenders = {
            name: attempt(time_attention, contender, shape, dtype, backward, deadline=deadline, before=known.get(name))
            for name, contender in attention_contenders(shape).items()
        }
        row = {"shape": shape, "dtype": dtype, "backward": backward, "contenders": contenders}
        rows.append(row | attention_work(shape, dtype, backward))
    return {"checks": checks, "rows": rows}


def attention_contenders(shape: tuple[int, ...]) -> dict[str, Any]:
    from benchmarks import test_attention as bench

    ours = {f"{name} {kind}": call for name in available() for kind, call in bench.ours(name).items()}
    theirs = {"sdpa twice": bench.sdpa_twice, "sdpa concatenated": bench.sdpa_concatenated, "eager": bench.eager}
    if shape in FLEX_SHAPES:
        theirs["flex"] = flex_attention()
    if importlib.util.find_spec("xformers"):
        theirs["xformers"] = xformers_twice
    if importlib.util.find_spec("flash_attn"):
        theirs["flash-attn, no mask"] = flash_twice
    return ours | theirs


def flex_attention() -> Callable[..., tuple[Tensor, ...]]:
    """FlexAttention, compiled, its mask a hash of the indices and of a seed in a tensor: nothing is stored either."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    from benchmarks.test_attention import RATIO

    def both(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]

        def masked(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            x = (((b * heads + h) * queries + q) * keys + k) * -1640531527 + seed
            x = (x ^ (x >> 15)) * -2048144789
            x = (x ^ (x >> 13)) * -1028477387
            return torch.where(((x ^ (x >> 16)) & 0xFFFF) < round(65536 * RATIO), -float("inf"), score)

        return flex(query, key, value), flex(mirrored, key, value, score_mod=masked)

    compiled = torch.compile(both, dynamic=False)

    def run(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        seed = torch.randint(2**31 - 1, (), dtype=torch.int32, device=query.device)
        return compiled(query, mirrored, key, value, seed)

    return run


def xformers_twice(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    from xformers.ops import memory_efficient_attention

    from benchmarks.test_attention import random_kept

    q, m, k, v = (tensor.transpose(1, 2) for tensor in (query, mirrored, key, value))
    width = -(-key.shape[2] // 8) * 8  # rows of the bias must be aligned
    bias = query.new_zeros(*query.shape[:3], width)[..., : key.shape[2]]
    bias.masked_fill_(~random_kept(query, key), -torch.inf)  # in place, which leaves the rows' distance
    outs = memory_efficient_attention(q, k, v), memory_efficient_attention(m, k, v, attn_bias=bias)
    return tuple(out.transpose(1, 2) for out in outs)


def flash_twice(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """It takes no mask: what two branches without one would cost."""
    from flash_attn import flash_attn_func

    q, m, k, v = (tensor.transpose(1, 2) for tensor in (query, mirrored, key, value))
    return flash_attn_func(q, k, v).transpose(1, 2), flash_attn_func(m, k, v).transpose(1, 2)


def time_attention(
    contender: Callable[..., tuple[Tensor, ...]], shape: tuple[int, ...], dtype: str, backward: bool
) -> Figures:
    from benchmarks import test_attention as bench

    torch.manual_seed(0)
    batch, heads, queries, keys, dim = shape
    sets = sets_beyond_cache(2 * batch * heads * (queries + keys) * dim * DTYPES[dtype].itemsize / 2**20)
    return timed([differentiated(contender, bench.inputs(shape, backward, DTYPES[dtype], DEVICE)) for _ in range(sets)])


def differentiated(contender: Callable[..., Iterable[Tensor]], tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Calls a contender, and where its tensors ask for gradients takes those that it has; gives outputs and gradients.

    `torch.autograd.grad` adds nothing up in `.grad`, as one step does not.
    """
    grads: list[Tensor] = []
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            outs = list(contender(*tensors))
        if not wanted:
            return outs
        if not grads:
            grads.extend(torch.randn_like(out) for out in outs)
        return outs + gradients(outs, wanted, grads)

    return run


def gradients(outs: Sequence[Tensor], wanted: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Those that there are: nothing is said about a tensor that was not used."""
    found = torch.autograd.grad(outs, wanted, grads, allow_unused=True)
    return [grad for grad in found if grad is not None]


def check_attention(name: str, kind: str, dtype: str) -> Figures:
    from benchmarks import test_attention as bench

    def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        outs = list(bench.ours(backend, seed=3)[kind](*tensors))
        generator = torch.Generator().manual_seed(4)
        grads = [torch.randn(out.shape, generator=generator).to(DEVICE, DTYPES[dtype]).to(out) for out in outs]
        return outs + gradients(outs, tensors, grads)

    def check(shape: tuple[int, ...]) -> Figures:
        torch.manual_seed(1)
        tensors = bench.inputs(shape, True, DTYPES[dtype], DEVICE)
        doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
        return checked(lambda: run(name, tensors), lambda: run("reference", doubles), dtype)

    return max(map(check, CHECKED_SHAPES), key=lambda found: (not found["right"], found["error"]))


def attention_work(shape: tuple[int, ...], dtype: str, backward: bool) -> Figures:
    """Operations of the matrix products, and bytes when everything is read and written once."""
    from benchmarks import test_attention as bench

    batch, heads, queries, keys, dim = shape
    rows = 4 * queries + 2 * keys  # two queries, two outputs, key and value
    if backward:
        rows += 6 * queries + 2 * keys + 2 * queries + 2 * keys  # read all and the outputs' gradients, write gradients
    return {"flops": bench.flops(shape, backward), "bytes": batch * heads * rows * dim * DTYPES[dtype].itemsize}


def relation(before: Figures) -> Figures:
    """Motifs' relation head, post_cat's halves included."""
    from benchmarks import test_relation as bench

    contenders: dict[str, Callable[[bench.Head], list[Tensor]]] = {}
    for name in available():
        contenders[f"{name} dual"] = functools.partial(bench.Head.ours_dual, backend=name)
        contenders[f"{name} single"] = functools.partial(bench.Head.ours_single, backend=name)
    checked_before = before.get("checks", {})
    checks = {
        case: attempt(check_relation, contender, dtype, before=checked_before.get(case))
        for name, contender in contenders.items()
        for dtype in ("bfloat16", "float32")
        for case in [f"{name}, {dtype}"]
    }
    contenders |= {"usual form": bench.Head.usual, "decomposed": bench.Head.decomposed}
    rows = []
    for shape, dtype, backward in itertools.product(RELATION_SHAPES, ("bfloat16", "float32"), (True, False)):
        known = known_contenders(before, shape, dtype, backward)
        measured = {
            name: attempt(time_relation, call, shape, dtype, backward, before=known.get(name))
            for name, call in contenders.items()
        }
        relations, objects, channels, classes = shape
        weights = (2 * bench.HIDDEN + 2 * classes) * channels
        elements = relations * channels + weights + 4 * objects * bench.HIDDEN + 2 * relations * classes
        elements *= 3 if backward else 1  # read again, and a gradient of each is written
        work = {"flops": bench.flops(shape, backward), "bytes": elements * DTYPES[dtype].itemsize}
        rows.append({"shape": shape, "dtype": dtype, "backward": backward, "contenders": measured} | work)
    return {"checks": checks, "rows": rows}


def time_relation(
    contender: Callable[[Any], list[Tensor]], shape: tuple[int, int, int, int], dtype: str, backward: bool
) -> Figures:
    from benchmarks.test_relation import Head

    def call(head: Head) -> Callable[[], object]:
        wanted = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return differentiated(lambda *_: contender(head), wanted)

    torch.manual_seed(0)
    heads = [Head(shape, backward).to(DEVICE, DTYPES[dtype])]
    mebibytes = sum(tensor.nbytes for tensor in heads[0].parameters()) / 2**20
    heads += [Head(shape, backward).to(DEVICE, DTYPES[dtype]) for _ in range(sets_beyond_cache(mebibytes) - 1)]
    return timed([call(head) for head in heads])


def check_relation(contender: Callable[[Any], list[Tensor]], dtype: str) -> Figures:
    """Beside the usual form, the public code's, with the same numbers in float64."""
    from benchmarks.test_relation import Head

    torch.manual_seed(1)
    head = Head((100, 20, 512, 51), True).to(DEVICE, DTYPES[dtype])
    exact = copy.deepcopy(head).double()

    def run(compute: Callable[[Any], list[Tensor]], head: Head) -> list[Tensor]:
        logits = compute(head)
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(out.shape, generator=generator).to(DTYPES[dtype]).to(out) for out in logits]
        return logits + gradients(logits, list(head.parameters()), grads)

    branches = len(contender(head))
    return checked(lambda: run(contender, head), lambda: run(lambda head: head.usual()[:branches], exact), dtype)


def loss(before: Figures) -> Figures:
    """The alignment loss with its gradient."""
    from benchmarks.test_relation import plain_loss

    shape = 4096, 51
    torch.manual_seed(0)
    logits, mirrored = torch.randn(2, *shape, device=DEVICE)
    contenders: dict[str, Callable[..., Tensor]] = {
        f"{name} loss": functools.partial(relation_alignment_loss, backend=name) for name in available()
    }

    def run(contender: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        teacher, student = (tensor.detach().requires_grad_() for tensor in given)
        value = contender(teacher, student)
        return [value, *torch.autograd.grad(value, student)]

    def check(contender: Callable[..., Tensor]) -> Figures:
        exact = functools.partial(relation_alignment_loss, backend="reference")
        doubles = logits.double(), mirrored.double()
        return checked(lambda: run(contender, logits, mirrored), lambda: run(exact, *doubles), "float32")

    def time_loss(contender: Callable[..., Tensor]) -> Figures:
        student = mirrored.detach().requires_grad_()
        return timed([differentiated(lambda student: (contender(logits, student),), [student])])

    checked_before, known = before.get("checks", {}), known_contenders(before, shape, "float32", True)
    checks = {
        name: attempt(check, contender, before=checked_before.get(name)) for name, contender in contenders.items()
    }
    contenders["kl_div of log_softmax"] = plain_loss
    measured = {name: attempt(time_loss, call, before=known.get(name)) for name, call in contenders.items()}
    row = {"shape": shape, "dtype": "float32", "backward": True, "contenders": measured}
    return {"checks": checks, "rows": [row]}


def steps(before: Figures) -> Figures:
    """Whole training steps: what the mirror costs, beside the ratio of counted arithmetic."""
    from benchmarks import conftest

    def motifs(extractors: bool) -> Any:
        from benchmarks.test_training_step import Step

        step = Step(extractors=extractors, device=DEVICE)
        return step.contenders(), step.parameters, step.counted()

    def sgtr(case: str) -> Any:
        from benchmarks import test_sgtr

        return test_sgtr.decoder_steps(DEVICE) if case == "decoder" else test_sgtr.image_steps(DEVICE)

    cases = {
        "Motifs, cached features": lambda: motifs(False),
        "Motifs, extractors trained": lambda: motifs(True),
        "SGTR, structural decoder": lambda: sgtr("decoder"),
        "SGTR from images": lambda: sgtr("images"),
    }
    deadline = time.monotonic() + SECONDS["steps"]

    def measure(case: str, precision: str) -> Figures:
        contenders, parameters, counted = cases[case]()
        if precision == "bfloat16":
            cast = torch.autocast("cuda", torch.bfloat16)
            contenders = {name: cast(step) for name, step in contenders.items()}
        conftest.time_steps(contenders, parameters, rounds=2, device=DEVICE)  # compiles, and warms up
        times, peaks = conftest.time_steps(contenders, parameters, rounds=7, device=DEVICE)
        taken = {name: {"call": 1e3 * statistics.median(times[name]), "peak": peaks[name]} for name in times}
        return {"contenders": taken, "counted": counted}

    names = {f"{case}, {precision}": (case, precision) for case in cases for precision in ("float32", "bfloat16")}
    return {name: attempt(measure, *names[name], deadline=deadline, before=before.get(name)) for name in names}


# Each takes what a run that was cut off has of it.
Part = Callable[[Figures], Figures]
PARTS: dict[str, Part] = {
    "environment": environment,
    "tests": tests,
    "attention bfloat16": functools.partial(attention, "bfloat16"),
    "relation": relation,
    "loss": loss,
    "steps": steps,
    "attention float32": functools.partial(attention, "float32"),
    "attention float16": functools.partial(attention, "float16"),
}


# ------------------------------------------------------------------------------------------------------ the report


def in_own_process(part: Part, before: Figures) -> Figures:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, before).result()


def sources() -> str:
    """A digest of the code and of who takes part: figures of another one are measured again."""
    folders = "benchmarks", "csrc", "kernels", "sgalign", "tests"
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    code = [path for path in paths if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu")]
    others = [name for name in ("xformers", "flash_attn") if importlib.util.find_spec(name)]
    digest = hashlib.sha256(" ".join([*available(), *others]).encode())
    for path in sorted([*code, ROOT / "kernels" / "configs.json"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_report(out: Path, parts: Mapping[str, Part], only: Iterable[str] = ()) -> Figures:
    """Runs what `out` does not have yet, or from its beginning what `only` names, "attention" for all of its dtypes."""
    file, remedy = out / "report.json", "remove it, or give another --out"
    check_writable(file)
    report: Figures = read_json(file, remedy) if file.exists() else {}
    if not isinstance(report, dict) or not all(isinstance(figures, dict) for figures in report.values()):
        raise ValueError(f"{file} is no report: {remedy}")
    digest = sources()
    for name, part in parts.items():
        before = {} if only or report.get(name, {}).get("sources") != digest else report[name]
        done = before and "failure" not in before and not unfinished(before)
        if not {name, name.split()[0]} & set(only) if only else done:
            continue
        before = {key: value for key, value in before.items() if key != "failure"}
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            report[name] = part(before)
        except Exception as error:
            report[name] = before | {"failure": sentence(error)}
        report[name]["sources"] = digest
        report[name]["seconds"] = round(before.get("seconds", 0) + time.monotonic() - start, 1)
        write_json(file, report, indent=1)
        (out / "report.md").write_text(markdown(report))
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the report; benchmarks/results/<card> if not given")
    choices = sorted({*PARTS, *(name.split()[0] for name in PARTS)})
    parser.add_argument("--only", nargs="+", default=[], choices=choices, metavar="PART", help=", ".join(choices))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no GPU here, so there is nothing to report")
        return 0
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / card
    parts = {name: functools.partial(in_own_process, part) for name, part in PARTS.items()}
    try:
        report = write_report(out, parts, options.only)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.gpu_report: {error}")
    print(f"{out / 'report.md'} and report.json")
    if left := [name for name, figures in report.items() if unfinished(figures)]:
        print(f"time was up in {', '.join(left)}: the same command without --only goes on there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
