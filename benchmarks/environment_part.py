"""The part "environment" of the GPU report: the installed versions and the card's own rates."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import subprocess
from contextlib import suppress

import torch

from benchmarks import measuring
from benchmarks.measuring import DTYPES, Figures
from benchmarks.record import HARNESS, Record, digest
from sgalign import _version
from sgalign.ops import backends

COPIED = 2**29  # bytes per copy
SIZES = {"bfloat16": 8192, "float16": 8192, "float32": 4096}  # side of the square matrices


def run(record: Record) -> None:
    """Record the installed versions, and the rates of copying and of matrix products, which set the ceilings."""
    depends = digest(*HARNESS, "benchmarks/environment_part.py")
    record.attempt(("installed",), installed, digest=depends)
    record.attempt(("rates",), rates, digest=depends)


def installed() -> Figures:
    """Return the card's properties and the installed versions."""
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
    return found


def rates() -> Figures:
    """Return the bytes read and written per second in a copy, and the operations per second of matrix products."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=measuring.DEVICE).random_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() / (1e-3 * measuring.graph_ms([lambda: target.copy_(source)]))
    operations = {}
    for dtype, size in SIZES.items():
        a, b = torch.randn(2, size, size, device=measuring.DEVICE, dtype=DTYPES[dtype])
        multiply = functools.partial(torch.mm, a, b)
        operations[dtype] = 2 * size**3 / (1e-3 * measuring.graph_ms([multiply]))
        if dtype == "float32":  # three TF32 products are as accurate as one of float32
            torch.set_float32_matmul_precision("high")
            thirds = 2 * size**3 / (1e-3 * measuring.graph_ms([multiply])) / 3
            torch.set_float32_matmul_precision("highest")
            operations[dtype] = max(operations[dtype], thirds)
    return {"bytes per second": copied, "FLOP per second": operations}
