"""Every Triton kernel as it is compiled for a GPU, without one: name, source and options.

Arguments are described as at run time: tensors of torch are aligned, sizes of the model (channels, classes, strides)
are known to be multiples of 16 where they are, lengths are not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from sgalign.kernels import alignment, relation
from triton.compiler import ASTSource

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CHANNELS, CLASSES = (512, 4096), (51, 71)


class Compiled(NamedTuple):
    name: str
    source: ASTSource
    options: dict[str, int]


def source(kernel: Any, *arguments: Any, constants: dict[str, Any]) -> ASTSource:
    """Arguments are types ("*fp32", "i32"), numbers, which stand for a 32-bit argument like them, tuples and None."""
    attributes, constexprs = {}, {(kernel.arg_names.index(name),): value for name, value in constants.items()}

    def type_of(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple):
            return tuple(type_of(part, (*path, i)) for i, part in enumerate(argument))
        if argument is None:
            constexprs[path] = None
            return "constexpr"
        if argument[0] == "*" if isinstance(argument, str) else argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return argument if isinstance(argument, str) else "i32"

    signature = {name: type_of(arg, (i,)) for i, (name, arg) in enumerate(zip(kernel.arg_names, arguments))}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names and len(arguments) + len(constants) == len(signature)
    return ASTSource(kernel, signature, constexprs, attributes)


def relation_sources() -> Iterator[Compiled]:
    """Of both branches and of one, with bias and gradient of union."""
    for dtype, element in TYPES.items():
        x = f"*{element}"
        for channels in CHANNELS:
            for classes in CLASSES:
                blocks = relation.Blocks.of(torch.empty(0, dtype=dtype), classes)
                branch = (x, channels) * 3
                sizes = {"BLOCK_K": blocks.classes, "BLOCK_C": blocks.channels, "PRECISION": "tf32x3"}
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
                    constants = {"CLASS_BLOCKS": -(-classes // blocks.classes), **sizes}
                    yield Compiled(
                        f"relation gradients of weight and union: {of}",
                        source(
                            relation.grad_weight_kernel, *both("*fp32"), x, *both(x), x, channels, "*i64",
                            *both(branch), "i32", classes, channels, "i32",
                            constants={"BLOCK_R": relation.BACKWARD_PAIRS, **constants},
                        ),
                        options,
                    )  # fmt: skip
                    yield Compiled(
                        f"relation gradients of objects: {of}",
                        source(
                            relation.grad_ends_kernel, x, x, *2 * both(x)[1:], *both(x), x, channels, "*i64", "*i64",
                            *both(branch), "i32", "i32", classes, channels,
                            constants={"BLOCK_R": relation.BACKWARD_PAIRS, **constants},
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
                for direction, (forward, backward) in {
                    "teacher to student": (True, False),
                    "student to teacher": (False, True),
                    "symmetric": (True, True),
                }.items():
                    constants = {"SIGMOID": kind == "sigmoid", "FORWARD": forward, "BACKWARD": backward}
                    yield Compiled(
                        f"alignment loss: {element}, {classes} classes, {kind}, {direction}",
                        source(
                            alignment.alignment_kernel, "*fp32", x, x, classes, x, classes, "*fp32", "i32", classes,
                            "fp32", constants={**constants, "ROWS": rows, "BLOCK_K": width},
                        ),
                        {"num_warps": warps},
                    )  # fmt: skip
