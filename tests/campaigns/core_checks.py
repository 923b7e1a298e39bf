"""The checks of one random case: what the kernels return, where they write, and what must not change it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import accuracy
import test_attention
import test_relation
import torch
from core_cases import Alignment, Attention, Case, Mask, Relation
from target import ROOT
from torch import Tensor

from sgalign import random_attention_mask, relation_alignment_loss
from sgalign.ops import _attention_backends, _core, random_mask, reference

Results = tuple[list[Tensor], list[Tensor | None]]  # outputs and gradients


def run(case: Case, backend: str) -> Results:
    """Return the outputs of an operation and the gradients of its inputs."""
    if isinstance(case, Attention):
        return test_attention.run(case.branches, case.tensors, case.grad_outs, backend=backend, **case.options)
    if isinstance(case, Relation):
        return test_relation.run(case.union, case.pairs, case.operands, case.grads, backend)
    if isinstance(case, Alignment):
        student = case.mirrored.detach().requires_grad_()
        loss = relation_alignment_loss(case.logits, student, backend=backend, **case.options)
        loss.backward()
        return [loss.detach()], [student.grad]
    return [random_attention_mask(*case.size, ratio=case.ratio, seed=case.seed, stream=case.stream)], []


def changed(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """Return the case with each tensor replaced."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        return {key: walk(item) for key, item in value.items()} if isinstance(value, dict) else value

    return type(case)(*map(walk, case))


def contiguous(case: Case) -> Case:
    """Return the case with copies of its tensors in the usual layout."""
    return changed(case, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def double(case: Case) -> Case:
    """Return the case in float64."""
    return changed(case, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def magnitudes(case: Case) -> Case:
    """Return the case with the absolute values of its numbers."""
    return changed(case, lambda tensor: tensor.abs() if tensor.is_floating_point() else tensor)


def repeats(tensor: Tensor) -> bool:
    """Return True if elements of a matrix of a batch share a place in memory."""
    places = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[2:], tensor.stride()[2:]))
    return places < tensor.shape[2] * tensor.shape[3]


class Expected:
    """The results of the reference for one case: in float64, and in the case's own dtype."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if isinstance(case, Mask):
            batch, heads, queries, keys = case.size
            drawn = reference.random_mask(
                batch * heads,
                queries,
                keys,
                threshold=round(65536 * case.ratio),
                seed=torch.tensor(case.seed),
                stream=case.stream,
                device=torch.device("cpu"),
            )
            self.exact: Results = [drawn.view(case.size)], []
            return
        # torch's product of float16 matrices reads outside of memory if rows are more than 2**31 elements apart.
        usual = contiguous(case)
        self.exact = run(double(usual), "reference")
        with mock.patch.object(_attention_backends, "accumulated_dtype", lambda dtype: dtype):
            plain = run(usual, "reference")
        # Where plain PyTorch overflows, its error must not excuse any other.
        self.plain = [
            [None if x is None else torch.where(x.isfinite(), x, right.to(x.dtype)) for x, right in zip(*group)]
            for group in zip(plain, self.exact)
        ]
        self.standard = None
        drops_all = isinstance(case, Attention) and case.options.get("dropout_p") == 1
        if isinstance(case, Attention) and case.tensors[0].shape[3] and not drops_all:
            eps = torch.finfo(case.tensors[0].dtype).eps
            options = usual.options | {"out_unit": eps / 2 if eps > 1e-6 else 0.0}
            errors = test_attention.standard_errors(case.branches, usual.tensors, usual.grad_outs, **options)
            # The factor is 2 because there are many cases. The errors of repeated numbers are equal, and therefore n of
            # them add up to n times one error, not to the root of n. Outputs do not depend on their gradients.
            root = max(*case.tensors[0].shape[2:], *case.tensors[2].shape[2:]) ** 0.5
            repeated = any(map(repeats, case.tensors)), any(map(repeats, (*case.tensors, *case.grad_outs)))
            self.standard = [
                [(2 * root if more else 2) * x if x.numel() else torch.zeros(()) for x in group]
                for more, group in zip(repeated, errors)
            ]
        if isinstance(case, Relation):
            # All results are sums of products. The sum of the products' magnitudes also bounds sums that cancel.
            sums = run(magnitudes(double(usual)), "reference")
            unit = torch.finfo(torch.float32).eps / 2
            self.standard = [[torch.zeros(()) if x is None else unit * x for x in group] for group in sums]

    def check(self, ours: Results) -> None:
        """Raise AssertionError unless rounding explains the errors of a kernel's results."""
        if isinstance(self.case, Mask):
            assert torch.equal(ours[0][0], self.exact[0][0]), "the mask is another one"
            return
        results = [self.exact, self.plain, ours]
        standard = self.standard
        if self.case.junk:
            masks = self._check_junk(ours)
            results = [kept(of_one, masks) for of_one in results]
            standard = standard and kept(standard, masks)
        if isinstance(self.case, Alignment):
            self._check_loss(*results)
        else:
            accuracy.assert_accurate(*results, standard, floor=1.0)

    def _check_loss(self, exact_results: Results, plain_results: Results, ours: Results) -> None:
        """Check the loss and its gradient.

        The bounds are those of tests/test_alignment.py. The part that allows for terms that nearly cancel is larger by
        a factor of a 16th of the spread, the sum of the ranges of both logits, if the spread is more than 16. For the
        loss, it is at least twice the rounding error of the sum of the terms' magnitudes.
        """
        assert isinstance(self.case, Alignment)
        weight = self.case.options.get("weight", torch.ones(len(self.case.logits))).double()
        share = 1.0 if self.case.options["reduction"] == "relation" else 1 / self.case.logits.shape[1]
        shares = weight / weight.sum().clamp_min(1e-300) * share
        # Differences of log-probabilities are up to the ranges of both logits, and rounded accordingly.
        finite = [x[x.isfinite()] for x in (self.case.logits, self.case.mirrored)]
        spread = sum((x.max() - x.min()).item() for x in finite if x.numel())
        share = max(share * max(1.0, spread / 16), (shares * self._magnitudes()).sum().item() / 8)
        largest = shares.max().item() * max(1.0, spread / 16) if len(shares) else 0.0
        for kind, factor, floor, *results in zip(
            ("loss", "gradient"), (2, 3), (share, largest), exact_results, plain_results, ours
        ):
            ((exact,), (plain,), (mine,)) = results
            assert mine.dtype == plain.dtype and mine.shape == exact.shape
            if mine.numel():
                allowed = factor * (plain - exact).abs().max().item()
                allowed += 16 * torch.finfo(mine.dtype).eps * max(exact.abs().max().item(), floor)
                error = (mine - exact).abs().max().item()
                assert error <= allowed, f"{kind}: {error} > {allowed}"

    def _magnitudes(self) -> Tensor:
        """Return the sum of the magnitudes of the terms of each relation's loss."""
        assert isinstance(self.case, Alignment)
        logits = self.case.logits.double(), self.case.mirrored.double()
        log_p, log_q = (reference._log_probabilities(x, self.case.options["kind"]) for x in logits)
        symmetric = self.case.options["direction"] == "symmetric"
        weight = (log_p.exp() + log_q.exp()) / 2 if symmetric else log_p.exp()
        return (weight * (log_p.abs() + log_q.abs())).nan_to_num(0, 0).sum((1, 2))

    def _check_junk(self, ours: Results) -> tuple[list[Tensor], list[Tensor | None]]:
        """Check the places of NaN and the places and signs of infinities. Return where numbers can be compared.

        They must be those of the reference, in the narrower dtype. The finite numbers beside them are compared too. In
        attention, they are compared only in heads whose inputs are all finite. Gradients of other heads are not
        checked, because the reference multiplies infinite numbers by dropped weights of 0, which gives NaN, and a
        kernel leaves these products out.
        The gradient of the symmetric loss is not checked in relations whose loss is infinite. It has products of a
        probability and an infinite number there, and depends on whether the probability was rounded to 0. If a logit
        and its mirrored one are infinite, the reference has NaN, and a kernel may leave the product out.
        """
        clean, unchecked, both = None, torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)
        if isinstance(self.case, Alignment) and self.case.options["direction"] == "symmetric":
            logits, mirrored = self.case.logits.double(), self.case.mirrored.double()
            divergence = reference.alignment_divergence(logits, mirrored, self.case.options["kind"], "symmetric")
            unchecked, both = divergence.isinf()[:, None], logits.isinf() & mirrored.isinf()
        if isinstance(self.case, Attention):
            finite = [x.isfinite().flatten(2).all(2) for x in (*self.case.tensors, *self.case.grad_outs)]
            clean = torch.stack(finite).all(0)[..., None, None]
        masks: tuple[list[Any], list[Any]] = [], []
        for kind, group, *results in zip(("output", "gradient"), masks, self.exact, ours):
            for i, (exact, mine) in enumerate(zip(*results, strict=True)):
                if exact is None:
                    group.append(None)
                    continue
                exact = exact.to(mine.dtype)
                mask = exact.isfinite() if clean is None else exact.isfinite() & clean
                equal = (exact == mine) | (exact.isnan() & mine.isnan()) | (exact.isfinite() & mine.isfinite())
                wrong = ~equal
                if kind == "gradient" and clean is not None:
                    wrong &= clean
                elif kind == "gradient":
                    wrong &= ~(unchecked | both & exact.isnan())
                    mask = mask & ~unchecked
                assert not wrong.any(), f"{kind} {i}: not finite in other places: {wrong.nonzero()[:3].tolist()}"
                group.append(mask)
        return masks


def kept(results: Any, masks: Any) -> Any:
    """Return the elements of results at the places of masks. A result that does not exist stays None."""
    groups = (zip(*pair, strict=True) for pair in zip(results, masks, strict=True))
    return [[None if mask is None else x.expand_as(mask)[mask] for x, mask in group] for group in groups]


def same(ours: Results, others: Results, what: str) -> None:
    """Raise AssertionError unless two results are equal, up to the sign of zero and the bits of NaN."""
    for kind, *results in zip(("output", "gradient"), ours, others):
        for i, (mine, other) in enumerate(zip(*results, strict=True)):
            if mine is None:
                assert other is None
                continue
            if kind == "gradient" and mine.dim() == 1:
                continue  # torch computes the gradient of a bias, and its sum depends on the layout
            assert mine.dtype == other.dtype and mine.shape == other.shape
            equal = (mine == other) | (mine.isnan() & other.isnan())
            assert equal.all(), f"{kind} {i} depends on {what}"


# -------------------------------------------------------------------------------------------------------- the runs

GUARD = 64  # elements around a tensor in which nothing may be written
UNTOUCHED = 77  # what they hold


class Guards:
    """New tensors of the operations: full of NaN, and with guards around them."""

    def __init__(self) -> None:
        self.wholes: list[tuple[Tensor, int]] = []
        for place, name in ((torch, "empty_like"), (Tensor, "new_empty")):
            setattr(place, name, self._guarded(getattr(place, name)))

    def _guarded(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            elements = elements if tensor.numel() else 0
            dtype = tensor.dtype if tensor.is_floating_point() else torch.uint8
            whole = torch.full((elements + 2 * GUARD,), math.nan if dtype.is_floating_point else UNTOUCHED, dtype=dtype)
            whole[:GUARD] = whole[GUARD + elements :] = UNTOUCHED
            self.wholes.append((whole, elements))
            # This tensor is no view, because autograd treats views in another way.
            return torch.empty(0, dtype=tensor.dtype).set_(
                whole.untyped_storage(), GUARD, tensor.shape, tensor.stride()
            )

        return allocate_guarded

    def check(self) -> None:
        """Raise AssertionError if a guard has changed, and forget all tensors."""
        wholes, self.wholes = self.wholes, []
        for whole, elements in wholes:
            intact = whole[:GUARD] == UNTOUCHED, whole[GUARD + elements :] == UNTOUCHED
            assert all(part.all() for part in intact), "a kernel wrote outside of its result"


class Core:
    """The compiled core, with each instruction set of this processor."""

    def __init__(self, _: str) -> None:
        self.core = _core.load()
        self.guards = Guards()

    def __call__(self, case: Case, number: int) -> None:
        """Raise AssertionError if a result is wrong, or depends on the layout of tensors or the number of threads."""
        torch.set_num_threads(1)
        expected = Expected(case)
        usual = contiguous(case)
        for name in self.core.instruction_sets():
            self.core.use_instruction_set(name)
            self.guards.check()
            torch.set_num_threads(1)
            alone = run(usual, "cpu")
            torch.set_num_threads(number % 4 + 1)
            ours = run(case, "cpu")
            self.guards.check()
            expected.check(ours)
            same(ours, alone, f"layout or threads with {name}")


class Sanitized(Core):
    """The core with sanitizers, which end the process, and with working memory that is full of NaN."""

    def __call__(self, case: Case, number: int) -> None:
        """Raise AssertionError if a result depends on memory that was never written."""
        torch.set_num_threads(number % 4 + 1)
        for name in self.core.instruction_sets():
            self.core.use_instruction_set(name)
            outputs, gradients = run(case, "cpu")
            self.guards.check()
            if isinstance(case, Mask) or not case.junk:
                assert not any(x.isnan().any() for x in (*outputs, *gradients) if x is not None), f"NaN with {name}"


class Backend:
    """A backend for GPUs on the CPU: Triton's kernels under its interpreter, or the emulated CUDA C++ kernels."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "cuda":
            import test_cuda

            path = test_cuda.build(ROOT / "build" / f"emulated-{test_cuda.digest()}", "-Og")
            spec = importlib.util.spec_from_file_location("_C", path)
            assert spec and spec.loader
            emulated = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(emulated)
            _core.load = lambda: emulated  # type: ignore[assignment]

    def __call__(self, case: Case, number: int) -> None:
        """Raise AssertionError if a result is wrong."""
        if isinstance(case, Mask):
            mask = torch.zeros(case.size, dtype=torch.bool)
            random_mask._LAUNCH[self.name](mask, torch.tensor(case.seed), round(65536 * case.ratio), case.stream)
            Expected(case).check(([mask], []))
        else:
            Expected(case).check(run(case, self.name))
