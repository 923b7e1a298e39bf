"""How kernels are compiled: the table of the attention kernels' block sizes, and what all kernels ask about a device.

The table holds sizes of blocks, warps, pipeline stages and limits of registers, so that no call stops to tune.
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
REMEDY = "install the package again, or copy the table that benchmarks.tune wrote"
ASKED_PRECISION = os.environ.get("SGALIGN_TRITON_DOT_PRECISION", "")
# architecture -> kernel -> `kind` -> channels -> `Config`
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


class Config(NamedTuple):
    """How a kernel is compiled."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0  # that a thread may have, where fewer than it asks for let one program more run at a time


def config(kernel: str, key: Tensor, branches: int, dropout: bool) -> Config:
    """Return how `kernel` is compiled for keys of this dtype, number of channels and device."""
    return lookup(kernel, architecture(key.device), key.element_size() * 8, key.shape[3], branches, dropout)


@functools.cache
def lookup(kernel: str, architecture: str, bits: int, dim: int, branches: int, dropout: bool) -> Config:
    """Return the table's entry of the smallest number of channels that is large enough.

    It is that of "default" where the architecture has none of its own. Dropout draws as much again as the random mask,
    and has entries of its own where that takes other tiles.
    """
    table = read_table()
    by_dim: dict[str, list[int]] = {}
    for name in ("default", architecture):
        for drops in (False, True) if dropout else (False,):
            by_dim |= table.get(name, {}).get(kernel, {}).get(kind(bits, branches, drops), {})
    if not (sizes := [size for size in map(int, by_dim) if size >= dim]):
        raise InputError(f"{TABLE} has no {kernel} of {kind(bits, branches, dropout)} and {dim} channels: {REMEDY}")
    return Config(*by_dim[str(min(sizes))])


def kind(bits: int, branches: int, dropout: bool) -> str:
    """Return the name of a group of entries in the table."""
    return f"{bits} bits, {branches} branch{'es' if branches > 1 else ''}{', dropout' if dropout else ''}"


@functools.cache
def read_table() -> Table:
    """Return the table, which a caller may change for this process.

    Raises:
        ValueError: the file is not such a table; names it.
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
        raise InputError(f"{TABLE} is no table of configurations ({error}): {REMEDY}") from error
    return table


def check_config(config: Config) -> None:
    """Raise ValueError unless these are whole numbers as Triton's matrix products take them."""
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
    """Return "sm_90", "gfx942", or "interpreter" for tensors on the CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def dot_precision() -> str:
    """Return how float32 matrices are multiplied: by three products of TF32 on NVIDIA's tensor cores, else exactly.

    The three keep float32's digits, where one, Triton's default, keeps ten bits of the factors. An H200's units cut off
    sums, but lose none of these digits; SGALIGN_TRITON_DOT_PRECISION=ieee multiplies without them.
    """
    if ASKED_PRECISION not in ("", "tf32x3", "ieee"):
        raise InputError(f"SGALIGN_TRITON_DOT_PRECISION must be tf32x3 or ieee, got {ASKED_PRECISION!r}")
    return ASKED_PRECISION or ("ieee" if torch.version.hip else "tf32x3")


def is_interpreting() -> bool:
    """Return whether kernels run on the CPU, in Python: TRITON_INTERPRET was set when they were imported."""
    return bool(triton.knobs.runtime.interpret)
