"""The mirrored branch of relation alignment for any model (Xu, Liao and Sigal, WACV 2024).

`RelationAlignment` holds the options and the mirror's own heads. Its method `mirror` returns a `Mirror` for one
training step. Inside the `with` block of a `Mirror`, the chosen attention modules compute a batch that holds both
branches, and mask its second half (`branches.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sgalign.errors import InputError
from sgalign.nn.attention import MaskedMultiheadAttention
from sgalign.nn.branches import Branches, Step, active_branches, attach, detach
from sgalign.nn.replace import fits
from sgalign.nn.transformers import uses_sgalign
from sgalign.ops._operands import check_tensor
from sgalign.ops.alignment import Direction, Kind, Reduction, check_choices, relation_alignment_loss
from sgalign.ops.random_mask import check_int, checked_ratio, random_attention_mask
from sgalign.ops.seeds import step_seed

Chosen = str | type[nn.Module]
_ROW_STREAM = 1 << 30  # first stream of masks of rows. Attention modules have the streams from 0 on


class RelationAlignment(nn.Module):
    """Relation alignment (Xu, Liao and Sigal, WACV 2024) for a model of your own.

    The mirrored branch (the mirror) shares the weights of the model, except for the heads in `heads`. The random mask
    drops entries of its attention. `Mirror.loss` pulls its predictions towards those of the supervised branch.

    This module is not part of your model, and your model does not become part of it. Its parameters are the mirror's
    heads, so give them to the optimizer, too.

    Args:
        mask_ratio: the probability that the random mask drops an entry, p in the paper.
        weight: the weight of the alignment loss, lambda in the paper.
        heads: heads of the model, by name, that the mirror does not share. `self.heads` gets a copy of each. In the
            paper these are the predicate head and, for SGTR, the entity class heads.
        masked: the attention modules that have the random mask, given by names or by classes. Names are those of
            `replace_attention`. If None, the mask is applied wherever both branches attend to the same keys. This is
            the cross-attention to a memory, not the self-attention among the queries.
        kind, reduction, direction: as in `relation_alignment_loss`. `kind` may also be a dict with a kind for each name
            that is given to `Mirror.loss`.
        warmup_steps: the number of steps in which the weight grows linearly from 0 to `weight`.
        seed: the seed of the run, from which the seeds of the steps are computed.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is out of its range.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = 0.1,
        weight: float = 10.0,
        heads: Mapping[str, nn.Module] | None = None,
        masked: Chosen | Sequence[Chosen] | None = None,
        kind: Kind | Mapping[str, Kind] = "softmax",
        reduction: Reduction = "element",
        direction: Direction = "teacher_to_student",
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mask_ratio = checked_ratio(mask_ratio, "mask_ratio")
        if not 0 <= weight < float("inf"):
            raise InputError(f"weight must be a number of at least 0, got {weight}")
        check_int(warmup_steps, "warmup_steps")
        if warmup_steps < 0:
            raise InputError(f"warmup_steps must be at least 0, got {warmup_steps}")
        check_int(seed, "seed")
        for each in kind.values() if isinstance(kind, Mapping) else (kind,):
            check_choices(each, reduction, direction)
        self.weight, self.warmup_steps, self.seed = float(weight), warmup_steps, seed
        self.kind, self.reduction, self.direction = kind, reduction, direction
        self.masked = None if masked is None else _chosen(masked)
        self.heads = nn.ModuleDict({name: copy.deepcopy(head) for name, head in (heads or {}).items()})

    def mirror(self, *modules: nn.Module, step: int, micro_batch: int = 0, rank: int = 0) -> Mirror:
        """Return the mirror of one training step, for use in a `with` statement.

        The same arguments give the same masks, in any process and after a resumed run.

        Args:
            modules: the parts of the model whose attention is masked, usually the decoder. Their attention modules must
                be `MaskedMultiheadAttention`, or modules of transformers with ``attn_implementation="sgalign"``. Leave
                them out if only rows of features are masked (`Mirror.mask_rows`).
            step: the index of the training step.
            micro_batch: the index of the batch among those whose gradients are accumulated.
            rank: the rank of the process.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, or the modules have no attention to mask.
        """
        for name, number in (("step", step), ("micro_batch", micro_batch), ("rank", rank)):
            check_int(number, name)
        return Mirror(self, modules, step, step_seed(self.seed, step, micro_batch, rank))

    def losses(self, **pairs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the unweighted alignment loss of each pair, by name.

        Args:
            pairs: for each name, the logits of the supervised and of the mirrored branch, ``[..., K]`` both. The
                supervised logits are detached.

        Raises:
            TypeError, ValueError: as in `relation_alignment_loss`, or if `kind` has no entry for a name.
        """
        losses = {}
        for name, (logits, mirrored_logits) in pairs.items():
            if isinstance(self.kind, Mapping) and name not in self.kind:
                raise InputError(f"kind must have an entry for {name!r}, got {', '.join(self.kind) or 'none'}")
            kind = self.kind[name] if isinstance(self.kind, Mapping) else self.kind
            rows = (x.flatten(0, -2) if x.dim() > 2 else x for x in (logits, mirrored_logits))
            losses[name] = relation_alignment_loss(*rows, kind=kind, reduction=self.reduction, direction=self.direction)
        return losses

    def extra_repr(self) -> str:
        return f"mask_ratio={self.mask_ratio}, weight={self.weight}"


class Mirror:
    """The mirrored branch of one training step. `RelationAlignment.mirror` makes it.

    Inside its `with` block, double the batch of the queries with `double`, call the decoder once, and split its output
    with `split`. Or let `both` do the three steps. An attention module whose batch of queries has been doubled computes
    both branches in one pass, with the random mask for the second half. If the keys and values have the batch size from
    before the doubling, both branches share them, and they are projected once. All other modules compute the second
    half as they compute the first.

    Each attention module draws its own mask from the step's seed. A module that is called twice in a step draws the
    same mask twice. The mask does not depend on the mode (training or evaluation) of the module. If the dropout of the
    attention weights is on, it is the same in both branches.
    """

    def __init__(self, alignment: RelationAlignment, modules: Sequence[nn.Module], step: int, seed: int) -> None:
        self.alignment, self.step, self.seed = alignment, step, seed
        self._step = Step(alignment.mask_ratio)
        self._branches: dict[nn.Module, Branches] = {}
        if modules:
            self._find_attention(modules)

    def __enter__(self) -> Mirror:
        if any(active_branches(module) for module in self._branches):
            raise InputError("modules must not be inside another mirror, got an attention module that is")
        self._step.active = True
        attach(self._branches)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.active = False
        detach(self._branches)
        if error is None and self._branches and not self._step.drew and self._step.images != 0:
            raise InputError(
                "modules must run an attention on doubled queries inside the mirror, got none that drew the random"
                " mask: double the queries with `double` or `both`, along the dimension of the batch"
            )

    @property
    def weight(self) -> float:
        """The weight of the alignment loss in this step."""
        warmup = self.alignment.warmup_steps
        return self.alignment.weight * (min(1.0, self.step / warmup) if warmup else 1.0)

    def double(self, batch: Tensor, mirrored: Tensor | None = None, *, dim: int = 0) -> Tensor:
        """Return the inputs of both branches, joined along the dimension of the batch.

        Double every input that the decoder combines with the doubled queries, such as position embeddings of the
        queries. Do not double the memory to which both branches attend.

        Args:
            batch: the input of the supervised branch.
            mirrored: the input of the mirrored branch, such as rows from `mask_rows`. If None, it is `batch`.
            dim: the dimension of the batch, 1 for ``[L, B, E]``.

        Raises:
            TypeError, ValueError: if an argument is not a tensor, has no such dimension, or its size differs from that
                of tensors that were doubled before.
        """
        images = _size("batch", batch, dim)
        mirrored = batch if mirrored is None else mirrored
        check_tensor("mirrored", mirrored)
        if mirrored.shape != batch.shape:
            raise InputError(f"mirrored must have the shape of batch {list(batch.shape)}, got {list(mirrored.shape)}")
        if self._step.images not in (None, images):
            raise InputError(
                f"batch must have the size {self._step.images} of the first doubled tensor in dimension {dim}, got"
                f" {list(batch.shape)}"
            )
        if self._step.seed is None:
            # A tensor, because a number would be a constant of a compiled decoder.
            self._step.seed = torch.full((), self.seed, dtype=torch.int64, device=batch.device)
        self._step.images = images
        return torch.cat([batch, mirrored], dim)

    def split(self, outputs: Any, dim: int = 0) -> tuple[Any, Any]:
        """Return the supervised half and the mirrored half of a model's outputs.

        Activation checkpointing computes the attention again in the backward pass, after the `with` block. This works
        for outputs that this method has split.

        Args:
            outputs: a tensor, or tensors in tuples, lists, dicts or outputs of transformers.
            dim: the dimension of the batch in all tensors.

        Raises:
            ValueError: if nothing has been doubled, or a tensor does not have twice the batch size.
        """
        images = self._step.images
        if images is None:
            raise InputError("outputs can be split only after `double` has doubled the inputs, got none doubled")
        leaves, structure = pytree.tree_flatten(outputs)
        halves = [self._halves(leaf, 2 * images, dim) if isinstance(leaf, Tensor) else (leaf, leaf) for leaf in leaves]
        supervised, mirrored = ([pair[branch] for pair in halves] for branch in (0, 1))
        return pytree.tree_unflatten(supervised, structure), pytree.tree_unflatten(mirrored, structure)

    def both(self, module: Any, queries: Tensor, *others: Any, dim: int = 0, **named: Any) -> tuple[Any, Any]:
        """Return the outputs of both branches of ``module(queries, *others, **named)``.

        Args:
            module: the decoder, or a function that calls it.
            queries: the only tensor to double.
            others, named: all other arguments. Both branches share them.
            dim: the dimension of the batch in the queries and in the outputs.

        Raises:
            TypeError, ValueError: as in `double` and `split`.
        """
        return self.split(module(self.double(queries, dim=dim), *others, **named), dim)

    def mask_rows(self, rows: Tensor, *, stream: int = 0) -> Tensor:
        """Return a copy of a table in which random rows are 0, each with probability `mask_ratio`.

        Motifs masks the inputs of its edge context in this way. The kept rows are not rescaled.

        Args:
            rows: ``[..., N, F]``, such as the features of N objects.
            stream: a number. Tables of one step that need independent masks have different streams.

        Raises:
            TypeError, ValueError: if `rows` is not a tensor of at least two dimensions, or `stream` is not in
                [0, 2**30).
        """
        check_tensor("rows", rows)
        if rows.dim() < 2:
            raise InputError(f"rows must be [..., N, F], got {list(rows.shape)}")
        check_int(stream, "stream")
        if not 0 <= stream < _ROW_STREAM:
            raise InputError(f"stream must be in [0, 2**30), got {stream}")
        dropped = random_attention_mask(
            rows.shape[:-2].numel(),
            1,
            1,
            rows.shape[-2],
            ratio=self._step.ratio,
            seed=self.seed,
            stream=_ROW_STREAM + stream,
            device=rows.device,
        )
        return rows.masked_fill(dropped.view(*rows.shape[:-1], 1), 0)

    def loss(self, **pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weighted sum of the alignment losses, a scalar to add to the supervised loss.

        Args:
            pairs: as in `RelationAlignment.losses`. A mirrored branch with a head of its own has the logits
                ``alignment.heads[name](mirrored_states)``.

        Raises:
            TypeError, ValueError: as in `RelationAlignment.losses`, or if there are no pairs.
        """
        if not pairs:
            raise InputError("pairs must have at least one pair of logits, got none")
        return self.weight * torch.stack(list(self.alignment.losses(**pairs).values())).sum()

    def _find_attention(self, modules: Sequence[nn.Module]) -> None:
        found = dict(_attention_modules(modules))
        masked = self.alignment.masked
        if masked is None:
            _refuse_deformable(modules)
        if not found:
            theirs = [name for name, part in _named(modules) if isinstance(part, nn.MultiheadAttention)]
            advice = f": call sgalign.nn.replace_attention for {', '.join(theirs)}" if theirs else ""
            raise InputError(
                "modules must contain MaskedMultiheadAttention, or modules of transformers with"
                f' attn_implementation="sgalign", got neither{advice}'
            )
        for each in masked or ():
            if not any(_is_chosen(each, name, module) for module, name in found.items()):
                raise InputError(f"masked must be among the attention modules {list(found.values())}, got {each!r}")
        for stream, (module, name) in enumerate(found.items()):
            chosen = None if masked is None else any(_is_chosen(each, name, module) for each in masked)
            self._branches[module] = Branches(self._step, stream, chosen)

    def _halves(self, output: Tensor, images: int, dim: int) -> tuple[Tensor, Tensor]:
        if _size("outputs", output, dim) != images:
            raise InputError(f"outputs must have the size {images} in dimension {dim}, got {list(output.shape)}")
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(self._attach_for_backward)
        supervised, mirrored = output.chunk(2, dim)
        return supervised, mirrored

    def _attach_for_backward(self, grad: Tensor) -> None:
        """Let the attention modules compute both branches if checkpointing runs them again in this backward pass."""
        if not self._step.active:
            attach(self._branches)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: detach(self._branches))


def _chosen(masked: Chosen | Sequence[Chosen]) -> tuple[Chosen, ...]:
    """Return the chosen attention modules as a tuple, or raise TypeError."""
    chosen = (masked,) if isinstance(masked, (str, type)) else tuple(masked)
    for each in chosen:
        if not isinstance(each, (str, type)):
            raise TypeError(f"masked must hold names and classes, got {type(each).__name__}")
    return chosen


def _is_chosen(each: Chosen, name: str, module: nn.Module) -> bool:
    return fits(each, name) if isinstance(each, str) else isinstance(module, each)


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be torch.nn.Module, got {type(module).__name__}")
        yield from module.named_modules()


def _attention_modules(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that call `attend`, or may do so, with their names."""
    for name, module in _named(modules):
        if isinstance(module, MaskedMultiheadAttention) or uses_sgalign(module):
            yield module, name


def _refuse_deformable(modules: Sequence[nn.Module]) -> None:
    for name, module in _named(modules):
        if "DeformableAttention" in type(module).__name__ or type(module).__name__ == "MSDeformAttn":
            raise InputError(
                f"modules must have dense attention, got {name!r} ({type(module).__name__}): it reads a few sampled"
                " points, so there is no attention matrix to mask. Mask rows of features with `mask_rows`, or choose"
                " other attention modules with `masked`"
            )


def _size(name: str, tensor: Tensor, dim: int) -> int:
    """Return the size of a tensor in a dimension, or raise TypeError or InputError."""
    check_tensor(name, tensor)
    if not -tensor.dim() <= dim < tensor.dim():
        raise InputError(f"dim must be a dimension of {name} {list(tensor.shape)}, got {dim}")
    return tensor.shape[dim]
