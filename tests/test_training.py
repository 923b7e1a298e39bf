"""Tests of training, evaluation and the command line, most with a few images and steps."""

import errno
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import torch
import yaml

pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.patches import FancyArrowPatch  # noqa: E402
from trainers import CONFIGS, trainer  # noqa: E402
from trainers import SMALL_MOTIFS as SMALL  # noqa: E402

from sgalign import random_attention_mask  # noqa: E402
from sgalign.commands import compare, doctor  # noqa: E402
from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import Detections, SeenBatch, collate  # noqa: E402
from sgalign.ops.seeds import step_seed  # noqa: E402
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

CONFIG_FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def scenes():
    data = SceneGraphData()
    data.train, data.validation, data.test = data.train[:96], data.validation[:32], data.test[:32]
    return data


def fit(module, data, *, seed=0, **options) -> pl.Trainer:
    """Train a module, by default for an epoch, and return the trainer."""
    pl.seed_everything(seed, verbose=False)
    run = trainer(**options)
    run.fit(module, datamodule=data)
    return run


def made(module, data):
    """Return the module with its network, without training it."""
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


def test_runs_repeat_exactly_and_depend_on_the_seed(scenes):
    first, again, other = (AlignMotifsModule(**SMALL) for _ in range(3))
    for module, seed in ((first, 0), (again, 0), (other, 1)):
        fit(module, scenes, seed=seed)
    assert same_weights(first, again) and not same_weights(first, other)


def test_a_resumed_run_equals_an_uninterrupted_one(scenes, tmp_path):
    whole, halves = AlignMotifsModule(**SMALL), AlignMotifsModule(**SMALL)
    fit(whole, scenes, max_epochs=2)
    fit(halves, scenes, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = AlignMotifsModule(**SMALL)
    pl.seed_everything(5, verbose=False)
    trainer(max_epochs=2).fit(resumed, datamodule=scenes, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.run_seed == whole.run_seed and same_weights(whole, resumed)


WARM_UP = {"optimizer": "sgd", "warmup_steps": 8}


@pytest.fixture(scope="module")
def half(scenes, tmp_path_factory):
    """The checkpoint after one of two epochs. The warm-up is not over yet."""
    path = tmp_path_factory.mktemp("half") / "half.ckpt"
    fit(MotifsModule(**SMALL, **WARM_UP), scenes, max_epochs=1).save_checkpoint(path)
    return path


def resume(path, data, max_epochs=2, **changed):
    """Resume a run from a checkpoint with changed options and return the trainer."""
    run = trainer(max_epochs=max_epochs)
    run.fit(MotifsModule(**SMALL, **WARM_UP | changed), data, ckpt_path=path)
    return run


def test_a_resumed_run_uses_a_new_learning_rate_and_says_so(scenes, half, tmp_path, monkeypatch):
    """Torch restores the options of the checkpoint, so the module must put back its own. The warm-up continues."""
    printed = []
    monkeypatch.setattr(base, "rank_zero_info", printed.append)
    same = resume(half, scenes)
    assert not printed
    lower = resume(half, scenes, learning_rate=2e-4)
    assert printed == ["these options differ from the checkpoint: learning_rate 0.0002 instead of 0.001"]
    assert lower.optimizers[0].param_groups[0]["lr"] == pytest.approx(same.optimizers[0].param_groups[0]["lr"] / 5)
    lower.save_checkpoint(tmp_path / "lower.ckpt")
    again = resume(tmp_path / "lower.ckpt", scenes, max_epochs=3)
    assert printed[1:] == ["these options differ from the checkpoint: learning_rate 0.001 instead of 0.0002"]
    assert again.optimizers[0].param_groups[1]["lr"] == pytest.approx(1e-3)
    schedules = [config.scheduler for config in again.lr_scheduler_configs]
    assert schedules[0].base_lrs == [1e-3, 1e-3] and schedules[1].factor == 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be 8, as in the checkpoint, got 0"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd', as in the checkpoint, got 'adam'"),
    ],
)
def test_a_resumed_run_needs_the_same_kinds_of_optimizers_and_schedules(changed, message, scenes, half):
    with pytest.raises(ValueError, match=message):
        resume(half, scenes, **changed)


def test_a_resumed_run_uses_new_options_of_the_optimizer(scenes, half, monkeypatch):
    make = MotifsModule.make_optimizer

    def heavier(module):
        optimizer = make(module)
        optimizer.param_groups[0].update(weight_decay=0.5, momentum=0.1)
        return optimizer

    monkeypatch.setattr(MotifsModule, "make_optimizer", heavier)
    run = resume(half, scenes)
    assert [run.optimizers[0].param_groups[0][name] for name in ("weight_decay", "momentum")] == [0.5, 0.1]


def test_a_resumed_schedule_uses_its_new_steps():
    """The rates fall at the new steps that are still to come, by the same factor as before."""

    def made(rate, drops, step=0, backbone=0.5):
        groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": backbone}]
        optimizer = torch.optim.SGD(groups, lr=rate)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        for _ in range(step):
            optimizer.step()
            schedule.step()
        return [optimizer], [schedule]

    before = made(1.0, [2, 5], step=3)
    now = made(2.0, [2, 7], backbone=0.5)
    given = GivenOptions(*now)
    for ours, theirs in zip(sum(now, []), sum(before, [])):
        ours.load_state_dict(theirs.state_dict())
    assert given.put_back(*now) == ["2 instead of 1"]
    (optimizer,), (schedule,) = now
    rates = []
    for _ in range(3, 8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([0.2, 0.05])] * 4 + [pytest.approx([0.02, 0.005])]
    # The current rate cannot be scaled if the rate before the checkpoint was 0. Then the new initial rate is used.
    given.groups[0][0]["initial_lr"] = 3.0
    optimizer.param_groups[0]["initial_lr"] = 0.0
    given.put_back(*now)
    assert optimizer.param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize(
    "when, workers",
    [
        ({"every_n_train_steps": 1}, 2),
        ({"save_on_train_epoch_end": False}, 2),
        ({}, 0),
    ],
    ids=str,
)
def test_a_run_resumed_at_any_step_equals_an_uninterrupted_one(tmp_path, when, workers):
    data = SceneGraphData(num_workers=workers, repeat_threshold=0.05, instance_drop=0.5)
    data.train, data.validation = data.train[:40], data.validation[:8]
    save = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
    whole = AlignMotifsModule(**SMALL)
    run = fit(whole, data, seed=3, max_epochs=2, callbacks=[save], enable_checkpointing=True)
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


def test_training_ends_if_a_worker_gets_no_shared_memory(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the workers, which are forked
    with pytest.raises(OSError, match="a worker process cannot pass its batch on through shared memory: unable"):
        fit(AlignMotifsModule(**SMALL), SceneGraphData(num_workers=1), max_epochs=1)


def test_dropout_of_a_resumed_run_equals_that_of_an_uninterrupted_one(scenes, tmp_path):
    """Dropout draws from torch's generator. The run is resumed within an epoch and between epochs."""

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


def callbacks(path):
    """Return the options of the callbacks in a config."""
    return [callback["init_args"] for callback in yaml.safe_load(path.read_text())["trainer"]["callbacks"]]


def test_an_error_leaves_a_checkpoint_from_which_the_run_can_be_resumed(scenes, tmp_path):
    """All configs have the callback that writes it."""
    every = [options for path in CONFIG_FILES for options in callbacks(path)]
    options = [options for options in every if options.get("filename") == "interrupted"]
    assert len(options) == len(CONFIG_FILES) and all(one == options[0] for one in options)
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


def test_a_run_resumed_within_an_epoch_needs_the_same_batch_size(scenes, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=2)
    fit(MotifsModule(**SMALL), scenes, limit_train_batches=3, callbacks=[save], enable_checkpointing=True)
    data = SceneGraphData(batch_size=8)
    data.train, data.validation = scenes.train, scenes.validation
    with pytest.raises(ValueError, match="batch_size times the number of processes must be 16 as in ckpt_path.* got 8"):
        trainer().fit(MotifsModule(**SMALL), data, ckpt_path=tmp_path / "middle.ckpt")


def test_a_run_with_overfit_batches_saves_checkpoints(scenes, tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(MotifsModule(**SMALL), scenes, overfit_batches=2, callbacks=[save], enable_checkpointing=True)
    assert list(tmp_path.glob("*.ckpt"))


def test_a_checkpoint_is_loaded_without_data_and_without_word_vectors(scenes, tmp_path):
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


def test_the_mirror_has_no_effect_on_evaluation(scenes):
    aligned, plain = made(AlignMotifsModule(**SMALL), scenes), made(MotifsModule(**SMALL), scenes)
    plain.network.load_state_dict(aligned.network.state_dict())
    batch = collate(scenes.test[:5], 20)
    assert torch.equal(aligned.eval()(SeenBatch(batch)).logits, plain.eval()(SeenBatch(batch)).logits)


def test_given_detections_are_evaluated_as_sgdet(scenes):
    """The detections are the annotated objects, one of them twice, so recall is that of PredCls.

    PredCls itself would refuse them, because their boxes are not those of the target.
    """
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


def test_a_checkpoint_with_other_classes_than_the_data_is_refused(scenes, tmp_path):
    module = MotifsModule(**SMALL)
    fit(module, scenes, max_epochs=0).save_checkpoint(tmp_path / "model.ckpt")
    loaded = MotifsModule.load_from_checkpoint(tmp_path / "model.ckpt")
    other = SceneGraphData()
    other.predicate_names = [*other.predicate_names[:-1], "beneath"]
    with pytest.raises(ValueError, match="predicate classes of the model .* differ in .*beneath"):
        trainer().test(loaded, datamodule=other, verbose=False)


@pytest.fixture
def sgd(scenes):
    """A module that is trained by SGD with a warm-up, as published."""
    return made(MotifsModule(**SMALL, optimizer="sgd", learning_rate=0.5, warmup_steps=10), scenes)


def test_weight_decay_spares_every_bias_including_those_of_lstms(sgd):
    (optimizer,), _ = sgd.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(sgd.named_parameters())
    assert {name for name, p in names.items() if decay[id(p)] == 0} == {name for name in names if "bias" in name}
    assert any("bias_hh" in name for name in names) and {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_the_learning_rate_warms_up_from_a_tenth_and_falls_to_a_tenth_on_a_plateau(sgd):
    (optimizer,), (warmup, plateau) = sgd.configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    for _ in range(10):
        optimizer.step()
        warmup["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    rates = []
    for _ in range(5):
        plateau["scheduler"].step(0.3)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05]), (
        "the rate must fall after the third epoch without progress"
    )


def test_a_checkpoint_of_another_model_or_of_other_sizes_is_refused(scenes, tmp_path):
    trainer_of_motifs = fit(MotifsModule(**SMALL), scenes, max_epochs=0)
    trainer_of_motifs.save_checkpoint(tmp_path / "motifs.ckpt")
    for module, message in (
        (AlignMotifsModule(**SMALL), "must belong to AlignMotifsModule, but belongs to MotifsModule"),
        (MotifsModule(**SMALL | {"hidden_dim": 9}), "hidden_dim must be 8, as in the checkpoint, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(max_epochs=1).fit(module, datamodule=scenes, ckpt_path=tmp_path / "motifs.ckpt")
    checkpoint = torch.load(tmp_path / "motifs.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]["hidden_dim"]  # as in a checkpoint from before the option
    with pytest.raises(ValueError, match="must come from a model .* has shape .* instead of "):
        made(module, scenes).on_load_checkpoint(checkpoint)


def test_a_checkpoint_with_other_parts_is_refused(scenes, tmp_path):
    fit(AveragedTeacherModule(**SMALL), scenes, max_epochs=0).save_checkpoint(tmp_path / "average.ckpt")
    fit(MaskedMotifsModule(**SMALL), scenes, max_epochs=0).save_checkpoint(tmp_path / "masked.ckpt")
    for name, part in (("average", "has teacher."), ("masked", "lacks mirrored_head.")):
        with pytest.raises(ValueError, match=f"must have the same weights as AlignMotifsModule, but it {part}"):
            AlignMotifsModule.load_from_checkpoint(tmp_path / f"{name}.ckpt")


def test_an_incomplete_checkpoint_is_refused_with_the_missing_parts(scenes, tmp_path):
    fit(MaskedMotifsModule(**SMALL), scenes, max_epochs=0).save_checkpoint(tmp_path / "masked.ckpt")
    content = torch.load(tmp_path / "masked.ckpt", weights_only=True)
    del content["state_dict"], content["sgalign"]["run_seed"]
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match="that sgalign fit has written, but it lacks run_seed, state_dict"):
        MaskedMotifsModule.load_from_checkpoint(tmp_path / "part.ckpt")


def test_motifs_can_be_tested_with_a_checkpoint_of_align_motifs_but_not_trained(scenes, tmp_path):
    aligned, plain = AlignMotifsModule(**SMALL), MotifsModule(**SMALL)
    fit(aligned, scenes, max_epochs=0).save_checkpoint(tmp_path / "aligned.ckpt")
    trainer().test(plain, datamodule=scenes, ckpt_path=tmp_path / "aligned.ckpt", verbose=False)
    assert same_weights(plain, aligned) and not hasattr(plain, "mirrored_head")
    with pytest.raises(ValueError, match="checkpoint has a mirror, so MotifsModule can be tested with it"):
        trainer(max_epochs=1).fit(MotifsModule(**SMALL), scenes, ckpt_path=tmp_path / "aligned.ckpt")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 1 << 31}, r"head_dim must be at least 1 and below 2\^31, got 2147483648"),
        ({"learning_rate": 1e308}, "learning_rate must be above 0 and below 1e30, got 1e"),
        ({"min_size": 0}, r"min_size must be at least 1 and below 2\^31, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and below 1e30, got 0.0"),
        ({"backbone": "resnet19"}, "backbone must be one of 'resnet18', .* got 'resnet19'"),
    ],
)
def test_bad_options_of_a_detector_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DetectorModule(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "configs/align_motifs_small.yaml", "--model.mask_ratio", "2"], "mask_ratio must be in [0, 1]"),
        (["--config", "configs/motifs_small.yaml", "--trainer.devices", "0"], "not a valid input using cpu"),
        (["--config", "configs/motifs_small.yaml", "--ckpt_path", "best"], "best: no such checkpoint"),
        (
            ["--model", "MotifsModule", "--trainer.accelerator", "true"],
            "trainer: Lightning refuses its options: You sel",
        ),
        (["--model", "MotifsModule", "--seed_everything", "-1"], "seed_everything must be from 0 to 2^32 - 1, got -1"),
        (
            ["--model", "MotifsModule", "--data.seed", str(1 << 63)],
            "seed must be above -2^62 and below 2^62, got 92233",
        ),
        (["--model", "MotifsModule", "--data.batch_size", str(1 << 63)], "batch_size must be from 1 to "),
        (["--model", "FrequencyModule"], "FrequencyModule has nothing to fit: sgalign test --model FrequencyModule"),
    ],
)
def test_the_command_line_refuses_bad_options_in_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    assert cli.main(["fit", "--trainer.accelerator", "cpu", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sgalign: ") and message in error, error


def test_the_command_line_has_no_optimizer_beside_those_of_the_modules(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--model", "MotifsModule", "--optimizer", "Adam"])
    assert end.value.code == 2 and "unrecognized arguments: --optimizer Adam" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "limit"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_a_run_over_no_batches_is_refused(command, limit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [f"--trainer.limit_{limit}_batches", "0", "--trainer.accelerator", "cpu"]
    assert cli.main([command, "--model", "FrequencyModule", *options]) == 1
    expected = f"sgalign: trainer.limit_{limit}_batches must be above 0, or there is nothing to {command}, got 0"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}])
def test_gradients_can_be_clipped_in_mixed_precision(scenes, options):
    run = fit(MotifsModule(**SMALL), scenes, max_steps=1, limit_val_batches=0, precision="bf16-mixed", **options)
    assert run.global_step == 1 and run.optimizers[0].defaults["fused"] != bool(options)


def test_there_is_no_zero_shot_recall_without_zero_shot_relations(scenes, caplog):
    data = SceneGraphData()
    data.annotated = data.validation = data.test = scenes.test
    assert data.zero_shot_validation is None and data.zero_shot_test is None
    assert "no zero-shot recall, as the test split has no zero-shot relations" in caplog.text


class Cache:
    """Features that no model reads."""

    folder, source = "features", None

    def __contains__(self, image_id):
        return True

    def add_to(self, batch):
        return batch


def test_features_that_the_model_does_not_read_are_named(scenes, monkeypatch, caplog):
    monkeypatch.setattr(scenes, "cache", Cache())
    made(MotifsModule(**SMALL), scenes)
    assert "data.features is not used, because only a model with vision 'cached' reads features" in caplog.text


def test_a_checkpoint_that_cannot_be_written_does_not_replace_the_previous_one(tmp_path, monkeypatch):
    path, temporary = tmp_path / "last.ckpt", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    write = Path.write_bytes

    def runs_out(partial, content):
        write(partial, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", runs_out)
    with pytest.raises(OSError, match="No space left on device: .*last.ckpt'"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, path)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path, temporary]
    assert not list(temporary.iterdir())


def test_an_error_of_a_full_disk_in_a_logger_names_its_folder(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CSVLogger, "log_hyperparams", full)
    assert cli.main(["fit", "--config", str(CONFIGS / "motifs_small.yaml"), "--trainer.accelerator", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sgalign: [Errno 28] No space left on device: 'runs'"


def test_seeds_of_masks_depend_on_every_argument_and_repeat():
    seeds = {step_seed(*arguments) for arguments in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]}
    seeds |= {step_seed(0, 0, 0, 1), step_seed(2**63, 0, 0, 0), step_seed(-1, 0, 0, 0)}
    assert len(seeds) == 7 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert step_seed(3, 4, 5, 6) == step_seed(3, 4, 5, 6)


# ---- options of the mirror


def mirror(scenes, **options):
    """Return an Align-Motifs with these options, a batch, its loss, and the parts of the loss."""
    module = made(AlignMotifsModule(**SMALL, **options), scenes).eval()
    module.run_seed = 0
    batch = collate(scenes.train[:8], 20)
    loss, parts = module.losses(batch, 0)
    return module, batch, loss, parts


def test_the_loss_is_the_weighted_sum_of_its_parts(scenes):
    _, _, loss, parts = mirror(scenes, alignment_weight=3.0)
    torch.testing.assert_close(loss, parts["loss"] + 3 * parts["alignment"])
    _, _, silent, parts = mirror(scenes, alignment_weight=0.0)
    assert torch.equal(silent, parts["loss"])


def test_the_supervised_loss_is_that_of_motifs_with_any_options_of_the_mirror(scenes):
    plain = made(MotifsModule(**SMALL), scenes).eval()
    expected, _ = plain.losses(collate(scenes.train[:8], 20), 0)
    for options in ({}, {"mask_ratio": 1.0}, {"mask_granularity": "feature"}, {"tied_head": True}):
        torch.testing.assert_close(mirror(scenes, **options)[3]["loss"], expected)


def test_a_tied_head_without_a_mask_leaves_nothing_to_align(scenes):
    assert mirror(scenes, tied_head=True, mask_ratio=0.0)[3]["alignment"].abs() < 1e-6
    assert mirror(scenes, tied_head=False, mask_ratio=0.0)[3]["alignment"] > 1e-4
    assert mirror(scenes, tied_head=True, mask_ratio=0.5)[3]["alignment"] > 1e-6


def test_the_head_of_the_mirror_learns_only_from_the_alignment(scenes):
    module, _, loss, _ = mirror(scenes)
    loss.backward()
    assert module.mirrored_head.weight.grad.any() and module.mirrored_head is not module.network.predicate
    module, _, loss, parts = mirror(scenes)
    parts["loss"].backward()
    assert not module.mirrored_head.weight.grad.any()


def test_a_row_mask_drops_whole_objects_and_differs_between_micro_batches(scenes):
    module, batch, *_ = mirror(scenes, mask_ratio=0.5)
    rows = module.draw_mask(batch, 0)
    assert rows.shape == (len(batch.labels), 1) and 0.2 < rows.float().mean() < 0.8
    assert not torch.equal(rows, module.draw_mask(batch, 1))


def test_a_feature_mask_drops_single_features(scenes):
    module, batch, *_ = mirror(scenes, mask_ratio=0.5, mask_granularity="feature")
    features = module.draw_mask(batch, 0)
    assert features.shape == (len(batch.labels), module.network.edge_input_dim)
    assert 0.45 < features.float().mean() < 0.55


def test_a_row_mask_is_an_attention_mask_of_one_head_and_one_query(scenes):
    module, batch, *_ = mirror(scenes, mask_ratio=0.5)
    seed = step_seed(0, module.global_step, 0, 0)
    whole = random_attention_mask(8, 1, 1, int(batch.lengths.max()), ratio=0.5, seed=seed)
    expected = [whole[image, 0, 0, place] for image, place in zip(batch.images, batch.positions)]
    assert torch.equal(module.draw_mask(batch, 0)[:, 0], torch.stack(expected))


def test_a_reduction_over_relations_multiplies_the_alignment_by_the_classes(scenes):
    element = mirror(scenes)[3]["alignment"]
    relation = mirror(scenes, reduction="relation")[3]["alignment"]
    torch.testing.assert_close(relation, 21 * element)


def test_the_symmetric_alignment_differs_from_that_of_one_direction(scenes):
    assert mirror(scenes, direction="symmetric")[3]["alignment"] != mirror(scenes)[3]["alignment"]


def test_a_supervised_mirror_adds_its_own_loss(scenes):
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


# ---- real data


@pytest.mark.slow
def test_motifs_beats_the_frequency_baseline_on_vrd(vrd_root):
    data = SceneGraphData(str(vrd_root))
    frequency = trainer().test(FrequencyModule(), datamodule=data, verbose=False)[0]
    module = MotifsModule()
    motifs = fit(module, data, max_epochs=2, limit_val_batches=0).test(module, datamodule=data, verbose=False)[0]
    for metric in ("test/R@50", "test/mR@50"):
        assert motifs[metric] > frequency[metric] + 0.01, metric


# ---- command line


def test_compare_prints_its_table_and_writes_results_checkpoints_and_pictures(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "COST_STEPS", 2)
    monkeypatch.setattr("sgalign.data.scenes.SIZES", {"train": 48, "validation": 16, "test": 16})
    assert cli.main(["compare", "--epochs", "2", "--out", "out"]) == 0
    printed = capfd.readouterr().out
    for name in ("Frequency", "Motifs", "Align-Motifs"):
        assert f"\n{name} " in printed
    written = ("comparison.png", "predictions.png", "results.json", "Motifs/metrics.csv")
    for path in (*written, "Motifs/last.ckpt", "Align-Motifs/last.ckpt"):
        assert (tmp_path / "out" / path).stat().st_size > 100
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["validation"]["Motifs"]) == 2 and 0 < results["test"]["Motifs"]["R@50"] < 1
    assert "times as long" in printed and results["step_seconds"]["Motifs"] > 0


def test_predicted_graphs_are_drawn_even_if_an_image_is_missing(tmp_path, capsys, monkeypatch):
    """The first scene has no image file, and its predictions are right. Those of the other scenes are wrong."""

    class Predictor:
        device = torch.device("cpu")

        def eval(self):
            return self

        def transfer_batch_to_device(self, batch, device, index):
            return batch

        def predictions(self, batch):
            graph = next(graph for graph in scenes if graph.image_id == batch.image_ids[0])
            scores = torch.nn.functional.one_hot(graph.relations[:, 2], len(data.predicate_names)).double()
            if graph is not scenes[0]:
                scores = scores.roll(1, 1).clamp(min=0.01)
            found = {"image_id": graph.image_id, "boxes": graph.boxes, "labels": graph.labels}
            found |= {"scores": torch.ones(len(graph.labels)), "pairs": graph.relations[:, :2]}
            return [found | {"predicate_scores": scores}]

    def no_file():
        raise FileNotFoundError("no such image")

    monkeypatch.setattr("sgalign.data.scenes.SIZES", {"train": 16, "validation": 4, "test": 3})
    figures = []
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: figures.append(figure))
    data = SceneGraphData()
    scenes = [replace(graph, image=no_file) if place == 0 else graph for place, graph in enumerate(data.test)]
    monkeypatch.setattr(data, "test", scenes)
    compare.draw_predictions(tmp_path / "predictions.png", data, Predictor())
    assert capsys.readouterr().err.count("only its boxes are drawn: no such image") == 1
    shown = [min(len(graph.relations), compare.MOST_TRIPLETS) for graph in scenes]
    for axes, count, right in zip(figures[0].axes[3:], shown, (shown[0], 0, 0), strict=True):
        assert axes.get_title() == f"{right} of the best {count} triplets are annotated (green)"
        arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
        green = [arrow for arrow in arrows if arrow.get_edgecolor() == to_rgba("tab:green")]
        assert (len(arrows), len(green)) == (count, right)


def test_compare_needs_a_new_or_empty_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["compare", "--out", "out"])
    assert "must be a new or an empty folder" in capfd.readouterr().err


def test_a_model_is_fitted_tested_and_used_for_prediction_on_the_command_line(tmp_path, monkeypatch, capsys):
    config = str(CONFIGS / "align_motifs_small.yaml")
    short = ["--config", config, "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", *short, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]) == 0
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


@pytest.mark.slow  # importing all libraries again takes most of the time
def test_a_new_process_can_fit(tmp_path):
    command = [sys.executable, "-m", "sgalign", "fit", "--config", str(CONFIGS / "align_motifs_small.yaml")]
    subprocess.run([*command, "--trainer.fast_dev_run=1"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("config", CONFIG_FILES, ids=lambda path: path.name)
def test_configs_are_accepted_by_fit(config, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["fit", "--config", str(config), "--print_config"])
    assert exit.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIG_FILES, ids=lambda path: path.name)
def test_configs_save_the_last_epoch_from_which_a_run_can_be_resumed(config):
    """Lightning's `save_last` with a monitor would save the last epoch that was among the best."""
    options = callbacks(config)
    assert [one for one in options if one.get("filename") == "last" and "monitor" not in one]


def test_the_command_test_needs_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["test", "--config", str(CONFIGS / "motifs_small.yaml")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("sgalign: test needs --ckpt_path")


def test_predict_with_a_config_or_a_model_is_the_command_of_lightning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in (("-c", str(CONFIGS / "motifs_small.yaml")), ("--model=MotifsModule",)):
        assert cli.main(["predict", *option]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("sgalign: predict needs --ckpt_path")


def test_configs_have_the_default_values_of_the_options():
    """`sgalign compare` uses the defaults, so it trains the same systems as the configs."""
    for name, module in (("motifs_small", MotifsModule), ("align_motifs_small", AlignMotifsModule)):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert config["model"]["class_path"] == f"sgalign.training.{module.__name__}"
        spelled, defaults = config["model"]["init_args"], module().hparams
        assert spelled.items() <= defaults.items()
        of_images = {"backbone", "min_size", "max_size", "head_dim", "detections_per_image", "detector_weights"}
        long_tail = {"predicate_weights", "predicate_weight_power", "effective_number_beta"}
        long_tail |= {"logit_adjustment", "logit_adjustment_test"}
        others = {"learning_rate_images", "word_vectors", "start_from"}
        assert defaults.keys() - spelled.keys() == of_images | long_tail | others
        assert config["trainer"]["max_epochs"] == compare.parser().get_default("epochs")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such"), (b"PK\x03\x04 cut", "cut short"), ({"a": 1}, "no class names")]
)
def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "bad.ckpt"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    for command in ("fit", "test"):
        assert cli.main([command, "--config", str(CONFIG_FILES[0]), "--ckpt_path", str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error and str(path) in error and "Traceback" not in error


def test_training_without_relations_is_refused(scenes):
    data = SceneGraphData()
    data.train, data.validation, data.test = [], scenes.validation, scenes.test
    with pytest.raises(ValueError, match="no training image has a relation"):
        fit(MotifsModule(**SMALL), data)


def test_a_diverging_loss_stops_the_training_with_advice(scenes):
    with pytest.raises(
        ValueError,
        match=r"loss must be finite, got nan \(loss nan\) at step 1: lower learning_rate, or check .* images",
    ):
        fit(MotifsModule(**SMALL, learning_rate=1e29), scenes)


def test_missing_data_are_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--data", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert "must be a folder with a data set, but there is no such folder" in error and error.strip().count("\n") == 0
    assert not (tmp_path / "runs").exists()


def test_a_missing_extra_is_reported_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "required", lambda extra: ["torch", "no-such-package"])
    assert cli.main(["compare"]) == 1
    expected = (
        "sgalign: compare needs packages that are not installed: no-such-package. Run pip install 'sgalign[train]'\n"
    )
    assert capsys.readouterr().err == expected


def test_help_is_printed(capsys):
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sgalign")


def test_an_unknown_command_is_refused_by_name(capsys):
    assert cli.main(["train"]) == 2
    assert "no command 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_doctor_reports_a_backend_that_fails_or_is_wrong(capfd, monkeypatch, fails):
    def broken(*tensors, backend, **options):
        if fails and backend == "cpu":
            raise RuntimeError("no such kernel")
        return tensors[0] + (backend == "cpu"), tensors[1]

    monkeypatch.setattr(doctor, "dual_branch_attention", broken)
    assert doctor.main() == 1
    verdict = "fails: RuntimeError: no such kernel" if fails else "differs from the reference by 1.0e+00: WRONG"
    assert f"cpu: dual-branch attention {verdict}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("asked", "printed"),
    [("tf32", "must be tf32x3 or ieee, got 'tf32'"), ("ieee", "with ieee (SGALIGN_TRITON_DOT_PRECISION)")],
)
def test_doctor_prints_the_precision_that_is_requested_of_triton(capfd, monkeypatch, asked, printed):
    configs = pytest.importorskip("sgalign.kernels.configs")
    monkeypatch.setattr(configs, "ASKED_PRECISION", asked)
    assert doctor.main() == int(asked == "tf32")
    assert printed in capfd.readouterr().out


def test_doctor_finds_the_package_working(capfd):
    assert cli.main(["doctor"]) == 0
    assert "cpu: available" in capfd.readouterr().out


def test_doctor_refuses_unknown_options():
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--fix"])
