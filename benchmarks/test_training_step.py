"""Benchmarks of a training step of Motifs at the published sizes.

The step runs without the mirrored branch, with both branches in one pass, and with both in two passes. The features of
the detector are given. The case "extractors trained" includes the relation head's own feature extractors. The case
"cached features" does not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
from torchvision.models.detection.faster_rcnn import TwoMLPHead  # noqa: E402

from benchmarks import conftest  # noqa: E402
from sgalign import relation_alignment_loss  # noqa: E402
from sgalign.data import GraphBatch, SceneGraph, SeenBatch, VisualFeatures, collate  # noqa: E402
from sgalign.models import Motifs  # noqa: E402
from sgalign.training.longtail import RelationLoss  # noqa: E402

IMAGES, OBJECTS, PAIRS = 4, 40, 1024
CLASSES, PREDICATES, DIM, HIDDEN = 151, 51, 4096, 512
REGION = 256 * 7 * 7


class Step:
    """A model, its inputs, and the losses of one training step in three ways."""

    def __init__(self, *, extractors: bool, device: torch.device = conftest.DEVICE) -> None:
        torch.manual_seed(0)
        self.motifs = (
            Motifs(torch.ones(CLASSES, CLASSES, PREDICATES), hidden_dim=HIDDEN, relation_dim=DIM, object_dim=DIM)
            .train()
            .to(device)
        )
        self.mirrored_head = self.motifs.new_predicate_head().to(device)
        self.relation_loss = RelationLoss(torch.ones(PREDICATES)).to(device)
        graphs = []
        for _ in range(IMAGES):
            corner = torch.rand(OBJECTS, 2) * 300
            boxes = torch.cat([corner, corner + 20 + torch.rand(OBJECTS, 2) * 200], 1)
            relations = torch.stack(
                [torch.randperm(OBJECTS), torch.randperm(OBJECTS), torch.randint(1, 51, (OBJECTS,))], 1
            )
            labels = torch.randint(1, CLASSES, (OBJECTS,))
            graphs.append(SceneGraph("", 600, 600, boxes, labels, relations))
        batch = collate(graphs, PREDICATES - 1)
        rows = torch.cat([image * OBJECTS * (OBJECTS - 1) + torch.randperm(OBJECTS * (OBJECTS - 1))[:PAIRS].sort()[0]
                          for image in range(IMAGES)])  # fmt: skip
        batch = batch.keep_pairs(rows)
        self.batch = batch.to(torch.device(device))
        self.heads = nn.ModuleList(TwoMLPHead(REGION, DIM) for _ in range(2)).to(device) if extractors else None
        width = REGION if extractors else DIM
        self.regions = [torch.rand(IMAGES * count, width, device=device) for count in (OBJECTS, PAIRS)]
        self.parameters = [*self.motifs.parameters(), *self.mirrored_head.parameters()]
        self.parameters += list(self.heads.parameters()) if self.heads is not None else []

    def seen(self) -> SeenBatch:
        heads = self.heads if self.heads is not None else [nn.Identity(), nn.Identity()]
        objects, union = (head(region) for head, region in zip(heads, self.regions))
        return SeenBatch(self.batch, VisualFeatures(objects, union))

    def dropped(self) -> Tensor:
        return torch.rand(IMAGES * OBJECTS, 1, device=self.regions[0].device) < 0.1

    def motifs_alone(self) -> Tensor:
        return self.relation_loss(self.motifs(self.seen()).logits, self.batch.targets)[0]

    def align_motifs(self) -> Tensor:
        prediction, mirrored = self.motifs.dual_branch(self.seen(), self.mirrored_head, dropped=self.dropped())
        alignment = relation_alignment_loss(prediction.logits, mirrored)
        return self.relation_loss(prediction.logits, self.batch.targets)[0] + 10 * alignment

    def two_passes(self) -> Tensor:
        """Return the loss of a step that runs the public code's relation branch again on masked input.

        The layers before the branch run once.
        """
        batch = self.batch
        shared = self.motifs.shared(self.seen())
        logits = self.usual_branch(batch, shared, shared.edge_input, self.motifs.predicate)
        masked = shared.edge_input.masked_fill(self.dropped(), 0)
        mirrored = self.usual_branch(batch, shared, masked, self.mirrored_head)
        teacher = logits.detach().log_softmax(1)
        alignment = kl_div(mirrored.log_softmax(1), teacher, log_target=True, reduction="sum") / logits.numel()
        return cross_entropy(logits, batch.targets) + 10 * alignment

    def usual_branch(self, batch: GraphBatch, shared, edge: Tensor, head: nn.Linear) -> Tensor:
        (context,) = self.motifs.edge_context.packed([edge], batch, shared.places)
        as_subject, as_object = self.motifs.head_tail(context).chunk(2, 1)
        subject, object_ = batch.pairs.unbind(1)
        pair = linear(
            torch.cat([as_subject[subject], as_object[object_]], 1), self.motifs.pair.weight, self.motifs.pair.bias
        )
        return head(pair * shared.union) + shared.bias

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return the steps: without the mirrored branch, with both branches in one pass, and with both in two."""
        return {"Motifs": self.motifs_alone, "Align-Motifs": self.align_motifs, "two passes": self.two_passes}

    def counted(self) -> float:
        """Return the multiplications of Align-Motifs divided by those of Motifs, from the layers' sizes."""
        objects, pairs = IMAGES * OBJECTS, IMAGES * PAIRS
        project = lambda width: 2 * objects * 4 * HIDDEN * width  # noqa: E731
        recur = 2 * objects * 4 * HIDDEN * HIDDEN + 2 * objects * HIDDEN * HIDDEN  # with the layer after it
        before = project(DIM + 200 + 128) + recur + project(self.motifs.edge_input_dim)
        branch = recur + objects * HIDDEN * 2 * HIDDEN + 2 * objects * HIDDEN * DIM + pairs * DIM * (PREDICATES + 1)
        before += (objects + pairs) * (REGION + DIM) * DIM if self.heads is not None else 0
        return (before + 2 * branch) / (before + branch)


@pytest.mark.parametrize("extractors", [False, True], ids=["cached features", "extractors trained"])
def test_training_step(benchmark, extractors):
    """Time all three steps in turn, which exposes them to the same state of the machine."""
    step = Step(extractors=extractors)
    case = "extractors trained" if extractors else "cached features"
    rounds = 1 if extractors else 5
    steps = step.contenders()
    conftest.compare_steps(benchmark, f"Motifs, {case}", steps, step.parameters, step.counted(), rounds=rounds)
