"""Benchmarks of the evaluator at the size of SGDet: images of 80 boxes, 6320 pairs and 50 predicates.

Memory bandwidth limits the speed. An image has 1.3 MB of predicate scores, which are read once to check them and once
to find the best predicate of each pair.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
from sgalign.metrics import SceneGraphEvaluator  # noqa: E402

BOXES, PREDICATES, RELATIONS, TOP_K = 80, 50, 20, (20, 50, 100)


def image(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def objects(count: int) -> dict[str, torch.Tensor]:
        corner = torch.rand(count, 2, generator=generator) * 300
        boxes = torch.cat((corner, corner + 50 + torch.rand(count, 2, generator=generator) * 200), 1)
        return {"boxes": boxes, "labels": torch.randint(1, 20, (count,), generator=generator)}

    pairs = (~torch.eye(BOXES, dtype=torch.bool)).nonzero()
    logits = torch.randn(len(pairs), PREDICATES + 1, generator=generator) * 3
    prediction = objects(BOXES) | {
        "scores": torch.rand(BOXES, generator=generator),
        "pairs": pairs,
        "predicate_scores": logits.softmax(1),
    }
    ends = torch.randint(12, (RELATIONS, 2), generator=generator)
    predicates = torch.randint(1, PREDICATES + 1, (RELATIONS, 1), generator=generator)
    return prediction, objects(12) | {"relations": torch.cat((ends, predicates), 1)}


def numpy_evaluator(images: list) -> np.ndarray:
    """Evaluate in plain numpy: score all triplets, sort them, and compare the best ones with the ground truth.

    This computes R and ngR, and the sums that their mean recalls need, as the public code does. It does not check its
    input. It returns R and ngR.
    """
    recalls = np.zeros((2, len(TOP_K)))
    by_predicate = np.zeros((2, len(TOP_K), PREDICATES + 1))
    for prediction, target in images:
        p = {name: value.numpy() for name, value in prediction.items()}
        t = {name: value.numpy() for name, value in target.items()}
        scores = p["scores"].astype(np.float64)[p["pairs"]].prod(1)[:, None] * p["predicate_scores"][:, 1:]
        best = scores.argmax(1)
        constrained = np.argsort(-scores[np.arange(len(scores)), best], kind="stable")[:100]
        free = np.argsort(-scores, axis=None, kind="stable")[:100]
        lists = (constrained, best[constrained]), (free // PREDICATES, free % PREDICATES)
        relations = t["relations"]
        for row, (pairs, predicates) in enumerate(lists):
            finds = np.ones((len(pairs), len(relations)), dtype=bool)
            for end in (0, 1):
                found, true = p["pairs"][pairs, end], relations[:, end]
                boxes, others = p["boxes"][found][:, None].astype(np.float64), t["boxes"][true].astype(np.float64)
                low, high = np.maximum(boxes[..., :2], others[:, :2]), np.minimum(boxes[..., 2:], others[:, 2:])
                common = (high - low + 1).clip(0).prod(-1)
                areas = [(b[..., 2:] - b[..., :2] + 1).prod(-1) for b in (boxes, others)]
                finds &= common / (areas[0] + areas[1] - common) >= 0.5
                finds &= p["labels"][found][:, None] == t["labels"][true]
            finds &= (predicates + 1)[:, None] == relations[:, 2]
            for column, k in enumerate(TOP_K):
                hit = finds[:k].any(0)
                recalls[row, column] += hit.mean() / len(images)
                for predicate in np.unique(relations[:, 2]):
                    by_predicate[row, column, predicate] += hit[relations[:, 2] == predicate].mean()
    return recalls


def sgalign_evaluator(images: list) -> SceneGraphEvaluator:
    metric = SceneGraphEvaluator("sgdet", PREDICATES, top_k=TOP_K)
    metric.update(*zip(*images, strict=True))
    return metric


FORMS: dict[str, Callable] = {"numpy": numpy_evaluator, "sgalign": sgalign_evaluator}


@pytest.fixture(scope="module")
def images() -> list:
    return [image(seed) for seed in range(10)]


def test_forms_agree(images: list) -> None:
    figures = sgalign_evaluator(images).compute()
    for row, name in enumerate(("R", "ngR")):
        assert [figures[f"{name}@{k}"].item() for k in TOP_K] == pytest.approx(numpy_evaluator(images)[row], abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.benchmark(group="evaluation, 10 images of 6320 pairs")
def test_evaluation(benchmark, images: list, form: str) -> None:
    benchmark(FORMS[form], images)
