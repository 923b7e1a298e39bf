"""Align a decoder like that of RelTR (Cong, Yang and Rosenhahn, TPAMI 2023).

It has two coupled decoders. Entities attend to the image. Subjects and objects attend to each other, to the image and
to the entities of the same layer. Only subjects and objects have a mirrored branch, so the entities are computed once.

Run it in the root of the project, after `pip install '.[train]'`:

    python examples/align_reltr.py
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


def attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


class TripletLayer(nn.Module):
    """Coupled self-attention, attention to the image and to the entities, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.coupled = attention()
        self.visual = nn.ModuleList([attention(), attention()])  # of subjects and of objects
        self.entity = nn.ModuleList([attention(), attention()])
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.linear = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(
        self, ends: list[Tensor], memory: Tensor, entities: Tensor, no_entity: Tensor, no_pair: Tensor
    ) -> list[Tensor]:
        x, padding = self.norms[0](torch.cat(ends, dim=1)), torch.cat([no_pair, no_pair], dim=1)
        attended = self.coupled(x, x, x, key_padding_mask=padding, need_weights=False)[0].chunk(2, dim=1)
        ends = [end + more for end, more in zip(ends, attended)]
        for i, end in enumerate(ends):
            end = end + self.visual[i](self.norms[1](end), memory, memory, need_weights=False)[0]
            x = self.norms[2](end)
            end = end + self.entity[i](x, entities, entities, key_padding_mask=no_entity, need_weights=False)[0]
            ends[i] = end + self.linear(self.norms[3](end))
        return ends


class Decoder(nn.Module):
    """The decoders of entities and of triplets, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.entity_layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(LAYERS))
        self.triplet_layers = nn.ModuleList(TripletLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(2 * WIDTH)

    def forward(
        self, subject: Tensor, object_: Tensor, no_pair: Tensor, entities: Tensor, no_entity: Tensor, memory: Tensor
    ) -> Tensor:
        ends = [subject, object_]
        for entity_layer, triplet_layer in zip(self.entity_layers, self.triplet_layers):
            entities = entity_layer(entities, memory, tgt_key_padding_mask=no_entity)
            ends = triplet_layer(ends, memory, entities, no_entity, no_pair)
        return self.norm(torch.cat(ends, dim=2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ImageEncoder(), Decoder()
        self.entity, self.subject, self.object = (nn.Linear(OBJECT_FEATURES, WIDTH) for _ in range(3))
        self.predicate = nn.Linear(2 * WIDTH, PREDICATES)

    def queries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the queries of subjects and objects."""
        return self.subject(batch.pairs[:, :, 0]), self.object(batch.pairs[:, :, 1])

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs that both branches share: the entities, their padding, and the memory of the image."""
        return self.entity(batch.objects), batch.no_object, self.encoder(batch.images)

    def decode(self, batch: Batch, shared: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.decoder(*self.queries(batch), batch.no_pair, *shared)


torch.manual_seed(0)
model = Model()
plain = copy.deepcopy(model)

# 1. Replace the attention to mask, in place. The parameters stay.
triplets = model.decoder.triplet_layers
sgalign.nn.replace_attention(triplets)
# 2. The predicate head of the mirror is a copy. Attention to the image and to the entities is masked.
align = sgalign.RelationAlignment(mask_ratio=RATIO, weight=10.0, heads={"predicate": model.predicate})


def aligned(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    subject, object_ = model.queries(batch)
    # 3. Run both decoders once for both branches. Only subjects, objects and their padding are doubled. The layers of
    #    entities are not in the mirror, and run as always.
    with align.mirror(triplets, step=step) as mirror:
        doubled = [mirror.double(queries) for queries in (subject, object_, batch.no_pair)]
        hidden, mirrored = mirror.split(model.decoder(*doubled, *model.encode(batch)))
    logits = model.predicate(hidden)
    # 4. Add the alignment loss. Padding has the weight 0.
    mirrored_logits = align.heads["predicate"](mirrored)
    return predicate_loss(logits, batch.targets), mirror.loss(predicate=(logits, mirrored_logits, ~batch.no_pair))


if __name__ == "__main__":
    train_and_compare(model, align, aligned, plain, masked=["visual", "entity"])
