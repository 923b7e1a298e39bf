"""Random cases of the operations: shapes, layouts in memory, dtypes, values and options.

A case is drawn from a seed and its number alone, so each can be repeated.
"""

from __future__ import annotations

import functools
import math
import mmap
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

JUNK = (math.nan, math.inf, -math.inf)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63))
STREAMS = (0, 1, 2**31 - 1)
RATIOS = (0.0, 1e-9, 1 / 65536, 0.15, 0.5, 65535 / 65536, 1.0)
BRANCHES = ("single", "dual", "same query")
FAR = 2**31 + 64  # elements from the first to the last row of a tensor whose offsets do not fit in 32 bits
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11's mmap does not name


class Limits(NamedTuple):
    """The largest sizes, and the dtypes, that a backend can run in little time."""

    # B, H, Lq, Lk and D of attention, with the share of the cases that have up to these sizes
    attention: tuple[tuple[float, tuple[int, ...]], ...]
    # N, R, C and K of the relation head; the alignment loss uses R and K
    relation: tuple[tuple[float, tuple[int, ...]], ...]
    dtypes: tuple[torch.dtype, ...]
    # If True, some numbers are infinite or NaN, and some tensors are spread over more than 2**31 elements. Kernels for
    # GPUs multiply by zeros where those for the CPU leave terms out, which makes NaN of infinite numbers.
    odd: bool


CORE = Limits(
    ((0.88, (2, 3, 12, 50, 40)), (0.117, (2, 3, 60, 300, 70)), (0.003, (2, 2, 420, 1100, 256))),
    ((0.88, (6, 20, 40, 20)), (0.117, (9, 70, 300, 60)), (0.003, (40, 300, 600, 310))),
    (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    True,
)
INTERPRETER = Limits(((1.0, (1, 2, 20, 80, 20)),), ((1.0, (4, 20, 60, 20)),), (torch.float32, torch.float16), False)
EMULATION = Limits(
    ((1.0, (2, 2, 20, 300, 70)),), ((1.0, (9, 40, 130, 60)),), (torch.float32, torch.bfloat16, torch.float16), False
)


class Attention(NamedTuple):
    """Arguments of attention, and the gradients of its outputs."""

    branches: str
    tensors: list[Tensor]  # query, mirrored query, key and value
    grad_outs: list[Tensor]
    options: dict[str, Any]
    junk: bool  # True if a number is infinite or NaN


class Mask(NamedTuple):
    """Arguments of a random mask."""

    size: tuple[int, ...]
    ratio: float
    seed: int
    stream: int


class Relation(NamedTuple):
    """Arguments of the relation head, and the gradients of its logits."""

    union: Tensor
    pairs: Tensor
    operands: list[list[Tensor | None]]  # of each branch: subject, object, weight and bias
    grads: list[Tensor]
    junk: bool


class Alignment(NamedTuple):
    """Arguments of the alignment loss."""

    logits: Tensor
    mirrored: Tensor
    options: dict[str, Any]
    junk: bool


Case = Attention | Mask | Relation | Alignment


def draw_case(seed: int, number: int, limits: Limits = CORE) -> Case:
    """Return the case with this number."""
    draw = Draw(seed, number, limits)
    kind = draw.random.random()
    if kind < 0.45:
        return _attention(draw)
    if kind < 0.6:
        return _mask(draw)
    return _relation(draw) if kind < 0.8 else _alignment(draw)


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int, number: int, limits: Limits) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.limits = limits
        self.is_far = False  # True if a tensor lies in the far buffer, which has room for one
        self.junk = self.chance(0.08) and limits.odd
        self.magnitude = self.random.choice([1.0, 1.0, 1.0, 0.01, 3.0])

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random.random() < probability

    def shape(self, tops: tuple[tuple[float, tuple[int, ...]], ...]) -> tuple[int, ...]:
        """Return a size for each dimension. Small sizes are likely, and so are 0 and 1."""
        (largest,) = self.random.choices([top for _, top in tops], [share for share, _ in tops])
        return tuple(self.size(top) for top in largest)

    def size(self, top: int) -> int:
        """Return a number from 0 to `top`."""
        kind = self.random.random()
        if kind < 0.015:
            return 0
        return 1 if kind < 0.1 else round(math.exp(self.random.uniform(0, math.log(top + 0.49))))

    def numbers(self, *size: int, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """Return a tensor of normally distributed numbers in any layout. One may be infinite or NaN."""
        x = torch.randn(size, generator=self.generator, dtype=torch.float64) * (self.magnitude * factor)
        if self.junk and x.numel() and self.chance(0.3):
            x.view(-1)[self.random.randrange(x.numel())] = self.random.choice(JUNK)
        return self.layout(x.to(dtype))

    def flags(self, *size: int) -> Tensor:
        """Return a bool tensor in any layout. True may have any byte but 0."""
        x = torch.rand(size, generator=self.generator) < self.random.choice([0.0, 0.3, 0.9, 1.0])
        if self.chance(0.1):
            x = (x.to(torch.uint8) * self.random.randrange(2, 256)).view(torch.bool)
        return self.layout(x)

    def layout(self, x: Tensor) -> Tensor:
        """Return the tensor, or a view with equal shape and other strides or repeated numbers."""
        kind = self.random.random()
        if kind < 0.4 or not x.numel() or not x.dim():
            return x
        if kind < 0.55:
            order = self.random.sample(range(x.dim()), x.dim())
            inverse = sorted(range(x.dim()), key=order.__getitem__)
            return x.permute(order).contiguous().permute(inverse)
        if kind < 0.65:
            for dim in self.random.sample(range(x.dim()), self.random.randint(1, x.dim())):
                x = x.narrow(dim, 0, 1).expand_as(x)
            return x
        if kind < 0.75:
            return self._overlapping(x)
        return self._far(x) if kind < 0.76 and self.limits.odd else self._slice(x)

    def _slice(self, x: Tensor) -> Tensor:
        """Return a part of a larger tensor of NaN."""
        before, step = ([self.random.randint(low, 2) for _ in x.shape] for low in (0, 1))
        larger = [b + s * size + self.random.randint(0, 1) for b, s, size in zip(before, step, x.shape)]
        whole = torch.full(larger, 1 if x.dtype in (torch.bool, torch.int64) else math.nan, dtype=x.dtype)
        part = whole[tuple(slice(b, b + s * size, s) for b, s, size in zip(before, step, x.shape))]
        part.copy_(x)
        return part

    def _overlapping(self, x: Tensor) -> Tensor:
        """Return a view in which several elements share a place."""
        strides = [self.random.randint(0, 3) for _ in x.shape]
        flat, offset = x.reshape(-1), self.random.randint(0, 3)
        needed = offset + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
        flat = flat.repeat(-(-needed // len(flat)))
        return flat.as_strided(x.shape, strides, offset)

    def _far(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor with more than 2**31 elements from its first to its last row."""
        dims = [dim for dim in range(x.dim() - 1) if x.shape[dim] > 1]
        if not dims or self.is_far:
            return x
        dim, strides = self.random.choice(dims), list(x.contiguous().stride())
        strides[dim] = -(-FAR // (x.shape[dim] - 1)) + x.numel()
        buffer, _ = far_buffer()
        if FAR + x.shape[dim] * 2 * x.numel() >= len(buffer) // x.element_size():
            return x
        self.is_far = True
        return buffer.view(x.dtype).as_strided(x.shape, strides).copy_(x)


@functools.cache
def far_buffer() -> tuple[Tensor, mmap.mmap]:
    """Return 17 GiB of address space. Pages take memory only once they are written."""
    memory = mmap.mmap(-1, 17 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8), memory


def release_far_buffer() -> None:
    """Give the pages of the far buffer back, if there are any."""
    if far_buffer.cache_info().currsize:
        far_buffer()[1].madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------------------------------------------- operations


def _attention(draw: Draw) -> Attention:
    batch, heads, queries, keys, dim = draw.shape(draw.limits.attention)
    dtype, choice = draw.random.choice(draw.limits.dtypes), draw.random.choice
    tensors = [draw.numbers(batch, heads, length, dim, dtype=dtype) for length in (queries, queries, keys, keys)]
    grad_outs = [draw.numbers(batch, heads, queries, dim, dtype=dtype, factor=1 / draw.magnitude) for _ in range(2)]
    options: dict[str, Any] = {"mask_seed": _seed(draw), "mask_stream": _stream(draw)}
    if draw.chance(0.6):
        options["mask_ratio"] = choice(RATIOS) if draw.chance(0.7) else draw.random.random()
    if draw.chance(0.3):
        options["dropout_p"] = choice((1e-9, 0.25, 0.9, 1.0))
    if draw.chance(0.35):
        sizes = [size if draw.chance(0.6) else 1 for size in (batch, heads, queries, keys)]
        options["mask"] = draw.flags(*sizes[draw.random.randint(0, 4) :])
    if draw.chance(0.35):
        options["key_padding_mask"] = draw.flags(batch, keys)
    if draw.magnitude <= 1 and draw.chance(0.3):
        options["scale"] = choice((0.0, -0.7, 0.9))
    return Attention(choice(BRANCHES), tensors, grad_outs, options, draw.junk)


def _mask(draw: Draw) -> Mask:
    size = draw.shape(draw.limits.attention)[:4]
    ratio = draw.random.choice(RATIOS) if draw.chance(0.5) else draw.random.random()
    return Mask(size, ratio, _seed(draw), _stream(draw))


def _seed(draw: Draw) -> int:
    return draw.random.choice(SEEDS) if draw.chance(0.4) else draw.random.randrange(-(2**63), 2**63)


def _stream(draw: Draw) -> int:
    return draw.random.choice(STREAMS) if draw.chance(0.6) else draw.random.randrange(2**31)


def _relation(draw: Draw) -> Relation:
    objects, relations, channels, classes = draw.shape(draw.limits.relation)
    relations = relations if objects else 0
    dtype = draw.random.choice(draw.limits.dtypes)
    bias = draw.chance(0.7)

    def branch() -> list[Tensor | None]:
        ends = [draw.numbers(objects, channels, dtype=dtype) for _ in range(2)]
        weight = draw.numbers(classes, channels, dtype=dtype, factor=max(channels, 1) ** -0.5)
        return [*ends, weight, draw.numbers(classes, dtype=dtype) if bias else None]

    pairs = torch.randint(max(objects, 1), (relations, 2), generator=draw.generator)
    operands = [branch() for _ in range(draw.random.randint(1, 2))]
    grads = [draw.numbers(relations, classes, dtype=dtype) for _ in operands]
    return Relation(draw.numbers(relations, channels, dtype=dtype), draw.layout(pairs), operands, grads, draw.junk)


def _alignment(draw: Draw) -> Alignment:
    _, relations, _, classes = draw.shape(draw.limits.relation)
    classes = max(classes, 1)
    dtype = draw.random.choice(draw.limits.dtypes)
    other = draw.random.choice(draw.limits.dtypes) if draw.chance(0.2) else dtype
    factor = draw.random.choice((1e-3, 1.0, 10.0))
    logits = draw.numbers(relations, classes, dtype=dtype, factor=factor)
    mirrored = draw.numbers(relations, classes, dtype=other, factor=factor)
    options: dict[str, Any] = {
        "kind": draw.random.choice(("softmax", "sigmoid")),
        "reduction": draw.random.choice(("element", "relation")),
        "direction": draw.random.choice(("teacher_to_student", "symmetric")),
    }
    if draw.chance(0.5):
        weight = torch.rand(relations, generator=draw.generator).mul(3)
        kind = draw.random.choice((torch.float32, torch.float64, torch.float16, torch.int64, torch.bool))
        options["weight"] = draw.layout(weight.to(kind) if draw.chance(0.9) else torch.zeros(relations))
    return Alignment(logits, mirrored, options, draw.junk)
