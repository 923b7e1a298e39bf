"""The mirrored branch of relation alignment for any model (Xu, Liao and Sigal, WACV 2024).

`RelationAlignment` holds the options and the mirror's own heads. Its method `mirror` returns a `Mirror` for one
training step. Inside the `with` block of a `Mirror`, the attention modules compute a batch that holds both branches,
and mask its second half (`branches.py`).
"""

from __future__ import annotations

import copy
import numbers
import operator
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sgalign.errors import InputError
from sgalign.nn.branches import BranchState, enter, leave, use_in_backward
from sgalign.nn.selection import Selector, find_attention, selectors
from sgalign.ops._operands import check_tensor
from sgalign.ops.alignment import Direction, Kind, Reduction, check_choices, relation_alignment_loss
from sgalign.ops.random_mask import check_int, checked_ratio, random_attention_mask
from sgalign.ops.seeds import step_seed

Logits = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
_ROW_STREAM = 1 << 30  # first stream of masks of rows. Attention modules have the streams from 0 on


class RelationAlignment(nn.Module):
    """Relation alignment (Xu, Liao and Sigal, WACV 2024) for a model of your own.

    The mirrored branch (the mirror) shares the weights of the model, except for the heads in `heads`. A random mask
    drops entries of the mirror's attention. `Mirror.loss` pulls the mirror's predictions towards those of the
    supervised branch.

    This module holds only the mirror's heads. Pass its parameters to the optimizer.

    Args:
        mask_ratio: the probability that the random mask drops an entry, p in the paper.
        weight: the weight of the alignment loss, lambda in the paper. The attribute is called `alignment_weight`. Code
            that initializes each module's `weight` would fail on a number.
        heads: heads of the model, by name, that the mirror does not share. `self.heads` has a copy of each. In the
            paper these are the predicate head and, for SGTR, the entity class heads.
        masked: names or classes of the attention modules to mask. Names work as in `replace_attention`. If None, the
            mirror masks each attention whose keys both branches share, such as cross-attention to a memory.
        kind, reduction, direction: as in `relation_alignment_loss`. `kind` may also be a dict with a kind for each name
            that is given to `Mirror.loss`.
        warmup_steps: the number of steps in which the weight grows linearly from 0 to `weight`.
        seed: the seed of the run, from which the seeds of the steps are computed.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is out of its range.
    """

    mask_ratio: float
    alignment_weight: float
    masked: Selector | Sequence[Selector] | None
    kind: Kind | Mapping[str, Kind]
    reduction: Reduction
    direction: Direction
    warmup_steps: int
    seed: int

    def __init__(
        self,
        *,
        mask_ratio: float = 0.1,
        weight: float = 10.0,
        heads: Mapping[str, nn.Module] | None = None,
        masked: Selector | Sequence[Selector] | None = None,
        kind: Kind | Mapping[str, Kind] = "softmax",
        reduction: Reduction = "element",
        direction: Direction = "teacher_to_student",
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mask_ratio = checked_ratio(mask_ratio, "mask_ratio")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weight must be a number, got {type(weight).__name__}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"weight must be finite and at least 0, got {weight}")
        check_int(seed, "seed")
        for each in ("softmax", *kind.values()) if isinstance(kind, Mapping) else (kind,):
            check_choices(each, reduction, direction)
        selectors(masked)
        self.alignment_weight, self.warmup_steps = float(weight), _count(warmup_steps, "warmup_steps")
        self.masked, self.seed = masked, operator.index(seed)
        self.kind, self.reduction, self.direction = kind, reduction, direction
        self.heads = nn.ModuleDict(_copies({} if heads is None else heads))
        self._has_masked: bool = False  # True once an attention has applied the random mask

    def mirror(self, *modules: nn.Module, step: int, micro_batch: int = 0, rank: int | None = None) -> Mirror:
        """Return the mirror of one training step, for use in a `with` statement.

        The same arguments and the same attention modules, in the same order, give the same masks.

        Args:
            modules: the parts of the model whose attention is masked, usually the decoder. Their attention modules must
                be `MaskedMultiheadAttention`, or modules of transformers with ``attn_implementation="sgalign"``. Leave
                them out if only rows of features are masked (`Mirror.mask_rows`).
            step: the index of the training step, at least 0.
            micro_batch: a number of at least 0 that differs between the micro-batches of one step, such as their index.
            rank: the rank of the process. If None, the rank in torch's default process group, or 0 without one.

        Raises:
            TypeError, ValueError: if an argument has the wrong type or range, or the modules have no attention to mask.
        """
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        step, micro_batch = _count(step, "step"), _count(micro_batch, "micro_batch")
        return Mirror(self, modules, step, step_seed(self.seed, step, micro_batch, _count(rank, "rank")))

    def extra_repr(self) -> str:
        names = "mask_ratio", "alignment_weight", "masked", "kind", "reduction", "direction", "warmup_steps", "seed"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class Mirror:
    """The mirrored branch of one training step. `RelationAlignment.mirror` makes it.

    Inside its `with` block, double the batch of the queries with `double`, call the decoder once, and split its output
    with `split`. `both` does all three. An attention module whose queries are doubled computes both branches in one
    pass, with the random mask for the second half. If the keys and values are not doubled, both branches share them,
    and they are projected once. All other modules treat the doubled batch as an ordinary batch.

    Each attention module draws its own mask from the step's seed. A module that is called twice in a step draws the
    same mask twice. The mask is drawn in training and in evaluation mode. Where the branches share the keys, they have
    the same dropout of the attention weights.

    Attributes:
        alignment: the `RelationAlignment`.
        step: the index of the training step.
        seed: the seed of the masks.
    """

    def __init__(self, alignment: RelationAlignment, modules: Sequence[nn.Module], step: int, seed: int) -> None:
        self.alignment, self.step, self.seed = alignment, step, seed
        self._state = BranchState(alignment.mask_ratio)
        self._branches = find_attention(modules, selectors(alignment.masked), self._state) if modules else {}
        self._is_open = False

    def __enter__(self) -> Mirror:
        enter(self._branches)
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        leave(self._branches)
        if error is None and self._branches and self._state.batch_size != 0:
            self._check_masked()

    @property
    def weight(self) -> float:
        """The weight of the alignment loss in this step."""
        warmup = self.alignment.warmup_steps
        return self.alignment.alignment_weight * (min(1.0, self.step / warmup) if warmup else 1.0)

    def double(self, batch: Tensor, mirrored: Tensor | None = None, *, dim: int = 0) -> Tensor:
        """Return the inputs of both branches, joined along the dimension of the batch.

        Double every input that the decoder combines with the doubled queries, such as position embeddings of the
        queries. Do not double the memory to which both branches attend.

        Args:
            batch: the input of the supervised branch.
            mirrored: the input of the mirrored branch, such as rows from `mask_rows`. If None, it is `batch`.
            dim: the dimension of the batch, 1 for ``[L, B, E]``.

        Raises:
            TypeError, ValueError: if an argument is not a tensor, has no such dimension, or its batch size differs from
                that of the first doubled tensor, or if the mirror has modules and its `with` block is not running.
        """
        if self._branches and not self._is_open:
            raise InputError("`double` must be called inside the `with` block of the mirror, got a call outside")
        size = _size("batch", batch, dim)
        mirrored = batch if mirrored is None else mirrored
        check_tensor("mirrored", mirrored)
        if mirrored.shape != batch.shape:
            raise InputError(f"mirrored must have the shape of batch {list(batch.shape)}, got {list(mirrored.shape)}")
        state = self._state
        if state.batch_size not in (None, size):
            raise InputError(
                f"batch must have the size {state.batch_size} of the first doubled tensor in dimension dim={dim}, got"
                f" {list(batch.shape)}"
            )
        if state.seed is None:
            # A tensor, because a number would be a constant of a compiled decoder.
            state.seed = torch.full((), self.seed, dtype=torch.int64, device=batch.device)
        state.batch_size = size
        return torch.cat([batch, mirrored], dim)

    def split(self, outputs: Any, dim: int = 0) -> tuple[Any, Any]:
        """Return the supervised half and the mirrored half of a model's outputs.

        With activation checkpointing, split the decoder's output with this method, outside of the checkpointed
        function. If you slice it instead, call `backward` inside the `with` block. Otherwise cross-attention raises an
        error, and a masked self-attention silently loses its mask.

        Args:
            outputs: a tensor, or tensors in tuples, lists, dicts or outputs of transformers. None, numbers and text
                are returned for both halves.
            dim: the dimension of the batch in all tensors.

        Raises:
            TypeError, ValueError: if nothing has been doubled, a tensor does not have twice the batch size, or
                `outputs` contains no tensor or an object of another class.
        """
        if self._state.batch_size is None:
            raise InputError("outputs can be split only after `double` has doubled the inputs, got none doubled")
        leaves, structure = pytree.tree_flatten_with_path(outputs)
        halves = [self._halves(f"outputs{pytree.keystr(path)}", leaf, dim) for path, leaf in leaves]
        if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
            raise TypeError(f"outputs must contain a tensor, got {type(outputs).__name__} without one")
        supervised, mirrored = ([pair[branch] for pair in halves] for branch in (0, 1))
        return pytree.tree_unflatten(supervised, structure), pytree.tree_unflatten(mirrored, structure)

    def both(
        self, module: Any, queries: Tensor, /, *others: Any, dim: int = 0, output_dim: int | None = None, **named: Any
    ) -> tuple[Any, Any]:
        """Return the outputs of both branches of ``module(queries, *others, **named)``.

        Args:
            module: the decoder, or a function that calls it.
            queries: the tensor that this method doubles.
            others, named: all other arguments, passed on unchanged. Double them with `double` if the decoder combines
                them with the queries.
            dim: the dimension of the batch in the queries.
            output_dim: the dimension of the batch in the outputs. If None, it is `dim`.

        Raises:
            TypeError, ValueError: as in `double` and `split`.
        """
        outputs = module(self.double(queries, dim=dim), *others, **named)
        return self.split(outputs, dim if output_dim is None else output_dim)

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
            ratio=self._state.ratio,
            seed=self.seed,
            stream=_ROW_STREAM + stream,
            device=rows.device,
        )
        return rows.masked_fill(dropped.view(*rows.shape[:-1], 1), 0)

    def loss(self, **logits: Logits) -> Tensor:
        """Return the weighted sum of the alignment losses, a scalar to add to the supervised loss.

        Args:
            logits: as in `losses`.

        Raises:
            TypeError, ValueError: as in `losses`, or if there are no logits.
        """
        if not logits:
            raise InputError("logits must have at least one entry, got none")
        return self.weight * torch.stack(list(self.losses(**logits).values())).sum()

    def losses(self, **logits: Logits) -> dict[str, Tensor]:
        """Return the alignment loss of each output without its weight, by name.

        `relation_alignment_loss` computes it. The supervised logits are detached.

        Args:
            logits: for each name, the logits of the supervised and of the mirrored branch, ``[..., K]``. If the mirror
                has its own head, its logits are ``alignment.heads[name](mirrored)``. A third tensor ``[...]``, bool or
                real, has the weight of each relation, such as 0 for padding.

        Raises:
            TypeError, ValueError: as in `relation_alignment_loss`, or if `kind` has no entry for a name.
        """
        losses = {}
        for name, given in logits.items():
            own, mirrored, weight = _checked_logits(name, given)
            losses[name] = relation_alignment_loss(
                own.flatten(0, -2),
                mirrored.flatten(0, -2),
                kind=self._kind(name, own.shape[-1]),
                reduction=self.alignment.reduction,
                direction=self.alignment.direction,
                weight=None if weight is None else weight.flatten(),
            )
        return losses

    def _kind(self, name: str, classes: int) -> Kind:
        kind = self.alignment.kind
        if isinstance(kind, Mapping):
            if name not in kind:
                raise InputError(f"kind must have an entry for {name!r}, got entries for {list(kind)}")
            kind = kind[name]
        if kind == "softmax" and classes == 1:
            raise InputError(
                f'kind of {name!r} must be "sigmoid" for a single class, got "softmax": the loss would be 0'
            )
        return kind

    def _halves(self, name: str, output: Any, dim: int) -> tuple[Any, Any]:
        if output is None or isinstance(output, (bool, int, float, str)):
            return output, output
        size, found = 2 * (self._state.batch_size or 0), _size(name, output, dim)
        if found != size:
            raise InputError(
                f"{name} must have the size {size} in dimension dim={dim}, twice the batch size, got"
                f" {list(output.shape)}. Split only outputs of doubled inputs"
            )
        if self._branches and output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(lambda grad: None if self._is_open else use_in_backward(self._branches))
        supervised, mirrored = output.chunk(2, dim)
        return supervised, mirrored

    def _check_masked(self) -> None:
        """Raise InputError if an attention that should have applied the random mask has not."""
        ran = [branches for branches in self._branches.values() if branches.ran]
        drew = any(branches.drew for branches in ran)
        # Chosen modules must all draw. Modules that have not run may have been left out at random (layer drop).
        missing = [branches.name for branches in ran if branches.masked and not branches.drew]
        if missing or not (drew or (not ran and self.alignment._has_masked)):
            names = missing or [branches.name for branches in self._branches.values()]
            raise InputError(
                f"the attention modules {names} must apply the random mask inside the mirror, but did not. Double the"
                " batch of the queries with `double` or `both`, and do not double the keys and values"
            )
        self.alignment._has_masked |= drew


def _copies(heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return copies of the heads, which share parameters with each other where the heads do."""
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must be a dict of modules, got {type(heads).__name__}")
    for name, head in heads.items():
        if not isinstance(head, nn.Module):
            raise TypeError(f"heads[{name!r}] must be a torch.nn.Module, got {type(head).__name__}")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise InputError(f"heads must have names that torch.nn.ModuleDict allows, got {name!r}")
    return copy.deepcopy(dict(heads))


def _checked_logits(name: str, given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the logits of both branches and the weights, or raise TypeError or InputError."""
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise TypeError(
            f"logits of {name!r} must be a tuple of two tensors, and optionally weights, got {type(given).__name__}"
        )
    for tensor in given:
        check_tensor(f"logits of {name!r}", tensor)
    logits, mirrored = given[:2]
    if logits.dim() < 2 or logits.shape != mirrored.shape:
        raise InputError(
            f"logits of {name!r} must be [..., K] in both branches, got {list(logits.shape)} and {list(mirrored.shape)}"
        )
    weight = given[2] if len(given) == 3 else None
    if weight is not None and weight.shape != logits.shape[:-1]:
        raise InputError(f"weights of {name!r} must be {list(logits.shape[:-1])}, got {list(weight.shape)}")
    return logits, mirrored, weight


def _count(number: int, name: str) -> int:
    """Return a number as an int, or raise TypeError or InputError unless it is at least 0."""
    check_int(number, name)
    if number < 0:
        raise InputError(f"{name} must be at least 0, got {number}")
    return operator.index(number)


def _size(name: str, tensor: Tensor, dim: int) -> int:
    """Return the size of a tensor in a dimension, or raise TypeError or InputError."""
    check_tensor(name, tensor)
    check_int(dim, "dim")
    if not -tensor.dim() <= dim < tensor.dim():
        raise InputError(f"dim must be a dimension of {name} {list(tensor.shape)}, got {dim}")
    return tensor.shape[dim]
