"""A data set whose objects and pairs get the features of a simulated detector, for studies without images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sgalign.data import Detections, GraphBatch, SceneGraph, VisualFeatures
from sgalign.errors import InputError
from sgalign.models.motifs import PAIR_FEATURES, pair_features
from sgalign.training.scarce import ScarceData

WIDTH = 1024  # numbers of a feature
HIDDEN = 128  # numbers of the observation that a feature is computed from
GROUP = 4  # number of object classes that are easily confused with each other
EVIDENCE = 2.0  # distance of the prototypes of two predicates; the noise that is added to a pair has the deviation 1


class SimulatedData(ScarceData):
    """A data set whose annotated objects and pairs get simulated features, as if a detector had seen them.

    It is for Motifs with `vision: cached` and `relation_dim: 1024`, under PredCls or SGCls. With `vision: none` the
    features are ignored. Nothing is read from images. An object or a pair has the same features in each epoch and in
    every run.

    An object's observation has 128 numbers. It is the sum of three parts, divided by `noise`:

    - the prototype of its class. The classes form random groups of four, which are easily confused: the prototypes of
      two classes of a group have a distance of about 1, and those of other classes of about 2;
    - the context: the sum of the prototypes of all objects in the image, divided by the square root of their number;
    - Gaussian noise with the deviation `noise` in each number.

    A pair's observation is a mixture of the observations of its two objects, to which three parts are added: the
    geometry of their boxes, the mean of the prototypes of its annotated predicates, and noise with the deviation 1. The
    prototypes of two predicates have a distance of about 2. A pair without an annotated predicate has no evidence of
    any, so its features also tell that it is not annotated.

    A feature is a fixed random layer of 1024 rectified linear units on an observation. The class logits of the detector
    are the log-likelihoods of the classes, given the object's observation, for a detector that does not know about the
    context.

    Args:
        root: as in `SceneGraphData`.
        noise: deviation of the noise of objects, at least 0.001.
        labelled: share of the training images to use. The others are left out.
        data: the other arguments of `SceneGraphData`, except for `features`, `detections` and `images`.

    Raises:
        ValueError: if an argument is out of its range, or if a split has no relations.
    """

    def __init__(self, root: str | None = None, *, noise: float = 0.5, labelled: float = 1.0, **data: Any) -> None:
        if not 0.001 <= noise < float("inf"):
            raise InputError(f"noise must be at least 0.001 and finite, got {noise}")
        for name in ("features", "detections", "images"):
            if data.get(name):
                raise InputError(f"{name} must not be given for simulated features, got {data[name]!r}")
        super().__init__(root, labelled=labelled, unlabelled=False, missing=0.0, wrong=0.0, **data)
        if not self.annotated:
            raise InputError(f"labelled must leave at least one training image, got {labelled}")
        self.simulation = Simulation(len(self.object_names) - 1, len(self.predicate_names) - 1, noise)

    @property
    def features_source(self) -> str:
        return f"simulation with noise {self.simulation.noise:g}"

    def _collate_fn(self, detections: dict[str, Detections] | None = None) -> Callable[..., GraphBatch]:
        return partial(_collate_simulated, super()._collate_fn(detections), self.simulation)


def _collate_simulated(collate: Any, simulation: Simulation, graphs: Sequence[SceneGraph]) -> GraphBatch:
    return simulation.add_to(collate(graphs))


class Simulation:
    """A simulated detector, as `SimulatedData` describes it.

    Args:
        num_objects: number of object classes without the background.
        num_predicates: number of predicates without the background.
        noise: deviation of the noise.
    """

    def __init__(self, num_objects: int, num_predicates: int, noise: float) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, columns: int, deviation: float = HIDDEN**-0.5) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * deviation

        # Two random vectors of length a have a distance of about 2**0.5 * a.
        groups = torch.randperm(num_objects, generator=generator) // GROUP
        centers = draw(num_objects // GROUP + 1, HIDDEN, (1.5 / HIDDEN) ** 0.5)
        prototypes = centers[groups] + draw(num_objects, HIDDEN, (0.5 / HIDDEN) ** 0.5)
        predicates = draw(num_predicates, HIDDEN, EVIDENCE * (0.5 / HIDDEN) ** 0.5)
        self.prototypes, self.predicates = (functional.pad(rows, (0, 0, 1, 0)) for rows in (prototypes, predicates))
        self.as_subject, self.as_object = draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN)
        self.geometry = draw(PAIR_FEATURES, HIDDEN, PAIR_FEATURES**-0.5)
        self.object_units, self.pair_units = draw(HIDDEN, WIDTH), draw(HIDDEN, WIDTH)

    def add_to(self, batch: GraphBatch) -> GraphBatch:
        """Return the batch with simulated features.

        Args:
            batch: a batch of annotated objects with all pairs of its images.
        """
        counts = zip(batch.image_ids, batch.lengths.tolist(), batch.pair_counts.tolist(), strict=True)
        noise = [_noise_of(image_id, objects, pairs) for image_id, objects, pairs in counts]
        of_objects, of_pairs = (torch.cat(parts) for parts in zip(*noise, strict=True))
        signal = self.prototypes[batch.labels]
        context = torch.zeros(len(batch.lengths), HIDDEN).index_add(0, batch.images, signal)
        context = context * batch.lengths[:, None].clamp(min=1) ** -0.5
        # Observations are divided by `noise`, so that their noise has the deviation 1.
        observed = (signal + context[batch.images]) / self.noise + of_objects
        subjects, objects = observed[batch.pairs].unbind(1)
        both = (subjects @ self.as_subject + objects @ self.as_object) * 0.5**0.5
        geometry = pair_features(batch).clamp(-3, 3) @ self.geometry
        observed_pairs = both + geometry + batch.targets @ self.predicates + of_pairs
        units = (observed @ self.object_units).relu(), (observed_pairs @ self.pair_units).relu()
        return batch._replace(features=VisualFeatures(*units, self._logits(observed)))

    def _logits(self, observed: Tensor) -> Tensor:
        """Return the log-likelihood of each class up to a constant, and -100 for the background."""
        prototypes = self.prototypes / self.noise
        logits = observed @ prototypes.T - prototypes.square().sum(1) / 2
        logits[:, 0] = -100
        return logits


def _noise_of(image_id: str, objects: int, pairs: int) -> Sequence[Tensor]:
    """Return the noise of an image's objects and pairs. It depends on the image's name and on their numbers."""
    seed = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "little", signed=True)
    noise = torch.randn(objects + pairs, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return noise.split([objects, pairs])
