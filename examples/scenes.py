"""Shared parts of the examples: batches of generated scenes, a small encoder, and the comparison of training steps.

The task is to predict the predicate of each given pair of objects (PredCls) from an image and the classes and boxes of
the two objects.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms.functional import pil_to_tensor

import sgalign
from sgalign.data import SceneGraph, ScenesDataset

SIDE, PAIRS, OBJECTS = 128, 24, 12  # width and height of an image; pairs and objects per image, with padding
CLASSES, PREDICATES = 17, 21  # with the background, which is 0
OBJECT_FEATURES = CLASSES + 4
WIDTH, HEADS, LAYERS = 128, 8, 3
RATIO = 0.1


class Batch(NamedTuple):
    images: Tensor  # [B, 3, SIDE, SIDE]
    objects: Tensor  # [B, OBJECTS, OBJECT_FEATURES], classes and boxes
    no_object: Tensor  # bool [B, OBJECTS], True for padding
    pairs: Tensor  # [B, PAIRS, 2, OBJECT_FEATURES], subject and object
    targets: Tensor  # int64 [B, PAIRS], the predicate, or -1 for padding

    @property
    def no_pair(self) -> Tensor:
        """True for padding, bool [B, PAIRS]."""
        return self.targets < 0


def batches(count: int, size: int = 4, split: str = "train") -> list[Batch]:
    scenes = ScenesDataset(split, size=count * size)
    return [collate([scenes[i * size + j] for j in range(size)]) for i in range(count)]


def collate(graphs: Sequence[SceneGraph]) -> Batch:
    images = [pil_to_tensor(graph.image().resize((SIDE, SIDE))) / 255 for graph in graphs]
    objects, no_object = torch.zeros(len(graphs), OBJECTS, OBJECT_FEATURES), torch.ones(len(graphs), OBJECTS).bool()
    pairs, targets = torch.zeros(len(graphs), PAIRS, 2, OBJECT_FEATURES), torch.full((len(graphs), PAIRS), -1)
    for i, graph in enumerate(graphs):
        size = torch.tensor([graph.width, graph.height] * 2)
        features = torch.cat([one_hot(graph.labels, CLASSES), graph.boxes / size], dim=1)
        objects[i, : len(features)], no_object[i, : len(features)] = features, False
        rows = graph.relations[:PAIRS]
        pairs[i, : len(rows)], targets[i, : len(rows)] = features[rows[:, :2]], rows[:, 2]
    return Batch(torch.stack(images), objects, no_object, pairs, targets)


class ImageEncoder(nn.Module):
    """A small convolutional network, from images to [B, 256, WIDTH], with position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), nn.Conv2d(64, WIDTH, 3, stride=2, padding=1), nn.ReLU()
        )
        self.position = nn.Parameter(torch.randn((SIDE // 8) ** 2, WIDTH) / math.sqrt(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).mT + self.position


def predicate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@contextmanager
def dense_masks(model: nn.Module, *names: str) -> Iterator[None]:
    """Give the attention modules with these names a random mask as a tensor."""

    def add_mask(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        if not isinstance(module, nn.MultiheadAttention):  # DETR's attention, whose mask is True for kept entries
            lengths = named["hidden_states"].shape[1], named["key_value_states"].shape[1]
            kept, given = torch.rand(len(named["hidden_states"]), HEADS, *lengths) >= RATIO, named["attention_mask"]
            return inputs, named | {"attention_mask": kept if given is None else kept & given}
        query, key = inputs[:2]
        mask, given = torch.rand(len(query) * HEADS, query.shape[1], key.shape[1]) < RATIO, named.get("attn_mask")
        return inputs, named | {"attn_mask": mask if given is None else mask | given}

    chosen = [module for name, module in model.named_modules() if set(name.split(".")[-2:]) & set(names)]
    hooks = [module.register_forward_pre_hook(add_mask, with_kwargs=True) for module in chosen if is_attention(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("CrossAttention")


def train_and_compare(
    model: nn.Module,
    align: sgalign.RelationAlignment,
    aligned: Callable[[Batch, int], tuple[Tensor, Tensor]],
    plain: nn.Module,
    masked: Sequence[str],
) -> None:
    """Train a model with its mirror. Then compare the time of a step with two other kinds of steps.

    Args:
        model: the model.
        align: the mirror's heads.
        aligned: a function from a batch and a step to the supervised and the alignment loss, with the mirror.
        plain: a copy of the model with its own attention. It has the methods `encode` and `decode`.
        masked: names of the attention modules that the mirror masks.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    steps = parser.parse_args().steps
    data = batches(min(steps, 40))
    optimizer = torch.optim.AdamW([*model.parameters(), *align.parameters()], 5e-4)
    losses = []
    for step in range(steps):
        supervised, alignment = aligned(data[step % len(data)], step)
        optimizer.zero_grad()
        (supervised + alignment).backward()
        optimizer.step()
        losses.append((supervised.item(), alignment.item()))
    for name, several in (("first", losses[:10]), ("last", losses[-10:])):
        means = [statistics.fmean(each) for each in zip(*several)]
        print(f"{name} 10 of {steps} steps: supervised loss {means[0]:.3f}, weighted alignment loss {means[1]:.4f}")

    def without_mirror(batch: Batch, step: int) -> Tensor:
        return predicate_loss(plain.predicate(plain.decode(batch, plain.encode(batch))), batch.targets)

    def plain_way(batch: Batch, step: int) -> Tensor:
        memory = plain.encode(batch)
        logits = plain.predicate(plain.decode(batch, memory))
        with dense_masks(plain, *masked):
            mirrored_logits = align.heads["predicate"](plain.decode(batch, memory))
        alignment = align.mirror(step=step).loss(predicate=(logits, mirrored_logits, ~batch.no_pair))
        return predicate_loss(logits, batch.targets) + alignment

    kinds = {
        "without a mirror": without_mirror,
        "the plain way (decoder called twice)": plain_way,
        "with sgalign's mirror": lambda batch, step: sum(aligned(batch, step)),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for step in range(10):
        for name, loss in kinds.items():
            start = time.perf_counter()
            loss(data[step % len(data)], step).backward()
            times[name].append(1000 * (time.perf_counter() - start))
    print("forward and backward of a training step, median of 10:")
    first = statistics.median(times["without a mirror"])
    for name, several in times.items():
        median = statistics.median(several)
        print(f"    {name:<38} {median:6.1f} ms   {median / first:.2f}")
