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
import functools
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sgalign import _version
from sgalign.ops import backends

try:
    from benchmarks import attention_part, device_tests, measuring, relation_part
    from benchmarks.measuring import DTYPES, Figures
    from benchmarks.report_markdown import markdown, unfinished
    from sgalign.files import check_writable, read_json, write_json
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.gpu_report needs {error.name}: pip install '.[train,test]'")

ROOT = Path(__file__).resolve().parent.parent
STEPS_SECONDS = 80  # with the other parts' own limits ten minutes, all in all


def environment(before: Figures) -> Figures:
    """Return what is installed, and two rates that everything is held against: of copying and of matrix products."""
    properties = torch.cuda.get_device_properties(measuring.DEVICE)
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
    source = torch.empty(2**29, dtype=torch.uint8, device=measuring.DEVICE).random_()
    target = torch.empty_like(source)
    found["bytes per second"] = 2 * source.numel() / (1e-3 * measuring.graph_ms([lambda: target.copy_(source)]))
    found["FLOP per second"] = {}
    for dtype in DTYPES:
        size = 4096 if dtype == "float32" else 8192
        a, b = torch.randn(2, size, size, device=measuring.DEVICE, dtype=DTYPES[dtype])
        found["FLOP per second"][dtype] = 2 * size**3 / (1e-3 * measuring.graph_ms([functools.partial(torch.mm, a, b)]))
        if dtype == "float32":  # three products of TF32 have its digits, too
            torch.set_float32_matmul_precision("high")
            thirds = 2 * size**3 / (1e-3 * measuring.graph_ms([functools.partial(torch.mm, a, b)])) / 3
            torch.set_float32_matmul_precision("highest")
            found["FLOP per second"][dtype] = max(found["FLOP per second"][dtype], thirds)
    return found


def steps(before: Figures) -> Figures:
    """Time whole training steps: what the mirror costs, beside the ratio of counted arithmetic."""
    from benchmarks import conftest

    def motifs(extractors: bool) -> Any:
        from benchmarks.test_training_step import Step

        step = Step(extractors=extractors, device=measuring.DEVICE)
        return step.contenders(), step.parameters, step.counted()

    def sgtr(case: str) -> Any:
        from benchmarks import test_sgtr

        steps = test_sgtr.decoder_steps if case == "decoder" else test_sgtr.image_steps
        return steps(measuring.DEVICE)

    cases = {
        "Motifs, cached features": lambda: motifs(False),
        "Motifs, extractors trained": lambda: motifs(True),
        "SGTR, structural decoder": lambda: sgtr("decoder"),
        "SGTR from images": lambda: sgtr("images"),
    }
    deadline = time.monotonic() + STEPS_SECONDS

    def measure(case: str, precision: str) -> Figures:
        contenders, parameters, counted = cases[case]()
        if precision == "bfloat16":
            cast = torch.autocast("cuda", torch.bfloat16)
            contenders = {name: cast(step) for name, step in contenders.items()}
        conftest.time_steps(contenders, parameters, rounds=2, device=measuring.DEVICE)  # compiles, and warms up
        times, peaks = conftest.time_steps(contenders, parameters, rounds=7, device=measuring.DEVICE)
        taken = {name: {"call": 1e3 * statistics.median(times[name]), "peak": peaks[name]} for name in times}
        return {"contenders": taken, "counted": counted}

    names = {f"{case}, {precision}": (case, precision) for case in cases for precision in ("float32", "bfloat16")}
    return {
        name: measuring.attempt(measure, *names[name], deadline=deadline, before=before.get(name)) for name in names
    }


# Each takes what a run that was cut off has of it.
Part = Callable[[Figures], Figures]
PARTS: dict[str, Part] = {
    "environment": environment,
    "tests": device_tests.run,
    "attention bfloat16": functools.partial(attention_part.run, "bfloat16"),
    "relation": relation_part.relation,
    "loss": relation_part.loss,
    "steps": steps,
    "attention float32": functools.partial(attention_part.run, "float32"),
    "attention float16": functools.partial(attention_part.run, "float16"),
}


def in_own_process(part: Part, before: Figures) -> Figures:
    """Return what a part gives in a process of its own, which it may crash."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, before).result()


def sources() -> str:
    """Return a digest of the code and of who takes part: figures of another one are measured again."""
    folders = "benchmarks", "csrc", "kernels", "sgalign", "tests"
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    code = [path for path in paths if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu")]
    others = [name for name in ("xformers", "flash_attn") if importlib.util.find_spec(name)]
    digest = hashlib.sha256(" ".join([*measuring.available(), *others]).encode())
    for path in sorted([*code, ROOT / "kernels" / "configs.json"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_report(out: Path, parts: Mapping[str, Part], only: Iterable[str] = ()) -> Figures:
    """Run what `out` does not have yet, or from its beginning what `only` names; return the whole report.

    "attention" stands for all of its dtypes.
    """
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
            report[name] = before | {"failure": measuring.sentence(error)}
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
