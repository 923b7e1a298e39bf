"""What the examples share: batches of generated scenes, two small networks, and the comparison of training steps.

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
def dense_masks(*attentions: nn.MultiheadAttention) -> Iterator[None]:
    """Give torch's attention modules a random mask as a tensor. This is the plain way to mask the mirror."""

    def add_mask(module: nn.MultiheadAttention, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        query, key = inputs[:2]
        batch, length = (0, 1) if module.batch_first else (1, 0)
        shape = query.shape[batch] * module.num_heads, query.shape[length], key.shape[length]
        mask, given = torch.rand(shape) < RATIO, named.get("attn_mask")
        return inputs, named | {"attn_mask": mask if given is None else mask | given}

    hooks = [attention.register_forward_pre_hook(add_mask, with_kwargs=True) for attention in attentions]
    yield
    for hook in hooks:
        hook.remove()


Losses = Callable[[Batch, int], tuple[Tensor, Tensor]]  # from a batch and a step to supervised and alignment loss


def train_and_compare(parameters: Sequence[nn.Parameter], aligned: Losses, others: dict[str, Losses]) -> None:
    """Train with `aligned`, then compare the time of its steps with that of the others.

    Args:
        parameters: the parameters to train.
        aligned: the losses of a step with sgalign's mirror.
        others: other kinds of steps by name. Ratios are relative to the first.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    steps = parser.parse_args().steps
    data = batches(min(steps, 40))
    optimizer = torch.optim.AdamW(parameters, 5e-4)

    trained = []
    for number in range(steps):
        supervised, alignment = aligned(data[number % len(data)], number)
        optimizer.zero_grad()
        (supervised + alignment).backward()
        optimizer.step()
        trained.append((supervised.item(), alignment.item()))
    for name, several in (("first", trained[:10]), ("last", trained[-10:])):
        means = [statistics.fmean(losses) for losses in zip(*several)]
        print(f"{name} 10 of {steps} steps: supervised loss {means[0]:.3f}, weighted alignment loss {means[1]:.4f}")

    times: dict[str, list[float]] = {}
    kinds = others | {"with sgalign's mirror": aligned}
    for number in range(10):
        for name, losses in kinds.items():
            start = time.perf_counter()
            sum(losses(data[number % len(data)], number)).backward()
            times.setdefault(name, []).append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(several) for name, several in times.items()}
    first = next(iter(medians.values()))
    print("forward and backward of a training step, median of 10:")
    for name, median in medians.items():
        print(f"    {name:<42} {median:6.1f} ms   {median / first:.2f}")
