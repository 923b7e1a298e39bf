"""Weights of SGTR's public code under the names of this package's modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from sgalign.errors import InputError
from sgalign.files import read_tensors
from sgalign.models.entity_detector import STD, EntityDetector
from sgalign.models.sgtr import SGTR

State = dict[str, Tensor]


def load_published(path: str | Path, *, focal: bool = True) -> tuple[EntityDetector, SGTR]:
    """Detector and relations from a checkpoint of the public code (`OneStageEncDecVRD` on a ResNet's C5).

    Sizes are those of the tensors; the heads of attention, which no tensor tells, are 8. Pixels: the first convolution
    takes those of `EntityDetector` after this, not BGR in 0 to 255.

    Args:
        path: of the file.
        focal: of `SGTR`: True for Visual Genome's, False for Open Images'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint; names what is missing.
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
        raise InputError(f"{path}: must be a checkpoint of SGTR's public code, has no {error}") from error
    return detector, network


_LAYER = "relation_decoder.predicate_decoder.layers.{}."


def _count(public: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in public if name.startswith(prefix)})


def relation_weights(public: Mapping[str, Tensor], layers: int, encoder_layers: int) -> State:
    """The state of `SGTR` from the public names."""
    state: State = {}

    def linear(name: str, *sources: str, rows: slice = slice(None)) -> None:
        """Layers that run side by side, or these rows of each."""
        for kind in ("weight", "bias"):
            one = f"in_proj_{kind}"
            state[f"{name}.{kind}"] = torch.stack(
                [public[source + (one if source.endswith("attn.") else f".{kind}")][rows] for source in sources]
            )

    def plain(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = public[f"{source}.{kind}"]

    def self_attention(name: str, *sources: str) -> None:
        linear(f"{name}.query_key", *(f"{source}self_attn." for source in sources), rows=slice(2 * dim))
        linear(f"{name}.value", *(f"{source}self_attn." for source in sources), rows=slice(2 * dim, None))
        linear(f"{name}.out", *(f"{source}self_attn.out_proj" for source in sources))
        linear(f"{name}.norm", *(f"{source}norm1" for source in sources))

    def cross_attention(name: str, *sources: str) -> None:
        linear(f"{name}.query", *(f"{source}multihead_attn." for source in sources), rows=slice(dim))
        linear(f"{name}.out", *(f"{source}multihead_attn.out_proj" for source in sources))
        linear(f"{name}.norm", *(f"{source}norm2" for source in sources))

    def feed_forward(name: str, norm: str, *sources: str) -> None:
        linear(f"{name}.inner", *(f"{source}linear1" for source in sources))
        linear(f"{name}.outer", *(f"{source}linear2" for source in sources))
        linear(f"{name}.norm", *(f"{source}{norm}" for source in sources))

    decoder = "relation_decoder."
    dim = public[f"{decoder}rel_query_embed.weight"].shape[1]
    for layer in range(encoder_layers):
        source = f"{decoder}encoder.layers.{layer}."
        self_attention(f"encoder.{layer}.attention", source)
        feed_forward(f"encoder.{layer}.feed_forward", "norm2", source)
    linear("encoder_norm", f"{decoder}encoder.norm")

    tables = [public[f"{decoder}rel_query_embed{end}.weight"] for end in ("", "_sub", "_obj")]
    state["queries"] = torch.stack(tables)[:, None]
    plain("entity_position", f"{decoder}ent_pos_sine_proj")
    source = f"{decoder}rel_q_gen.layers.0."
    self_attention("query_self", source)
    linear("query_keys_values", f"{source}multihead_attn.", rows=slice(dim, None))
    cross_attention("query_cross", source)
    feed_forward("query_ffn", "norm3", source)
    linear("query_norm", f"{decoder}rel_q_gen.norm")
    plain("query_split", f"{decoder}split_query.1")

    for kind in ("weight", "bias"):
        rows = {"keys": slice(dim, 2 * dim), "values": slice(2 * dim, None)}
        for part, of_part in rows.items():
            found = [public[f"{_LAYER.format(n)}multihead_attn.in_proj_{kind}"][of_part] for n in range(layers)]
            state[f"memory_{part}.{kind}"] = torch.cat(found)[None]
        entities = [
            torch.cat(
                [
                    public[f"{decoder}rel_ent_crs_decoder_layers_{role}.{n}.multihead_attn.in_proj_{kind}"][dim:]
                    for n in range(layers)
                ]
            )
            for role in ("sub", "obj")
        ]
        state[f"entity_keys_values.{kind}"] = torch.stack(entities)
    for layer in range(layers):
        ends = [f"{decoder}rel_ent_crs_decoder_layers_{role}.{layer}." for role in ("sub", "obj")]
        sources = [_LAYER.format(layer), *ends]
        self_attention(f"self_attention.{layer}", *sources)
        cross_attention(f"cross_attention.{layer}", *sources)
        feed_forward(f"feed_forward.{layer}", "norm3", *sources)
    linear("decoder_norm", f"{decoder}rel_decoder_norm", f"{decoder}rel_ent_crs_decoder_norm")
    linear("fusion", *(f"{decoder}ent_rel_fuse_fc_{role}.0" for role in ("sub", "obj")))

    plain("predicate", "rel_class_embed")
    plain("vector", "rel_vector_embed")
    linear("entity_class", "sub_class_embed.0", "obj_class_embed.0")
    for layer in range(3):
        linear(f"entity_box.{layer}", *(f"{role}_bbox_embed.0.layers.{layer}" for role in ("sub", "obj")))
    return state


def detector_weights(public: Mapping[str, Tensor]) -> State:
    """The state of `transformers`' DETR from the public names."""
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
    # From BGR in 0 to 255 less its mean, which is ImageNet's mean times 255, to RGB with unit deviation.
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
        downsample_in_bottleneck=True,  # as MSRA's weights
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
