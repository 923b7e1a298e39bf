"""Tests of new runs that start from a model with other classes. Most models are not trained."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from trainers import SMALL_DETR, SMALL_MOTIFS, SMALL_SGTR, trainer_without_sanity_check  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import collate  # noqa: E402
from sgalign.files import read_tensors  # noqa: E402
from sgalign.models import Detector  # noqa: E402
from sgalign.models.entity_detector import EntityDetector  # noqa: E402
from sgalign.training import (  # noqa: E402
    AlignMotifsModule,
    AlignSGTRModule,
    AveragedTeacherModule,
    DetectorModule,
    EntityDetectorModule,
    MotifsModule,
    SceneGraphData,
    SGTRModule,
    load_module,
    starting,
)

SMALL_DETECTOR = {"backbone": "resnet18", "head_dim": 8, "min_size": 48, "max_size": 64}
IMAGES = SMALL_MOTIFS | SMALL_DETECTOR | {"vision": "images", "protocol": "sgcls"}
SYSTEMS = {
    "motifs": (AlignMotifsModule, SMALL_MOTIFS),
    "motifs on images": (MotifsModule, IMAGES),
    "sgtr": (AlignSGTRModule, SMALL_SGTR),
    "sgtr without focal loss": (SGTRModule, SMALL_SGTR | {"focal": False}),
}


def scenes_with(rename=lambda name: name, more=(), shuffled=False):
    """Return the data module with 6 training images, whose classes have other names or another order.

    Args:
        rename: function from the old name of a class to the new one.
        more: names of additional classes of objects and predicates.
        shuffled: if True, the classes have another order.
    """
    data = SceneGraphData(images=True, batch_size=2)
    train, validation = data.train[:6], data.validation[:6]  # read with the original names
    numbers = {}
    for kind in ("object_names", "predicate_names"):
        old = getattr(data, kind)
        new = [rename(name) for name in old[1:]] + [f"{name} {kind}" for name in more]
        if shuffled:
            random.Random(0).shuffle(new)
        setattr(data, kind, [old[0], *new])
        numbers[kind] = torch.tensor([0, *(new.index(rename(name)) + 1 for name in old[1:])])

    def changed(graph):
        relations = graph.relations.clone()
        relations[:, 2] = numbers["predicate_names"][relations[:, 2]]
        return replace(graph, labels=numbers["object_names"][graph.labels], relations=relations)

    data.train, data.validation = [changed(graph) for graph in train], [changed(graph) for graph in validation]
    data.annotated = data.train
    data.numbers = numbers
    return data


def made(module, data, seed=0, **options):
    """Return the module after its run has started, without any step."""
    pl.seed_everything(seed, verbose=False)
    trainer_without_sanity_check(**{"max_epochs": 0} | options).fit(module, data)
    return module


def saved(module, data, path, **options):
    """Write the checkpoint of a module that is made on the data, and return the module."""
    made(module, data, **options)
    module.trainer.save_checkpoint(path)
    return module


@pytest.fixture
def printed(monkeypatch):
    lines = []
    monkeypatch.setattr(starting, "rank_zero_info", lines.append)
    return lines


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request, tmp_path_factory):
    """A module, its options and the checkpoint of a model of it."""
    kind, options = SYSTEMS[request.param]
    path = tmp_path_factory.mktemp("source") / "source.ckpt"
    theirs = saved(kind(**options), scenes_with(), path).eval()
    return kind, options, path, theirs


@torch.no_grad()
def scores(module, graphs):
    """Return the scores of a batch with the classes of objects, and with the predicates, as the last dimension."""
    batch = collate(graphs, len(module.predicate_names) - 1, pixels=module.looks_at_images)
    if isinstance(module, MotifsModule):
        prediction = module(module.see(batch))
        objects = torch.zeros(1, len(module.object_names)) if prediction.object_logits is None else None
        return prediction.object_logits if objects is None else objects, prediction.logits
    entities = module.detect(batch)[1]
    outputs = module.network(entities.last())
    logits = [entities.logits.flatten(0, -2), outputs.class_logits.flatten(0, -2)]
    # The background comes last. Without the focal loss, the predicates have one, too.
    predicates = outputs.logits.flatten(0, -2)
    if module.options.focal:
        predicates = torch.cat([predicates, torch.zeros(len(predicates), 1)], 1)
    return torch.cat(logits).roll(1, -1), predicates.roll(1, -1)


def test_classes_in_another_order_are_found_by_name(system, printed):
    kind, options, path, theirs = system
    data, shuffled = scenes_with(), scenes_with(shuffled=True)
    ours = made(kind(**options, start_from=str(path)), shuffled, seed=1).eval()
    assert ours.object_names != theirs.object_names
    both = scores(ours, shuffled.train[:2]), scores(theirs, data.train[:2])
    for mine, other, numbers in zip(*both, shuffled.numbers.values(), strict=True):
        torch.testing.assert_close(mine[:, numbers], other)
    assert printed[-1] == f"start_from {path}: the classes have the same names"
    assert "new:" not in printed[-2] and "not used" not in printed[-2]


def test_additional_classes_start_anew_and_are_named(system, printed):
    kind, options, path, theirs = system
    data = scenes_with(more=("extra",))
    if options.get("vision") == "images":
        with pytest.raises(ValueError, match="lacks extra object_names. Train the detector first"):
            made(kind(**options, start_from=str(path)), data)
        return
    ours = made(kind(**options, start_from=str(path)), data, seed=1).eval()
    of_data = scenes_with().train[:2]
    (objects, predicates), (their_objects, their_predicates) = scores(ours, of_data), scores(theirs, of_data)
    torch.testing.assert_close(objects[:, :-1], their_objects)
    if kind is not AlignMotifsModule:  # its bias is the log of frequencies among more predicates
        torch.testing.assert_close(predicates[:, :-1], their_predicates)
    of = [len(theirs.object_names), len(theirs.predicate_names)]
    assert printed[-1] == (
        f"start_from {path}: new object classes: 1 of {of[0]} (extra object_names), "
        f"new predicates: 1 of {of[1]} (extra predicate_names)"
    )


def test_of_disjoint_classes_only_the_background_is_kept(tmp_path, printed):
    theirs = saved(MotifsModule(**SMALL_MOTIFS), scenes_with(), tmp_path / "source.ckpt")
    data = scenes_with(rename=lambda name: f"my {name}")
    scratch = made(MotifsModule(**SMALL_MOTIFS), data, seed=1).network.state_dict()
    ours = made(MotifsModule(**SMALL_MOTIFS, start_from=str(tmp_path / "source.ckpt")), data, seed=1)
    for name, tensor in ours.network.state_dict().items():
        other = theirs.network.state_dict()[name]
        if name in ("object_embedding.weight", "edge_embedding.weight", "predicate.weight", "predicate.bias"):
            assert tensor[0].equal(other[0]) and tensor[1:].equal(scratch[name][1:])
        else:
            assert tensor.equal(scratch[name] if name == "frequency_bias.logits" else other)
    assert "new object classes: 16 of 16 (my " in printed[-1]
    assert "predicates that are not used: 20 of 20 (" in printed[-1]
    assert "computed by the run: 3 (network.frequency_bias, relation_loss)" in printed[-2]


def test_the_frequency_bias_comes_from_the_new_data(tmp_path):
    saved(MotifsModule(**SMALL_MOTIFS, learning_rate=0.1), scenes_with(), tmp_path / "source.ckpt", max_epochs=1)
    data = scenes_with()
    scratch = made(MotifsModule(**SMALL_MOTIFS), data)
    ours = made(MotifsModule(**SMALL_MOTIFS, start_from=str(tmp_path / "source.ckpt")), data)
    assert ours.network.frequency_bias.logits.equal(scratch.network.frequency_bias.logits)
    assert not ours.network.predicate.weight.equal(scratch.network.predicate.weight)
    assert ours.global_step == 0 and ours.current_epoch == 0


def test_another_width_is_refused_with_the_option_to_change(system, tmp_path):
    kind, options, path, theirs = system
    name = "dim" if issubclass(kind, SGTRModule) else "hidden_dim"
    with pytest.raises(ValueError, match=rf"^{name} must be {options[name]}, got 64, as in start_from"):
        made(kind(**options | {name: 64}, start_from=str(path)), scenes_with())
    checkpoint = torch.load(path, weights_only=True)
    width = "network.vector.weight" if name == "dim" else "network.head_tail.weight"
    checkpoint["state_dict"][width] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match=rf"{width} must have shape .*, but it has shape \[3, 3\]"):
        made(kind(**options, start_from=str(tmp_path / "wrong.ckpt")), scenes_with())
    checkpoint["sgalign"]["object_names"].append("one that has no row")
    checkpoint["state_dict"][width] = theirs.state_dict()[width]
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match="must have shape .* to start from, but has shape"):
        made(kind(**options, start_from=str(tmp_path / "wrong.ckpt")), scenes_with())


def test_another_system_and_a_file_without_names_are_refused(tmp_path):
    saved(DetectorModule(**SMALL_DETECTOR), scenes_with(), tmp_path / "detector.ckpt")
    with pytest.raises(ValueError, match="start_from must be a checkpoint of MotifsModule or a variant of it"):
        made(MotifsModule(**SMALL_MOTIFS, start_from=str(tmp_path / "detector.ckpt")), scenes_with())
    torch.save({"state_dict": {}}, tmp_path / "nameless.ckpt")
    with pytest.raises(ValueError, match="nameless.ckpt: must be a checkpoint .* has no class names"):
        made(MotifsModule(**SMALL_MOTIFS, start_from=str(tmp_path / "nameless.ckpt")), scenes_with())


@pytest.mark.parametrize("tied", [False, True])
def test_a_mirror_starts_anew_without_one_in_the_checkpoint_and_is_left_out_without_one_in_the_model(
    tied, tmp_path, printed
):
    theirs = saved(AlignMotifsModule(**SMALL_MOTIFS), scenes_with(), tmp_path / "mirror.ckpt")
    torch.nn.init.zeros_(theirs.mirrored_head.weight)
    theirs.trainer.save_checkpoint(tmp_path / "mirror.ckpt")
    own = {"start_from": str(tmp_path / "mirror.ckpt")}
    plain = saved(MotifsModule(**SMALL_MOTIFS, **own), scenes_with(), tmp_path / "plain.ckpt", seed=1)
    assert "not used: 2 (mirrored_head)" in printed[-2]
    again = AlignMotifsModule(**SMALL_MOTIFS, tied_head=tied, start_from=str(tmp_path / "plain.ckpt"))
    made(again, scenes_with())
    assert ("new: 2 (mirrored_head)" in printed[-2]) != tied
    # A tied head is the supervised one, so the mirror's head of the checkpoint must not replace it.
    for module in (plain, again, made(AlignMotifsModule(**SMALL_MOTIFS, tied_head=tied, **own), scenes_with())):
        assert module.network.predicate.weight.equal(theirs.network.predicate.weight)


def test_an_averaged_teacher_starts_as_a_copy_of_the_started_network(tmp_path):
    saved(MotifsModule(**SMALL_MOTIFS), scenes_with(), tmp_path / "source.ckpt")
    module = AveragedTeacherModule(**SMALL_MOTIFS, start_from=str(tmp_path / "source.ckpt"))
    made(module, scenes_with(), seed=1)
    ours, teacher = module.network.state_dict(), module.teacher.module.state_dict()
    assert all(ours[name].equal(teacher[name]) for name in ours)


def test_word_vectors_are_used_for_the_classes_that_the_checkpoint_lacks(tmp_path):
    theirs = saved(MotifsModule(**SMALL_MOTIFS), scenes_with(), tmp_path / "source.ckpt")
    data = scenes_with(more=("extra",))
    vector = " 0.5" * 12
    (tmp_path / "words.txt").write_text(f"dog{vector}\nobject_names{vector}\n")
    options = SMALL_MOTIFS | {"word_vectors": str(tmp_path / "words.txt"), "start_from": str(tmp_path / "source.ckpt")}
    embedding = made(MotifsModule(**options), data).network.object_embedding.weight
    assert embedding[:-1].equal(theirs.network.object_embedding.weight) and (embedding[-1] == 0.5).all()


def test_a_resumed_run_and_an_exported_model_do_not_need_the_source(system, tmp_path):
    kind, options, path, _ = system
    source = shutil.copy(path, tmp_path / "gone.ckpt")
    limits = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    first = saved(kind(**options, start_from=str(source)), scenes_with(), tmp_path / "first.ckpt", **limits)
    source.unlink()
    resumed = kind(**options, start_from=str(source))
    resumed.on_load_checkpoint(torch.load(tmp_path / "first.ckpt", weights_only=True))  # as the command line does
    run = trainer_without_sanity_check(**limits | {"max_epochs": 2})
    run.fit(resumed, scenes_with(), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.global_step == 2
    assert cli.main(["export", str(tmp_path / "first.ckpt"), str(tmp_path / "folder")]) == 0
    assert str(tmp_path) not in (tmp_path / "folder" / "config.json").read_text()
    exported = load_module(tmp_path / "folder")
    assert all(tensor.equal(exported.state_dict()[name]) for name, tensor in first.state_dict().items())


# ---- detectors


@pytest.mark.parametrize(
    ("changes", "new"),
    [({"shuffled": True}, 0), ({"more": ("extra",), "shuffled": True}, 1), ({"rename": lambda name: f"my {name}"}, 16)],
    ids=["order", "more", "disjoint"],
)
@pytest.mark.parametrize("kind", ["faster r-cnn", "detr"])
def test_a_detector_starts_from_one_with_other_classes(kind, changes, new, tmp_path, printed):
    source, data = str(tmp_path / "detector.ckpt"), scenes_with(**changes)
    if kind == "detr":
        theirs = saved(EntityDetectorModule(**SMALL_DETR), scenes_with(), source)
        ours = made(EntityDetectorModule(**SMALL_DETR, detector_weights=source), data, seed=1)
    else:
        theirs = saved(DetectorModule(**SMALL_DETECTOR), scenes_with(), source)
        ours = made(DetectorModule(**SMALL_DETECTOR, weights=source), data, seed=1)
    mine, others = rows_by_class(ours), rows_by_class(theirs)
    common = mine.keys() & others.keys()
    assert len(common) == (1 if new == 16 else 17)
    assert all(torch.equal(mine[name], others[name]) for name in common)
    state, other = ours.network.state_dict(), theirs.network.state_dict()
    heads = "class_labels_classifier", "cls_score", "bbox_pred"
    assert all(state[name].equal(other[name]) for name in state if not any(head in name for head in heads))
    expected = [f"the detector in {source} lacks {new} of the data's {len(data.object_names) - 1} object classes"]
    assert [line.partition(",")[0] for line in printed] == (expected if new else [])


def rows_by_class(module):
    """Return all weights of each object class of a detector, by the name of the class."""
    if isinstance(module, EntityDetectorModule):
        head = module.detector.detr.class_labels_classifier
        weights = torch.cat([head.weight, head.bias[:, None]], 1).roll(1, 0)  # the background comes last
    else:
        heads = module.network.model.roi_heads.box_predictor
        parts = [part for head in (heads.cls_score, heads.bbox_pred) for part in (head.weight, head.bias)]
        weights = torch.cat([part.reshape(len(module.object_names), -1) for part in parts], 1)
    return dict(zip(module.object_names, weights, strict=True))


def test_a_frozen_detector_must_know_the_classes(tmp_path):
    source = str(tmp_path / "detector.ckpt")
    saved(EntityDetectorModule(**SMALL_DETR), scenes_with(), source)
    more, shuffled = scenes_with(more=("extra",)), scenes_with(shuffled=True)
    frozen = SMALL_SGTR | {"detector_weights": source, "frozen": ["detector"]}
    with pytest.raises(ValueError, match="but .*detector.ckpt lacks extra object_names. Train the detector first"):
        made(SGTRModule(**frozen), more)
    sgtr = saved(SGTRModule(**frozen), shuffled, tmp_path / "sgtr.ckpt")
    start = SMALL_SGTR | {"start_from": str(tmp_path / "sgtr.ckpt")}
    with pytest.raises(ValueError, match="start_from must be a detector of the data's object classes"):
        made(SGTRModule(**start, frozen=["detector"]), more)
    made(SGTRModule(**start), more)
    again = made(SGTRModule(**start, frozen=["detector"]), shuffled).state_dict()
    assert all(tensor.equal(again[name]) for name, tensor in sgtr.state_dict().items())
    trained = made(SGTRModule(**SMALL_SGTR, detector_weights=source), more)
    head = trained.detector.detr.class_labels_classifier.weight
    assert all(weight.equal(head) for weight in trained.network.entity_class.weight)
    saved(DetectorModule(**SMALL_DETECTOR), scenes_with(), source)
    with pytest.raises(ValueError, match="must be a detector of the data's object classes, because it stays frozen"):
        made(MotifsModule(**IMAGES, detector_weights=source), more)
    made(MotifsModule(**IMAGES, detector_weights=source), shuffled)


def test_a_detector_of_its_own_replaces_the_one_of_the_started_model(tmp_path):
    saved(MotifsModule(**IMAGES), scenes_with(), tmp_path / "source.ckpt")
    data = scenes_with(more=("extra",))
    theirs = saved(DetectorModule(**SMALL_DETECTOR), data, tmp_path / "detector.ckpt", seed=1)
    paths = {"start_from": str(tmp_path / "source.ckpt"), "detector_weights": str(tmp_path / "detector.ckpt")}
    ours = made(MotifsModule(**IMAGES, **paths), data, seed=2)
    other = theirs.network.state_dict()
    assert all(tensor.equal(other[name]) for name, tensor in ours.vision.detector.state_dict().items())


def test_a_detector_without_names_has_the_same_classes_if_it_has_as_many(tmp_path, printed):
    data = SceneGraphData()
    theirs = Detector(17, backbone="resnet18", head_dim=8)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    source, same = str(tmp_path / "weights.pt"), Detector(17, backbone="resnet18", head_dim=8)
    assert starting.load_detector(same, source, data.object_names) == []
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in same.state_dict().items())
    assert "has no class names, so they are taken to be the data's" in printed[-1]
    other = Detector(4, backbone="resnet18", head_dim=8)
    before = other.model.roi_heads.box_predictor.cls_score.weight.clone()
    assert starting.load_detector(other, source, ["__background__", "a", "b", "c"]) == ["a", "b", "c"]
    assert other.model.roi_heads.box_predictor.cls_score.weight.equal(before)
    assert other.model.rpn.state_dict()["head.cls_logits.weight"].equal(theirs.model.rpn.head.cls_logits.weight)
    assert "lacks 3 of the data's 3 object classes, which start anew: a, b, c" in printed[-1]
    with pytest.raises(ValueError, match="must hold a detector with .* head_dim 9"):
        starting.load_detector(Detector(4, backbone="resnet18", head_dim=9), source, ["__background__", "a", "b", "c"])


def test_weights_of_transformers_keep_their_classes_only_if_they_may_be_the_same(tmp_path):
    sizes = {"backbone": "resnet10", "stride": 16, "dim": 32, "heads": 4, "ffn_dim": 32, "layers": 2}
    first = EntityDetector(16, **sizes)
    names = [f"thing {number}" for number in range(16)]
    for labels, others in ((None, names), (names, names), (names, names[::-1]), (None, names[1:])):
        if labels is not None:
            first.detr.config.id2label = dict(enumerate(labels))
        first.detr.save_pretrained(tmp_path / "detr")
        second = EntityDetector(len(others), weights=tmp_path / "detr")
        kept = len(others) == 16 and labels in (None, others)
        assert second.reset_other_classes(others) != kept
        head, theirs = (one.detr.class_labels_classifier.weight for one in (second, first))
        assert (head.shape == theirs.shape and head.equal(theirs)) == kept
    frozen = EntityDetectorModule(**SMALL_DETR, detector_weights=str(tmp_path / "detr"), frozen=["decoder"])
    made(frozen, scenes_with())
    with pytest.raises(ValueError, match="must be a detector of the data's object classes, because it stays frozen"):
        options = SMALL_SGTR | {"detector_weights": str(tmp_path / "detr"), "frozen": ["detector"]}
        made(SGTRModule(**options), scenes_with())


@pytest.mark.parametrize(
    ("kind", "options", "option"),
    [(DetectorModule, SMALL_DETECTOR, "weights"), (EntityDetectorModule, SMALL_DETR, "detector_weights")],
)
def test_weights_of_a_detector_must_be_finite(tmp_path, kind, options, option):
    source = str(tmp_path / "detector.ckpt")
    saved(kind(**options), scenes_with(), source)
    content = read_tensors(source, "checkpoint")
    name = next(name for name in content["state_dict"] if name.endswith("weight"))
    content["state_dict"][name].fill_(float("nan"))
    torch.save(content, source)
    with pytest.raises(ValueError, match=r"detector\.ckpt: .* must .*finite.*, but these are not"):
        made(kind(**options, **{option: source}), scenes_with())


WRONG_DETECTORS = {
    "no weights": ({"state_dict": None}, "must map names to the weights of a detector, got None"),
    "a number": (
        {"model.backbone": 1.5},
        "must map names to the weights of a detector, but 'model.backbone' is no tensor",
    ),
    "numbered": ({1: torch.ones(1)}, "must map names to the weights of a detector, got"),
    "classes": ({"state_dict": {}, "sgalign": {"object_names": 3}}, "must have object_names, a list of names, got 3"),
    "twice": ({"sgalign": {"object_names": ["a", "a"]}, "state_dict": {}}, "but 'a' occurs twice"),
}


@pytest.mark.parametrize("wrong", WRONG_DETECTORS)
def test_files_without_a_detector_are_refused_by_name(tmp_path, wrong):
    content, message = WRONG_DETECTORS[wrong]
    torch.save(content, source := tmp_path / "detector.pth")
    with pytest.raises(ValueError, match=rf"detector\.pth: .*{message}"):
        starting.load_detector(Detector(3, backbone="resnet18", head_dim=8), str(source), ["__background__", "a", "b"])


def test_whole_numbers_are_no_weights_of_a_detector(tmp_path):
    detector = Detector(3, backbone="resnet18", head_dim=8)
    name = "model.roi_heads.box_predictor.cls_score.bias"
    state = detector.state_dict() | {name: torch.ones(3, dtype=torch.int64)}
    torch.save(state, source := tmp_path / "detector.pth")
    with pytest.raises(ValueError, match=rf"{name} has type torch.int64 instead of torch.float32"):
        detector.load_weights(str(source))


@pytest.mark.parametrize(
    "wrong",
    ["no config", "no JSON", "no object", "no names", "another shape", "too large", "lacks a tensor", "has none"],
)
def test_checkpoints_without_their_detr_are_refused_by_name(tmp_path, wrong):
    source = str(tmp_path / "detector.ckpt")
    saved(EntityDetectorModule(**SMALL_DETR), scenes_with(), source)
    content = read_tensors(source, "checkpoint")
    detector, state = content["sgalign"]["detector"], content["state_dict"]
    if wrong == "no config":
        del detector["config"]
    elif wrong == "no JSON":
        detector["config"] = "{"
    elif wrong == "no object":
        detector["config"] = "[1]"
    elif wrong == "no names":
        content["sgalign"]["object_names"] = []
    elif wrong in ("another shape", "too large"):
        size = 64 if wrong == "another shape" else 1 << 40
        detector["config"] = json.dumps(json.loads(detector["config"]) | {"decoder_ffn_dim": size})
    elif wrong == "lacks a tensor":
        del state["detector.detr.class_labels_classifier.weight"]
    else:
        content["state_dict"] = {name: tensor for name, tensor in state.items() if not name.startswith("detector.")}
    torch.save(content, source)
    messages = {"no config": "must be a checkpoint of Entity", "no JSON": "must be a DETR that can be loaded"}
    messages |= {"no object": "config must be a JSON object", "no names": "object_names must have the background"}
    message = messages.get(wrong, "checkpoint must (have the same weights as the DETR|come from a model with the same)")
    with pytest.raises(ValueError, match=rf"detector\.ckpt: {message}"):
        made(EntityDetectorModule(**SMALL_DETR, detector_weights=source), scenes_with())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("config.json", b"[1]", "must be a DETR that can be loaded"),
     ("model.safetensors", b"x" * 100, "must be a DETR that can be loaded")],
)  # fmt: skip
def test_damaged_folders_of_transformers_are_refused_by_name(tmp_path, name, content, message):
    sizes = {"backbone": "resnet10", "stride": 16, "dim": 32, "heads": 4, "ffn_dim": 32, "layers": 2}
    EntityDetector(3, **sizes, num_queries=12).detr.save_pretrained(tmp_path / "detr")
    (tmp_path / "detr" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"detr.*{message}"):
        made(EntityDetectorModule(**SMALL_DETR, detector_weights=str(tmp_path / "detr")), scenes_with())


def test_a_model_without_any_of_the_tensors_is_refused(tmp_path):
    source = tmp_path / "empty.ckpt"
    saved(MotifsModule(**SMALL_MOTIFS), scenes_with(), source)
    content = read_tensors(source, "checkpoint")
    torch.save(content | {"state_dict": {}}, source)
    with pytest.raises(ValueError, match="start_from must have weights of the model"):
        made(MotifsModule(**SMALL_MOTIFS, start_from=str(source)), scenes_with())
