"""The table of compilation parameters of the attention kernels, and the device properties that all kernels use.

The table holds block sizes, warps, pipeline stages and register limits, so no call has to stop for tuning.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sgalign.errors import InputError

TABLE = Path(__file__).with_name("configs.json")
REMEDY = "install the package again, or replace this file by the configs.json that benchmarks.tune wrote"
ASKED_PRECISION = os.environ.get("SGALIGN_TRITON_DOT_PRECISION", "")
# architecture -> kernel -> `kind` -> channels -> `Config`
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


class Config(NamedTuple):
    """The compilation parameters of a kernel."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0  # limit per thread, or 0 for no limit; a limit can let one more program run at a time


def config(kernel: str, key: Tensor, branches: int, dropout: bool) -> Config:
    """Return the parameters of `kernel` for the dtype, the number of channels and the device of `key`."""
    return lookup(kernel, architecture(key.device), key.element_size() * 8, key.shape[3], branches, dropout)


@functools.cache
def lookup(kernel: str, architecture: str, bits: int, dim: int, branches: int, dropout: bool) -> Config:
    """Return the table's entry for the smallest number of channels that is at least `dim`.

    Entries of the architecture take precedence over those of "default". Dropout draws as many random numbers as the
    random mask does, so other tiles may be better with dropout. Entries for dropout take precedence over the others of
    the same architecture.
    """
    table = read_table()
    by_dim: dict[str, list[int]] = {}
    for name in ("default", architecture):
        for drops in (False, True) if dropout else (False,):
            by_dim |= table.get(name, {}).get(kernel, {}).get(kind(bits, branches, drops), {})
    if not (sizes := [size for size in map(int, by_dim) if size >= dim]):
        raise InputError(
            f"{TABLE} has no entry for {kernel} with {kind(bits, branches, dropout)} and {dim} channels: {REMEDY}"
        )
    return Config(*by_dim[str(min(sizes))])


def kind(bits: int, branches: int, dropout: bool) -> str:
    """Return the name of a group of entries in the table."""
    return f"{bits} bits, {branches} branch{'es' if branches > 1 else ''}{', dropout' if dropout else ''}"


@functools.cache
def read_table() -> Table:
    """Return the table, which a caller may change for this process.

    Raises:
        InputError: if the file is not a valid table. The message names the file.
    """
    try:
        table: Table = json.loads(TABLE.read_text())
        for by_kernel in table.values():
            for by_kind in by_kernel.values():
                for by_dim in by_kind.values():
                    for dim, plan in by_dim.items():
                        check_config(Config(*plan))
                        if str(int(dim)) != dim:
                            raise InputError(f"channels must be an int, got {dim!r}")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{TABLE} is not a table of configurations ({error}): {REMEDY}") from error
    return table


def check_config(config: Config) -> None:
    """Raise InputError unless the parameters are ints that Triton's matrix products accept."""
    if any(type(number) is not int for number in config):
        raise InputError(f"blocks, warps, stages and registers must be ints, got {[*config]}")
    for name, number, least in (
        ("block_q", config.block_q, 16),
        ("block_k", config.block_k, 16),
        ("warps", config.warps, 1),
    ):
        if number < least or number & (number - 1):
            raise InputError(f"{name} must be a power of two of at least {least}, got {number}")
    if config.stages < 1 or config.registers < 0:
        raise InputError(f"stages must be at least 1 and registers at least 0, got {[*config]}")


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name of the architecture, such as "sm_90" or "gfx942", or "interpreter" for tensors on the CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def dot_precision() -> str:
    """Return the input precision for products of float32 matrices.

    On NVIDIA GPUs it is "tf32x3": the tensor cores compute three TF32 products, whose sum keeps the digits of float32.
    A single TF32 product, Triton's default, keeps only ten bits of the factors. The tensor cores truncate sums, but in
    measurements on an H200 no digit of float32 was lost by this. On AMD GPUs it is "ieee", which multiplies in float32
    without tensor cores. Set SGALIGN_TRITON_DOT_PRECISION=ieee to use it on NVIDIA GPUs, too.
    """
    if ASKED_PRECISION not in ("", "tf32x3", "ieee"):
        raise InputError(f"SGALIGN_TRITON_DOT_PRECISION must be tf32x3 or ieee, got {ASKED_PRECISION!r}")
    return ASKED_PRECISION or ("ieee" if torch.version.hip else "tf32x3")


def is_interpreting() -> bool:
    """Return True if the kernels run in Triton's interpreter, on the CPU.

    They do so if TRITON_INTERPRET was set when they were imported.
    """
    return bool(triton.knobs.runtime.interpret)
