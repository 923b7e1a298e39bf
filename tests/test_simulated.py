"""Tests of the data set with simulated features of a detector."""

import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
from trainers import SMALL_MOTIFS, trainer  # noqa: E402

from sgalign.commands.main import main  # noqa: E402
from sgalign.training import AlignMotifsModule, MotifsModule, SceneGraphData, SimulatedData, load_module  # noqa: E402
from sgalign.training.simulated import HIDDEN, WIDTH, Simulation  # noqa: E402

SMALL = SMALL_MOTIFS | {"vision": "cached", "relation_dim": WIDTH}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "40", "24", "12"]) == 0
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return SimulatedData(str(folder), noise=0.25)


def batch_of(data, graphs):
    return data._collate_fn()(graphs)


@pytest.mark.parametrize("protocol", ["predcls", "sgcls"])
def test_motifs_trains_and_is_tested_on_simulated_features(data, tmp_path, protocol):
    torch.manual_seed(0)
    module = AlignMotifsModule(**SMALL, protocol=protocol, learning_rate=0.01)
    run = trainer(max_epochs=5)
    run.fit(module, data)
    assert 0 < run.callback_metrics["val/R@100"] <= 1
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert run.test(load_module(tmp_path / "model.ckpt"), data, verbose=False)[0]["test/R@100"] > 0


def test_a_model_is_not_tested_on_features_of_another_noise(folder, data, tmp_path):
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(MotifsModule(**SMALL), data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="trained on, simulation with noise 0.25, got simulation with noise 1: run"):
        trainer().test(load_module(tmp_path / "model.ckpt"), SimulatedData(str(folder), noise=1.0), verbose=False)


def test_features_of_an_image_depend_neither_on_its_batch_nor_on_the_share_of_images(folder, data):
    first, second = data.test[:2]
    both, alone = batch_of(data, [first, second]).features, batch_of(data, [second]).features
    few = batch_of(SimulatedData(str(folder), noise=0.25, labelled=0.1), [second]).features
    assert all(torch.equal(one, other) for one, other in zip(alone, few))
    for one, other in zip(alone, both):
        torch.testing.assert_close(one, other[-len(one) :])
    assert alone.objects.shape == (len(second.labels), WIDTH) and alone.objects.min() == 0
    assert alone.unions.shape == (len(second.labels) * (len(second.labels) - 1), WIDTH)


def test_every_image_has_noise_of_its_own(data):
    graph = data.test[0]
    one, other = (batch_of(data, [replace(graph, image_id=name)]).features for name in ("one", "other"))
    assert (one.objects != other.objects).any(1).all() and (one.unions != other.unions).any(1).all()


def test_more_noise_makes_the_detector_worse(folder):
    right = []
    for noise in (0.02, 0.3, 3.0):
        data = SimulatedData(str(folder), noise=noise)
        batch = batch_of(data, [*data.train, *data.validation])
        right.append((batch.features.logits.argmax(1) == batch.labels).float().mean())
    assert right[0] > right[1] > right[2] > 0


def test_prototypes_have_the_documented_distances():
    prototypes = Simulation(400, 50, noise=1.0).prototypes[1:]
    distances = torch.cdist(prototypes, prototypes)
    near = distances.sort(dim=1).values[:, 1:]  # without the distance to itself
    assert near[:, :3].mean().item() == pytest.approx(1, abs=0.03)
    assert near[:, 3:].mean().item() == pytest.approx(2, abs=0.03)


def test_prototypes_of_predicates_have_the_documented_distance():
    predicates = Simulation(4, 50, noise=1.0).predicates
    assert torch.pdist(predicates[1:]).mean().item() == pytest.approx(2, abs=0.05) and (predicates[0] == 0).all()


def test_features_of_related_pairs_differ_from_those_of_unrelated_ones(data):
    graph = max(data.test, key=lambda graph: len(graph.relations))
    batch = batch_of(data, [graph])
    bare = batch._replace(targets=torch.eye(batch.targets.shape[1])[torch.zeros(len(batch.pairs), dtype=torch.int64)])
    other = data.simulation.add_to(bare).features
    changed = (batch.features.unions != other.unions).any(1)
    assert torch.equal(changed, batch.related) and torch.equal(batch.features.objects, other.objects)


def test_objects_are_the_context_of_each_other(data):
    batch = batch_of(data, data.test[:2])
    labels = batch.labels.clone()
    labels[0] = labels[0] % 5 + 1
    changed = data.simulation.add_to(batch._replace(labels=labels)).features
    first = batch.lengths[0]
    assert (changed.objects != batch.features.objects).any(1).tolist() == [row < first for row in range(len(labels))]
    pairs = batch.pair_counts[0]
    assert (changed.unions[:pairs] != batch.features.unions[:pairs]).any(1).all()
    assert torch.equal(changed.unions[pairs:], batch.features.unions[pairs:])


def test_features_of_pairs_contain_the_geometry_of_their_boxes(data):
    batch = batch_of(data, data.test[:1])
    boxes = batch.boxes.clone()
    boxes[0, 2:] += 30
    changed = data.simulation.add_to(batch._replace(boxes=boxes)).features
    assert torch.equal(changed.objects, batch.features.objects)
    assert torch.equal((changed.unions != batch.features.unions).any(1), (batch.pairs == 0).any(1))


def test_pairs_have_noise_of_their_own(data, monkeypatch):
    for name in ("as_subject", "as_object"):
        monkeypatch.setattr(data.simulation, name, torch.zeros(HIDDEN, HIDDEN))
    one, other = (batch_of(data, [replace(data.test[0], image_id=name)]).features for name in ("one", "other"))
    assert (one.unions != other.unions).any(1).all()


def test_logits_are_log_likelihoods():
    simulation = Simulation(6, 3, noise=0.5)
    observed = torch.randn(10, HIDDEN)
    logits = simulation._logits(observed)
    likelihoods = -(torch.cdist(observed, simulation.prototypes[1:] / 0.5) ** 2) / 2
    torch.testing.assert_close(logits[:, 1:].log_softmax(1), likelihoods.log_softmax(1), atol=1e-4, rtol=1e-4)
    assert (logits[:, 0] == -100).all()


def test_only_the_given_share_of_the_training_images_is_used(folder, data):
    few = SimulatedData(str(folder), labelled=0.25)
    assert len(few.train) == round(0.25 * len(data.train)) and len(few.training_graphs()) == len(few.train)
    whole = {graph.image_id: graph.relations for graph in data.train}
    assert all(torch.equal(graph.relations, whole[graph.image_id]) for graph in few.train)
    assert few.predicate_groups == data.predicate_groups and len(few.test) == len(data.test)


def test_workers_get_the_same_features(data):
    collate = pickle.loads(pickle.dumps(data._collate_fn()))
    assert all(
        torch.equal(*both) for both in zip(collate(data.test[:3]).features, batch_of(data, data.test[:3]).features)
    )


def test_an_image_without_objects_has_no_features(data):
    graph = data.test[0]
    empty = replace(graph, boxes=graph.boxes[:0], labels=graph.labels[:0], relations=graph.relations[:0])
    features = batch_of(data, [empty, graph]).features
    assert features.objects.isfinite().all() and len(features.objects) == len(graph.labels)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf")])
def test_the_noise_must_be_positive(noise):
    with pytest.raises(ValueError, match=f"noise must be at least 0.001 and finite, got {noise}"):
        SimulatedData(noise=noise)


def test_a_share_of_no_image_is_refused(folder):
    with pytest.raises(ValueError, match="labelled must leave at least one training image, got 0.0001"):
        SimulatedData(str(folder), labelled=0.0001)


@pytest.mark.parametrize(("name", "value"), [("features", "f"), ("detections", "d"), ("images", True)])
def test_other_features_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must not be given for simulated features, got {value!r}"):
        SimulatedData(**{name: value})


def test_the_model_must_have_the_width_of_the_features(data):
    module = MotifsModule(**SMALL | {"relation_dim": 16})
    with pytest.raises(ValueError, match="relation_dim must be 1024, as in the features of the data, got 16"):
        trainer(limit_train_batches=1).fit(module, data)


def test_other_data_have_no_source_of_features(folder):
    assert SceneGraphData(str(folder)).features_source is None
