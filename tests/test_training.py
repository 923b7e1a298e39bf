"""Training, evaluation and the command line, on a few images for a step or two unless marked slow."""

import json
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
import yaml

pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from trainers import SMALL_MOTIFS as SMALL  # noqa: E402
from trainers import trainer  # noqa: E402

from sgalign.commands import compare, doctor  # noqa: E402
from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import Detections, SeenBatch, collate  # noqa: E402
from sgalign.training import (  # noqa: E402
    AlignMotifsModule,
    AveragedTeacherModule,
    DetectorModule,
    FrequencyModule,
    MaskedMotifsModule,
    MotifsModule,
    SceneGraphData,
    base,
)
from sgalign.training.checkpoints import WholeCheckpointIO  # noqa: E402
from sgalign.training.resuming import GivenOptions  # noqa: E402
from sgalign.training.seeds import step_seed  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def scenes():
    data = SceneGraphData()
    data.train, data.validation, data.test = data.train[:96], data.validation[:32], data.test[:32]
    return data


def fit(module, data, *, seed=0, **options) -> pl.Trainer:
    pl.seed_everything(seed, verbose=False)
    run = trainer(**options)
    run.fit(module, datamodule=data)
    return run


def made(module, data):
    """The module with its network, without any training."""
    fit(module, data, max_epochs=0)
    return module


def same_weights(first, second) -> bool:
    first, second = first.network.state_dict(), second.network.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(scenes):
    module = made(AlignMotifsModule(**SMALL, learning_rate=0.01), scenes)
    batch = collate(scenes.train, 20)
    before, _ = module.relation_loss(module(SeenBatch(batch)).logits, batch.targets)
    fit(module, scenes, max_epochs=2)
    assert module.relation_loss(module(SeenBatch(batch)).logits, batch.targets)[0] < 0.9 * before


def test_runs_repeat_and_seeds_differ(scenes):
    first, again, other = (AlignMotifsModule(**SMALL) for _ in range(3))
    for module, seed in ((first, 0), (again, 0), (other, 1)):
        fit(module, scenes, seed=seed)
    assert same_weights(first, again) and not same_weights(first, other)


def test_a_resumed_run_goes_on_as_the_first_would_have(scenes, tmp_path):
    whole, halves = AlignMotifsModule(**SMALL), AlignMotifsModule(**SMALL)
    fit(whole, scenes, max_epochs=2)
    fit(halves, scenes, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = AlignMotifsModule(**SMALL)
    pl.seed_everything(5, verbose=False)
    trainer(max_epochs=2).fit(resumed, datamodule=scenes, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.run_seed == whole.run_seed and same_weights(whole, resumed)


def test_a_resumed_run_has_the_options_that_it_is_given(scenes, tmp_path, monkeypatch):
    """Not the checkpoint's, which torch puts into the optimizer; a warm-up goes on where it was."""
    options, said = {"optimizer": "sgd", "warmup_steps": 8}, []
    monkeypatch.setattr(base, "rank_zero_info", said.append)
    fit(MotifsModule(**SMALL, **options), scenes, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")

    def resumed(path="half.ckpt", epochs=2, **changed):
        run = trainer(max_epochs=epochs)
        run.fit(MotifsModule(**SMALL, **options | changed), scenes, ckpt_path=tmp_path / path)
        return run

    same = resumed()
    assert not said
    lower = resumed(learning_rate=2e-4)
    assert said == ["learning rate 0.0002 instead of 0.001 as in the checkpoint"]
    assert lower.optimizers[0].param_groups[0]["lr"] == pytest.approx(same.optimizers[0].param_groups[0]["lr"] / 5)
    lower.save_checkpoint(tmp_path / "lower.ckpt")
    again = resumed("lower.ckpt", 3)
    assert said[1:] == ["learning rate 0.001 instead of 0.0002 as in the checkpoint"]
    assert again.optimizers[0].param_groups[1]["lr"] == pytest.approx(1e-3)
    schedules = [config.scheduler for config in again.lr_scheduler_configs]
    assert schedules[0].base_lrs == [1e-3, 1e-3] and schedules[1].factor == 0.1

    make = MotifsModule.make_optimizer

    def heavier(module):
        optimizer = make(module)
        optimizer.param_groups[0].update(weight_decay=0.5, momentum=0.1)
        return optimizer

    with pytest.raises(
        ValueError, match="must be the same as in the checkpoint, LinearLR, ReduceLROnPlateau, got ReduceLROnPlateau"
    ):
        resumed(warmup_steps=0)
    monkeypatch.setattr(MotifsModule, "make_optimizer", heavier)
    run = resumed()
    assert [run.optimizers[0].param_groups[0][name] for name in ("weight_decay", "momentum")] == [0.5, 0.1]


def test_schedules_have_the_steps_that_they_are_given():
    """A rate falls at the new steps, as far as they are to come, and by as much as before."""

    def made(rate, drops, step=0, backbone=0.5):
        groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": backbone}]
        optimizer = torch.optim.SGD(groups, lr=rate)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        for _ in range(step):
            optimizer.step()
            schedule.step()
        return [optimizer], [schedule]

    before = made(1.0, [2, 5], step=3)
    kept = GivenOptions(*made(1.0, [2, 5])).saved()
    now = made(2.0, [2, 7], backbone=0.5)
    given = GivenOptions(*now)
    for ours, theirs in zip(sum(now, []), sum(before, [])):
        ours.load_state_dict(theirs.state_dict())
    assert given.put_back(*now, kept) == ["learning rate 2 instead of 1 as in the checkpoint"]
    (optimizer,), (schedule,) = now
    rates = []
    for _ in range(3, 8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([0.2, 0.05])] * 4 + [pytest.approx([0.02, 0.005])]
    given.groups[0][0]["initial_lr"] = 3.0
    given.put_back(*now, {"rates": [[0.0, 0.5]], "schedules": ["MultiStepLR"]})
    assert optimizer.param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize(
    "when, workers",
    [
        ({"every_n_train_steps": 1}, 2),
        ({"every_n_train_steps": 1}, 0),
        ({"save_on_train_epoch_end": False}, 2),
        ({}, 0),
    ],
    ids=str,
)
def test_a_run_goes_on_from_any_step(tmp_path, when, workers):
    data = SceneGraphData(num_workers=workers, repeat_threshold=0.05, instance_drop=0.5)
    data.train, data.validation = data.train[:40], data.validation[:8]
    save = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
    whole = AlignMotifsModule(**SMALL)
    run = fit(whole, data, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    steps = run.num_training_batches
    assert run.global_step == 2 * steps and steps > 3
    for step in {2, steps, steps + 2}:
        path = tmp_path / f"epoch={(step - 1) // steps}-step={step}.ckpt"
        if not path.exists():
            continue
        resumed = AlignMotifsModule(**SMALL)
        pl.seed_everything(5, verbose=False)
        again = trainer(max_epochs=2)
        again.fit(resumed, datamodule=data, ckpt_path=path)
        assert again.global_step == 2 * steps and same_weights(whole, resumed), path.name


def test_dropout_goes_on_where_it_was(scenes, tmp_path):
    """Draws from torch's own generator, in the middle of an epoch and after it."""

    class Noisy(MotifsModule):
        def supervised_loss(self, prediction, batch):
            dropped = torch.nn.functional.dropout(prediction.logits, 0.5)
            return super().supervised_loss(prediction._replace(logits=dropped), batch)

    whole, save = Noisy(**SMALL), ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    fit(whole, scenes, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    for name in ("epoch=0-step=3", "epoch=0-step=6", "epoch=1-step=9"):
        resumed = Noisy(**SMALL)
        pl.seed_everything(5, verbose=False)
        trainer(max_epochs=2).fit(resumed, scenes, ckpt_path=tmp_path / f"{name}.ckpt")
        assert same_weights(whole, resumed), name


def test_an_error_leaves_a_checkpoint_to_go_on_from(scenes, tmp_path):
    of_configs = [callback["init_args"] for path in CONFIGS for callback in callbacks(path)]
    options = [options for options in of_configs if options.get("filename") == "interrupted"]
    assert len(options) == len(CONFIGS) and all(one == options[0] for one in options)
    whole, stopped, resumed = (AlignMotifsModule(**SMALL) for _ in range(3))
    fit(whole, scenes)
    step, save = stopped.training_step, ModelCheckpoint(tmp_path, **options[0])

    def fail(self, batch, batch_index):
        if batch_index == 3:
            raise RuntimeError("pulled the plug")
        return step(batch, batch_index)

    stopped.training_step = MethodType(fail, stopped)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(stopped, scenes, callbacks=[save], enable_checkpointing=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "interrupted.ckpt"]
    trainer().fit(resumed, scenes, ckpt_path=tmp_path / "interrupted.ckpt")
    assert same_weights(whole, resumed)


def callbacks(path):
    return yaml.safe_load(path.read_text())["trainer"]["callbacks"]


def test_the_middle_of_an_epoch_needs_the_same_batches(scenes, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=2)
    fit(MotifsModule(**SMALL), scenes, limit_train_batches=3, callbacks=[save], enable_checkpointing=True)
    data = SceneGraphData(batch_size=8)
    data.train, data.validation = scenes.train, scenes.validation
    with pytest.raises(ValueError, match="batch_size times the number of processes must still be 16 .* got 8"):
        trainer().fit(MotifsModule(**SMALL), data, ckpt_path=tmp_path / "middle.ckpt")


def test_overfitting_saves_checkpoints_too(scenes, tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(MotifsModule(**SMALL), scenes, overfit_batches=2, callbacks=[save], enable_checkpointing=True)
    assert list(tmp_path.glob("*.ckpt"))


def test_a_checkpoint_needs_neither_data_nor_word_vectors(scenes, tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("dog " + "1 " * 12 + "\ncat " + "2 " * 12 + "\n")
    module = AlignMotifsModule(**SMALL, word_vectors=str(vectors), mask_ratio=0.3)
    fit(module, scenes, max_epochs=0).save_checkpoint(tmp_path / "model.ckpt")
    assert module.network.object_embedding.weight[scenes.object_names.index("dog")].tolist() == [1.0] * 12
    vectors.unlink()
    loaded = AlignMotifsModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.predicate_names == scenes.predicate_names and loaded.options.mask_ratio == 0.3
    assert same_weights(module, loaded)
    batch = collate(scenes.test[:3], 20)
    assert torch.equal(loaded.eval()(SeenBatch(batch)).logits, module.eval()(SeenBatch(batch)).logits)


def test_the_mirror_is_gone_at_evaluation(scenes):
    aligned, plain = made(AlignMotifsModule(**SMALL), scenes), made(MotifsModule(**SMALL), scenes)
    plain.network.load_state_dict(aligned.network.state_dict())
    batch = collate(scenes.test[:5], 20)
    assert torch.equal(aligned.eval()(SeenBatch(batch)).logits, plain.eval()(SeenBatch(batch)).logits)


def test_given_detections_are_evaluated_as_sgdet(scenes):
    """Annotated objects as detections, one of them twice, so that boxes are not the target's: recall is PredCls's."""
    given = SceneGraphData()
    given.train, given.test = scenes.train, scenes.test
    given.detections = {}
    for graph in given.test:
        rows = torch.cat([torch.arange(len(graph.labels)), torch.tensor([0])])
        scores = torch.cat([torch.ones(len(graph.labels)), torch.tensor([1e-6])])
        given.detections[graph.image_id] = Detections(graph.boxes[rows], graph.labels[rows], scores)
    (predcls,), (sgdet,) = (
        trainer().test(FrequencyModule(), datamodule=data, verbose=False) for data in (scenes, given)
    )
    assert sgdet["test/R@50"] == pytest.approx(predcls["test/R@50"])


def test_a_checkpoint_of_other_classes_is_refused(scenes, tmp_path):
    module = MotifsModule(**SMALL)
    fit(module, scenes, max_epochs=0).save_checkpoint(tmp_path / "model.ckpt")
    loaded = MotifsModule.load_from_checkpoint(tmp_path / "model.ckpt")
    other = SceneGraphData()
    other.predicate_names = [*other.predicate_names[:-1], "beneath"]
    with pytest.raises(ValueError, match="predicate classes of the model .* differ in .*beneath"):
        trainer().test(loaded, datamodule=other, verbose=False)


def test_published_optimizer(scenes):
    """SGD whose weight decay spares every bias, those of the LSTMs too, with a warm-up from a tenth."""
    module = made(MotifsModule(**SMALL, optimizer="sgd", learning_rate=0.5, warmup_steps=10), scenes)
    (optimizer,), (warmup, plateau) = module.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(module.named_parameters())
    assert {name for name, p in names.items() if decay[id(p)] == 0} == {name for name in names if "bias" in name}
    assert any("bias_hh" in name for name in names) and {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    for _ in range(10):
        optimizer.step()
        warmup["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    rates = []
    for _ in range(5):
        plateau["scheduler"].step(0.3)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05]), "a tenth after the third epoch that is not better"


def test_a_checkpoint_of_another_model_or_size_is_refused(scenes, tmp_path):
    trainer_of_motifs = fit(MotifsModule(**SMALL), scenes, max_epochs=0)
    trainer_of_motifs.save_checkpoint(tmp_path / "motifs.ckpt")
    for module, message in (
        (AlignMotifsModule(**SMALL), "must belong to AlignMotifsModule, but belongs to MotifsModule"),
        (MotifsModule(**SMALL | {"hidden_dim": 9}), "must come from a model .* has shape .* instead of "),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(max_epochs=1).fit(module, datamodule=scenes, ckpt_path=tmp_path / "motifs.ckpt")


def test_a_checkpoint_with_other_parts_is_refused(scenes, tmp_path):
    fit(AveragedTeacherModule(**SMALL), scenes, max_epochs=0).save_checkpoint(tmp_path / "average.ckpt")
    fit(MaskedMotifsModule(**SMALL), scenes, max_epochs=0).save_checkpoint(tmp_path / "masked.ckpt")
    for name, part in (("average", "has teacher."), ("masked", "lacks mirrored_head.")):
        with pytest.raises(ValueError, match=f"must have the same weights as AlignMotifsModule, but it {part}"):
            AlignMotifsModule.load_from_checkpoint(tmp_path / f"{name}.ckpt")
    content = torch.load(tmp_path / "masked.ckpt", weights_only=True)
    del content["state_dict"], content["sgalign"]["run_seed"]
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match="that sgalign fit has written, but it lacks run_seed, state_dict"):
        MaskedMotifsModule.load_from_checkpoint(tmp_path / "part.ckpt")


def test_motifs_of_an_aligned_model_leaves_the_mirror_out(scenes, tmp_path):
    aligned, plain = AlignMotifsModule(**SMALL), MotifsModule(**SMALL)
    fit(aligned, scenes, max_epochs=0).save_checkpoint(tmp_path / "aligned.ckpt")
    trainer().test(plain, datamodule=scenes, ckpt_path=tmp_path / "aligned.ckpt", verbose=False)
    assert same_weights(plain, aligned) and not hasattr(plain, "mirrored_head")
    with pytest.raises(ValueError, match="checkpoint has a mirror, so MotifsModule can be tested with it"):
        trainer(max_epochs=1).fit(MotifsModule(**SMALL), scenes, ckpt_path=tmp_path / "aligned.ckpt")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_size": 0}, "min_size must be at least 1 and finite, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"backbone": "resnet19"}, "backbone must be one of 'resnet18', .* got 'resnet19'"),
    ],
)
def test_options_of_a_detector(options, message):
    with pytest.raises(ValueError, match=message):
        DetectorModule(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "configs/align_motifs_small.yaml", "--model.mask_ratio", "2"], "mask_ratio must be in [0, 1]"),
        (["--config", "configs/motifs_small.yaml", "--trainer.devices", "0"], "not a valid input using cpu"),
        (["--config", "configs/motifs_small.yaml", "--ckpt_path", "best"], "best: no such checkpoint"),
        (["--model", "FrequencyModule"], "FrequencyModule has nothing to fit: sgalign test --model FrequencyModule"),
    ],
)
def test_wrong_options_are_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert cli.main(["fit", "--trainer.accelerator", "cpu", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sgalign: ") and message in error, error


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()

    def runs_out(self, checkpoint, path, options):
        path.write_bytes(before[:10])
        raise OSError("no space left")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", runs_out)
    with pytest.raises(OSError, match="no space left"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_mask_seeds_differ_in_every_argument_and_repeat():
    seeds = {step_seed(*arguments) for arguments in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]}
    seeds |= {step_seed(0, 0, 0, 1), step_seed(2**63, 0, 0, 0), step_seed(-1, 0, 0, 0)}
    assert len(seeds) == 7 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert step_seed(3, 4, 5, 6) == step_seed(3, 4, 5, 6)


# ---- each option of the mirror changes what it says and nothing else


def mirror(scenes, **options):
    """Loss, parts, and the gradients that reach network and head."""
    module = made(AlignMotifsModule(**SMALL, **options), scenes).eval()
    module.run_seed = 0
    batch = collate(scenes.train[:8], 20)
    loss, parts = module.losses(batch, 0)
    return module, batch, loss, parts


def test_loss_is_the_weighted_sum_of_its_parts(scenes):
    _, _, loss, parts = mirror(scenes, alignment_weight=3.0)
    torch.testing.assert_close(loss, parts["loss"] + 3 * parts["alignment"])
    _, _, silent, parts = mirror(scenes, alignment_weight=0.0)
    assert torch.equal(silent, parts["loss"])


def test_the_supervised_loss_is_that_of_motifs_whatever_the_mirror(scenes):
    plain = made(MotifsModule(**SMALL), scenes).eval()
    expected, _ = plain.losses(collate(scenes.train[:8], 20), 0)
    for options in ({}, {"mask_ratio": 1.0}, {"mask_granularity": "feature"}, {"tied_head": True}):
        torch.testing.assert_close(mirror(scenes, **options)[3]["loss"], expected)


def test_tied_head_and_no_mask_leave_nothing_to_align(scenes):
    assert mirror(scenes, tied_head=True, mask_ratio=0.0)[3]["alignment"].abs() < 1e-6
    assert mirror(scenes, tied_head=False, mask_ratio=0.0)[3]["alignment"] > 1e-4
    assert mirror(scenes, tied_head=True, mask_ratio=0.5)[3]["alignment"] > 1e-6


def test_untied_head_learns_from_the_alignment_alone(scenes):
    module, _, loss, _ = mirror(scenes)
    loss.backward()
    assert module.mirrored_head.weight.grad.any() and module.mirrored_head is not module.network.predicate
    module, _, loss, parts = mirror(scenes)
    parts["loss"].backward()
    assert not module.mirrored_head.weight.grad.any()


def test_mask_granularity(scenes):
    module, batch, *_ = mirror(scenes, mask_ratio=0.5)
    rows = module.draw_mask(batch, 0)
    assert rows.shape == (len(batch.labels), 1) and 0.2 < rows.float().mean() < 0.8
    assert not torch.equal(rows, module.draw_mask(batch, 1))
    module, batch, *_ = mirror(scenes, mask_ratio=0.5, mask_granularity="feature")
    features = module.draw_mask(batch, 0)
    assert features.shape == (len(batch.labels), module.network.edge_input_dim)
    assert 0.45 < features.float().mean() < 0.55


def test_row_mask_is_that_of_attention_with_one_head_and_query(scenes):
    from sgalign import random_attention_mask

    module, batch, *_ = mirror(scenes, mask_ratio=0.5)
    seed = step_seed(0, module.global_step, 0, 0)
    whole = random_attention_mask(8, 1, 1, int(batch.lengths.max()), ratio=0.5, seed=seed)
    expected = [whole[image, 0, 0, place] for image, place in zip(batch.images, batch.positions)]
    assert torch.equal(module.draw_mask(batch, 0)[:, 0], torch.stack(expected))


def test_reduction_and_direction(scenes):
    element = mirror(scenes)[3]["alignment"]
    relation = mirror(scenes, reduction="relation")[3]["alignment"]
    torch.testing.assert_close(relation, 21 * element)
    assert mirror(scenes, direction="symmetric")[3]["alignment"] != element


def test_supervised_mirror(scenes):
    _, _, loss, parts = mirror(scenes, supervise_mirror=True, alignment_weight=0.0)
    assert parts["mirror"] > parts["loss"] * 0.5
    torch.testing.assert_close(loss, parts["loss"] + parts["mirror"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"alignment_weight": -1}, "alignment_weight"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"hidden_dim": 0}, "hidden_dim"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        AlignMotifsModule(**options)


def test_images_without_objects_or_pairs_are_evaluated(scenes):
    module = made(MotifsModule(**SMALL), scenes).eval()
    scene = scenes.test[0]
    none = type(scene)("none", 9, 9, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 3).long())
    one = type(scene)("one", 9, 9, torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([1]), torch.tensor([[0, 0, 1]]))
    for graphs in ([none, one], [scene, none, one]):
        predictions = module.predictions(collate(graphs, 20))
        assert [len(p["labels"]) for p in predictions[-2:]] == [0, 1] and len(predictions[-1]["pairs"]) == 0


# ---- the first main job, on real data


def test_motifs_beats_the_frequency_baseline_on_vrd(vrd_root):
    data = SceneGraphData(str(vrd_root))
    frequency = trainer().test(FrequencyModule(), datamodule=data, verbose=False)[0]
    module = MotifsModule()
    motifs = fit(module, data, max_epochs=2, limit_val_batches=0).test(module, datamodule=data, verbose=False)[0]
    for metric in ("test/R@50", "test/mR@50"):
        assert motifs[metric] > frequency[metric] + 0.01, metric


# ---- command line


def run(*arguments, cwd, **options):
    command = [
        sys.executable,
        "-c",
        "import sys; from sgalign.commands.main import main; sys.exit(main())",
        *map(str, arguments),
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def test_compare_writes_what_it_says(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "COST_STEPS", 2)
    monkeypatch.setattr("sgalign.data.scenes.SIZES", {"train": 48, "validation": 16, "test": 16})
    assert cli.main(["compare", "--epochs", "2", "--out", "out"]) == 0
    printed = capfd.readouterr().out
    for name in ("Frequency", "Motifs", "Align-Motifs"):
        assert f"\n{name} " in printed
    for path in ("comparison.png", "results.json", "Motifs/last.ckpt", "Align-Motifs/last.ckpt", "Motifs/metrics.csv"):
        assert (tmp_path / "out" / path).stat().st_size > 100
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["validation"]["Motifs"]) == 2 and 0 < results["test"]["Motifs"]["R@50"] < 1
    assert "times as long" in printed and results["step_seconds"]["Motifs"] > 0
    with pytest.raises(SystemExit):
        cli.main(["compare", "--out", "out"])
    assert "must be a new or an empty folder" in capfd.readouterr().err


def test_fit_test_predict(tmp_path, monkeypatch, capsys):
    config = str(ROOT / "configs" / "align_motifs_small.yaml")
    short = ["--config", config, "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    fitted = run("fit", *short, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    monkeypatch.chdir(tmp_path)
    checkpoints = tmp_path / "runs/align_motifs_small/version_0/checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (tmp_path / "runs/align_motifs_small/version_0/metrics.csv").exists()
    limit = "--trainer.limit_test_batches=2"
    assert cli.main(["test", *short, limit, "--ckpt_path", str(checkpoints / "last.ckpt")]) == 0
    assert "test/mR@100" in capsys.readouterr().out
    limit = "--trainer.limit_predict_batches=2"
    assert cli.main(["predict", *short, limit, "--ckpt_path", str(checkpoints / "best.ckpt")]) == 0
    lines = (tmp_path / "runs/align_motifs_small/predictions.jsonl").read_text().splitlines()
    graph = json.loads(lines[0])
    assert len(lines) == 32 and graph["objects"][0].keys() == {"label", "box", "score"}
    scores = [triplet["score"] for triplet in graph["triplets"]]
    assert scores == sorted(scores, reverse=True) and graph["triplets"][0]["predicate"] != "__background__"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configs_are_valid(config, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["fit", "--config", str(config), "--print_config"])
    assert exit.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configs_keep_the_last_epoch_to_go_on_from(config):
    """Lightning's `save_last` beside a monitor keeps the last epoch that was among the best."""
    yaml = pytest.importorskip("yaml")
    callbacks = [callback["init_args"] for callback in yaml.safe_load(config.read_text())["trainer"]["callbacks"]]
    assert [options for options in callbacks if options.get("filename") == "last" and "monitor" not in options]


def test_a_test_needs_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["test", "--config", str(ROOT / "configs" / "motifs_small.yaml")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("sgalign: test needs --ckpt_path")


def test_predict_is_lightnings_with_any_of_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in (("-c", str(ROOT / "configs" / "motifs_small.yaml")), ("--model=MotifsModule",)):
        assert cli.main(["predict", *option]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("sgalign: predict needs --ckpt_path")


def test_configs_spell_out_the_defaults():
    """So that `sgalign compare`, which takes the defaults, and the configs are the same systems."""
    yaml = pytest.importorskip("yaml")
    for name, module in (("motifs_small", MotifsModule), ("align_motifs_small", AlignMotifsModule)):
        config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        assert config["model"]["class_path"] == f"sgalign.training.{module.__name__}"
        spelled, defaults = config["model"]["init_args"], module().hparams
        assert spelled.items() <= defaults.items()
        of_images = {"backbone", "min_size", "max_size", "head_dim", "detections_per_image", "detector_weights"}
        long_tail = {"predicate_weights", "predicate_weight_power", "effective_number_beta"}
        long_tail |= {"logit_adjustment", "logit_adjustment_test"}
        others = {"learning_rate_images", "word_vectors"}
        assert defaults.keys() - spelled.keys() == of_images | long_tail | others
        assert config["trainer"]["max_epochs"] == compare.parser().get_default("epochs")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such"), (b"PK\x03\x04 cut", "cut short"), ({"a": 1}, "no class names")]
)
def test_bad_checkpoints_are_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "bad.ckpt"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    for command in ("fit", "test"):
        assert cli.main([command, "--config", str(CONFIGS[0]), "--ckpt_path", str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error and str(path) in error and "Traceback" not in error


def test_training_without_relations_or_with_a_diverging_loss_says_so(scenes):
    data = SceneGraphData()
    data.train, data.validation, data.test = [], scenes.validation, scenes.test
    with pytest.raises(ValueError, match="no training image has a relation"):
        fit(MotifsModule(**SMALL), data)
    with pytest.raises(
        ValueError,
        match=r"loss must be finite, got nan \(loss nan\) at step 1: lower learning_rate, or check .* images",
    ):
        fit(MotifsModule(**SMALL, learning_rate=1e30), scenes)


def test_missing_data_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--data", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert "must be a folder with annotations_train.json" in error and error.strip().count("\n") == 0
    assert not (tmp_path / "runs").exists()


def test_missing_extra_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "required", lambda extra: ["torch", "no-such-package"])
    assert cli.main(["compare"]) == 1
    expected = (
        "sgalign: compare needs packages that are not installed: no-such-package. Run pip install 'sgalign[train]'\n"
    )
    assert capsys.readouterr().err == expected


def test_usage(capsys):
    assert cli.main(["--help"]) == 0 and cli.main(["train"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: sgalign") and "no command 'train'" in captured.err


@pytest.mark.parametrize("fails", [False, True])
def test_doctor_finds_a_backend_that_does_not_work(capfd, monkeypatch, fails):
    def broken(*tensors, backend, **options):
        if fails and backend == "cpu":
            raise RuntimeError("no such kernel")
        return tensors[0] + (backend == "cpu"), tensors[1]

    monkeypatch.setattr(doctor, "dual_branch_attention", broken)
    assert doctor.main() == 1
    said = "fails: RuntimeError: no such kernel" if fails else "differs from the reference by 1.0e+00: WRONG"
    assert f"cpu: dual-branch attention {said}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [("tf32", "must be tf32x3 or ieee, got 'tf32'"), ("ieee", "with ieee (SGALIGN_TRITON_DOT_PRECISION)")],
)
def test_doctor_says_the_precision_that_triton_is_asked_for(capfd, monkeypatch, asked, said):
    configs = pytest.importorskip("sgalign.kernels.configs")
    monkeypatch.setattr(configs, "ASKED_PRECISION", asked)
    assert doctor.main() == int(asked == "tf32")
    assert said in capfd.readouterr().out


def test_doctor_finds_the_package_working(capfd):
    assert cli.main(["doctor"]) == 0
    assert "cpu: available" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--fix"])
