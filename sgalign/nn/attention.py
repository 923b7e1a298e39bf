"""Multi-head attention on the fused operations, in the place of torch's module."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.errors import InputError
from sgalign.nn.branches import attend, branches_of
from sgalign.ops import backends
from sgalign.ops._operands import check_bool, check_device, check_tensor, differs, dropped_entries
from sgalign.ops.attention import attention_weights, dual_branch_attention
from sgalign.ops.random_mask import checked_ratio


class OutputProjection(nn.Linear):
    """A linear layer whose bias is initialized to zero, as in `torch.nn.MultiheadAttention`."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MaskedMultiheadAttention(nn.Module):
    """Multi-head attention on the fused kernels, with a random mask, for one branch or for both branches in one call.

    Use it in place of `torch.nn.MultiheadAttention`. The parameters have the same names and initial values, so state
    dicts can be loaded in both directions. There are these differences:

    - ``add_bias_kv`` and ``add_zero_attn`` are not supported.
    - A floating-point mask may hold only 0 (kept) and -inf (dropped). `torch.nn.TransformerEncoderLayer` and
      `torch.nn.TransformerDecoderLayer` convert bool masks into such masks.
    - The attention weights are not returned, because no tensor of size Lq x Lk is ever formed. `attention_weights`
      computes them in plain PyTorch.
    - A row without any kept entry gives zeros instead of NaN.

    Args:
        embed_dim: the number of channels of the query and the output.
        num_heads: the number of heads. It must divide `embed_dim`.
        dropout: the dropout probability of the attention weights, used only in training.
        bias: if True, the projections have a bias.
        kdim, vdim: the number of channels of the key and of the value. If None, `embed_dim`.
        batch_first: if True, tensors are ``[B, L, E]`` instead of ``[L, B, E]``.
        mask_ratio: the probability that the random mask drops an entry, used only in training.
        backend: as in `fused_masked_attention`.
        device, dtype: the device and the dtype of the parameters.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is out of its range.
    """

    _qkv_same_embed_dim = False  # keeps torch's encoder layer from bypassing this module in evaluation mode

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        mask_ratio: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads = _size(embed_dim, "embed_dim"), _size(num_heads, "num_heads")
        kdim = embed_dim if kdim is None else _size(kdim, "kdim")
        vdim = embed_dim if vdim is None else _size(vdim, "vdim")
        if embed_dim % num_heads:
            raise InputError(f"num_heads must divide embed_dim ({embed_dim}), got {num_heads}")
        dropout, mask_ratio = checked_ratio(dropout, "dropout"), checked_ratio(mask_ratio, "mask_ratio")
        backends.check_name(backend)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        self.dropout, self.mask_ratio, self.backend = dropout, mask_ratio, backend
        self.kdim, self.vdim = kdim, vdim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if kdim == vdim == embed_dim:
            self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(embed_dim, kdim)
            self.v_proj_weight = parameter(embed_dim, vdim)
        if bias:
            self.in_proj_bias = parameter(3 * embed_dim)
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = OutputProjection(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self._reset_input_projections()

    def reset_parameters(self) -> None:
        """Initialize all parameters, as torch's module does when it is made.

        FSDP and code that moves a module from the meta device with ``to_empty`` call this function.
        """
        self.out_proj.reset_parameters()
        self._reset_input_projections()

    _reset_parameters = reset_parameters  # the name in torch.nn.MultiheadAttention

    def _reset_input_projections(self) -> None:
        for weight in self._projection_weights() if self.in_proj_weight is None else (self.in_proj_weight,):
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask_seed: int | Tensor | None = None,
        mask_stream: int = 0,
    ) -> tuple[Tensor, None]:
        """Compute attention. In training mode, the random mask is applied.

        Args:
            query: the queries, ``[Lq, B, E]``, or ``[B, Lq, E]`` if `batch_first`, or ``[Lq, E]`` without a batch.
            key, value: the keys, with `kdim` channels, and the values, with `vdim` channels. Both have length Lk and
                the layout of `query`.
            key_padding_mask: the padding among the keys, ``[B, Lk]``, or ``[Lk]`` without a batch. It is bool (True
                means ignored), or floating point with only 0 and -inf (-inf means ignored).
            need_weights: must be False. `attention_weights` computes the weights.
            attn_mask: an explicit mask, ``[Lq, Lk]`` or ``[B * num_heads, Lq, Lk]``, bool (True means dropped) or
                floating point with only 0 and -inf (-inf means dropped).
            average_attn_weights: has no effect, because no attention weights are returned.
            is_causal: states that `attn_mask` is causal. If True, `attn_mask` must be given. It has no other effect.
            mask_seed, mask_stream: as in `fused_masked_attention`.

        Returns:
            The output in the query's layout, and None in place of the attention weights.

        Raises:
            TypeError, ValueError: if `need_weights` is True, or an argument has the wrong type, shape, dtype or device,
                or a floating-point mask has another value. On a GPU, a device-side assertion fails for such a mask. In
                compiled code, a RuntimeError is raised.
            ImportError, RuntimeError: as in `fused_masked_attention`.
        """
        if need_weights:
            raise InputError(
                "need_weights must be False, got True: the fused kernels never form the [Lq, Lk] attention weights; "
                "the module's method attention_weights(query, key) computes them in plain PyTorch"
            )
        # `is_causal` comes second. torch's decoder computes it from values, on which torch.compile cannot branch.
        if attn_mask is None and is_causal:
            raise InputError("attn_mask must be given if is_causal is True, as in torch.nn.MultiheadAttention")
        batched, (queries, keys, values) = self._project(query=query, key=key, value=value)
        options = self._options(queries, keys, key_padding_mask, attn_mask, mask_seed, mask_stream, batched)
        out = attend(self, queries, keys, values, backend=self.backend, **options)
        return self.out_proj(self._merge_heads(out, batched)), None

    def attention_weights(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        *,
        mask_seed: int | Tensor | None = None,
        mask_stream: int = 0,
    ) -> Tensor:
        """Compute, in plain PyTorch, the weights that `torch.nn.MultiheadAttention` returns as its second output.

        They are the weights of `forward` with the same arguments and the same `mask_seed`. In training mode, they have
        the random mask and dropout. Inside a mirror, they are those of both branches.

        Args:
            query, key, key_padding_mask, attn_mask, mask_seed, mask_stream: as in `forward`.
            average_attn_weights: if True, return the mean over the heads.

        Returns:
            The weights, ``[B, Lq, Lk]`` if `average_attn_weights` is True, otherwise ``[B, num_heads, Lq, Lk]``. There
            is no B if the tensors have no batch dimension.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        batched, (queries, keys) = self._project(query=query, key=key)
        options = self._options(queries, keys, key_padding_mask, attn_mask, mask_seed, mask_stream, batched)
        branches = branches_of(self)
        weights = (attention_weights if branches is None else branches.weights)(queries, keys, **options)
        if average_attn_weights:
            weights = weights.mean(1)
        return weights if batched else weights[0]

    def dual_branch(
        self,
        query: Tensor,
        mirrored_query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        mask_seed: int | Tensor | None = None,
        mask_stream: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Compute both branches: the supervised one without the random mask and the mirrored one with it.

        Both branches attend to the same keys and values, which are projected once. Pass the same tensor object as
        `query` and `mirrored_query` if the two are equal. This tensor is then projected only once. In evaluation mode,
        no random mask is drawn.

        Args:
            query, mirrored_query: the queries of the two branches, each as `query` in `forward`.
            key, value, key_padding_mask, attn_mask, mask_seed, mask_stream: as in `forward`.

        Returns:
            ``(out, mirrored_out)``, each in the query's layout.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, shape, dtype or device.
            ImportError, RuntimeError: as in `dual_branch_attention`.
        """
        rows = {"query": query, "mirrored_query": mirrored_query, "key": key, "value": value}
        if mirrored_query is query:
            del rows["mirrored_query"]
        batched, (*queries, keys, values) = self._project(**rows)
        options = self._options(queries[0], keys, key_padding_mask, attn_mask, mask_seed, mask_stream, batched)
        outs = dual_branch_attention(queries[0], queries[-1], keys, values, backend=self.backend, **options)
        out, mirrored_out = (self.out_proj(self._merge_heads(out, batched)) for out in outs)
        return out, mirrored_out

    def _project(self, **rows: Tensor) -> tuple[bool, list[Tensor]]:
        """Return True if there is a batch dimension, and each argument projected to ``[B, H, L, D]``.

        The arguments are called query, mirrored_query, key and value.
        """
        batched = isinstance(rows["query"], Tensor) and rows["query"].dim() == 3
        weights = self._projection_weights()
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = []
        for name, tensor in rows.items():
            check_tensor(name, tensor)
            place = ("query", "key", "value").index(name.removeprefix("mirrored_"))
            width = (self.embed_dim, self.kdim, self.vdim)[place]
            if tensor.dim() not in (2, 3) or (tensor.dim() == 3) != batched or tensor.shape[-1] != width:
                layout = f"[B, L, {width}]" if self.batch_first else f"[L, B, {width}]"
                raise InputError(
                    f"{name} must be {layout}, or [L, {width}] if no tensor has a batch dimension,"
                    f" got {list(tensor.shape)}"
                )
            heads.append(self._split_heads(functional.linear(tensor, weights[place], biases[place])))
        return batched, heads

    def _options(
        self,
        queries: Tensor,
        keys: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        mask_seed: int | Tensor | None,
        mask_stream: int,
        batched: bool,
    ) -> dict[str, Any]:
        """Return the options of `fused_masked_attention` for projected queries and keys."""
        if key_padding_mask is not None:
            key_padding_mask = _bool_mask("key_padding_mask", key_padding_mask)
            shape = (keys.shape[0], keys.shape[2])[not batched :]
            if differs(key_padding_mask.shape, shape):
                raise InputError(f"key_padding_mask must be {list(shape)}, got {list(key_padding_mask.shape)}")
            key_padding_mask = key_padding_mask if batched else key_padding_mask[None]
        if attn_mask is not None:
            check_tensor("attn_mask", attn_mask)
            check_device("attn_mask", attn_mask, queries.device, "the query's device")
            attn_mask = self._mask_by_head(_bool_mask("attn_mask", attn_mask), queries, keys)
        return {
            "mask": attn_mask,
            "mask_ratio": self.mask_ratio if self.training else 0.0,
            "mask_seed": mask_seed,
            "mask_stream": mask_stream,
            "key_padding_mask": key_padding_mask,
            "dropout_p": self.dropout if self.training else 0.0,
        }

    def _mask_by_head(self, attn_mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Return an explicit mask as ``[Lq, Lk]`` or ``[B, H, Lq, Lk]``."""
        shape = queries.shape[2], keys.shape[2]
        if attn_mask.shape == shape:
            return attn_mask
        for batch in (queries.shape[0], keys.shape[0]):  # they differ inside a mirror
            if attn_mask.shape == (batch * self.num_heads, *shape):
                return attn_mask.unflatten(0, (batch, self.num_heads))
        by_head = [queries.shape[0] * self.num_heads, *shape]
        raise InputError(
            f"attn_mask must be {list(shape)} or {by_head} ([B * num_heads, Lq, Lk]), got {list(attn_mask.shape)}"
        )

    def _projection_weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _split_heads(self, projected: Tensor) -> Tensor:
        """Return a view of a projection as ``[B, H, L, D]``."""
        if projected.dim() == 2:
            projected = projected[None]
        elif not self.batch_first:
            projected = projected.transpose(0, 1)
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge_heads(self, out: Tensor, batched: bool) -> Tensor:
        merged = out.transpose(1, 2).flatten(-2)
        if not batched:
            return merged[0]
        return merged if self.batch_first else merged.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, mask_ratio={self.mask_ratio}"


def _size(size: int, name: str) -> int:
    """Return a size as an int. It may be any integer type, such as numpy's."""
    try:
        found = operator.index(size)
    except TypeError:
        found = 0
    if isinstance(size, bool) or found < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {size!r}")
    return found


def _bool_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask as bool, True = dropped. A floating-point mask must hold only 0 (kept) and -inf (dropped)."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        check_bool(name, mask)
        return mask
    rule = f"{name} must be bool (True = dropped), or hold only 0 (kept) and -inf (dropped)"
    return dropped_entries(mask, -math.inf, rule)
