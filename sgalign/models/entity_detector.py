"""DETR (Carion et al., ECCV 2020), the entity detector of SGTR, from `transformers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoBackbone, DetrConfig, DetrForObjectDetection, ResNetConfig

from sgalign.errors import InputError, shown
from sgalign.models.precision import widened
from sgalign.nn import register_with_transformers
from sgalign.ops._operands import accumulated_dtype

# Mean and standard deviation of ImageNet's pixels, RGB in 0 to 1. The weights of `transformers` and torchvision were
# trained on images normalized with these numbers.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Backbone = Literal["resnet10", "resnet18", "resnet50", "resnet101"]
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet10": {"layer_type": "basic", "depths": [1] * 4, "hidden_sizes": [32, 64, 128, 256], "embedding_size": 32},
    "resnet18": {"layer_type": "basic", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {"depths": [3, 4, 6, 3]},
    "resnet101": {"depths": [3, 4, 23, 3]},
}
# Entries of a config that DETR does not need. transformers would make `num_labels` names, or refuse the given ones.
LABELS = "id2label", "label2id", "num_labels"


register_with_transformers()  # `EntityDetector` uses attn_implementation="sgalign"


class DetectedEntities(NamedTuple):
    """The outputs of the detector for B images, with M feature map positions, N queries and L decoder layers."""

    memory: Tensor  # [B, M, dim], the encoder's output
    position: Tensor  # [B, M, dim], sine embedding of each position
    padding: Tensor  # bool [B, M], True for padding
    features: Tensor  # [B, N, dim], output of the last decoder layer
    logits: Tensor  # [L, B, N, num_objects + 1], last column for no object
    boxes: Tensor  # [L, B, N, 4], center x, y, width, height relative to the image size

    def last(self) -> DetectedEntities:
        """Return the same outputs with only the last layer's boxes, detached. Views of larger tensors are copied.

        A compiled network specializes on the sizes of its inputs. If an input is a view, it also specializes on the
        sizes of the larger tensor, such as the number of layers. If two sizes are equal when it compiles, it assumes
        that they always are, and it compiles again when they differ.
        """
        boxes = self.boxes[-1:].detach().clone()
        return self._replace(position=self.position.clone(), features=self.features.clone(), boxes=boxes)


class EntityDetector(nn.Module):
    """DETR, with the outputs that SGTR needs: encoder memory, decoder features, and the predictions of every layer.

    Args:
        num_objects: number of object classes, without the class for no object.
        backbone: name of the ResNet. "resnet10" has one basic block per stage and half the channels, for small
            experiments.
        stride: stride of the feature map. It is 32 as published. 16 leaves out the backbone's last stage.
        dim, heads, ffn_dim, layers, num_queries: sizes of the transformer. Encoder and decoder have `layers` layers
            each.
        dropout: dropout probability in the transformer, including attention weights.
        weights: folder or name of weights for `DetrForObjectDetection` of `transformers`. They determine all sizes. A
            class head for a different number of classes is initialized anew. If None, the detector starts from
            scratch: batch normalization is trained instead of frozen, and `_start` sets the initial values.
        config: `config` of another detector. If given, the detector has the same architecture, without its weights.
        trains_norms: if True, batch normalization is trained even with `config`, as in a detector from scratch.
    """

    mean: Tensor
    std: Tensor
    detr: DetrForObjectDetection

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
        self.new_classes = False  # True if `weights` have another number of classes
        if config is None and weights is not None:
            read: Any = DetrForObjectDetection.from_pretrained  # its annotation lacks the loading info
            self.detr, loaded = read(
                weights, num_labels=num_objects, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
            self.new_classes = bool(loaded["mismatched_keys"])
        else:
            if config is not None:
                read_config = json.loads(config)
                if not isinstance(read_config, dict):
                    raise InputError(f"config must be a JSON object, got {shown(config)}")
                backbone_config = read_config.get("backbone_config")
                for labelled in (read_config, backbone_config if isinstance(backbone_config, dict) else {}):
                    for name in LABELS:
                        labelled.pop(name, None)
                sizes = DetrConfig.from_dict(read_config, num_labels=num_objects, **options)
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
            # Without trained statistics, DETR's frozen batch normalization would not normalize.
            if self.trains_norms:
                self.detr.model.backbone.model = AutoBackbone.from_config(sizes.backbone_config)
            if config is None:
                _start(self.detr)
        self.detr.set_attn_implementation("sgalign")
        self.dim = self.detr.config.d_model
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    @property
    def config(self) -> str:
        """The JSON configuration from which `transformers` can build the same architecture."""
        return self.detr.config.to_json_string(use_diff=False)

    def reset_other_classes(self, names: Sequence[str]) -> bool:
        """Initialize the class head anew if `weights` are of other classes, and return True if it is new.

        Weights that name no classes are assumed to be of these classes if their number is the same.

        Args:
            names: the object classes, without the background.
        """
        named = list((self.detr.config.id2label or {}).values())
        if self.new_classes or named in (list(names), [f"LABEL_{number}" for number in range(len(named))]):
            return self.new_classes
        self.detr.class_labels_classifier.reset_parameters()
        return True

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Exclude parts of the detector from training, and train all others.

        Frozen parts keep their dropout, as in SGTR's public code. A frozen backbone does not update its batch
        normalization either.

        Args:
            parts: any of "backbone", "encoder" and "decoder", or "detector" for the whole detector.
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

    def batch(self, pixels: list[Tensor], padded_size: Sequence[int] = (0, 0)) -> tuple[Tensor, Tensor]:
        """Normalize images `[3, H, W]` in 0 to 1, and pad them with zeros to one size.

        Args:
            pixels: the images.
            padded_size: smallest height and width of the batch.

        Returns:
            The batch `[B, 3, H, W]`, and a mask bool `[B, H, W]` that is False for padding.
        """
        height, width = (max(padded_size[axis], *(image.shape[axis + 1] for image in pixels)) for axis in (0, 1))
        batch = pixels[0].new_zeros(len(pixels), 3, height, width)
        seen = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=batch.device)
        for row, image in enumerate(pixels):
            batch[row, :, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
            seen[row, : image.shape[1], : image.shape[2]] = True
        return batch, seen

    def forward(self, pixels: list[Tensor], padded_size: Sequence[int] = (0, 0)) -> DetectedEntities:
        """Detect entities in images `[3, H, W]`, float32 in 0 to 1. Sizes may differ.

        Args:
            pixels: the images.
            padded_size: smallest height and width to which images are padded.
        """
        model = self.detr.model
        batch, seen = self.batch(pixels, padded_size)
        sizes = {tuple(image.shape[1:]) for image in pixels}
        feature_map, seen = model.backbone(batch, seen)[-1]
        # Computed in bfloat16, the embedding would be off by up to 0.04 instead of 0.002.
        dtype = accumulated_dtype(feature_map.dtype)
        position = model.position_embedding(feature_map.shape, feature_map.device, dtype, mask=seen)
        position, seen = position.to(feature_map.dtype).flatten(2).mT, seen.flatten(1)
        # Images of one size have no padding. Comparing the shapes avoids a copy of `seen` to the host.
        mask = None if sizes == {tuple(batch.shape[2:])} else seen[:, None, None]
        memory = self._encode(model.input_projection(feature_map).flatten(2).mT, position, mask)
        features = self._decode(memory, position, mask)
        logits = self.detr.class_labels_classifier(features)
        boxes = widened(self.detr.bbox_predictor(features)).sigmoid()
        return DetectedEntities(memory, position, ~seen, features[-1], logits, boxes)

    def _encode(self, features: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoder's memory `[B, M, dim]`.

        The library's own encoder checks for infinities after each layer in training, which makes the host wait for the
        GPU. This check is not needed, because the losses are checked.
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
        """Return the normalized features of each decoder layer, `[L, B, N, dim]`.

        The library can return them with `auxiliary_loss`, but then it passes the normalized features to the next layer.
        DETR passes on the features before normalization.
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
    """Initialize the detector as DETR's public code does, where the library differs, and make one bias random.

    The transformer's weights are initialized by Xavier, as in the public code. The library's standard deviation of 0.02
    makes the attention of small transformers uniform, and all queries alike.

    The random bias is the output bias of the decoder's first self-attention, which the public code leaves at zero. The
    contents of the queries are zero at first, so the layer normalization after this attention sees only the bias. If
    the bias is zero too, its gradient is about 300 times too large (1 / sqrt(epsilon of the normalization)). Clipping
    gradients by their norm then suppresses all other gradients.
    """
    for part in (detr.model.encoder, detr.model.decoder, detr.model.input_projection, detr.bbox_predictor):
        for weight in part.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
    nn.init.normal_(detr.model.decoder.layers[0].self_attn.o_proj.bias)


def resize(pixels: Tensor, short_side: int, long_side: int) -> Tensor:
    """Resize an image to the largest size within two limits.

    Args:
        pixels: `[3, H, W]`.
        short_side, long_side: limits of the short and of the long side, in pixels.
    """
    height, width = pixels.shape[1:]
    scale = min(short_side / min(height, width), long_side / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
