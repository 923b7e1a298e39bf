"""Tests of the differences between arms, and of their intervals."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
from sgalign.studies import figures, tables  # noqa: E402
from sgalign.studies.intervals import paired_difference  # noqa: E402


def made_run(ranks, predicates=([1, 1, 2], [1], [2, 2]), seed=0):
    return {"seed": seed, "predicates": list(predicates), "ranks": list(ranks), "groups": {"body": ["a", "b"]}}


NONE = made_run([[100] * 3, [100], [100] * 2])  # finds no relation
SOME = made_run([[3, 100, 60], [2], [100, 7]])
ALL = made_run([[0] * 3, [0], [0] * 2], seed=1)


def test_a_run_does_not_differ_from_itself():
    assert paired_difference([SOME], [SOME], "R", 50) == (0, 0, 0)


def test_the_difference_of_recall_is_averaged_over_images_and_inside_its_interval():
    difference, low, high = paired_difference([SOME], [NONE], "R", 50)
    assert difference == pytest.approx((1 / 3 + 1 + 1 / 2) / 3) and 0 < low < difference < high <= 1


def test_the_difference_of_mean_recall_is_averaged_over_images_and_predicates():
    # The recalls of predicate 1 are 1/2 and 1, those of predicate 2 are 0 and 1/2.
    difference, _, _ = paired_difference([SOME], [NONE], "mR", 50)
    assert difference == pytest.approx((3 / 4 + 1 / 4) / 2)
    difference, _, _ = paired_difference([SOME], [NONE], "mR", 100)
    assert difference == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_only_runs_with_the_same_seed_are_compared():
    assert paired_difference([SOME, ALL], [NONE], "R", 50) == paired_difference([SOME], [NONE], "R", 50)
    with pytest.raises(ValueError, match=r"base must have at least one of the seeds \[1\], got \[0\]"):
        paired_difference([ALL], [NONE], "R", 50)


def test_runs_on_different_images_are_not_compared():
    with pytest.raises(ValueError, match="same test images"):
        paired_difference([made_run([[0]], [[1]])], [NONE], "R", 50)


def test_equal_models_are_rarely_called_different():
    """Both models find every relation with the same probability. Few of 40 intervals may exclude 0."""
    generator = torch.Generator().manual_seed(0)
    predicates = [[1, 2, 1, 2]] * 60
    called = 0
    for _ in range(40):
        runs = [
            [
                made_run((torch.rand(60, 4, generator=generator) * 100).long().tolist(), predicates, seed)
                for seed in range(4)
            ]
            for _ in range(2)
        ]
        _, low, high = paired_difference(*runs, "R", 50)
        called += not low <= 0 <= high
    assert called <= 8, f"{called} of 40 comparisons of equal models called them different"


def test_only_arms_with_relations_are_compared_and_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    names = {"R@100/on": 0.5, "R@100/near": 0.5}
    some, none = ({**run, "test": names, "groups": {"all": ["on", "near"]}} for run in (SOME, NONE))
    detector = {**made_run([[]], [[]]), "test": {"mAP": 0.3}, "groups": {}}
    arms = {"detector": [detector], "other": [detector], "Motifs": [none], "better": [some]}
    bases = {"other": "detector", "better": "Motifs", "detector": ""}
    intervals = tables.differences(bases, arms)
    assert set(intervals) == {"better"}
    figures.draw_predicates(Path("predicates.png"), bases, arms, intervals)
    assert len(drawn[0].axes) == 1


def test_arms_with_other_test_images_in_any_seed_are_not_compared():
    other = made_run([[0]], [[1]], seed=1)
    assert tables.differences({"a": "b"}, {"a": [SOME, other], "b": [NONE]}) == {"a": []}
