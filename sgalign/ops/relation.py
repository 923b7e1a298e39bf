"""The relation head of Neural Motifs, for one branch or for both in a single pass over the union features.

From the public function to the kernel as in `sgalign.ops.attention`: checks, `_RelationLogits` (autograd), the
registered operation ``sgalign::relation_logits``, the compiled core (csrc/cpu/relation.cpp, csrc/cuda/relation.cu) or
Triton's kernels (kernels/relation.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops.attention import DTYPES, check_dense, computed_dtype, distinct, unit_stride


def fused_relation_logits(
    subject: Tensor,
    object: Tensor,
    union: Tensor,
    pairs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Predicate logits of R pairs of N objects, without any tensor of R x C but `union` itself.

    ``logits[r] = weight ((subject[s] + object[o]) * union[r]) + bias`` with ``s, o = pairs[r]``. This is the end of
    Neural Motifs as in Scene-Graph-Benchmark: its ``post_cat``, a linear layer on the concatenated features of subject
    and object, is the sum of two linear layers on N objects each (its bias goes into one of them), and what it gives
    is multiplied with the pair's union features before the last layer, ``rel_compress``.

    Differentiable once in subject, object, union, weight and bias; deterministic.

    Args:
        subject, object: ``[N, C]``, float32, float64, bfloat16 or float16: each object as one end of a pair.
        union: ``[R, C]`` features of the pairs. Any row stride; copied if the last stride is not 1, as the others.
        pairs: int64 ``[R, 2]``, subject and object in 0 to N - 1; in any order, repeated or not.
        weight: ``[K, C]``; bias: ``[K]`` or None.
        backend: "cpu" (compiled), "triton" or "cuda" (GPUs), "reference" (plain PyTorch); None takes the fastest that
            serves device and dtype.

    Returns:
        ``[R, K]`` in the dtype of `union`; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
        IndexError: a pair is out of range; found before anything is computed. On a GPU it is a device-side assertion,
            which torch for ROCm is built without: there the result is undefined.
        ImportError: the compiled core is not built, or older than its sources.
    """
    branch = {"subject": subject, "object": object, "weight": weight, "bias": bias}
    return _relation_logits([branch], union, pairs, backend)[0]


def dual_branch_relation_logits(
    subject: Tensor,
    object: Tensor,
    mirrored_subject: Tensor,
    mirrored_object: Tensor,
    union: Tensor,
    pairs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mirrored_weight: Tensor,
    mirrored_bias: Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_relation_logits` of the supervised and of the mirrored branch; each row of `union` is read once for both.

    Args:
        subject, object, weight, bias: of the supervised branch, as in `fused_relation_logits`.
        mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias: of the mirror, of the same shapes. A tied
            head is the same `weight` and `bias` twice.
        union, pairs, backend: of both, as in `fused_relation_logits`.

    Returns:
        ``(logits, mirrored_logits)``, each ``[R, K]``.

    Raises:
        As `fused_relation_logits`.
    """
    branch = {"subject": subject, "object": object, "weight": weight, "bias": bias}
    mirrored = {
        "mirrored_subject": mirrored_subject,
        "mirrored_object": mirrored_object,
        "mirrored_weight": mirrored_weight,
        "mirrored_bias": mirrored_bias,
    }
    logits, mirrored_logits = _relation_logits([branch, mirrored], union, pairs, backend)
    return logits, mirrored_logits


def _relation_logits(
    branches: list[dict[str, Tensor | None]], union: Tensor, pairs: Tensor, backend: str | None
) -> tuple[Tensor, ...]:
    """Logits of each branch; a branch is its subject, object, weight and bias by the names of the arguments."""
    _check(branches, union, pairs)
    dtype = computed_dtype(union)
    backend = backends.choose(backend, union.device, dtype)
    union = union.to(dtype)
    operands = [[None if t is None else t.to(dtype) for t in branch.values()] for branch in branches]
    if backend != "cpu":
        _check_pairs(pairs, len(operands[0][0]))  # type: ignore[arg-type]
    if backend == "reference":
        return tuple(reference.relation_logits(s, o, union, pairs, w, b) for s, o, w, b in operands)  # type: ignore[arg-type]
    mirrored = operands[1] if len(operands) == 2 else [None] * 4
    union, *both = distinct([union, *operands[0], *mirrored])
    return _RelationLogits.apply(backend, union, pairs, *both)


def _check(branches: list[dict[str, Tensor | None]], union: Tensor, pairs: Tensor) -> None:
    named: dict[str, Tensor | None] = {"union": union}
    for branch in branches:
        named.update(branch)
    for name, tensor in named.items():
        if tensor is None and name.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if computed_dtype(tensor) != computed_dtype(union):
            raise TypeError(f"{name} must have the dtype of union, {union.dtype}, got {tensor.dtype}")
        dim = 1 if name.endswith("bias") else 2
        if tensor.dim() != dim:
            raise InputError(f"{name} must have {dim} dimensions, got {tensor.dim()}: {list(tensor.shape)}")
        if tensor.device != union.device:
            raise InputError(f"{name} must be on the device of union, {union.device}, got {tensor.device}")
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be an int64 tensor, got {getattr(pairs, 'dtype', type(pairs).__name__)}")
    check_dense("pairs", pairs)
    if pairs.device != union.device:
        raise InputError(f"pairs must be on the device of union, {union.device}, got {pairs.device}")
    relations, channels = union.shape
    if pairs.shape != (relations, 2):
        raise InputError(f"pairs must be [{relations}, 2], a row for each of union, got {list(pairs.shape)}")
    subject, weight = branches[0]["subject"], branches[0]["weight"]
    assert subject is not None and weight is not None
    for name, tensor in named.items():
        if tensor is None or name == "union":
            continue
        objects, classes = len(subject), len(weight)
        rows = {"bias": (classes,), "weight": (classes, channels)}.get(name.rpartition("_")[2], (objects, channels))
        if tensor.shape != rows:
            raise InputError(f"{name} must be {list(rows)} to go with the others, got {list(tensor.shape)}")


def _check_pairs(pairs: Tensor, objects: int) -> None:
    """The compiled core checks by itself; PyTorch would count negative indices from the end."""
    outside = (pairs < 0) | (pairs >= objects)
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"pairs must be in 0 to {objects - 1}")
    elif outside.any():
        row, column = outside.nonzero()[0].tolist()
        got = int(pairs[row, column])
        raise IndexError(f"pairs must be in 0 to {objects - 1}, one less than the objects, got {got} in row {row}")


class _RelationLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        union: Tensor,
        pairs: Tensor,
        subject: Tensor,
        object: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mirrored_subject: Tensor | None,
        mirrored_object: Tensor | None,
        mirrored_weight: Tensor | None,
        mirrored_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        subjects, objects = _present(subject, mirrored_subject), _present(object, mirrored_object)
        weights, biases = _present(weight, mirrored_weight), _present(bias, mirrored_bias)
        if biases and len(biases) < len(weights):  # one branch alone has a bias
            zeros = weight.new_zeros(weight.shape[0])
            biases = [zeros if bias is None else bias, zeros if mirrored_bias is None else mirrored_bias]
        return tuple(torch.ops.sgalign.relation_logits(backend, union, pairs, subjects, objects, weights, biases))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, union, pairs, subject, object, weight, _, *mirrored, _ = inputs
        ctx.save_for_backward(union, pairs, subject, object, weight, *mirrored)

    @staticmethod
    def backward(ctx: Any, *grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        grad, mirrored_grad = (*grad_logits, None)[:2]
        needs = ctx.needs_input_grad[1:]
        grads = _RelationLogitsBackward.apply(ctx.backend, needs[0], grad, mirrored_grad, *ctx.saved_tensors)
        subject, object, weight, *rest = grads
        grad_union = rest.pop() if needs[0] else None
        mirrored_subject, mirrored_object, mirrored_weight = rest or (None, None, None)
        bias = grad.sum(0) if grad is not None and needs[5] else None
        mirrored_bias = mirrored_grad.sum(0) if mirrored_grad is not None and needs[9] else None
        mirrored = mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias
        return None, grad_union, None, subject, object, weight, bias, *mirrored


class _RelationLogitsBackward(torch.autograd.Function):
    """The backward operation, which cannot be differentiated again, and says so."""

    @staticmethod
    def forward(
        backend: str,
        wants_union: bool,
        grad: Tensor,
        mirrored_grad: Tensor | None,
        union: Tensor,
        pairs: Tensor,
        subject: Tensor,
        object: Tensor,
        weight: Tensor,
        mirrored_subject: Tensor | None,
        mirrored_object: Tensor | None,
        mirrored_weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        grads, weights = _present(grad, mirrored_grad), _present(weight, mirrored_weight)
        subjects, objects = _present(subject, mirrored_subject), _present(object, mirrored_object)
        operation = torch.ops.sgalign.relation_logits_backward
        return tuple(operation(backend, grads, union, pairs, subjects, objects, weights, wants_union))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "sgalign: second-order gradients of the fused relation head are not supported (create_graph=True, or a"
            " gradient of a gradient); backend='reference' has them"
        )


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


_library = torch.library.Library("sgalign", "FRAGMENT")
_library.define(
    "relation_logits(str backend, Tensor union, Tensor pairs, Tensor[] subjects, Tensor[] objects, Tensor[] weights,"
    " Tensor[] biases) -> Tensor[]"
)
# -> the gradients of each branch's subject, object and weight, then that of union if wanted
_library.define(
    "relation_logits_backward(str backend, Tensor[] grad_logits, Tensor union, Tensor pairs, Tensor[] subjects,"
    " Tensor[] objects, Tensor[] weights, bool wants_union) -> Tensor[]"
)


@torch.library.register_fake("sgalign::relation_logits")
def _logits_fake(
    backend: str, union: Tensor, pairs: Tensor, subjects: Any, objects: Any, weights: list[Tensor], biases: Any
) -> list[Tensor]:
    return [union.new_empty(union.shape[0], weight.shape[0]) for weight in weights]


@torch.library.register_fake("sgalign::relation_logits_backward")
def _backward_fake(
    backend: str,
    grad_logits: list[Tensor],
    union: Tensor,
    pairs: Tensor,
    subjects: list[Tensor],
    objects: list[Tensor],
    weights: list[Tensor],
    wants_union: bool,
) -> list[Tensor]:
    grads = [tensor.new_empty(tensor.shape) for branch in zip(subjects, objects, weights) for tensor in branch]
    return [*grads, union.new_empty(union.shape)] if wants_union else grads


@torch.library.impl(_library, "relation_logits", "CompositeExplicitAutograd")
def _logits(
    backend: str,
    union: Tensor,
    pairs: Tensor,
    subjects: list[Tensor],
    objects: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
) -> list[Tensor]:
    logits = _logits_fake(backend, union, pairs, subjects, objects, weights, biases)
    if backend == "triton":
        from sgalign.kernels import relation as kernels

        with _cuda.queue(union.device):
            kernels.forward(union, pairs, subjects, objects, weights, biases, logits)
        return logits
    core = _cuda.core(union.device) if backend == "cuda" else _core.load()
    description, _kept = _description(union, pairs, subjects, objects, weights, biases, logits)
    if backend == "cuda":
        splits = core.cuda_relation_splits(description, _cuda.multiprocessors(union.device))
        workspace = _cuda.workspace(union, splits, len(weights), *logits[0].shape)
        with _cuda.queue(union.device) as queue:
            core.cuda_relation_forward(description, splits, workspace.data_ptr(), queue)
    else:
        core.relation_forward(description)
    return logits


@torch.library.impl(_library, "relation_logits_backward", "CompositeExplicitAutograd")
def _backward(
    backend: str,
    grad_logits: list[Tensor],
    union: Tensor,
    pairs: Tensor,
    subjects: list[Tensor],
    objects: list[Tensor],
    weights: list[Tensor],
    wants_union: bool,
) -> list[Tensor]:
    grads = _backward_fake(backend, grad_logits, union, pairs, subjects, objects, weights, wants_union)
    if backend == "triton":
        from sgalign.kernels import relation as kernels

        with _cuda.queue(union.device):
            kernels.backward(grad_logits, union, pairs, subjects, objects, weights, grads, wants_union)
        return grads
    description, _kept = _description(union, pairs, subjects, objects, weights, [], [])
    grad_logits = [grad.contiguous() for grad in grad_logits]
    by_branch = [
        (grad.data_ptr(), *(g.data_ptr() for g in grads[3 * i : 3 * i + 3])) for i, grad in enumerate(grad_logits)
    ]
    grad_union = grads[-1].data_ptr() if wants_union else 0
    if backend == "cuda":
        orders = pairs.t().contiguous().argsort(dim=1, stable=True)
        with _cuda.queue(union.device) as queue:
            _core.load().cuda_relation_backward(description, by_branch, grad_union, orders.data_ptr(), queue)
    else:
        _core.load().relation_backward(description, by_branch, grad_union)
    return grads


def _description(
    union: Tensor,
    pairs: Tensor,
    subjects: list[Tensor],
    objects: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    logits: list[Tensor],
) -> tuple[Any, list[Tensor]]:
    """The call as the core takes it (csrc/kernels.h), and the tensors whose addresses it holds."""
    kept: list[Tensor] = []

    def address(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    def rows(tensor: Tensor) -> tuple[int, int]:
        tensor = unit_stride(tensor)
        return address(tensor), tensor.stride(0)

    branches = [
        (
            *map(rows, branch),
            address(biases[i].contiguous()) if biases else 0,
            address(logits[i]) if logits else 0,
        )
        for i, branch in enumerate(zip(subjects, objects, weights))
    ]
    sizes = (len(subjects[0]), *union.shape, len(weights[0]))
    threads = torch.get_num_threads()
    core = _core.load()
    description = core.RelationLogits(
        DTYPES.index(union.dtype), sizes, branches, rows(union), address(pairs.contiguous()), threads
    )
    return description, kept
