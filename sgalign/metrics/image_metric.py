"""The base class of metrics that are updated with images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sgalign.data.scene_graph import check_objects
from sgalign.errors import InputError
from sgalign.matching import FLOATS, check_fields, check_prediction, check_triplets


class ImageMetric(Metric):
    """A base class for metrics that are updated with images.

    A subclass implements `_add`, which adds one image to the state.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    is_differentiable = False

    num_predicates: int
    _settings: tuple[str, ...]  # names of the attributes that must be equal when two evaluators are merged

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images to the metric.

        Args:
            predictions: one dict per image, with `boxes` float `[N, 4]` (x1, y1, x2, y2 in pixels of the original
                image), `labels` int64 `[N]` from 1, and either

                - `scores` float `[N]`, `pairs` int64 `[R, 2]` (subject and object index) and `predicate_scores` float
                  `[R, num_predicates + 1]`, where column 0 is the background, which is never predicted; or
                - `triplets` int64 `[T, 3]` (subject index, object index, predicate from 1), best first, and
                  `triplet_scores` float `[T]`. All metrics then use this ranking. SGTR's predictions have this form.
            targets: one dict per image, with `boxes`, `labels`, and `relations` int64 `[M, 3]` (subject index, object
                index, predicate from 1). If the target or the prediction has an `image_id`, error messages use it.

        Raises:
            TypeError: if `predictions` or `targets` is not a list of dicts.
            ValueError: if a field is missing or malformed. The message names the field and the image. The metric is
                then unchanged.
        """
        for name, images in (("predictions", predictions), ("targets", targets)):
            kinds = {type(image) for image in images} if isinstance(images, Sequence) else {type(images)}
            if not isinstance(images, Sequence) or not all(issubclass(kind, Mapping) for kind in kinds):
                got = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise TypeError(f"{name} must be a list with a dict for each image, got {got}")
        if len(predictions) != len(targets):
            raise InputError(
                f"predictions and targets must have the same length, got {len(predictions)} and {len(targets)}"
            )
        for where, prediction, target in self._named(predictions, targets):
            self._check(where, prediction, target)
        for prediction, target in zip(predictions, targets, strict=True):
            self._add(_to(prediction, self.device), _to(target, self.device))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the images of another evaluator with the same settings, for example from another file or process.

        Raises:
            ValueError: if the settings differ.
        """
        for name in self._settings if isinstance(incoming_state, type(self)) else ():
            own, other = getattr(self, name), getattr(incoming_state, name)
            if own != other:
                raise InputError(f"incoming_state must have the same {name}, {own!r}, got {other!r}")
        super().merge_state(incoming_state)
        self._computed = None  # otherwise compute would return the results from before the merge
        self._update_count += getattr(incoming_state, "_update_count", 1)

    def _named(
        self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
        for position, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            image = target.get("image_id", prediction.get("image_id"))
            where = f"image at index {position}: " if image is None else f"image {image!r}: "
            yield where, prediction, target

    def _check(self, where: str, prediction: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        check_prediction(where + "prediction ", prediction, self.num_predicates)
        _check_target(where + "target ", target, self.num_predicates)

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        raise NotImplementedError(f"{type(self).__name__} must override _add")


def check_top_k(top_k: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(top_k, Sequence) or not top_k or any(type(k) is not int or not 1 <= k < 1 << 31 for k in top_k):
        raise InputError(f"top_k must be integers from 1 to 2^31 - 1, got {top_k!r}")
    return tuple(top_k)


def _to(fields: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def _check_target(where: str, target: Mapping[str, Any], num_predicates: int) -> None:
    check_fields(where, target, ("boxes", "labels", "relations"))
    check_objects(where, target["boxes"], target["labels"], FLOATS)
    check_triplets(where, "relations", target["relations"], len(target["labels"]), num_predicates)
