"""Tests of degraded training labels, and of the control experiments of the studies."""

import dataclasses

import pytest
import torch

pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from trainers import SMALL_MOTIFS as SMALL  # noqa: E402
from trainers import trainer  # noqa: E402

from sgalign import training  # noqa: E402
from sgalign.commands.main import main  # noqa: E402
from sgalign.training import GrowingMaskModule, ScarceData, load_module  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scarce") / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "40", "8", "12"]) == 0
    return folder


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule", "GrowingMaskModule"])
def test_checkpoints_of_controls_are_loaded_as_their_own_module(folder, tmp_path, name):
    module = getattr(training, name)(**SMALL, mask_ratio=0.3)
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(module, ScarceData(str(folder)))
    run.save_checkpoint(tmp_path / "control.ckpt")
    loaded = load_module(tmp_path / "control.ckpt")
    assert type(loaded) is type(module) and loaded.options == module.options
    own, others = module.state_dict(), loaded.state_dict()
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


def test_every_weight_of_the_control_without_a_mirror_gets_a_gradient(folder):
    module = training.MaskedMotifsModule(**SMALL)
    trainer(limit_train_batches=1, limit_val_batches=0).fit(module, ScarceData(str(folder)))
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule"])
def test_controls_without_an_object_loss_support_only_predcls(name):
    with pytest.raises(ValueError, match=f"protocol must be 'predcls' for {name}, got 'sgcls'"):
        getattr(training, name)(protocol="sgcls", vision="cached")


def test_the_mask_ratio_grows_linearly_from_0(folder, monkeypatch):
    ratios, draw = [], GrowingMaskModule.draw_mask
    monkeypatch.setattr(
        GrowingMaskModule, "draw_mask", lambda self, *args: ratios.append(self.mask_ratio) or draw(self, *args)
    )
    module = GrowingMaskModule(**SMALL, mask_ratio=0.4)
    trainer(max_epochs=2).fit(module, ScarceData(str(folder)))
    assert len(ratios) > 4 and ratios == pytest.approx([0.4 * step / len(ratios) for step in range(len(ratios))])


# ---- scarce labels


def num_relations(data):
    return sum(len(graph.relations) for graph in data.train)


@pytest.fixture(scope="module")
def whole(folder):
    return ScarceData(str(folder))


def test_missing_labels_are_removed_from_the_training_part(folder, whole):
    missing = ScarceData(str(folder), missing=0.5)
    assert 0.35 < num_relations(missing) / num_relations(whole) < 0.65
    assert all(len(graph.relations) for graph in missing.train)
    assert torch.equal(missing.test[0].relations, whole.test[0].relations)


def test_wrong_labels_change_only_the_predicates(folder, whole):
    wrong = ScarceData(str(folder), wrong=1.0)
    assert num_relations(wrong) == num_relations(whole)
    pairs = [zip(a.relations.tolist(), b.relations.tolist()) for a, b in zip(wrong.train, whole.train, strict=True)]
    changed = [a[2] != b[2] for graph in pairs for a, b in graph if a[:2] == b[:2]]
    assert len(changed) == num_relations(whole) and sum(changed) > 0.5 * len(changed)


def test_few_labels_change_neither_predicate_groups_nor_zero_shot_triplets(folder, whole):
    few = ScarceData(str(folder), labelled=0.1, unlabelled=False)
    assert few.predicate_groups == whole.predicate_groups and len(whole.zero_shot_test)
    assert torch.equal(few.zero_shot_test, whole.zero_shot_test)


def test_images_without_labels_are_trained_on_with_targets_of_zero(folder):
    data = ScarceData(str(folder), labelled=0.25)
    count = len(data.train) + len(data.unlabelled)
    assert len(data.train) == round(0.25 * count) and count == len(ScarceData(str(folder)).train)
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ids = {graph.image_id for graph in data.unlabelled}
    seen = []
    for batch in data.train_dataloader():
        seen += batch.image_ids
        for row, (subject, _) in enumerate(batch.pairs.tolist()):
            unlabelled = batch.image_ids[int(batch.images[subject])] in ids
            assert batch.targets[row].sum() == (0 if unlabelled else 1)
    assert len(set(seen)) == count


def test_images_without_labels_can_be_left_out(folder):
    assert len(ScarceData(str(folder), labelled=0.25, unlabelled=False).unlabelled) == 0


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_parts_without_relations_are_refused_before_training(folder, part, monkeypatch):
    read = ScarceData._read

    def read_bare(self, asked):
        return [dataclasses.replace(g, relations=g.relations[:0]) if asked == part else g for g in read(self, asked)]

    monkeypatch.setattr(ScarceData, "_read", read_bare)
    with pytest.raises(ValueError, match=f"the {part} split must have relations, got none"):
        ScarceData(str(folder))


@pytest.mark.parametrize("name", ["labelled", "missing", "wrong"])
def test_shares_outside_0_to_1_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be a share in \[0, 1\], got 1.5"):
        ScarceData(**{name: 1.5})
