"""Tests of the detector, of region and union features, of their cache, and of models that read images.

No network here was trained on more than a few images.
"""

import copy
import dataclasses
import itertools
import pickle

import h5py
import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("h5py")
pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from torchvision.models import WeightsEnum  # noqa: E402
from torchvision.models.detection import fasterrcnn_resnet50_fpn  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d, box_iou, clip_boxes_to_image, roi_align  # noqa: E402
from trainers import trainer_without_sanity_check  # noqa: E402

from sgalign.commands.cache_features import cache_features  # noqa: E402
from sgalign.data import SceneGraph, ScenesDataset, VisualFeatures, collate, read_detections  # noqa: E402
from sgalign.data.features import FeatureCache  # noqa: E402
from sgalign.data.images import read_images  # noqa: E402
from sgalign.models import Detector, RegionFeatures  # noqa: E402
from sgalign.models.detector import ObjectDetections  # noqa: E402
from sgalign.models.regions import rectangle_masks  # noqa: E402
from sgalign.training import AlignMotifsModule, DetectionWriter, DetectorModule, MotifsModule  # noqa: E402
from sgalign.training.datamodule import SceneGraphData, collate_for  # noqa: E402
from sgalign.training.vision import with_detections  # noqa: E402
from sgalign.viewing import describe  # noqa: E402

CLASSES = 17
SIZES = {"backbone": "resnet18", "min_size": 64, "max_size": 96}


def small(graphs, count):
    """Return the first graphs of few objects, because most of the time is spent on their pairs."""
    return list(itertools.islice((graph for graph in graphs if len(graph.labels) <= 6), count))


@pytest.fixture(scope="module")
def scenes():
    return small(ScenesDataset("validation", size=40), 4)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    detector = Detector(CLASSES, **SIZES)
    # The scores of an untrained detector are nearly equal. Large weights make some classes likely.
    torch.nn.init.normal_(detector.model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    detector.freeze()
    return detector


@pytest.fixture(scope="module")
def regions():
    torch.manual_seed(1)
    return RegionFeatures(dim=24).eval()


@pytest.fixture(scope="module")
def features(detector, scenes):
    return detector.features(read_images(scenes)[0])


# ---- detector


def test_detections_are_those_of_loops(detector, features, scenes, monkeypatch):
    """Loops apply the threshold, suppression within each class, the best class of each proposal, and the limit."""
    monkeypatch.setattr(detector, "detections_per_image", 15)
    proposals, _ = detector.model.rpn(features.images, features.levels)
    logits, boxes = detector._box_head(features, proposals)
    counts = [len(p) for p in proposals]
    for found, graph, image_logits, image_boxes, size in zip(
        detector.detect(features), scenes, logits.split(counts), boxes.split(counts), features.images.image_sizes
    ):
        scores = image_logits.softmax(1)
        limits = torch.tensor([size[1], size[0]] * 2)
        image_boxes = image_boxes.clamp(min=0).minimum(limits)
        survivors = []
        for label in range(1, CLASSES):
            above = (scores[:, label] > 0.01).nonzero()[:, 0]
            overlaps = box_iou(image_boxes[:, label], image_boxes[:, label]).tolist()
            kept = []
            for row in above[scores[above, label].argsort(descending=True, stable=True)].tolist():
                if all(overlaps[row][other] <= 0.3 for other in kept):
                    kept.append(row)
            survivors += [(float(scores[row, label]), row, label) for row in kept]
        best = {}
        for score, row, label in sorted(survivors, reverse=True):
            best.setdefault(row, (score, label))
        expected = sorted(((score, label, row) for row, (score, label) in best.items()), reverse=True)[:15]
        assert found.labels.tolist() == [label for _, label, _ in expected] and len(expected) == 15
        torch.testing.assert_close(found.scores, torch.tensor([score for score, _, _ in expected]))
        scale = torch.tensor([graph.width / size[1], graph.height / size[0]] * 2)
        rows = [row for _, _, row in expected]
        torch.testing.assert_close(found.boxes, image_boxes[rows, found.labels] * scale)
        assert torch.equal(found.logits, image_logits[rows])
        torch.testing.assert_close(found.boxes_per_class, image_boxes[rows] * scale)


def test_boxes_are_exact_in_bfloat16():
    """Without offsets, proposals are anchors, and the box head returns the boxes that it was given."""
    detector = Detector(CLASSES, backbone="resnet18", min_size=160, max_size=720, box_score_threshold=0.0).eval()
    for layer in (detector.model.rpn.head.bbox_pred, detector.model.roi_heads.box_predictor.bbox_pred):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    boxes = torch.tensor([[3.3, 4.4, 555.5, 99.9], [600.1, 1.7, 701.3, 150.2]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = detector.features([torch.rand(3, 160, 720)])
        (proposals,), _ = detector.model.rpn(features.images, features.levels)
        outputs = detector.model.rpn.head(list(features.levels.values()))
        _, decoded = detector._box_head(features, [boxes])
        (found,) = detector.detect(features)
    torch.testing.assert_close(decoded, boxes[:, None].expand_as(decoded))
    levels = [level.float() for level in features.levels.values()]
    anchors = detector.model.rpn.anchor_generator(features.images, levels)[0]
    anchors = {tuple(anchor) for anchor in clip_boxes_to_image(anchors, (160, 720)).tolist()}
    assert len(proposals) > 100 and {tuple(proposal) for proposal in proposals.tolist()} <= anchors
    assert {output.dtype for part in outputs for output in part} == {torch.float32}
    assert len(found.boxes) and {found.boxes.dtype, found.scores.dtype, found.logits.dtype} == {torch.float32}


def test_images_without_detections_give_empty_tensors(detector, features, monkeypatch):
    monkeypatch.setattr(detector, "box_score_threshold", 1.1)
    for image in detector.detect(features):
        assert image.boxes.shape == (0, 4) and image.boxes_per_class.shape == (0, CLASSES, 4)


def test_feature_maps_that_are_not_finite_are_refused(detector, features):
    level = features.levels["1"].clone()
    level[0, 5, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="outputs of the detector must be finite"):
        detector.detect(features._replace(levels=features.levels | {"1": level}))


@pytest.mark.parametrize(
    "layer",
    [
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ],
)
def test_outputs_that_are_not_finite_are_refused(detector, features, layer):
    broken = copy.deepcopy(detector)
    torch.nn.init.constant_(broken.model.get_submodule(layer).bias, float("nan"))
    with pytest.raises(ValueError, match="outputs of the detector must be finite"):
        broken.detect(features)


def test_detections_replace_the_annotated_objects_and_their_features(detector, features, scenes):
    batch = collate(scenes, 20)
    seen = VisualFeatures(torch.zeros(len(batch.labels), 16), torch.zeros(len(batch.pairs), 16))
    found = detector.detect(features)
    graph = with_detections(batch._replace(features=seen), found)
    assert graph.features is None and graph.truth is batch.truth and not graph.targets.any()
    assert graph.lengths.tolist() == [len(image.boxes) for image in found] and len(graph.boxes) == len(graph.scores)


def test_given_boxes_are_classified_in_their_order(detector, features, scenes):
    boxes = [graph.boxes for graph in scenes]
    logits = detector.classify(features, boxes)
    assert logits.shape == (sum(map(len, boxes)), CLASSES)
    assert torch.equal(
        detector.classify(features, [b.flip(0) for b in boxes])[: len(boxes[0])], logits[: len(boxes[0])].flip(0)
    )
    assert not torch.allclose(logits[0], logits[1])


def test_a_frozen_detector_stays_in_evaluation_mode(detector):
    holder = torch.nn.ModuleList([detector]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(p.requires_grad for p in detector.parameters())


def test_the_losses_of_the_detector_reach_every_layer_of_its_heads(scenes):
    detector = Detector(CLASSES, **SIZES).train()
    losses = detector.losses(read_images(scenes[:2])[0], *zip(*((g.boxes, g.labels) for g in scenes[:2])))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.model.roi_heads.parameters())


@pytest.mark.parametrize("kind", ["state of a detector", "checkpoint of a model"])
def test_weights_of_a_detector_are_loaded(detector, tmp_path, kind):
    state = detector.state_dict()
    if kind == "checkpoint of a model":
        state = {f"vision.detector.{name}": tensor for name, tensor in state.items()} | {"network.x": torch.zeros(1)}
        state = {"state_dict": state}
    torch.save(state, tmp_path / "weights.pt")
    other = Detector(CLASSES, **SIZES)
    other.load_weights(str(tmp_path / "weights.pt"))
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), detector.state_dict().values()))


def test_weights_of_another_size_are_refused_with_the_sizes_of_the_detector(detector, tmp_path):
    torch.save(detector.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="backbone 'resnet18', head_dim 1024 and 5 classes"):
        Detector(5, **SIZES).load_weights(str(tmp_path / "weights.pt"))


def test_a_file_without_weights_is_refused(detector, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="must be a file of detector weights, but is not one or is cut short"):
        detector.load_weights(str(path))


def test_a_missing_file_of_weights_is_reported(detector):
    with pytest.raises(FileNotFoundError, match="no such file of detector weights"):
        detector.load_weights("nowhere.pt")


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="backbone must be one of"):
        Detector(5, backbone="vgg16")


def test_trained_batch_norms_give_the_same_features_when_they_are_frozen(scenes, tmp_path):
    trained = Detector(CLASSES, **SIZES, head_dim=64, trains_norms=True).train()
    before = trained.model.backbone.body.bn1.running_var.clone()
    trained.losses(read_images(scenes[:2])[0], *zip(*((g.boxes, g.labels) for g in scenes[:2])))
    assert not torch.equal(trained.model.backbone.body.bn1.running_var, before)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    frozen = Detector(CLASSES, **SIZES, head_dim=64)
    frozen.load_weights(str(tmp_path / "weights.pt"))
    # In float64, because the two kinds of normalization round differently.
    images = [image.double() for image in read_images(scenes[:2])[0]]
    frozen, trained = frozen.double().eval(), trained.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(frozen.features(images).levels, trained.features(images).levels)


def test_torchvision_weights_are_used_with_an_epsilon_of_0(monkeypatch):
    """The reference is torchvision's FrozenBatchNorm2d with an epsilon of 0. The variances are small."""
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(1e-6, 2e-5)  # so small that an epsilon would matter
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **options: theirs.state_dict())
    ours = Detector(91, backbone="resnet50", min_size=64, max_size=64)
    ours.load_weights("torchvision")
    frozen = FrozenBatchNorm2d(64, eps=0.0)
    frozen.load_state_dict(theirs.backbone.body.bn1.state_dict())
    inputs = torch.rand(1, 64, 8, 8) * 1e-3
    with torch.no_grad():
        found = ours.eval().model.backbone.body.bn1(inputs)
        torch.testing.assert_close(found, frozen(inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.model.rpn.state_dict(), theirs.rpn.state_dict())


def test_images_more_than_96_times_as_long_as_wide_are_refused(detector):
    assert detector.features([torch.zeros(3, 2, 192)]).levels
    with pytest.raises(ValueError, match="at most 96 times the short side, got 193 x 2 pixels"):
        detector.features([torch.zeros(3, 2, 193)])


# ---- regions


def test_union_features_are_pooled_from_every_level(regions, features, scenes):
    boxes, pairs = [g.boxes for g in scenes], [torch.tensor([[0, 1], [2, 0]])] * 4
    ours = regions.pairs(features, boxes, pairs)
    assert ours.shape == (8, 24)
    image, subject, object_ = 1, 2, 0
    (resized,) = features.resized(boxes)[image : image + 1]
    low = torch.minimum(resized[subject], resized[object_])[:2]
    high = torch.maximum(resized[subject], resized[object_])[2:]
    region = torch.tensor([[image, *low, *high]])
    pooled = [roi_align(features.levels[str(i)], region, 7, 2.0**-2 / 2**i, 2) for i in range(4)]
    visual = regions.union_reduce(torch.cat(pooled, 1)).relu()
    height, width = features.images.image_sizes[image]
    both = torch.stack([resized[subject], resized[object_]]) / torch.tensor([width, height] * 2)
    expected = regions.union_head(visual + regions.rectangles(rectangle_masks(both)[None]))
    torch.testing.assert_close(ours[3:4], expected, atol=1e-5, rtol=1e-4)


def test_pairs_in_parts_give_the_same_features_as_all_at_once(regions, features, scenes, monkeypatch):
    boxes, pairs = [g.boxes for g in scenes], [torch.tensor([[0, 1], [2, 0], [1, 2]])] * 4
    at_once = regions.pairs(features, boxes, pairs)
    monkeypatch.setattr("sgalign.models.regions.PAIRS_AT_ONCE", 5)
    torch.testing.assert_close(regions.pairs(features, boxes, pairs), at_once, atol=1e-5, rtol=1e-4)


def test_scales_do_not_depend_on_the_first_images(detector, regions, scenes):
    """A thin image comes first. Its feature maps are a pixel or two wide, too little to infer their scales."""
    torch.manual_seed(1)
    fresh = RegionFeatures(dim=24).eval()
    fresh.load_state_dict(regions.state_dict())
    thin, box = torch.rand(3, 20, 600), [torch.tensor([[5.0, 5, 500, 15]])]
    fresh.objects(detector.features([thin]), box)
    usual = detector.features(read_images([scenes[0]])[0])
    ours, theirs = (module.objects(usual, [scenes[0].boxes]) for module in (fresh, regions))
    torch.testing.assert_close(ours, theirs)


def test_rectangle_masks_mark_every_cell_that_a_box_touches():
    masks = rectangle_masks(torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 0.51, 1], [0.1, 0.2, 0.3, 0.9], [1, 1, 1, 1]]))
    assert masks.shape == (4, 27, 27) and masks[0].all() and masks[1].sum() == 27 and masks[3].sum() == 1
    for y in range(27):
        for x in range(27):
            touches = x + 1 > 2.7 and x < 8.1 and y + 1 > 5.4 and y < 24.3
            assert masks[2, y, x] == touches


def test_images_without_objects_or_pairs_have_no_features(regions, features, scenes):
    boxes = [scenes[0].boxes, torch.zeros(0, 4), scenes[2].boxes[:1], torch.zeros(0, 4)]
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert regions.objects(features, boxes).shape == (len(scenes[0].boxes) + 1, 24)
    assert regions.pairs(features, boxes, [none] * 4).shape == (0, 24)


def test_region_heads_start_with_the_weights_of_the_detector(detector):
    regions = RegionFeatures(dim=1024)
    regions.load_box_head(detector)
    theirs = detector.model.roi_heads.box_head
    assert torch.equal(regions.object_head.fc6.weight, theirs.fc6.weight)
    assert torch.equal(regions.union_head.fc7.bias, theirs.fc7.bias)


def test_small_region_heads_start_with_all_weights_of_the_detector():
    detector, regions = Detector(CLASSES, **SIZES, head_dim=64), RegionFeatures(dim=64)
    regions.load_box_head(detector)
    for head in (regions.object_head, regions.union_head):
        torch.testing.assert_close(head.state_dict(), detector.model.roi_heads.box_head.state_dict())


# ---- cache


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_cached_features_equal_those_computed_from_the_images(detector, regions, scenes, tmp_path, half):
    cache_features(scenes, detector, regions, tmp_path, half=half)
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path)))
    batch = cache.add_to(collate(scenes, 20))
    with torch.no_grad():
        for graph, objects, logits in zip(
            scenes,
            batch.features.objects.split(batch.lengths.tolist()),
            batch.features.logits.split(batch.lengths.tolist()),
        ):
            alone = detector.features(read_images([graph])[0])
            tolerance = {"atol": 1e-2, "rtol": 1e-2} if half else {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(objects, regions.objects(alone, [graph.boxes]), **tolerance)
            torch.testing.assert_close(logits, detector.classify(alone, [graph.boxes]), **tolerance)
        pairs = collate(scenes[:1], 20).pairs
        union = regions.pairs(detector.features(read_images([scenes[0]])[0]), [scenes[0].boxes], [pairs])
        torch.testing.assert_close(batch.features.unions[: len(pairs)], union, **tolerance)


def test_an_interrupted_cache_is_completed_without_rewriting_its_files(
    detector, regions, scenes, tmp_path, monkeypatch
):
    monkeypatch.setattr("sgalign.commands.cache_features.IMAGES_A_FILE", 1)

    def fails():
        raise OSError("the disk is full")

    broken = SceneGraph("broken", 9, 9, scenes[0].boxes[:0], scenes[0].labels[:0], scenes[0].relations[:0], fails)
    with pytest.raises(OSError, match="disk is full"):
        cache_features([scenes[0], broken, scenes[1]], detector, regions, tmp_path)
    assert scenes[0].image_id in FeatureCache(tmp_path) and "broken" not in FeatureCache(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    cache_features(scenes[:2], detector, regions, tmp_path)
    assert scenes[1].image_id in FeatureCache(tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_deleted_file_of_a_cache_is_written_again(detector, regions, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("sgalign.commands.cache_features.IMAGES_A_FILE", 1)
    cache_features([*scenes[:3], scenes[0]], detector, regions, tmp_path)  # has an image twice
    sorted(tmp_path.glob("*.h5"))[1].unlink()
    cache_features(scenes[:4], detector, regions, tmp_path)
    cache = FeatureCache(tmp_path)
    assert len(cache.paths) == 4 and all(graph.image_id in cache for graph in scenes)


def test_an_incomplete_cache_is_refused_when_the_data_are_read(detector, regions, scenes, tmp_path):
    cache_features(scenes[:2], detector, regions, tmp_path)
    with pytest.raises(ValueError, match="must have features of all 500 images of the validation split, but lacks 498"):
        _ = SceneGraphData(features=str(tmp_path)).validation


def test_a_missing_cache_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder that sgalign cache-features has filled"):
        SceneGraphData(features=str(tmp_path / "nowhere"))


def test_an_incomplete_file_of_a_cache_is_refused_by_name(detector, regions, scenes, tmp_path):
    cache_features(scenes[:1], detector, regions, tmp_path)
    path = next(tmp_path.glob("*.h5"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name}: must be a feature file, but is not one or is cut short"):
        FeatureCache(tmp_path)["x"]


@pytest.fixture(scope="module")
def cache_of_one(detector, regions, scenes, tmp_path_factory):
    """The folder of a cache of the first image, which no test changes."""
    folder = tmp_path_factory.mktemp("cache")
    cache_features(scenes[:1], detector, regions, folder)
    return folder


def test_a_cache_of_other_weights_is_not_extended(cache_of_one, detector, scenes):
    with pytest.raises(ValueError, match="its features have weights .* choose another folder"):
        cache_features(scenes[:1], detector, RegionFeatures(dim=24), cache_of_one)


def test_a_cache_of_images_of_other_sizes_is_not_extended(cache_of_one, detector, regions, scenes, monkeypatch):
    monkeypatch.setattr(detector.model.transform, "max_size", 128)
    with pytest.raises(ValueError, match=r"have sizes \(64,\), 96, but the new ones would have \(64,\), 128"):
        cache_features(scenes[:1], detector, regions, cache_of_one)


def test_an_image_that_is_not_cached_is_refused(cache_of_one, scenes):
    with pytest.raises(ValueError, match="has no features of image"):
        FeatureCache(cache_of_one).add_to(collate(scenes[1:2], 20))


def test_cached_features_of_other_boxes_are_refused(cache_of_one, scenes):
    batch = collate(scenes[:1], 20)
    with pytest.raises(ValueError, match="the cached boxes of image"):
        FeatureCache(cache_of_one).add_to(batch._replace(boxes=batch.boxes + 1))


# ---- training and prediction


@pytest.fixture(scope="module")
def data():
    data = SceneGraphData(images=True, batch_size=2)
    data.train, data.validation, data.test = small(data.train, 4), small(data.validation, 2), small(data.test, 2)
    return data


def fitted(kind, data, tmp_path=None, **options):
    """Train a model for an epoch and save its checkpoint, if there is a folder. Return the model and the trainer."""
    sizes = SIZES | {"detections_per_image": 6, "embed_dim": 8, "hidden_dim": 8, "relation_dim": 16, "vision": "images"}
    pl.seed_everything(0, verbose=False)
    module = kind(**(sizes | options))
    trainer = trainer_without_sanity_check()
    trainer.fit(module, datamodule=data)
    if tmp_path is not None:
        trainer.save_checkpoint(tmp_path / "model.ckpt")
    return module, trainer


@pytest.mark.parametrize("protocol", ["predcls", "sgcls", "sgdet"])
def test_each_protocol_trains_all_but_the_detector_from_images(data, protocol):
    module, trainer = fitted(AlignMotifsModule, data, protocol=protocol)
    metrics = trainer.callback_metrics
    assert ("train/objects" in metrics) == (protocol != "predcls") and metrics["train/alignment"] >= 0
    assert 0 <= metrics["val/R@100"] <= 1
    graph = module.see(collate(data.train[:2], 20, pixels=True)).graph
    if protocol == "sgdet":
        assert len(graph.boxes) != len(collate(data.train[:2], 20).boxes), "in sgdet, the objects must be detections"
    module.train()
    loss, _ = module.losses(collate(data.train[:2], 20, pixels=True), 0)
    module.zero_grad()
    loss.backward()
    missing = {n for n, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing and all(p.grad is None for p in module.vision.detector.parameters())


def test_annotated_labels_do_not_influence_predictions_in_sgcls(data):
    module, _ = fitted(MotifsModule, data, protocol="sgcls")
    batch = collate(data.test, 20, pixels=True)
    others = batch._replace(labels=torch.ones_like(batch.labels))
    module.eval()
    for ours, theirs in zip(module.predictions(batch), module.predictions(others)):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["predicate_scores"], theirs["predicate_scores"])


def cached_motifs(relation_dim=16):
    """Return a model of cached features that was not trained."""
    sizes = {"embed_dim": 8, "hidden_dim": 8, "relation_dim": relation_dim}
    module = MotifsModule(protocol="sgcls", vision="cached", **sizes)
    module.make_network(torch.ones(17, 17, 21))
    return module


def test_a_model_gives_the_same_logits_from_cached_features_and_from_images(data, tmp_path):
    module, _ = fitted(MotifsModule, data, protocol="sgcls")
    cache_features(data.test, module.vision.detector, module.vision.regions, tmp_path)
    cached = cached_motifs()
    cached.network, cached.relation_loss = module.network.eval(), module.relation_loss
    batch = collate_for(data.test[:1], 20, cache=FeatureCache(tmp_path))
    module.eval()
    expected = module(module.see(collate(data.test[:1], 20, pixels=True)))
    ours = cached.eval()(cached.see(batch))
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert SceneGraphData(features=str(tmp_path)).cache is not None


def test_a_model_of_cached_features_needs_data_with_features(data):
    with pytest.raises(ValueError, match="the data must have features for a model"):
        cached_motifs().see(collate(data.test[:1], 20))


def test_a_model_of_another_size_than_the_cached_features_is_refused(data, detector, tmp_path):
    cache_features(data.test[:1], detector, RegionFeatures(dim=16), tmp_path)
    with pytest.raises(ValueError, match="relation_dim must be 16, as in the features of the data, got 8"):
        cached_motifs(relation_dim=8).see(collate_for(data.test[:1], 20, cache=FeatureCache(tmp_path)))


def test_stretched_images_are_reported_when_their_features_are_cached(data, detector, regions, tmp_path, caplog):
    wider = [dataclasses.replace(graph, width=3 * graph.width) for graph in data.test[:2]]
    cache_features(wider, detector, regions, tmp_path)
    expected = f"2 images of other proportions than annotated. For example, image {wider[0].image_id!r} is stretched"
    assert caplog.messages[0].startswith(expected)


def test_sgdet_cannot_use_cached_features():
    with pytest.raises(ValueError, match="vision must be images for sgdet, got 'cached'"):
        MotifsModule(protocol="sgdet", vision="cached")


def test_a_model_is_not_evaluated_on_features_of_other_weights(data, detector, tmp_path):
    def with_features(folder, seed):
        torch.manual_seed(seed)
        cache_features([*data.train, *data.validation, *data.test], detector, RegionFeatures(dim=16), folder)
        cached = SceneGraphData(batch_size=2)
        cached.train, cached.validation, cached.test = data.train, data.validation, data.test
        cached.cache = FeatureCache(folder)
        return cached

    own, others = with_features(tmp_path / "own", 1), with_features(tmp_path / "others", 2)
    module, trainer = fitted(MotifsModule, own, tmp_path, vision="cached")
    with pytest.raises(ValueError, match="features of the data must be those that the model was trained on"):
        trainer.test(module, datamodule=others, verbose=False)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        fresh = MotifsModule(**module.hparams)
        evaluate(fresh, datamodule=own, ckpt_path=str(tmp_path / "model.ckpt"), weights_only=True)
        fresh = MotifsModule(**module.hparams)
        with pytest.raises(ValueError, match="features of the data must be those that the model was trained on"):
            evaluate(fresh, datamodule=others, ckpt_path=str(tmp_path / "model.ckpt"), weights_only=True)


def test_training_changes_every_weight_of_the_detector(data):
    module, trainer, start = DetectorModule(**SIZES), trainer_without_sanity_check(), {}
    module.on_train_start = lambda: start.update({name: p.detach().clone() for name, p in module.named_parameters()})
    trainer.fit(module, datamodule=data)
    assert start and not [name for name, p in module.named_parameters() if torch.equal(start[name], p)]
    assert {"train/classifier", "train/box_reg", "train/objectness"} <= trainer.callback_metrics.keys()


def test_the_found_share_counts_annotated_objects_with_a_detection_of_their_class(data, monkeypatch):
    def detect(self, features):
        """Return a detection of each object, some of them wrong.

        In the first image, the last box is wrong. In the second image, all classes but the first are wrong.
        """
        first, second = ((graph.boxes.clone(), graph.labels.clone()) for graph in data.validation)
        first[0][-1] += 10000
        second[1][1:] = min(set(range(1, CLASSES)) - set(second[1].tolist()))
        return [
            ObjectDetections(*image, torch.ones(len(image[0])), *torch.ones(2, len(image[0]), 1))
            for image in (first, second)
        ]

    monkeypatch.setattr(Detector, "detect", detect)
    (figures,) = trainer_without_sanity_check().validate(DetectorModule(**SIZES), datamodule=data, verbose=False)
    counts = [len(graph.boxes) for graph in data.validation]
    assert figures["val/found"] == pytest.approx((counts[0] - 1 + 1) / sum(counts))


def test_the_detection_writer_writes_a_file_that_can_be_read_back(data, tmp_path):
    trainer = trainer_without_sanity_check(callbacks=[DetectionWriter(tmp_path / "found.json")])
    (batch,) = trainer.predict(DetectorModule(**SIZES), datamodule=data)
    found = read_detections(tmp_path / "found.json", data.object_names)
    assert list(found) == [image["image_id"] for image in batch] == [graph.image_id for graph in data.test]
    for image in batch:
        for written, expected in zip(found[image["image_id"]], (image["boxes"], image["labels"], image["scores"])):
            torch.testing.assert_close(written, expected)


def test_a_model_that_reads_images_needs_data_with_images(data):
    module, _ = fitted(MotifsModule, data, protocol="predcls")
    with pytest.raises(ValueError, match="data.images must be true"):
        module.see(collate(data.test, 20))


PREDICTION = {
    "image_id": "x", "boxes": torch.zeros(3, 4), "labels": torch.tensor([1, 2, 1]),
    "scores": torch.tensor([1.0, 0.5, 0.1]), "pairs": torch.tensor([[0, 1], [1, 2]]),
    "predicate_scores": torch.tensor([[0.1, 0.5, 0.4], [0.0, 0.3, 0.7]]),
}  # fmt: skip
NAMES = ["bg", "cat", "mat"], ["bg", "on", "by"]


def described_triplets(**options):
    found = describe(PREDICTION, *NAMES, **options)["triplets"]
    return [(t["subject"], t["predicate"], t["object"], t["score"]) for t in found]


def test_a_described_graph_has_the_best_triplet_of_each_pair():
    best = [(0, "on", 1, 0.25), (1, "by", 2, 0.035)]
    assert described_triplets(top_k=9) == best and described_triplets(top_k=1) == best[:1]


def test_a_described_graph_can_have_all_predicates_of_each_pair():
    every = [(0, "on", 1, 0.25), (0, "by", 1, 0.2), (1, "by", 2, 0.035), (1, "on", 2, 0.015)]
    assert described_triplets(top_k=9, all_predicates=True) == every


def test_a_described_graph_without_pairs_has_no_triplets():
    none = {"pairs": torch.zeros(0, 2).long(), "predicate_scores": torch.zeros(0, 3)}
    assert describe(PREDICTION | none, *NAMES, 5)["triplets"] == []


@pytest.mark.parametrize(
    "field, values", [("logits", np.ones(3)), ("union", np.ones((1, 3))), ("objects", np.bytes_("x"))]
)
def test_features_of_another_shape_are_refused(field, values, tmp_path):
    with h5py.File(tmp_path / "features_0.h5", "w") as file:
        file.attrs.update(weights="x", dtype="float32")
        arrays = dict(boxes=np.ones((2, 4)), objects=np.ones((2, 3)), logits=np.ones((2, 3)), union=np.ones((2, 3)))
        for name, array in (arrays | {field: values}).items():
            file[f"x/{name}"] = array
    with pytest.raises(ValueError, match=r"features_0\.h5, image 'x': is damaged"):
        FeatureCache(tmp_path)["x"]


def test_the_source_of_a_damaged_cache_is_refused_by_name(tmp_path):
    (tmp_path / "features_0.h5").write_text("x")
    with pytest.raises(ValueError, match=r"features_0\.h5: must be a feature file"):
        FeatureCache(tmp_path).source  # noqa: B018
