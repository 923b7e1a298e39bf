"""Triton kernels compiled without a GPU: names, sources, options, and the resources that they use.

`PYTHONPATH=. python tests/compiled_kernels.py "attention.* 32 channels" sm_90 gfx942` compiles the kernels whose names
match ("" matches all) for these targets. It rewrites their rows in compiled_kernels.csv, for the installed version of
Triton. tests/test_kernels.py compares with this table.

The compiler knows the same about arguments as at run time. Tensors of torch are aligned. Sizes of the model (channels,
classes, strides) are known to be multiples of 16 if they are. Nothing is known about lengths.
"""

import csv
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from assembly import NVIDIA, longest, loops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgalign.kernels import alignment, attention, configs, relation

TABLE = Path(__file__).with_suffix(".csv")
TRITON = ".".join(triton.__version__.split(".")[:2])  # version of the compiler
# bytes of shared memory that a program can use at most
LARGEST_SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIMS = 32, 64, 128, 256
CLASSES = 51, 71
ATTENTION = {
    "forward": attention.forward_kernel,
    "query_gradient": attention.query_gradient_kernel,
    "key_value_gradient": attention.key_value_gradient_kernel,
}
HEADS = (512, 51), (512, 71), (512, 310), (4096, 51), (4096, 71)  # channels and classes of the relation head


class Compiled(NamedTuple):
    name: str
    source: ASTSource
    options: dict[str, int]


class Resources(NamedTuple):
    """The resources that a kernel uses."""

    registers: int  # per thread
    spilled: int  # bytes of registers that are spilled to memory
    shared: int  # bytes of shared memory per program
    instructions: int
    loop: int  # instructions of the longest loop, a step of the walk over keys, pairs or queries, or 0 without a loop


def sources(target: str) -> dict[str, Compiled]:
    with mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else "of another machine"):
        kernels = *attention_sources(target), *relation_sources(), *alignment_sources()
    return {kernel.name: kernel for kernel in kernels}


def resources(kernel: Compiled, target: str) -> tuple[Resources, str]:
    """Return the resources and the assembly of a kernel, compiled for a target such as "sm_90" or "gfx942"."""
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    compiled = triton.compile(kernel.source, target=gpu, options=kernel.options)
    if not nvidia:
        assembly = compiled.asm["amdgcn"]
        counts = {name: int(count) for name, count in re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", assembly)}
        spilled = 4 * counts["vgpr_spill_count"]  # scalar registers spill into lanes of vector registers
        count, found = loops(assembly, r"^\s+(?:[sv]|ds|global|buffer|scratch|flat)_\w+")
        return Resources(counts["vgpr_count"], spilled, compiled.metadata.shared, count, longest(found)), assembly
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, assembly = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spilled = stack if "STL" in assembly else 0  # without stores (STL), the stack only holds frames of calls
    count, found = loops(assembly, NVIDIA)
    return Resources(registers, spilled, compiled.metadata.shared, count, longest(found)), assembly


def read_table() -> dict[tuple[str, str, str], Resources]:
    """Return the resources of each kernel in the table, by version of Triton, target and name."""
    with open(TABLE, newline="") as file:
        return {(row[0], row[1], row[2]): Resources(*map(int, row[3:])) for row in list(csv.reader(file))[1:]}


def write_table(names: str, targets: list[str]) -> None:
    """Compile kernels and write their rows to the table.

    The table is written after each kernel, because all kernels of a target take minutes.
    """
    for target in targets:
        for name, kernel in sources(target).items():
            if not re.match(names, name):
                continue
            taken, _ = resources(kernel, target)
            print(TRITON, target, name, *taken, flush=True)
            table = read_table() | {(TRITON, target, name): taken}
            with open(TABLE, "w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("triton", "target", "kernel", *Resources._fields))
                writer.writerows((*key, *row) for key, row in sorted(table.items()))


def source(kernel: Any, *arguments: Any, constants: dict[str, Any]) -> ASTSource:
    """Return the source of a kernel for these arguments.

    Args:
        kernel: a kernel of Triton.
        arguments: a type ("*fp32", "i32"), a number, a tuple or None for each argument. A number stands for a 32-bit
            integer that is divisible by 16 if the number is. As at run time, 1 and None become constants.
        constants: the compile-time constants by name.
    """
    attributes, constexprs = {}, {(kernel.arg_names.index(name),): value for name, value in constants.items()}

    def type_of(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple):
            parts = [type_of(part, (*path, i)) for i, part in enumerate(argument)]
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        if argument is None or argument == 1:
            constexprs[path] = argument
            return "constexpr"
        if argument[0] == "*" if isinstance(argument, str) else argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return argument if isinstance(argument, str) else "i32"

    signature = {name: type_of(arg, (i,)) for i, (name, arg) in enumerate(zip(kernel.arg_names, arguments))}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names and len(arguments) + len(constants) == len(signature)
    return ASTSource(kernel, signature, constexprs, attributes)


def attention_sources(target: str) -> Iterator[Compiled]:
    """Yield attention's kernels with the random mask, in every configuration of the table.

    At SGTR's 32 channels, also yield them with dropout and with padding.
    """
    kinds = ((1, False), (2, False), (2, True))
    for name, element, dim in itertools.product(ATTENTION, ("fp16", "fp32"), DIMS):
        for (branches, shared), dropout in itertools.product(kinds, (0, 6554) if dim == 32 else (0,)):
            plan = configs.lookup(name, target, int(element[2:]), dim, branches, dropout > 0)
            yield attention_source(name, element, dim, branches, shared, dropout, plan)
            if dim == 32 and not dropout and name != "key_value_gradient":
                yield attention_source(name, element, dim, branches, shared, dropout, plan, padded=True)


def attention_source(
    name: str,
    element: str,
    dim: int,
    branches: int,
    shared: bool,
    dropout: int,
    plan: configs.Config,
    padded: bool = False,
) -> Compiled:
    """Return one of attention's kernels, for operands that are projections and for keys that fill their tiles."""
    tiling = attention.Tiling.of(plan, True, 4096)
    rows = f"*{element}", 4096 * dim, 512 * dim, 8 * dim, 1  # strides of a projection

    def both(value: Any) -> tuple[Any, Any]:
        return value, value if branches == 2 else None

    queries = (rows, None) if shared else both(rows)
    sums = both("*fp32")
    masks = None, ("*i1", 4096, 0, 0, 1) if padded else None, "*i64"
    sizes = "i32", "i32", "i32", "i32"  # queries, keys, tiles, span
    drawn = "i32", "i32", "i32", "fp32", "fp32"  # stream, two thresholds, scale, scale of dropout
    if name == "forward":
        arguments = (*queries, rows, rows, *both(rows), *sums, *masks, "i32", 8, *sizes, *drawn)
    elif name == "query_gradient":
        grads = *both(rows), *sums, *queries  # gradients of the outputs, their sums, gradients of the queries
        arguments = (*queries, rows, rows, *both(rows), *sums, *grads, *masks, "i32", 8, *sizes, *drawn, "fp32")
    else:
        grads = *both(rows), *sums, rows, rows  # gradients of the outputs, their sums, gradients of key and value
        arguments = (*queries, rows, rows, *sums, *grads, *masks, 8, *sizes[:3], *drawn, "fp32")
    constants = attention.constants(name, plan, tiling, branches, True, dropout > 0, dim, padded)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    kind = "one branch" if branches == 1 else "one query for both branches" if shared else "two branches"
    kind += ", dropout" if dropout else ", padding" if padded else ""
    return Compiled(
        f"attention {name.replace('_', ' ')}: {element}, {dim} channels, {kind}",
        source(ATTENTION[name], *arguments, constants=constants),
        options,
    )


def relation_sources() -> Iterator[Compiled]:
    """Yield the relation head's kernels for both branches and for one, with bias and with the gradient of union."""
    for dtype, element in TYPES.items():
        x = f"*{element}"
        for channels, classes in HEADS:
            blocks = relation.Blocks.of(torch.empty(0, dtype=dtype), classes)
            branch = (x, channels) * 3
            sizes = {"BLOCK_K": blocks.classes, "BLOCK_C": blocks.channels}
            sizes |= {"PRECISION": configs.dot_precision()}
            backward = {"BLOCK_R": relation.BACKWARD_PAIRS, **relation.backward_sizes(blocks, classes)}
            options = {"num_warps": relation.WARPS, "num_stages": relation.STAGES}
            for branches in (1, 2):
                both = lambda value, n=branches: (value, value if n == 2 else None)  # noqa: E731
                of = f"{element}, {channels} channels, {classes} classes, {branches} branches"
                yield Compiled(
                    f"relation forward: {of}",
                    source(
                        relation.forward_kernel, *both("*fp32"), x, channels, "*i64", *both(branch), *both(x),
                        "i32", classes, channels, "i32", constants={"BLOCK_R": blocks.pairs, **sizes},
                    ),
                    options,
                )  # fmt: skip
                yield Compiled(
                    f"relation gradients of weight and union: {of}",
                    source(
                        relation.grad_weight_kernel, *both("*fp32"), x, *both(x), x, channels, "*i64",
                        *both(branch), "i32", classes, channels, "i32", constants=backward,
                    ),
                    options,
                )  # fmt: skip
                yield Compiled(
                    f"relation gradients of objects: {of}",
                    source(
                        relation.grad_ends_kernel, x, x, *2 * both(x)[1:], *both(x), x, channels, "*i64", "*i64",
                        *both(branch), "i32", "i32", classes, channels, constants=backward,
                    ),
                    options | {"num_warps": relation.SEGMENT_WARPS},
                )  # fmt: skip
        yield Compiled(
            f"relation sum of splits: {element}",
            source(relation.sum_splits_kernel, x, x, "*fp32", "i32", "i32", constants={"BLOCK": relation.SUMMED}),
            {"num_warps": 4},
        )


def alignment_sources() -> Iterator[Compiled]:
    for element in TYPES.values():
        x = f"*{element}"
        for classes in (*CLASSES, 4096):
            rows, width, warps = alignment.sizes(classes)
            for kind in ("softmax", "sigmoid"):
                for direction in ("teacher to student", "symmetric"):
                    constants = {"SIGMOID": kind == "sigmoid", "SYMMETRIC": direction == "symmetric"}
                    yield Compiled(
                        f"alignment loss: {element}, {classes} classes, {kind}, {direction}",
                        source(
                            alignment.alignment_kernel, "*fp32", "*fp32", x, classes, x, classes, "*fp32", "i32",
                            classes, "fp32", constants={**constants, "ROWS": rows, "BLOCK_K": width},
                        ),
                        {"num_warps": warps},
                    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit((__doc__ or "").split("\n\n")[1])
    write_table(sys.argv[1], sys.argv[2:])
