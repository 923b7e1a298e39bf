"""Align the decoder of a DETR from the library transformers.

Run it in the root of the project, after `pip install '.[train]'`:

    python examples/align_detr.py
"""

from __future__ import annotations

import copy

import torch
from scenes import HEADS, LAYERS, OBJECT_FEATURES, PREDICATES, RATIO, WIDTH, Batch, predicate_loss, train_and_compare
from torch import Tensor, nn
from transformers import DetrConfig, DetrModel, ResNetConfig

import sgalign

sizes = {"encoder_layers": 1, "decoder_layers": LAYERS, "dropout": 0.0, "d_model": WIDTH}
for part in ("encoder", "decoder"):
    sizes |= {f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": 4 * WIDTH}
stages = {"layer_type": "basic", "embedding_size": 32, "depths": [1, 1, 1], "hidden_sizes": [32, 64, 64]}
backbone = ResNetConfig(**stages, downsample_in_first_stage=False, out_features=["stage3"])


class Model(nn.Module):
    """DETR with a query for each pair of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.detr = DetrModel(DetrConfig(**sizes, backbone_config=backbone))
        self.query = nn.Linear(2 * OBJECT_FEATURES, WIDTH)
        self.predicate = nn.Linear(WIDTH, PREDICATES)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Return the memory as arguments of the decoder. The steps are those of DetrModel.forward."""
        detr, images = self.detr, batch.images
        features, mask = detr.backbone(images, torch.ones(len(images), *images.shape[2:]))[-1]
        position = detr.position_embedding(features.shape, features.device, features.dtype, mask).flatten(2).mT
        memory = detr.encoder(
            inputs_embeds=detr.input_projection(features).flatten(2).mT,
            attention_mask=mask.flatten(1),
            spatial_position_embeddings=position,
        )
        return {
            "encoder_hidden_states": memory.last_hidden_state,
            "encoder_attention_mask": mask.flatten(1),
            "spatial_position_embeddings": position,
        }

    def decode(self, batch: Batch, memory: dict[str, Tensor]) -> Tensor:
        return self.decode_queries(*self.queries(batch), memory)

    def decode_queries(self, contents: Tensor, queries: Tensor, memory: dict[str, Tensor]) -> Tensor:
        decoder = self.detr.decoder
        output = decoder(inputs_embeds=contents, object_queries_position_embeddings=queries, **memory)
        return output.last_hidden_state

    def queries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the contents and the position embeddings of the queries."""
        queries = self.query(batch.pairs.flatten(2))
        return torch.zeros_like(queries), queries


torch.manual_seed(0)
model = Model()
plain = copy.deepcopy(model)

# 1. Use our attention in the whole model. The parameters stay.
sgalign.nn.register_with_transformers()
model.detr.set_attn_implementation("sgalign")
# 2. The predicate head of the mirror is a copy.
align = sgalign.RelationAlignment(mask_ratio=RATIO, weight=10.0, heads={"predicate": model.predicate})


def aligned(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    memory, (contents, queries) = model.encode(batch), model.queries(batch)
    # 3. Run the decoder once for both branches. Double all inputs that belong to the queries.
    with align.mirror(model.detr.decoder, step=step) as mirror:
        hidden, mirrored = mirror.both(model.decode_queries, contents, mirror.double(queries), memory)
    logits = model.predicate(hidden)
    # 4. Add the alignment loss. Padding has the weight 0.
    mirrored_logits = align.heads["predicate"](mirrored)
    return predicate_loss(logits, batch.targets), mirror.loss(predicate=(logits, mirrored_logits, ~batch.no_pair))


if __name__ == "__main__":
    train_and_compare(model, align, aligned, plain, masked=["encoder_attn"])
