"""SGTR (Li, Zhang, He, CVPR 2022), with the mirrored branch of relation alignment.

The layers and their order are those of the public code (`OneStageEncDecVRD` and `PredicateNodeGenerator`), but the
computation is arranged into a few large operations. Within a layer, the predicate, subject and object sub-decoders do
not read each other. They therefore run side by side as three roles of one layer. Tensors are `[roles, B, queries,
dim]`. With the mirrored branch (the mirror) they are `[roles, 2 * B, queries, dim]`, supervised images first, then
mirrored images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.models.entity_detector import DetectedEntities
from sgalign.models.precision import widened
from sgalign.ops.attention import attention_weights, dual_branch_attention, fused_masked_attention


class MirrorMask(NamedTuple):
    """The random mask of one step. Each cross-attention block of each layer draws its own mask from the seed."""

    ratio: float
    seed: int | Tensor  # if the network is compiled, an int64 tensor [], because compiling makes a number a constant


class RelationOutputs(NamedTuple):
    """The predictions of L layers for Q relation queries in each of B images.

    The first dimension of `class_logits` and `boxes` is the role, 0 for the subject and 1 for the object. Outputs of a
    single layer lack dimension L.
    """

    logits: Tensor  # [L, B, Q, K], or K + 1 with a last column for no relation
    vectors: Tensor  # [L, B, Q, 4], center x, y of subject and object relative to the image size
    class_logits: Tensor  # [2, L, B, Q, num_objects + 1], last column for no object
    boxes: Tensor  # [2, L, B, Q, 4], center x, y, width, height relative to the image size

    def at(self, layer: int) -> RelationOutputs:
        """Return the outputs of one layer, without the layer dimension."""
        return RelationOutputs(
            self.logits[layer], self.vectors[layer], self.class_logits[:, layer], self.boxes[:, layer]
        )


class RoleLinear(nn.Module):
    """A linear layer with separate weights for each role, from `[roles, ..., inputs]` to `[roles, ..., outputs]`."""

    def __init__(self, roles: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(roles, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(roles, outputs))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # separate products take three quarters of the time of MKL's batched product
            return torch.stack([functional.linear(*role) for role in zip(x, self.weight, self.bias, strict=True)])
        return self.batched(x)

    def batched(self, x: Tensor) -> Tensor:
        """Compute all roles in one operation."""
        return torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT).unflatten(1, x.shape[1:-1])


class RoleNorm(nn.Module):
    """Layer normalization of `[roles, ..., dim]`, with a weight and a bias for each role.

    Args:
        roles: number of roles.
        dim: number of channels.
        shared: index of the weights that each role uses. If None, each role has its own.
    """

    shared: Tensor | None

    def __init__(self, roles: int, dim: int, shared: Sequence[int] | None = None) -> None:
        super().__init__()
        kinds = roles if shared is None else len(set(shared))
        self.weight, self.bias = nn.Parameter(torch.ones(kinds, dim)), nn.Parameter(torch.zeros(kinds, dim))
        # This is a buffer, because a list used as an index would be copied to the device each time.
        self.register_buffer("shared", None if shared is None else torch.tensor(list(shared)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if self.shared is not None:
            weight, bias = weight[self.shared], bias[self.shared]
        shape = (len(weight), *[1] * (x.dim() - 2), x.shape[-1])
        return torch.addcmul(bias.view(shape), functional.layer_norm(x, x.shape[-1:]), weight.view(shape))


class _Block(nn.Module):
    """A base class for the residual blocks of pre-norm layers."""

    def __init__(self, roles: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = RoleNorm(roles, dim)
        self.heads, self.dropout = heads, dropout

    def split(self, projected: Tensor) -> Tensor:
        """Reshape `[roles, B, L, heads * D]` to `[roles * B, heads, L, D]`."""
        return projected.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge(self, attended: Tensor, roles: int) -> Tensor:
        return attended.transpose(1, 2).flatten(2).unflatten(0, (roles, -1))

    def drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)

    @property
    def attention_dropout(self) -> float:
        return self.dropout if self.training else 0.0


class SelfAttention(_Block):
    """Self-attention, `x + attention(query = key = norm(x) + position, value = norm(x))`."""

    def __init__(self, roles: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__(roles, dim, heads, dropout)
        self.query_key, self.value = RoleLinear(roles, dim, 2 * dim), RoleLinear(roles, dim, dim)
        self.out = RoleLinear(roles, dim, dim)

    def forward(self, x: Tensor, position: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        query, key = self.query_key(normed if position is None else normed + position).chunk(2, -1)
        attended = fused_masked_attention(
            *(self.split(t) for t in (query, key, self.value(normed))),
            key_padding_mask=padding,
            dropout_p=self.attention_dropout,
        )
        return x + self.drop(self.out(self.merge(attended, len(x))))


class FeedForward(_Block):
    """A feed-forward block, `x + linear(relu(linear(norm(x))))`."""

    def __init__(self, roles: int, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__(roles, dim, 1, dropout)
        self.inner, self.outer = RoleLinear(roles, dim, ffn_dim), RoleLinear(roles, ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.outer(self.drop(self.inner(self.norm(x)).relu())))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(1, dim, heads, dropout)
        self.feed_forward = FeedForward(1, dim, ffn_dim, dropout)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x, position, padding))


class KeysValues(NamedTuple):
    """The projected keys and values that some roles attend to."""

    key: Tensor  # [roles * B, heads, L, D]
    value: Tensor  # [roles * B, heads, L, D]
    padding: Tensor | None = None  # bool [roles * B, L], True = ignored


class CrossAttention(_Block):
    """Cross-attention, `x + attention(norm(x) + position, memory)`.

    The memory is projected outside of this block, once for all layers and branches.
    """

    def __init__(self, roles: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__(roles, dim, heads, dropout)
        self.query, self.out = RoleLinear(roles, dim, dim), RoleLinear(roles, dim, dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor | None,
        memories: Sequence[KeysValues],
        mask: MirrorMask | None = None,
        stream: int = 0,
    ) -> Tensor:
        """Run both branches if `mask` is given, otherwise the supervised branch.

        Args:
            x: `[roles, B, Q, dim]`, states of the supervised branch. With `mask`, states of both branches
                `[roles, 2 * B, Q, dim]`, or `[roles, B, Q, dim]` while the branches are still equal.
            position: position embedding of the queries, added after the norm.
            memories: one or two memories. The first role attends to the first memory, all other roles to the second.
            mask: random mask of the mirrored branch.
            stream: mask stream of the first memory. The second memory has the next stream.

        Returns:
            The new states, `[roles, B, Q, dim]`, or `[roles, 2 * B, Q, dim]` with `mask`.
        """
        normed = self.norm(x)
        queries = self.query(normed if position is None else normed + position)
        parts = (queries[:1], queries[1:])[: len(memories)]
        outs = []
        for number, (query, memory) in enumerate(zip(parts, memories, strict=True)):
            roles, images = len(query), len(memory.key) // len(query)
            dropout_p = self.attention_dropout
            if mask is None:
                attended = fused_masked_attention(
                    self.split(query), memory.key, memory.value, key_padding_mask=memory.padding, dropout_p=dropout_p
                )
                outs.append(self.merge(attended, roles))
                continue
            first = self.split(query[:, :images])
            second = self.split(query[:, images:]) if query.shape[1] > images else first
            both = dual_branch_attention(
                first,
                second,
                memory.key,
                memory.value,
                mask_ratio=mask.ratio,
                mask_seed=mask.seed,
                mask_stream=stream + number,
                key_padding_mask=memory.padding,
                dropout_p=dropout_p,
            )
            outs.append(torch.cat([self.merge(branch, roles) for branch in both], dim=1))
        out = self.drop(self.out(torch.cat(outs)))
        return out + (x if x.shape == out.shape else x.repeat(1, 2, 1, 1))

    def weights(
        self,
        x: Tensor,
        position: Tensor | None,
        memories: Sequence[KeysValues],
        mask: MirrorMask,
        stream: int = 0,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the attention weights of both branches, for figures. `forward` never computes them as tensors.

        Args:
            x, position, memories, mask, stream: as for `forward`.

        Returns:
            For each memory, the weights of the supervised and of the mirrored branch, `[roles, B, heads, Q, L]` each.
        """
        normed = self.norm(x)
        queries = self.query(normed if position is None else normed + position)
        parts = (queries[:1], queries[1:])[: len(memories)]
        found = []
        for number, (query, memory) in enumerate(zip(parts, memories, strict=True)):
            images = len(memory.key) // len(query)
            branches = []
            for query_part, ratio in ((query[:, :images], 0.0), (query[:, -images:], mask.ratio)):
                weights = attention_weights(
                    self.split(query_part),
                    memory.key,
                    mask_ratio=ratio,
                    mask_seed=mask.seed,
                    mask_stream=stream + number,
                    key_padding_mask=memory.padding,
                )
                branches.append(weights.unflatten(0, (len(query), images)))
            found.append((branches[0], branches[1]))
        return found


class Mirror(NamedTuple):
    """The parts that only the mirrored branch has: its predicate and entity class heads, and its random mask."""

    heads: tuple[nn.Linear, RoleLinear]
    mask: MirrorMask


class SGTR(nn.Module):
    """The parts of SGTR after the entity detector: predicate encoder, queries, structural decoder and heads.

    Args:
        num_objects, num_predicates: numbers of classes, without the classes for no object and no relation.
        dim: number of channels, the same as in the entity detector.
        heads, ffn_dim, layers, encoder_layers, num_queries, dropout: settings of the transformer.
        focal: if True, predicates are trained by a focal loss, as for Visual Genome. Otherwise they are trained by
            cross-entropy and `logits` have a last column for no relation, as for Open Images.
    """

    def __init__(
        self,
        num_objects: int,
        num_predicates: int,
        *,
        dim: int = 256,
        heads: int = 8,
        ffn_dim: int = 2048,
        layers: int = 6,
        encoder_layers: int = 3,
        num_queries: int = 180,
        dropout: float = 0.1,
        focal: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.layers, self.focal = dim, heads, layers, focal
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, ffn_dim, dropout) for _ in range(encoder_layers))
        self.encoder_norm = RoleNorm(1, dim)

        self.queries = nn.Parameter(torch.randn(3, 1, num_queries, dim))
        self.entity_position = nn.Linear(dim, dim)
        self.query_self = SelfAttention(1, dim, heads, dropout)
        self.query_keys_values = RoleLinear(1, dim, 2 * dim)
        self.query_cross = CrossAttention(1, dim, heads, dropout)
        self.query_ffn = FeedForward(1, dim, ffn_dim, dropout)
        self.query_norm = RoleNorm(1, dim)
        self.query_split = nn.Linear(dim, 3 * dim)

        # The projections to keys and values for the cross-attention blocks of all layers. All of these blocks read the
        # same memory.
        self.memory_keys, self.memory_values = (RoleLinear(1, dim, layers * dim) for _ in range(2))
        self.entity_keys_values = RoleLinear(2, dim, layers * 2 * dim)
        self.self_attention = nn.ModuleList(SelfAttention(3, dim, heads, dropout) for _ in range(layers))
        self.cross_attention = nn.ModuleList(CrossAttention(3, dim, heads, dropout) for _ in range(layers))
        self.feed_forward = nn.ModuleList(FeedForward(3, dim, ffn_dim, dropout) for _ in range(layers))
        self.decoder_norm = RoleNorm(3, dim, shared=(0, 1, 1))
        self.fusion = RoleLinear(2, dim, dim)

        self.num_objects, self.num_predicates = num_objects, num_predicates
        self.predicate, self.entity_class = self.new_heads()
        self.vector = nn.Linear(dim, 4)
        self.entity_box = nn.ModuleList(RoleLinear(2, dim, out) for out in (dim, dim, 4))
        for projection, blocks in ((self.memory_keys, 1), (self.memory_values, 1), (self.entity_keys_values, 2)):
            _init_blocks(projection, layers * blocks)

    def new_heads(self) -> tuple[nn.Linear, RoleLinear]:
        """Return new predicate and entity class heads. The mirror has its own."""
        predicate = nn.Linear(self.dim, self.num_predicates + (0 if self.focal else 1))
        if self.focal:  # initial probabilities of 0.01, as in Lin et al., ICCV 2017
            nn.init.constant_(predicate.bias, -math.log(99))
        return predicate, RoleLinear(2, self.dim, self.num_objects + 1)

    def start_heads(self, classes: nn.Linear, boxes: Sequence[nn.Linear]) -> None:
        """Initialize the subject and object heads with the detector's heads, as in the public code.

        Args:
            classes: the detector's class head, with `num_objects + 1` outputs.
            boxes: the three layers of the detector's box head.
        """
        with torch.no_grad():
            for ours, theirs in zip((self.entity_class, *self.entity_box), (classes, *boxes), strict=True):
                ours.weight.copy_(theirs.weight.expand_as(ours.weight))
                ours.bias.copy_(theirs.bias.expand_as(ours.bias))

    def forward(
        self, entities: DetectedEntities, mirror: Mirror | None = None
    ) -> RelationOutputs | tuple[RelationOutputs, RelationOutputs]:
        """Return the predictions of each layer and, with `mirror`, the mirror's predictions of the last layer.

        `dual_branch` calls this method too, so `torch.nn.Module.compile` compiles both.

        Args:
            entities: outputs of the detector. Only the last layer's boxes are read.
            mirror: the mirrored branch. If None, only the supervised branch runs.
        """
        states = self._states(entities, mirror.mask if mirror is not None else None)
        images = len(entities.features)
        supervised = self._outputs(torch.stack([s[:, :images] for s in states], 1), self.predicate, self.entity_class)
        if mirror is None:
            return supervised
        return supervised, self._outputs(states[-1][:, None, images:], *mirror.heads).at(0)

    def dual_branch(
        self, entities: DetectedEntities, heads: tuple[nn.Linear, RoleLinear], mask: MirrorMask
    ) -> tuple[RelationOutputs, RelationOutputs]:
        """Return the predictions of `forward` and the mirror's predictions of the last layer, computed by `heads`.

        Everything before the first cross-attention is computed once, as are all keys and values. In training, both
        branches have the same dropout of cross-attention weights. All other dropout after the first cross-attention
        differs between the branches, because they are stacked along the batch dimension.
        """
        return self(entities, Mirror(heads, mask))

    def _states(self, entities: DetectedEntities, mask: MirrorMask | None) -> list[Tensor]:
        """Return the three roles' states after each layer, `[3, B, Q, dim]`, or `[3, 2 * B, Q, dim]` with a mask."""
        memories = self._memories(entities)
        x, states = self._contents(entities), []
        for layer in range(self.layers):
            x = self.self_attention[layer](x, self.queries)
            x = self.cross_attention[layer](x, self.queries, memories[layer], mask, stream=2 * layer)
            x = self.decoder_norm(self.feed_forward[layer](x))
            fused = x[:1] + self.fusion(x[1:]).sum(0, keepdim=True).relu()
            x = torch.cat([fused, x[1:]])
            states.append(x)
        return states

    def _memories(self, entities: DetectedEntities) -> list[tuple[KeysValues, KeysValues]]:
        """Return the memories of each layer: one for predicates, and one for subjects and objects."""
        memory = entities.memory[None]
        for layer in self.encoder:
            memory = layer(memory, entities.position, entities.padding)
        memory = self.encoder_norm(memory)
        keys = self.memory_keys(memory + entities.position)[0].unflatten(2, (self.layers, self.heads, -1)).unbind(2)
        values = self.memory_values(memory)[0].unflatten(2, (self.layers, self.heads, -1)).unbind(2)
        of_entities = self.entity_keys_values(entities.features.expand(2, -1, -1, -1)).flatten(0, 1)
        shared = of_entities.unflatten(2, (self.layers, 2, self.heads, -1)).transpose(1, 4)
        return [
            (
                KeysValues(keys[number].transpose(1, 2), values[number].transpose(1, 2), entities.padding),
                KeysValues(*shared[:, :, number].unbind(2)),
            )
            for number in range(self.layers)
        ]

    def _contents(self, entities: DetectedEntities) -> Tensor:
        """Return the initial contents of the queries, computed from the entities, `[3, B, Q, dim]`."""
        images = len(entities.features)
        middles = sine_embedding(entities.boxes[-1][..., :2].detach(), self.dim).to(entities.features.dtype)
        key, value = self.query_keys_values((entities.features + self.entity_position(middles))[None]).chunk(2, -1)
        memory = KeysValues(self.query_cross.split(key), self.query_cross.split(value))
        query = self.query_self(self.queries[:1]).expand(-1, images, -1, -1)
        query = self.query_norm(self.query_ffn(self.query_cross(query, None, [memory])))[0]
        subject, object_, predicate = self.query_split(query.relu()).chunk(3, -1)
        return torch.stack([predicate, subject, object_])

    def _outputs(self, states: Tensor, predicate: nn.Linear, entity_class: RoleLinear) -> RelationOutputs:
        """Return the predictions for states `[3, L, B, Q, dim]`."""
        boxes = states[1:]
        for number, layer in enumerate(self.entity_box):
            boxes = layer(boxes.relu() if number else boxes)
        return RelationOutputs(
            predicate(states[0]),
            widened(self.vector(states[0])).sigmoid(),
            entity_class(states[1:]),
            widened(boxes).sigmoid(),
        )


def _init_blocks(projection: RoleLinear, blocks: int) -> None:
    """Initialize each of the blocks as if it were a separate layer."""
    for block in projection.weight.data.chunk(blocks, dim=1):
        for weight in block:
            nn.init.xavier_uniform_(weight)


def sine_embedding(points: Tensor, dim: int) -> Tensor:
    """Return DETR's sine embedding of points, `[..., dim]`, with the channels of y before those of x.

    Args:
        points: `[..., 2]`, x and y in 0 to 1.
        dim: number of channels.
    """
    half = dim // 2
    frequency = 10000 ** (2 * torch.arange(half // 2, device=points.device, dtype=points.dtype) / half)
    angles = 2 * math.pi * points.flip(-1)[..., None] / frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
