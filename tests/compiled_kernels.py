"""Every Triton kernel as it is compiled for a GPU, without one: name, source, options, and what it takes of the GPU.

`PYTHONPATH=. python tests/compiled_kernels.py "attention.* 32 channels" sm_90 gfx942` compiles this tree's kernels of
these names, "" for all, for these targets and rewrites their rows of compiled_kernels.csv, which tests/test_kernels.py
compares with. A row is of one version of Triton, the one that is installed.

Arguments are described as at run time: tensors of torch are aligned, sizes of the model (channels, classes, strides)
are known to be multiples of 16 where they are, lengths are not.
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
TRITON = ".".join(triton.__version__.split(".")[:2])  # which compiles
# Bytes of shared memory that a program can have.
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
    """What a kernel takes."""

    registers: int  # of a thread
    spilled: int  # bytes of registers that go to memory
    shared: int  # bytes of a program
    instructions: int
    loop: int  # instructions of its longest loop, where it has any: a step of the walk over keys, pairs or queries


def sources(target: str) -> dict[str, Compiled]:
    with mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else "of another machine"):
        kernels = *attention_sources(target), *relation_sources(), *alignment_sources()
    return {kernel.name: kernel for kernel in kernels}


def resources(kernel: Compiled, target: str) -> tuple[Resources, str]:
    """What a kernel takes and its assembly, compiled for "sm_90" or "gfx942"."""
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    compiled = triton.compile(kernel.source, target=gpu, options=kernel.options)
    if not nvidia:
        assembly = compiled.asm["amdgcn"]
        counts = {name: int(count) for name, count in re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", assembly)}
        spilled = 4 * counts["vgpr_spill_count"]  # scalar ones spill into lanes of these
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
    spilled = stack if "STL" in assembly else 0  # what is stored there; calls have frames there, too
    count, found = loops(assembly, NVIDIA)
    return Resources(registers, spilled, compiled.metadata.shared, count, longest(found)), assembly


def read_table() -> dict[tuple[str, str, str], Resources]:
    """By version of Triton, target and kernel."""
    with open(TABLE, newline="") as file:
        return {(row[0], row[1], row[2]): Resources(*map(int, row[3:])) for row in list(csv.reader(file))[1:]}


def write_table(names: str, targets: list[str]) -> None:
    """Written after each kernel: all of a target take minutes."""
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
    """Arguments are types ("*fp32", "i32"), numbers, which stand for a 32-bit argument like them, tuples and None.

    A 1 and None are constants, as they are at run time.
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
    """Every configuration in the table, with the random mask; at SGTR's 32 channels with dropout, and with padding."""
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
    """Return one of attention's kernels, of projected operands and of keys that fill their tiles."""
    tiling = attention.Tiling.of(plan, True, 4096)
    rows = f"*{element}", 4096 * dim, 512 * dim, 8 * dim, 1  # of a projection

    def both(value: Any) -> tuple[Any, Any]:
        return value, value if branches == 2 else None

    queries = (rows, None) if shared else both(rows)
    sums = both("*fp32")
    masks = None, ("*i1", 4096, 0, 0, 1) if padded else None, "*i64"
    sizes = "i32", "i32", "i32", "i32"  # queries, keys, tiles, span
    drawn = "i32", "i32", "i32", "fp32", "fp32"  # stream, two thresholds, scale, that of dropout
    if name == "forward":
        arguments = (*queries, rows, rows, *both(rows), *sums, *masks, "i32", 8, *sizes, *drawn)
    elif name == "query_gradient":
        grads = *both(rows), *sums, *queries  # of the outputs, their sums, of the queries
        arguments = (*queries, rows, rows, *both(rows), *sums, *grads, *masks, "i32", 8, *sizes, *drawn, "fp32")
    else:
        grads = *both(rows), *sums, rows, rows  # of the outputs, their sums, of key and value
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
    """Of both branches and of one, with bias and gradient of union."""
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
