"""Modules over the fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.errors import InputError
from sgalign.ops import backends
from sgalign.ops._operands import check_bool, check_tensor
from sgalign.ops.attention import dual_branch_attention, fused_masked_attention
from sgalign.ops.random_mask import ratio_threshold


class MaskedMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` on fused kernels, with the random mask and a dual-branch call.

    Parameters have the same names and initial values, so state dicts go both ways. What it does not have:
    ``add_bias_kv``, ``add_zero_attn``, additive (floating point) masks, which `torch.nn.TransformerEncoderLayer` makes
    of any mask, and attention weights, since no tensor of size Lq x Lk ever exists.

    Args:
        embed_dim: channels of the query and the output.
        num_heads: divides `embed_dim`.
        dropout: of the attention weights, in training only.
        bias: of the projections.
        kdim, vdim: channels of key and value, if not `embed_dim`.
        batch_first: tensors are ``[B, L, E]`` instead of ``[L, B, E]``.
        mask_ratio: of the random mask, in training only.
        backend: as in `fused_masked_attention`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range.
    """

    _qkv_same_embed_dim = False  # what torch's encoder layer asks before it would go around this module in evaluation

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
        kdim, vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if not isinstance(size, int) or size < 1:
                raise InputError(f"{name} must be an int of at least 1, got {size!r}")
        if embed_dim % num_heads:
            raise InputError(f"num_heads must divide embed_dim, {embed_dim}, got {num_heads}")
        ratio_threshold(dropout, "dropout")
        ratio_threshold(mask_ratio, "mask_ratio")
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
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        for weight in self._projection_weights() if self.in_proj_weight is None else (self.in_proj_weight,):
            nn.init.xavier_uniform_(weight)
        if bias:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

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
        """Return attention with the module's random mask (in training).

        Args:
            query: ``[Lq, B, E]``, or ``[B, Lq, E]`` if `batch_first`, or ``[Lq, E]``.
            key, value: likewise with Lk and their own channels.
            key_padding_mask: bool ``[B, Lk]`` (``[Lk]`` without a batch), True = ignored.
            need_weights: must be False.
            attn_mask: bool ``[Lq, Lk]`` or ``[B * num_heads, Lq, Lk]``, True = dropped.
            average_attn_weights: of the weights that there are not; has no effect.
            is_causal: says of `attn_mask` that it is causal, which makes no difference here; needs `attn_mask`.
            mask_seed, mask_stream: as in `fused_masked_attention`.

        Returns:
            The output in the query's layout, and None for the weights, as `torch.nn.MultiheadAttention` returns it.

        Raises:
            ValueError, TypeError: `need_weights` is True, or an argument has the wrong type, shape, dtype or device.
            ImportError, RuntimeError: as `fused_masked_attention`.
        """
        if need_weights:
            raise InputError(
                "need_weights must be False, got True: the fused kernels never form the [Lq, Lk] attention weights; "
                "sgalign.random_attention_mask gives the random mask alone"
            )
        if is_causal and attn_mask is None:
            raise InputError("attn_mask must be given where is_causal is True, as torch.nn.MultiheadAttention asks")
        (out,) = self._attend([query], key, value, key_padding_mask, attn_mask, mask_seed, mask_stream, dual=False)
        return out, None

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
        """Return the supervised branch without the random mask and the mirrored one with it, sharing key and value.

        Key and value are projected once; if `mirrored_query` is `query`, so is the query.

        Args:
            query, mirrored_query, key, value, key_padding_mask, attn_mask, mask_seed, mask_stream: as in `forward`.

        Returns:
            ``(out, mirrored_out)`` in the query's layout. In evaluation no mask is drawn.

        Raises:
            ValueError, TypeError: an argument has the wrong type, shape, dtype or device.
            ImportError, RuntimeError: as `dual_branch_attention`.
        """
        queries = [query] if mirrored_query is query else [query, mirrored_query]
        out, mirrored_out = self._attend(
            queries, key, value, key_padding_mask, attn_mask, mask_seed, mask_stream, dual=True
        )
        return out, mirrored_out

    def _attend(
        self,
        queries: list[Tensor],
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        mask_seed: int | Tensor | None,
        mask_stream: int,
        *,
        dual: bool,
    ) -> list[Tensor]:
        names = ["query", "mirrored_query"][: len(queries)] + ["key", "value"]
        channels = [self.embed_dim] * len(queries) + [self.kdim, self.vdim]
        batched = isinstance(queries[0], Tensor) and queries[0].dim() == 3
        for name, tensor, width in zip(names, [*queries, key, value], channels, strict=True):
            check_tensor(name, tensor)
            if tensor.dim() not in (2, 3) or (tensor.dim() == 3) != batched or tensor.shape[-1] != width:
                layout = f"[B, L, {width}]" if self.batch_first else f"[L, B, {width}]"
                raise InputError(f"{name} must be {layout}, or [L, {width}] like every other, got {list(tensor.shape)}")
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        weights = self._projection_weights()
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = [self._split_heads(functional.linear(query, weights[0], biases[0])) for query in queries]
        keys = self._split_heads(functional.linear(key, weights[1], biases[1]))
        values = self._split_heads(functional.linear(value, weights[2], biases[2]))
        if attn_mask is not None:
            attn_mask = self._mask_by_head(attn_mask, len(keys), heads[0].shape[2], keys.shape[2])
        options: dict[str, Any] = {
            "mask": attn_mask,
            "mask_ratio": self.mask_ratio if self.training else 0.0,
            "mask_seed": mask_seed,
            "mask_stream": mask_stream,
            "key_padding_mask": key_padding_mask,
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        outs = (
            dual_branch_attention(heads[0], heads[-1], keys, values, **options)
            if dual
            else [fused_masked_attention(heads[0], keys, values, **options)]
        )
        return [self.out_proj(self._merge_heads(out, batched)) for out in outs]

    def _mask_by_head(self, attn_mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
        check_bool("attn_mask", attn_mask)
        if attn_mask.shape == (queries, keys):
            return attn_mask
        by_head = (batch * self.num_heads, queries, keys)
        if attn_mask.shape != by_head:
            raise InputError(
                f"attn_mask must be {[queries, keys]} or {list(by_head)}, [B * num_heads, Lq, Lk], "
                f"got {list(attn_mask.shape)}"
            )
        return attn_mask.unflatten(0, (batch, self.num_heads))

    def _projection_weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _split_heads(self, projected: Tensor) -> Tensor:
        """Return a projection as ``[B, H, L, D]``, without a copy."""
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
