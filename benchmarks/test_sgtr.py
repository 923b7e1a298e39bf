"""Benchmarks of SGTR's structural decoder and of its training step from images, with and without the mirrored branch.

The sizes are the published ones. The linear layers take most of the time. The decoder's branches share only the keys
and values of both memories, so the counted cost of two branches is nearly twice that of one. Most of a whole step is
the backbone, which runs once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("lightning")
from benchmarks import conftest  # noqa: E402
from sgalign import relation_alignment_loss  # noqa: E402
from sgalign.models.entity_detector import DetectedEntities, EntityDetector  # noqa: E402
from sgalign.models.graph_assembly import Annotations, Entities, match, relation_losses  # noqa: E402
from sgalign.models.sgtr import SGTR, MirrorMask, RelationOutputs  # noqa: E402

OBJECTS, PREDICATES, DIM, HEADS, QUERIES, ENTITIES, POSITIONS = 150, 50, 256, 8, 180, 100, 608
IMAGE = 600, 1000  # height and width
MASK = MirrorMask(0.1, 1)


class PlainLayer(nn.Module):
    """A layer of a sub-decoder as in the public code."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(DIM, 2048), nn.ReLU(), nn.Linear(2048, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))

    def forward(self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norms[0](x)
        query = normed + position
        x = x + self.self_attention(query, query, normed, need_weights=False)[0]
        query = self.norms[1](x) + position
        x = x + self.cross_attention(query, key, value, attn_mask=mask, need_weights=False)[0]
        return self.norms[3](x + self.feed_forward(self.norms[2](x)))


class PlainDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(PlainLayer() for _ in range(3)) for _ in range(6))
        self.fusion = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, contents: Tensor, positions: Tensor, found: DetectedEntities, ratio: float) -> Tensor:
        states, (memory, features) = list(contents), (found.memory, found.features)
        for roles in self.layers:
            for role, layer in enumerate(roles):
                key, value = (memory + found.position, memory) if role == 0 else (features, features)
                shape = len(key) * HEADS, QUERIES, key.shape[1]
                mask = torch.rand(shape, device=key.device) < ratio if ratio else None
                states[role] = layer(states[role], positions[role], key, value, mask)
            told = self.fusion[0](states[1]) + self.fusion[1](states[2])
            states[0] = states[0] + told.relu()
        return torch.stack(states)


def counted(step: Callable[[], Tensor]) -> int:
    """Return the operations of the matrix products, convolutions and attention in a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


Steps = tuple[dict[str, Callable[[], Tensor]], list[nn.Parameter], float]  # by name, all parameters, counted ratio


def decoder_steps(device: torch.device = conftest.DEVICE) -> Steps:
    """Return the steps of the six decoder layers on given inputs.

    They have no dropout, because torch does not use its fused attention with dropout.
    """
    torch.manual_seed(0)
    images = 2
    with device:
        net, plain = SGTR(OBJECTS, PREDICATES, dropout=0.0), PlainDecoder()
        found = DetectedEntities(
            torch.randn(images, POSITIONS, DIM),
            torch.randn(images, POSITIONS, DIM),
            torch.zeros(images, POSITIONS, dtype=torch.bool),
            torch.randn(images, ENTITIES, DIM),
            torch.randn(1, images, ENTITIES, OBJECTS + 1),
            torch.rand(1, images, ENTITIES, 4),
        )
        contents = torch.randn(3, images, QUERIES, DIM)
    net.encoder = nn.ModuleList()
    net._contents = lambda entities: contents

    def twice() -> Tensor:
        ours = plain(contents, net.queries, found, 0.0)
        return ours.square().mean() + plain(contents, net.queries, found, MASK.ratio).square().mean()

    steps = {
        "SGTR": lambda: net._states(found, None)[-1].square().mean(),
        "Align-SGTR": lambda: net._states(found, MASK)[-1].square().mean(),
        "two passes": twice,
    }
    flops = {name: counted(step) for name, step in steps.items()}
    return steps, [*net.parameters(), *plain.parameters()], flops["Align-SGTR"] / flops["SGTR"]


def image_steps(device: torch.device = conftest.DEVICE) -> Steps:
    """Return the steps on one image of 600 x 1000 pixels, with ResNet-101.

    The detector is frozen as for Visual Genome.
    """
    torch.manual_seed(0)
    detector, net = EntityDetector(OBJECTS).to(device), SGTR(OBJECTS, PREDICATES).to(device)
    detector.freeze(("backbone", "encoder", "decoder"))
    with torch.no_grad():  # otherwise, the untrained backbone's features reach 1e5, and scores of 1e10 overflow
        detector.detr.model.input_projection.weight.mul_(1e-5)
    predicate, entity_class = net.new_heads()
    heads = predicate.to(device), entity_class.to(device)
    pixels, sizes = [torch.rand(3, *IMAGE).to(device)], torch.tensor([IMAGE[::-1]], device=device).float()
    annotated = torch.randint(50, (10,)), torch.randint(150, (2, 10)), torch.rand(2, 10, 4) * 0.4 + 0.1
    truth = [Annotations(*(tensor.to(device) for tensor in annotated))]

    def see() -> DetectedEntities:
        found = detector(pixels)
        return found._replace(memory=found.memory.detach(), features=found.features.detach())

    def supervised(found: DetectedEntities, outputs: RelationOutputs) -> Tensor:
        entities = Entities.detected(found.logits[-1], found.boxes[-1])
        matches = match(outputs, entities, sizes, truth)
        losses = relation_losses(outputs, truth, matches, focal=True, relations=10.0)
        return torch.stack(list(losses.values())).sum() + found.logits.square().mean() + found.boxes.square().mean()

    def sgtr() -> Tensor:
        found = see()
        return supervised(found, net(found))

    def align_sgtr() -> Tensor:
        found = see()
        outputs, mirrored = net.dual_branch(found, heads, MASK)
        last = outputs.at(-1)
        align = relation_alignment_loss(last.logits.flatten(0, -2), mirrored.logits.flatten(0, -2), kind="sigmoid")
        classes = relation_alignment_loss(last.class_logits.flatten(0, -2), mirrored.class_logits.flatten(0, -2))
        return supervised(found, outputs) + 10 * (align + 2 * classes)

    def two_passes() -> Tensor:
        found = see()
        outputs, mirrored = net(found), net(found)
        teacher = outputs.logits[-1].detach().sigmoid()
        align = functional.binary_cross_entropy_with_logits(mirrored.logits[-1], teacher)
        return supervised(found, outputs) + 10 * align

    steps = {"SGTR": sgtr, "Align-SGTR": align_sgtr, "two passes": two_passes}
    parameters = [p for module in (detector, net, *heads) for p in module.parameters()]
    return steps, parameters, counted(align_sgtr) / counted(sgtr)


def test_decoder(benchmark):
    conftest.compare_steps(benchmark, "structural decoder", *decoder_steps(), rounds=5)


def test_training_step(benchmark):
    conftest.compare_steps(benchmark, "SGTR from images", *image_steps(), rounds=3)
