"""The relation head in Triton, for one branch or both.

The kernels compute the logits, then the gradients of the weights and of `union`, then the gradients of the objects.
The product (subject + object) * union, which is multiplied by the weights, has size R x C. As in
csrc/cpu/relation.cpp, it is formed one tile at a time. There are no atomic additions. If several programs contribute
to a result, each writes its part separately, and the parts are summed in a fixed order.

A branch is a tuple `(subject, subject_stride, object, object_stride, weight, weight_stride)`. `mirrored` is the second
branch or None. The numbers of channels and classes are fixed by the model, so the kernels are specialized for them.
Triton then knows that rows are aligned and loads tiles 16 bytes at a time. The numbers of relations and objects change
with every batch, so the kernels are not specialized for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgalign.kernels.configs import dot_precision, is_interpreting

# Pairs per step of the backward pass. This is the smallest number that `tl.dot` accepts. The sums for the weights leave
# no registers for more.
BACKWARD_PAIRS = 16
# Minimum number of steps per program if several programs share the work. With fewer steps, writing and reading the
# partial results would cost too much.
LEAST_STEPS = 2
WARPS = 8
SEGMENT_WARPS = 4  # fewer, because an object is in few pairs and a program has little work
STAGES = 2  # stages of the load pipeline
SUMMED = 1024  # elements per program of `sum_splits_kernel`


@triton.jit
def load_tile(matrix, stride, row, column, inside):
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(matrix, stride, row, column, inside, tile):
    target = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(target, tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def load_sum(branch, subject_of, object_of, channel, inside):
    """Return `subject + object` of each pair, in float32."""
    subject = load_tile(branch[0], branch[1], subject_of, channel, inside)
    object = load_tile(branch[2], branch[3], object_of, channel, inside)
    return subject.to(tl.float32) + object.to(tl.float32)


@triton.jit
def load_weight(branch, k, classes, channel, channels):
    return load_tile(branch[4], branch[5], k, channel, (k < classes)[:, None] & (channel < channels)[None, :])


@triton.jit
def grad_of_product(
    grad_logits, branch, row, present, classes, channel, channels,
    CLASS_BLOCKS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `grad_logits @ weight`, the gradient of `(subject + object) * union`, in float32."""
    total = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    if UNROLLED:
        for block in tl.static_range(CLASS_BLOCKS):
            total = add_classes(
                total, block, grad_logits, branch, row, present, classes, channel, channels, BLOCK_K, PRECISION
            )
    else:
        for block in range(CLASS_BLOCKS):
            total = add_classes(
                total, block, grad_logits, branch, row, present, classes, channel, channels, BLOCK_K, PRECISION
            )
    return total


@triton.jit
def add_classes(
    total, block, grad_logits, branch, row, present, classes, channel, channels,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `total` with one block of classes added."""
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = load_tile(grad_logits, classes, row, k, present[:, None] & (k < classes)[None, :])
    weight = load_weight(branch, k, classes, channel, channels)
    return tl.dot(grad, weight, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["relations", "span"])
def forward_kernel(
    logits, mirrored_logits, union, union_stride, pairs, branch, mirrored, bias, mirrored_bias,
    relations, classes, channels, span,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the logits of a block of pairs and a block of classes from `span` blocks of channels.

    The program indices are block of pairs, block of classes, and split. A tile of `union` is loaded once for both
    branches. The kernel is memory-bound. With two branches, a pair takes 4 C K operations. It reads C numbers of
    `union` and up to 4 C numbers of subject and object features, which stay in the caches because they repeat from pair
    to pair.
    """
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    present = row < relations
    subject_of = tl.load(pairs + 2 * row.to(tl.int64), mask=present, other=0)
    object_of = tl.load(pairs + 2 * row.to(tl.int64) + 1, mask=present, other=0)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    mirrored_total = total
    for block in range(split * span, min(split * span + span, tl.cdiv(channels, BLOCK_C))):
        channel = block * BLOCK_C + tl.arange(0, BLOCK_C)  # starts at a multiple of 16, so loads are aligned
        inside = present[:, None] & (channel < channels)[None, :]
        features = load_tile(union, union_stride, row, channel, inside)
        weight = load_weight(branch, k, classes, channel, channels)
        product = load_sum(branch, subject_of, object_of, channel, inside) * features.to(tl.float32)
        total = tl.dot(product.to(weight.dtype), tl.trans(weight), total, input_precision=PRECISION)
        if mirrored is not None:
            weight = load_weight(mirrored, k, classes, channel, channels)
            product = load_sum(mirrored, subject_of, object_of, channel, inside) * features.to(tl.float32)
            mirrored_total = tl.dot(
                product.to(weight.dtype), tl.trans(weight), mirrored_total, input_precision=PRECISION
            )
    inside = present[:, None] & (k < classes)[None, :]
    row += split * relations
    add_bias_and_store(logits, bias, total, split, row, k, classes, inside)
    if mirrored is not None:
        add_bias_and_store(mirrored_logits, mirrored_bias, mirrored_total, split, row, k, classes, inside)


@triton.jit
def add_bias_and_store(logits, bias, total, split, row, k, classes, inside):
    if bias is not None:  # only the first split adds the bias
        total += tl.load(bias + k, mask=tl.where(split == 0, k < classes, False), other=0.0).to(tl.float32)[None, :]
    store_tile(logits, classes, row, k, inside, total)


@triton.jit(do_not_specialize=["relations", "span"])
def grad_weight_kernel(
    grad_weight, mirrored_grad_weight, grad_union, grad_logits, mirrored_grad_logits, union, union_stride, pairs,
    branch, mirrored, relations, classes, channels, span,
    BLOCK_R: tl.constexpr, CLASS_BLOCKS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of the weights and of a part of `union`.

    The program indices are block of channels, block of classes, and split. A program iterates over `span` blocks of
    pairs. Every program also computes the gradient of `union` for these pairs, over all classes, but only the programs
    of the first block of classes store it. There is one block of classes for up to 64 classes in float32 and up to 128
    in 16 bits (64 on AMD GPUs). Like the forward kernel, this kernel is memory-bound. In addition, it writes the
    gradient of `union`.
    """
    class_block = tl.program_id(1)
    split = tl.program_id(2)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = class_block * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    mirrored_total = total
    for block in range(split * span, min(split * span + span, tl.cdiv(relations, BLOCK_R))):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        present = row < relations
        inside = present[:, None] & (channel < channels)[None, :]
        subject_of = tl.load(pairs + 2 * row.to(tl.int64), mask=present, other=0)
        object_of = tl.load(pairs + 2 * row.to(tl.int64) + 1, mask=present, other=0)
        features = load_tile(union, union_stride, row, channel, inside)
        sums, total = step(
            total, grad_logits, branch, features, row, subject_of, object_of, present, k, classes, channel, channels,
            inside, PRECISION,
        )  # fmt: skip
        if mirrored is not None:
            mirrored_sums, mirrored_total = step(
                mirrored_total, mirrored_grad_logits, mirrored, features, row, subject_of, object_of, present,
                k, classes, channel, channels, inside, PRECISION,
            )  # fmt: skip
        if grad_union is not None:  # after both products for the weights, otherwise registers do not suffice
            to_union = sums * grad_of_product(
                grad_logits, branch, row, present, classes, channel, channels,
                CLASS_BLOCKS, UNROLLED, BLOCK_K, PRECISION,
            )  # fmt: skip
            if mirrored is not None:
                to_union += mirrored_sums * grad_of_product(
                    mirrored_grad_logits, mirrored, row, present, classes, channel, channels,
                    CLASS_BLOCKS, UNROLLED, BLOCK_K, PRECISION,
                )  # fmt: skip
            store_tile(grad_union, channels, row, channel, tl.where(class_block == 0, inside, False), to_union)
    inside = (k < classes)[:, None] & (channel < channels)[None, :]
    k += split * classes
    store_tile(grad_weight, channels, k, channel, inside, total)
    if mirrored is not None:
        store_tile(mirrored_grad_weight, channels, k, channel, inside, mirrored_total)


@triton.jit
def step(
    total, grad_logits, branch, features, row, subject_of, object_of, present, k, classes, channel, channels, inside,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return subject + object of each pair, and the gradient of the weights with these pairs added."""
    sums = load_sum(branch, subject_of, object_of, channel, inside)
    product = (sums * features.to(tl.float32)).to(features.dtype)
    grad = load_tile(grad_logits, classes, row, k, present[:, None] & (k < classes)[None, :])
    return sums, tl.dot(tl.trans(grad), product, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["relations", "objects"])
def grad_ends_kernel(
    grad_subject, grad_object, mirrored_grad_subject, mirrored_grad_object, grad_logits, mirrored_grad_logits,
    union, union_stride, order, offsets, branch, mirrored, relations, objects, classes, channels,
    BLOCK_R: tl.constexpr, CLASS_BLOCKS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of an object as the subject (end 0) or as the object (end 1) of its pairs.

    The program indices are object, block of channels, and end. A program iterates over the object's pairs,
    `order[end, offsets[end, object] : offsets[end, object + 1]]`. In total `union` is read twice, once per end. With
    few pairs per object, reading the weights from the second-level cache for every object takes the most time. With
    many pairs per object, reading `union` does.
    """
    index = tl.program_id(0)
    end = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment = offsets + end * (objects + 1).to(tl.int64) + index
    order += end * relations.to(tl.int64)
    stop = tl.load(segment + 1)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    mirrored_total = total
    for first in range(tl.load(segment), stop, BLOCK_R):
        place = first + tl.arange(0, BLOCK_R)
        present = place < stop
        row = tl.load(order + place, mask=present, other=0)
        inside = present[:, None] & (channel < channels)[None, :]
        features = load_tile(union, union_stride, row, channel, inside).to(tl.float32)
        total += features * grad_of_product(
            grad_logits, branch, row, present, classes, channel, channels, CLASS_BLOCKS, UNROLLED, BLOCK_K, PRECISION
        )
        if mirrored is not None:
            mirrored_total += features * grad_of_product(
                mirrored_grad_logits, mirrored, row, present, classes, channel, channels,
                CLASS_BLOCKS, UNROLLED, BLOCK_K, PRECISION,
            )  # fmt: skip
    place = index.to(tl.int64) * channels + channel
    store_end(grad_subject, grad_object, end, place, channel < channels, total)
    if mirrored is not None:
        store_end(mirrored_grad_subject, mirrored_grad_object, end, place, channel < channels, mirrored_total)


@triton.jit
def store_end(grad_subject, grad_object, end, place, inside, total):
    grad = tl.sum(total, 0).to(grad_subject.dtype.element_ty)
    if end == 0:
        tl.store(grad_subject + place, grad, mask=inside)
    else:
        tl.store(grad_object + place, grad, mask=inside)


@triton.jit(do_not_specialize=["splits", "count"])
def sum_splits_kernel(out, mirrored_out, partial, splits, count, BLOCK: tl.constexpr):
    """Add the splits of `partial`, `[branches, splits, count]`, in their order.

    The program indices are block and branch.
    """
    branch = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    partial += branch * splits * count.to(tl.int64) + place
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * count.to(tl.int64), mask=inside, other=0.0)
    total = total.to(out.dtype.element_ty)
    if branch == 0:
        tl.store(out + place, total, mask=inside)
    elif mirrored_out is not None:
        tl.store(mirrored_out + place, total, mask=inside)


class Blocks(NamedTuple):
    """The block sizes for a dtype and a number of classes.

    They are chosen so that the sums of both branches fit into registers.
    """

    # Pairs per forward program. Larger blocks are better, because the weights are read again for every block.
    pairs: int
    classes: int  # a larger number of classes takes several programs, or several steps of one program
    channels: int  # channels in 128 bytes of a row: whole cache lines, and the depth of a tensor core tile

    @staticmethod
    def of(union: Tensor, classes: int) -> Blocks:
        size = union.element_size()
        widest = 64 if size == 4 or torch.version.hip else 128
        width = min(widest, max(16, triton.next_power_of_2(classes)))
        row_bytes = 512 if is_interpreting() else 128  # in the interpreter, a program takes the same time for any size
        return Blocks(32 if width * size > 128 else 64, width, row_bytes // size)


def backward_sizes(blocks: Blocks, classes: int) -> dict[str, Any]:
    """Return the compile-time constants of the backward kernels.

    If the loop over blocks of classes is unrolled, the next pairs can be loaded ahead. Each block then needs separate
    shared memory. There is room for one block on AMD GPUs and for two on others.
    """
    count = triton.cdiv(classes, blocks.classes)
    unrolled = count <= (1 if torch.version.hip else 2)
    sizes = {"CLASS_BLOCKS": count, "UNROLLED": unrolled, "BLOCK_K": blocks.classes, "BLOCK_C": blocks.channels}
    return sizes | {"PRECISION": dot_precision()}


def forward(union: Tensor, pairs: Tensor, branches: list[Any], logits: list[Tensor], multiprocessors: int) -> None:
    """Write the logits of each branch.

    Args:
        union: the union features, with last stride 1.
        pairs: the pairs, contiguous.
        branches: the subject, object, weight and bias (or None) of each branch, with last strides of 1.
        logits: the outputs of each branch.
        multiprocessors: the number of multiprocessors of the GPU, which decides how many programs are launched.
    """
    (relations, channels), classes = union.shape, logits[0].shape[1]
    if not relations * classes:
        return
    blocks = Blocks.of(union, classes)
    programs = triton.cdiv(relations, blocks.pairs), triton.cdiv(classes, blocks.classes)
    span, splits = _length_splits(channels, blocks.channels, programs[0] * programs[1], multiprocessors)
    parts = _Parts(logits, splits)
    forward_kernel[(*programs, splits)](
        *parts.outs, union, union.stride(0), pairs, *_both([_operands(branch) for branch in branches]),
        *_both([branch.bias for branch in branches]), relations, classes, channels, span,
        BLOCK_R=blocks.pairs, BLOCK_K=blocks.classes, BLOCK_C=blocks.channels, PRECISION=dot_precision(),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    parts.sum()


def backward(
    union: Tensor,
    pairs: Tensor,
    branches: list[Any],
    grads: list[Any],
    grad_union: Tensor | None,
    multiprocessors: int,
) -> None:
    """Write the gradients of each branch's subject, object and weight, and the gradient of union if it is wanted.

    Args:
        union, pairs, branches, multiprocessors: as in `forward`. The biases are not read.
        grads: the gradients of each branch, contiguous. The gradient of the logits is an input, and the gradients of
            subject, object and weight are outputs.
        grad_union: the output for the gradient of `union`. If None, it is not computed.
    """
    (relations, channels), count = union.shape, len(branches[0].subject)
    classes = len(branches[0].weight)
    if not channels:
        return
    blocks = Blocks.of(union, classes)
    operands, given = _both([_operands(branch) for branch in branches]), _both([of.logits for of in grads])
    channel_blocks = triton.cdiv(channels, blocks.channels)
    sizes = backward_sizes(blocks, classes) | {"num_stages": STAGES}

    programs = channel_blocks, max(sizes["CLASS_BLOCKS"], 1)  # without classes, zeros are written for union
    span, splits = _length_splits(relations, BACKWARD_PAIRS, programs[0] * programs[1], multiprocessors)
    parts = _Parts([of.weight for of in grads], splits)
    grad_weight_kernel[(*programs, splits)](
        *parts.outs, grad_union, *given, union, union.stride(0), pairs, *operands,
        relations, classes, channels, span, BLOCK_R=BACKWARD_PAIRS, num_warps=WARPS, **sizes,
    )  # fmt: skip
    parts.sum()
    if not count:
        return

    ends, order = pairs.t().contiguous().sort(stable=True)
    numbers = torch.arange(count + 1, device=pairs.device).expand(2, -1).contiguous()
    offsets = torch.searchsorted(ends, numbers)  # [2, N + 1], on the device, so the host does not wait
    to_ends = [grad for of in _both(grads) for grad in ((of.subject, of.object) if of else (None, None))]
    grad_ends_kernel[(count, channel_blocks, 2)](
        *to_ends, *given, union, union.stride(0), order, offsets, *operands,
        relations, count, classes, channels, BLOCK_R=BACKWARD_PAIRS, num_warps=SEGMENT_WARPS, **sizes,
    )  # fmt: skip


def _operands(branch: Any) -> tuple[Any, ...]:
    """Return a branch in the form that the kernels accept."""
    return tuple(x for matrix in (branch.subject, branch.object, branch.weight) for x in (matrix, matrix.stride(0)))


def _both(values: list[Any]) -> list[Any]:
    """Return the values of both branches. The second is None if there is only one branch."""
    return [*values, None, None][:2]


def _length_splits(length: int, block: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """Return how many blocks of a length each program takes, and how many programs share the length.

    The aim is two programs per multiprocessor.
    """
    steps = max(triton.cdiv(length, block), 1)
    splits = max(min(2 * multiprocessors // programs, steps // LEAST_STEPS), 1)
    span = triton.cdiv(steps, splits)
    return span, triton.cdiv(steps, span)


class _Parts:
    """The partial results that the splits write and `sum` adds, or the final results if there is one split."""

    def __init__(self, outs: list[Tensor], splits: int) -> None:
        self.results, self.splits = outs, splits
        self.parts = outs[0].new_empty((len(outs), splits, *outs[0].shape), dtype=torch.float32) if splits > 1 else None
        self.outs = _both(outs if self.parts is None else list(self.parts))

    def sum(self) -> None:
        if self.parts is None:
            return
        count = self.results[0].numel()
        grid = triton.cdiv(count, SUMMED), len(self.results)
        sum_splits_kernel[grid](*_both(self.results), self.parts, self.splits, count, BLOCK=SUMMED, num_warps=4)
