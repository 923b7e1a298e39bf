"""Align a decoder with explicit masks, like that of Mask2Former (Cheng et al., CVPR 2022).

Each layer predicts a mask of the image for each query. In the next layer, the query attends only to its mask. The two
branches predict different masks. The random mask of the mirror drops further entries.

Run it in the root of the project, after `pip install '.[train]'`:

    python examples/align_mask2former.py
"""

from __future__ import annotations

import copy

import torch
from scenes import (
    HEADS,
    LAYERS,
    OBJECT_FEATURES,
    PREDICATES,
    RATIO,
    WIDTH,
    Batch,
    ImageEncoder,
    predicate_loss,
    train_and_compare,
)
from torch import Tensor, nn

import sgalign


class Layer(nn.Module):
    """Masked attention to the image, self-attention, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.self = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.linear = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        x = self.norms[0](queries)
        queries = queries + self.cross(x, memory, memory, attn_mask=mask, need_weights=False)[0]
        x = self.norms[1](queries)
        queries = queries + self.self(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return queries + self.linear(self.norms[2](queries))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.mask = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, queries: Tensor, padding: Tensor, pixels: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, memory, self.masks(queries, pixels), padding)
        return self.norm(queries)

    def masks(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """Return True for the image positions that a query must not see, bool [B * HEADS, Q, L]."""
        outside = (self.mask(self.norm(queries)) @ pixels.mT).detach() < 0
        outside &= ~outside.all(2, keepdim=True)  # an empty mask would leave nothing to attend to
        return outside.repeat_interleave(HEADS, dim=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ImageEncoder(), Decoder()
        self.query = nn.Linear(2 * OBJECT_FEATURES, WIDTH)
        self.predicate = nn.Linear(WIDTH, PREDICATES)

    def encode(self, batch: Batch) -> Tensor:
        return self.encoder(batch.images)

    def decode(self, batch: Batch, memory: Tensor) -> Tensor:
        return self.decoder(self.queries(batch), batch.no_pair, memory, memory)

    def queries(self, batch: Batch) -> Tensor:
        return self.query(batch.pairs.flatten(2))


torch.manual_seed(0)
model = Model()
plain = copy.deepcopy(model)

# 1. Replace the attention to mask, in place. The parameters stay.
sgalign.nn.replace_attention(model.decoder, "cross")
# 2. The predicate head of the mirror is a copy.
align = sgalign.RelationAlignment(mask_ratio=RATIO, weight=10.0, heads={"predicate": model.predicate})


def aligned(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    queries, memory = model.queries(batch), model.encode(batch)
    # 3. Run the decoder once for both branches. The features that are multiplied with the queries are doubled, too.
    with align.mirror(model.decoder, step=step) as mirror:
        padding, pixels = mirror.double(batch.no_pair), mirror.double(memory)
        hidden, mirrored = mirror.both(model.decoder, queries, padding, pixels, memory)
    logits = model.predicate(hidden)
    # 4. Add the alignment loss. Padding has the weight 0.
    mirrored_logits = align.heads["predicate"](mirrored)
    return predicate_loss(logits, batch.targets), mirror.loss(predicate=(logits, mirrored_logits, ~batch.no_pair))


if __name__ == "__main__":
    train_and_compare(model, align, aligned, plain, masked=["cross"])
