"""Align a `torch.nn.TransformerDecoder`.

Run it in the root of the project, after `pip install '.[train]'`:

    python examples/align_torch_decoder.py
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


class Model(nn.Module):
    """Pairs of objects attend to the image. Nothing in this class knows about alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoder()
        self.query = nn.Linear(2 * OBJECT_FEATURES, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        self.predicate = nn.Linear(WIDTH, PREDICATES)

    def encode(self, batch: Batch) -> Tensor:
        return self.encoder(batch.images)

    def decode(self, batch: Batch, memory: Tensor) -> Tensor:
        return self.decoder(self.queries(batch), memory, tgt_key_padding_mask=batch.no_pair)

    def queries(self, batch: Batch) -> Tensor:
        return self.query(batch.pairs.flatten(2))


torch.manual_seed(0)
model = Model()
plain = copy.deepcopy(model)

# 1. Replace the attention to mask, in place. The parameters stay.
sgalign.nn.replace_attention(model.decoder, "multihead_attn")
# 2. The predicate head of the mirror is a copy.
align = sgalign.RelationAlignment(mask_ratio=RATIO, weight=10.0, heads={"predicate": model.predicate})


def aligned(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    queries, memory = model.queries(batch), model.encode(batch)
    # 3. Run the decoder once for both branches. The padding among the pairs is doubled with the pairs.
    with align.mirror(model.decoder, step=step) as mirror:
        hidden, mirrored = mirror.both(
            model.decoder, queries, memory, tgt_key_padding_mask=mirror.double(batch.no_pair)
        )
    logits = model.predicate(hidden)
    # 4. Add the alignment loss. Padding has the weight 0.
    mirrored_logits = align.heads["predicate"](mirrored)
    return predicate_loss(logits, batch.targets), mirror.loss(predicate=(logits, mirrored_logits, ~batch.no_pair))


if __name__ == "__main__":
    train_and_compare(model, align, aligned, plain, masked=["multihead_attn"])
