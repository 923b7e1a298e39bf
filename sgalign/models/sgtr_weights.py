"""Loading of SGTR's public checkpoints into the modules of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from sgalign.errors import InputError, is_lack_of_memory, shown
from sgalign.files import read_tensors
from sgalign.models.entity_detector import STD, EntityDetector
from sgalign.models.sgtr import SGTR

State = dict[str, Tensor]


def load_published(path: str | Path, *, focal: bool = True) -> tuple[EntityDetector, SGTR]:
    """Load a checkpoint of the public code (`OneStageEncDecVRD` on a ResNet's C5).

    All sizes follow from the shapes of the tensors, except the number of attention heads, which is 8. The first
    convolution is converted for the pixels that `EntityDetector` reads, because the public code reads BGR in 0 to 255.

    Args:
        path: the checkpoint file.
        focal: as for `SGTR`: True for checkpoints of Visual Genome, False for those of Open Images.

    Returns:
        The entity detector and the relation network, with the loaded weights.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a tensor is missing, or has another shape than in the public code. The message names the first
            one that is missing.
    """
    saved = read_tensors(path, "checkpoint")
    public: State = saved.get("model", saved) if isinstance(saved, dict) else {}
    try:
        dim, objects = public["class_embed.weight"].shape[1], len(public["class_embed.weight"]) - 1
        layers, encoder_layers = (
            _count(public, f"relation_decoder.{part}.layers.") for part in ("predicate_decoder", "encoder")
        )
        predicates = len(public["rel_class_embed.weight"]) - (0 if focal else 1)
        ffn_dim = len(public[_LAYER.format(0) + "linear1.weight"])
        detector = EntityDetector(objects, config=_detector_config(public, dim, objects, ffn_dim))
        detector.detr.load_state_dict(detector_weights(public))
        queries = len(public["relation_decoder.rel_query_embed.weight"])
        network = SGTR(
            objects,
            predicates,
            dim=dim,
            ffn_dim=ffn_dim,
            layers=layers,
            encoder_layers=encoder_layers,
            num_queries=queries,
            focal=focal,
        )
        network.load_state_dict(relation_weights(public, layers, encoder_layers))
    except KeyError as error:
        raise InputError(f"{path}: must be a checkpoint of SGTR's public code, got one without {error}") from error
    except Exception as error:  # wrong shapes raise many kinds of error, in torch and in transformers
        if is_lack_of_memory(error):
            raise
        raise InputError(
            f"{path}: must be a checkpoint of SGTR's public code, but its tensors do not fit ({shown(error)})"
        ) from error
    return detector, network


_DECODER = "relation_decoder."
_LAYER = _DECODER + "predicate_decoder.layers.{}."
_ROLES = "sub", "obj"


def _count(public: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in public if name.startswith(prefix)})


class _Renamed:
    """The state of `SGTR`, collected layer by layer from the public tensors.

    Where the public code has separate layers that `SGTR` runs side by side, their tensors are stacked.
    """

    def __init__(self, public: Mapping[str, Tensor]) -> None:
        self.public = public
        self.state: State = {}
        self.dim = public[f"{_DECODER}rel_query_embed.weight"].shape[1]

    def plain(self, name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            self.state[f"{name}.{kind}"] = self.public[f"{source}.{kind}"]

    def linear(self, name: str, *sources: str, rows: slice = slice(None)) -> None:
        """Stack the given rows of several layers.

        A source that ends with a dot is the input projection of an attention.
        """
        for kind in ("weight", "bias"):
            names = (f"{source}in_proj_{kind}" if source.endswith(".") else f"{source}.{kind}" for source in sources)
            self.state[f"{name}.{kind}"] = torch.stack([self.public[name][rows] for name in names])

    def self_attention(self, name: str, *sources: str) -> None:
        self.linear(f"{name}.query_key", *_each(sources, "self_attn."), rows=slice(2 * self.dim))
        self.linear(f"{name}.value", *_each(sources, "self_attn."), rows=slice(2 * self.dim, None))
        self.linear(f"{name}.out", *_each(sources, "self_attn.out_proj"))
        self.linear(f"{name}.norm", *_each(sources, "norm1"))

    def cross_attention(self, name: str, *sources: str) -> None:
        self.linear(f"{name}.query", *_each(sources, "multihead_attn."), rows=slice(self.dim))
        self.linear(f"{name}.out", *_each(sources, "multihead_attn.out_proj"))
        self.linear(f"{name}.norm", *_each(sources, "norm2"))

    def feed_forward(self, name: str, norm: str, *sources: str) -> None:
        self.linear(f"{name}.inner", *_each(sources, "linear1"))
        self.linear(f"{name}.outer", *_each(sources, "linear2"))
        self.linear(f"{name}.norm", *_each(sources, norm))


def _each(sources: Sequence[str], part: str) -> list[str]:
    return [source + part for source in sources]


def relation_weights(public: Mapping[str, Tensor], layers: int, encoder_layers: int) -> State:
    """Return the state of `SGTR`, given the public tensors by name."""
    renamed = _Renamed(public)
    for layer in range(encoder_layers):
        source = f"{_DECODER}encoder.layers.{layer}."
        renamed.self_attention(f"encoder.{layer}.attention", source)
        renamed.feed_forward(f"encoder.{layer}.feed_forward", "norm2", source)
    renamed.linear("encoder_norm", f"{_DECODER}encoder.norm")
    _rename_queries(renamed)
    _rename_decoder(renamed, layers)
    renamed.plain("predicate", "rel_class_embed")
    renamed.plain("vector", "rel_vector_embed")
    renamed.linear("entity_class", "sub_class_embed.0", "obj_class_embed.0")
    for layer in range(3):
        renamed.linear(f"entity_box.{layer}", *(f"{role}_bbox_embed.0.layers.{layer}" for role in _ROLES))
    return renamed.state


def _rename_queries(renamed: _Renamed) -> None:
    """Rename the query tables, and the decoder layer that computes the queries' initial contents from the entities."""
    tables = [renamed.public[f"{_DECODER}rel_query_embed{end}.weight"] for end in ("", "_sub", "_obj")]
    renamed.state["queries"] = torch.stack(tables)[:, None]
    renamed.plain("entity_position", f"{_DECODER}ent_pos_sine_proj")
    source = f"{_DECODER}rel_q_gen.layers.0."
    renamed.self_attention("query_self", source)
    renamed.linear("query_keys_values", f"{source}multihead_attn.", rows=slice(renamed.dim, None))
    renamed.cross_attention("query_cross", source)
    renamed.feed_forward("query_ffn", "norm3", source)
    renamed.linear("query_norm", f"{_DECODER}rel_q_gen.norm")
    renamed.plain("query_split", f"{_DECODER}split_query.1")


def _rename_decoder(renamed: _Renamed, layers: int) -> None:
    """Rename the structural decoder, in which predicates, subjects and objects are side by side in each layer."""
    entity_layers = [_DECODER + f"rel_ent_crs_decoder_layers_{role}.{{}}." for role in _ROLES]
    for layer in range(layers):
        sources = [source.format(layer) for source in (_LAYER, *entity_layers)]
        renamed.self_attention(f"self_attention.{layer}", *sources)
        renamed.cross_attention(f"cross_attention.{layer}", *sources)
        renamed.feed_forward(f"feed_forward.{layer}", "norm3", *sources)
    renamed.linear("decoder_norm", f"{_DECODER}rel_decoder_norm", f"{_DECODER}rel_ent_crs_decoder_norm")
    renamed.linear("fusion", *(f"{_DECODER}ent_rel_fuse_fc_{role}.0" for role in _ROLES))

    # Keys and values of all layers' cross-attention are computed by one product.
    dim, keys, values = renamed.dim, slice(renamed.dim, 2 * renamed.dim), slice(2 * renamed.dim, None)
    for kind in ("weight", "bias"):

        def of_all_layers(source: str, rows: slice, kind: str = kind) -> Tensor:
            names = (f"{source.format(layer)}multihead_attn.in_proj_{kind}" for layer in range(layers))
            return torch.cat([renamed.public[name][rows] for name in names])

        renamed.state[f"memory_keys.{kind}"] = of_all_layers(_LAYER, keys)[None]
        renamed.state[f"memory_values.{kind}"] = of_all_layers(_LAYER, values)[None]
        entities = [of_all_layers(source, slice(dim, None)) for source in entity_layers]
        renamed.state[f"entity_keys_values.{kind}"] = torch.stack(entities)


def detector_weights(public: Mapping[str, Tensor]) -> State:
    """Return the state of DETR in `transformers`, given the public tensors by name."""
    state: State = {"model.query_position_embeddings.weight": public["query_embed.weight"]}

    def plain(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = public[f"{source}.{kind}"]

    def attention(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            parts = public[f"{source}.in_proj_{kind}"].chunk(3)
            for part, weights in zip("qkv", parts, strict=True):
                state[f"{name}.{part}_proj.{kind}"] = weights
        plain(f"{name}.o_proj", f"{source}.out_proj")

    for part, norms in (("encoder", ("norm1", "norm2")), ("decoder", ("norm1", "norm3"))):
        for layer in range(_count(public, f"transformer.{part}.layers.")):
            name, source = f"model.{part}.layers.{layer}", f"transformer.{part}.layers.{layer}"
            attention(f"{name}.self_attn", f"{source}.self_attn")
            if part == "decoder":
                attention(f"{name}.encoder_attn", f"{source}.multihead_attn")
                plain(f"{name}.encoder_attn_layer_norm", f"{source}.norm2")
            for ours, theirs in zip(("self_attn_layer_norm", "final_layer_norm"), norms, strict=True):
                plain(f"{name}.{ours}", f"{source}.{theirs}")
            for ours, theirs in (("fc1", "linear1"), ("fc2", "linear2")):
                plain(f"{name}.mlp.{ours}", f"{source}.{theirs}")
    plain("model.decoder.layernorm", "transformer.decoder.norm")
    plain("model.input_projection", "input_proj")
    plain("class_labels_classifier", "class_embed")
    for layer in range(3):
        plain(f"bbox_predictor.layers.{layer}", f"bbox_embed.layers.{layer}")

    def convolution(name: str, source: str) -> None:
        state[f"{name}.convolution.weight"] = public[f"{source}.weight"]
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.normalization.{kind}"] = public[f"{source}.norm.{kind}"]

    resnet = "model.backbone.model."
    convolution(f"{resnet}embedder.embedder", "backbone.stem.conv1")
    # The public code reads BGR in 0 to 255, minus 255 times ImageNet's mean. `EntityDetector` reads RGB normalized by
    # mean and standard deviation. The weights are converted accordingly.
    first = state[f"{resnet}embedder.embedder.convolution.weight"].flip(1)
    deviation = 255 * torch.tensor(STD)[:, None, None]
    state[f"{resnet}embedder.embedder.convolution.weight"] = first * deviation
    for stage in range(4):
        for block in range(_count(public, f"backbone.res{stage + 2}.")):
            name, source = f"{resnet}encoder.stages.{stage}.layers.{block}", f"backbone.res{stage + 2}.{block}"
            for layer in range(3):
                convolution(f"{name}.layer.{layer}", f"{source}.conv{layer + 1}")
            if f"{source}.shortcut.weight" in public:
                convolution(f"{name}.shortcut", f"{source}.shortcut")
    return state


def _detector_config(public: Mapping[str, Tensor], dim: int, objects: int, ffn_dim: int) -> str:
    stages = [f"backbone.res{stage}." for stage in range(2, 6)]
    stages_read: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = ResNetConfig(
        embedding_size=len(public["backbone.stem.conv1.weight"]),
        hidden_sizes=[len(public[f"{stage}0.conv3.weight"]) for stage in stages],
        depths=[_count(public, stage) for stage in stages],
        downsample_in_bottleneck=True,  # as in MSRA's weights
        **stages_read,
    )
    layers = _count(public, "transformer.encoder.layers.")
    options: dict[str, Any] = {
        "num_labels": objects,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "d_model": dim,
    }
    options |= {
        "encoder_ffn_dim": ffn_dim,
        "decoder_ffn_dim": ffn_dim,
        "num_queries": len(public["query_embed.weight"]),
    }
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **options)).config.to_json_string(use_diff=False)
