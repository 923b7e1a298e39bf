"""DETR (Carion et al., ECCV 2020), the entity detector of SGTR, from `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoBackbone, DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sgalign.ops.attention import fused_masked_attention

# What the library's weights and torchvision's are trained with, for RGB in 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Backbone = Literal["resnet10", "resnet18", "resnet50", "resnet101"]
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet10": {"layer_type": "basic", "depths": [1] * 4, "hidden_sizes": [32, 64, 128, 256], "embedding_size": 32},
    "resnet18": {"layer_type": "basic", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {"depths": [3, 4, 6, 3]},
    "resnet101": {"depths": [3, 4, 23, 3]},
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """`fused_masked_attention` as `transformers` calls attention: its mask is True where a key is seen."""
    mask = None if attention_mask is None else ~attention_mask
    out = fused_masked_attention(query, key, value, mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("sgalign", _attention)
AttentionMaskInterface.register("sgalign", sdpa_mask)


class DetectedEntities(NamedTuple):
    """What the detector makes of B images; M positions of the feature map, N queries, L decoder layers."""

    memory: Tensor  # [B, M, dim], of the encoder
    position: Tensor  # [B, M, dim], sine embedding of each position
    padding: Tensor  # bool [B, M], True where there is no image
    features: Tensor  # [B, N, dim], of the last decoder layer
    logits: Tensor  # [L, B, N, num_objects + 1], the last column for no object
    boxes: Tensor  # [L, B, N, 4], middle x, y, width, height in units of the image

    def last(self) -> DetectedEntities:
        """Return them with the boxes of the last layer alone, without a gradient, and with no views of larger tensors.

        A compiled network knows the sizes of what it reads and of what that is a view of, such as the number of layers.
        Where it meets two that are equal it takes them for one, and compiles again when they no longer are.
        """
        boxes = self.boxes[-1:].detach().clone()
        return self._replace(position=self.position.clone(), features=self.features.clone(), boxes=boxes)


class EntityDetector(nn.Module):
    """DETR, with what SGTR reads of it: the encoder's memory, the decoder's features, and every layer's predictions.

    Args:
        num_objects: classes, without one for no object.
        backbone: "resnet10" is a ResNet of one basic block a stage and half the channels, for small experiments.
        stride: of the feature map, 32 as published, or 16 by leaving out the backbone's last stage.
        dim, heads, ffn_dim, layers, num_queries: of the transformer; `layers` each of encoder and decoder.
        dropout: in the transformer, of attention weights too.
        weights: folder or name of weights of `transformers`' `DetrForObjectDetection`, which then tell all sizes; heads
            for another number of classes start anew. None starts from scratch: with batch normalisation that is
            trained, instead of the frozen one, and the initial values of `_start`.
        config: `self.config` of a detector, to make it again without weights.
        trains_norms: with `config`, batch normalisation is trained, as in a detector from scratch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_objects: int,
        *,
        backbone: Backbone = "resnet101",
        stride: Literal[16, 32] = 32,
        dim: int = 256,
        heads: int = 8,
        ffn_dim: int = 2048,
        layers: int = 6,
        num_queries: int = 100,
        dropout: float = 0.1,
        weights: str | Path | None = None,
        config: str | None = None,
        trains_norms: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"attention_dropout": dropout, "dropout": dropout}
        self.trains_norms = trains_norms or (config is None and weights is None)
        if config is None and weights is not None:
            self.detr = DetrForObjectDetection.from_pretrained(
                weights, num_labels=num_objects, ignore_mismatched_sizes=True, **options
            )
        else:
            if config is not None:
                sizes = DetrConfig.from_dict(json.loads(config), **options)
            else:
                stages: dict[str, Any] = {"hidden_sizes": [256, 512, 1024, 2048]} | BACKBONES[backbone]
                count = 4 if stride == 32 else 3
                stages |= {name: stages[name][:count] for name in ("depths", "hidden_sizes")}
                stages["out_features"] = [f"stage{count}"]
                options |= {"backbone_config": ResNetConfig(**stages), "d_model": dim, "num_queries": num_queries}
                options |= {"num_labels": num_objects}
                for part in ("encoder", "decoder"):
                    options |= {f"{part}_layers": layers, f"{part}_attention_heads": heads, f"{part}_ffn_dim": ffn_dim}
                sizes = DetrConfig(**options)
            self.detr = DetrForObjectDetection(sizes)
            if self.trains_norms:  # the frozen one, which DETR has, normalises nothing before somebody has trained it
                self.detr.model.backbone.model = AutoBackbone.from_config(sizes.backbone_config)
            if config is None:
                _start(self.detr)
        self.detr.set_attn_implementation("sgalign")
        self.dim = self.detr.config.d_model
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    @property
    def config(self) -> str:
        """What the library needs to make this architecture again, as JSON."""
        return self.detr.config.to_json_string(use_diff=False)

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Excludes "backbone", "encoder" or "decoder" from training, and nothing else; or all of the "detector".

        Their dropout remains, as in SGTR's public code; batch normalisation learns nothing either.
        """
        self.detr.requires_grad_("detector" not in parts)
        if "detector" not in parts:
            for part in ("backbone", "encoder", "decoder"):
                getattr(self.detr.model, part).requires_grad_(part not in parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> EntityDetector:
        super().train(mode)
        backbone = self.detr.model.backbone
        if not any(weight.requires_grad for weight in backbone.parameters()):
            backbone.eval()
        return self

    def batch(self, pixels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Images `[3, H, W]` in 0 to 1, normalised and padded with zeros to one size.

        Returns:
            `[B, 3, H, W]`, and bool `[B, H, W]`, True where there is an image.
        """
        height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
        batch = pixels[0].new_zeros(len(pixels), 3, height, width)
        seen = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=batch.device)
        for row, image in enumerate(pixels):
            batch[row, :, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
            seen[row, : image.shape[1], : image.shape[2]] = True
        return batch, seen

    def forward(self, pixels: list[Tensor]) -> DetectedEntities:
        """What is found in images `[3, H, W]`, float32 in 0 to 1, of any sizes."""
        model = self.detr.model
        feature_map, seen = model.backbone(*self.batch(pixels))[-1]
        position = model.position_embedding(feature_map.shape, feature_map.device, feature_map.dtype, mask=seen)
        position, seen = position.flatten(2).mT, seen.flatten(1)
        # Images of one size have no padding; the host knows that without a look at `seen`.
        mask = None if len({image.shape for image in pixels}) == 1 else seen[:, None, None]
        memory = self._encode(model.input_projection(feature_map).flatten(2).mT, position, mask)
        features = self._decode(memory, position, mask)
        logits = self.detr.class_labels_classifier(features)
        boxes = self.detr.bbox_predictor(features).sigmoid()
        return DetectedEntities(memory, position, ~seen, features[-1], logits, boxes)

    def _encode(self, features: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoder's memory `[B, M, dim]`.

        In training the library's own way to it looks for infinities after each layer, for which a GPU has to be waited
        for; the losses are checked anyway.
        """
        encoder = self.detr.model.encoder
        memory = functional.dropout(features, encoder.dropout, encoder.training)
        for layer in encoder.layers:
            attended, _ = layer.self_attn(memory, mask, position)
            attended = functional.dropout(attended, layer.dropout, layer.training)
            memory = layer.self_attn_layer_norm(memory + attended)
            memory = layer.final_layer_norm(memory + layer.mlp(memory))
        return memory

    def _decode(self, memory: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Each decoder layer's features, normalised: `[L, B, N, dim]`.

        The library's own way to them, `auxiliary_loss`, hands the normalised features on from layer to layer, which
        DETR does not.
        """
        model = self.detr.model
        queries = model.query_position_embeddings.weight.expand(len(memory), -1, -1)
        hidden, layers = torch.zeros_like(queries), []
        for layer in model.decoder.layers:
            hidden = layer(
                hidden,
                None,
                position,
                queries,
                memory,
                encoder_attention_mask=mask,
            )
            layers.append(hidden)
        return model.decoder.layernorm(torch.stack(layers))


def _start(detr: DetrForObjectDetection) -> None:
    """Initial values of DETR's public code where the library has others.

    Weights of the transformer by Xavier: the library's standard deviation of 0.02 makes small transformers' attention
    uniform, and all queries alike. And queries are zeros at first, so that the first layer of the decoder normalises
    the bias of its self-attention alone. If that is zero too, its gradient is some 300 times too large (the inverse
    root of the normalisation's epsilon), and all others are lost when gradients are clipped by their norm. The public
    code leaves that bias at zero; here it is random.
    """
    for part in (detr.model.encoder, detr.model.decoder, detr.model.input_projection, detr.bbox_predictor):
        for weight in part.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
    nn.init.normal_(detr.model.decoder.layers[0].self_attn.o_proj.bias)


def resize(pixels: Tensor, short_side: int, long_side: int) -> Tensor:
    """The image `[3, H, W]` with its short side as long as told, or less so that the other is not above `long_side`."""
    height, width = pixels.shape[1:]
    scale = min(short_side / min(height, width), long_side / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
