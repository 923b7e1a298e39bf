"""Tests of the options of a resumed run. The given options are used, refused or named."""

import copy
import dataclasses
import json
import re
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from trainers import CONFIGS, SMALL_DETR, SMALL_MOTIFS, trainer, trainer_without_sanity_check

from sgalign.commands import main as cli
from sgalign.errors import InputError
from sgalign.training import (
    AlignMotifsModule,
    AlignSGTRModule,
    DetectorModule,
    EntityDetectorModule,
    MaskedMotifsModule,
    MotifsModule,
    SceneGraphData,
    SGTRModule,
    base,
    saved_states,
)
from sgalign.training.checkpoints import check_ours, read_checkpoint
from sgalign.training.resuming import GivenOptions, check_fixed, differing
from sgalign.training.saved_states import check_callbacks, check_resumable, check_states

OPTIONS = [
    module.options_type
    for module in (
        MotifsModule,
        AlignMotifsModule,
        DetectorModule,
        EntityDetectorModule,
        SGTRModule,
        AlignSGTRModule,
    )
]
# Every option belongs to one of these. Changed options of a network give wrong results with the same weights.
NETWORK = """backbone head_dim vision embed_dim hidden_dim relation_dim tied_head stride dim heads ffn_dim entity_layers
    entity_queries encoder_layers layers queries focal tied_heads"""
TRAINING = "optimizer warmup_steps frozen aligned weights"
START = "word_vectors detector_weights start_from"
CHANGEABLE = """protocol min_size max_size detections_per_image relations_per_image learning_rate learning_rate_images
    predicate_weights predicate_weight_power effective_number_beta logit_adjustment logit_adjustment_test compile
    mask_ratio alignment_weight reduction direction mask_granularity supervise_mirror dropout entity_loss_weights
    short_sides long_side padded_size flip backbone_learning_rate learning_rate_drops distinct_matching pairs"""
KINDS = {
    name: kind
    for kind, names in {"network": NETWORK, "training": TRAINING, "start": START, None: CHANGEABLE}.items()
    for name in names.split()
}
FIELDS = [(kind, field.name) for kind in OPTIONS for field in dataclasses.fields(kind)]


@pytest.fixture(scope="module")
def data():
    return some_scenes()


def some_scenes(**options):
    """Return the data module with 3 batches of 16 images."""
    data = SceneGraphData(**options)
    data.train, data.validation = data.train[:48], data.validation[:8]
    return data


@pytest.fixture
def printed(monkeypatch):
    """The lines that `fit` prints about a checkpoint."""
    lines = []
    monkeypatch.setattr(base, "rank_zero_info", lines.append)
    return lines


def run(module, data, ckpt_path=None, epochs=1, **options):
    """Train a module for some epochs and return the trainer."""
    result = trainer_without_sanity_check(max_epochs=epochs, **options)
    result.fit(module, data, ckpt_path=ckpt_path)
    return result


def rates_of(run):
    return [group["lr"] for group in run.optimizers[0].param_groups]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_is_fixed_for_a_reason_or_changes(kind, name):
    options, why = kind(), KINDS[name]
    given = dataclasses.asdict(options)
    assert differing(given, given | {name: "another"}) == {name: (given[name], "another")}
    for resumes in (False, True):
        refused = why == "network" or (resumes and why == "training")
        if refused:
            with pytest.raises(ValueError, match=f"{name} must be 'another', as in the checkpoint, got "):
                check_fixed(options, given | {name: "another"}, resumes=resumes)
        else:
            check_fixed(options, given | {name: "another"}, resumes=resumes)


@pytest.mark.parametrize("name", START.split())
def test_a_file_that_only_a_new_run_reads_can_be_left_out_but_not_changed(name):
    options = MotifsModule(**{name: "new"}).options
    check_fixed(options, {name: "old"}, resumes=False)
    with pytest.raises(
        ValueError, match=f"{name} must be 'old', as in the checkpoint, got 'new'. Only a new run reads"
    ):
        check_fixed(options, {name: "old"}, resumes=True)


def test_tuples_and_lists_are_equal_and_options_that_a_checkpoint_lacks_do_not_differ():
    assert differing({"frozen": (), "pairs": 3}, {"frozen": []}) == {}
    assert differing({"pairs": 3}, {"pairs": torch.ones(2)}).keys() == {"pairs"}


SGD = {"optimizer": "sgd", "warmup_steps": 4}


@pytest.mark.parametrize(
    ("options", "plateau", "factor"),
    [({}, False, 1), (SGD, False, 0.1 + 0.9 * 3 / 4), (SGD, True, (0.1 + 0.9 * 3 / 4) / 10)],
    ids=["adam", "in the warm-up", "after a drop in the warm-up"],
)
def test_a_new_learning_rate_of_motifs_is_used_from_the_first_step(options, plateau, factor, data, tmp_path, printed):
    """The warm-up of 4 steps is in its fourth step when the run resumes."""
    first = run(MotifsModule(**SMALL_MOTIFS, **options), data)
    if plateau:
        for value in (1.0, 0.0, 0.0, 0.0):
            first.lr_scheduler_configs[1].scheduler.step(value)
    first.save_checkpoint(tmp_path / "first.ckpt")
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *unused):
            rates.append(rates_of(trainer))

    run(
        MotifsModule(**SMALL_MOTIFS, **options, learning_rate=1e-5),
        data,
        tmp_path / "first.ckpt",
        epochs=2,
        callbacks=[Rates()],
    )
    assert rates[0] == pytest.approx([1e-5 * factor] * len(rates[0]))
    assert printed == ["these options differ from the checkpoint: learning_rate 1e-05 instead of 0.001"]


@pytest.mark.parametrize("drops", [[], [1]], ids=str)
def test_new_learning_rates_and_drops_of_detr_are_used_from_the_first_step(drops, tmp_path, printed):
    """The first run ends after its drop. The resumed run uses the rates that it would have without a checkpoint."""
    scenes = some_scenes(images=True, batch_size=2)
    limits = {"limit_train_batches": 3, "limit_val_batches": 0}
    options = SMALL_DETR | {"warmup_steps": 4, "learning_rate": 1e-3, "backbone_learning_rate": 1e-3}
    first = run(EntityDetectorModule(**options, learning_rate_drops=[2]), scenes, **limits)
    first.save_checkpoint(tmp_path / "first.ckpt")
    changed = options | {"learning_rate": 1e-5, "backbone_learning_rate": 1e-6, "learning_rate_drops": drops}
    resumed = run(EntityDetectorModule(**changed), scenes, tmp_path / "first.ckpt", epochs=2, **limits)
    factor = 0.1 if drops == [1] else 1
    assert rates_of(resumed) == pytest.approx([1e-5 * factor, 1e-6 * factor])
    rates = "learning_rate 1e-05 instead of 0.001, backbone_learning_rate 1e-06 instead of 0.001"
    assert printed == [f"these options differ from the checkpoint: {rates}, learning_rate_drops {drops} instead of [2]"]


def test_a_checkpoint_without_the_options_of_the_data_resumes_with_the_given_learning_rate(data, tmp_path, printed):
    run(MotifsModule(**SMALL_MOTIFS), data).save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    del checkpoint["datamodule_hyper_parameters"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = run(MotifsModule(**SMALL_MOTIFS, learning_rate=1e-5), data, tmp_path / "old.ckpt", epochs=2)
    assert rates_of(resumed) == [1e-5]
    assert printed == ["these options differ from the checkpoint: learning_rate 1e-05 instead of 0.001"]


WRONG_STATES = {
    "epoch": ["x", True],
    "global_step": [None, 7],
    "loops": [None, {}, {"fit_loop": {}}, {"fit_loop": {"epoch_progress": 3}}],
    "callbacks": [None, [1]],
    "lr_schedulers": [None, [5]],
    "optimizer_states": [5, [], [{}], [{"state": 5, "param_groups": []}], [{"state": {0: 5}, "param_groups": []}]],
    "sgalign": [{"random_states": []}],
    "pytorch-lightning_version": [None, "x", "1.4.0"],
}


def test_a_run_resumes_only_with_all_states(data, tmp_path):
    module = MotifsModule(**SMALL_MOTIFS)
    run(module, data).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    check_resumable(checkpoint)
    for name, values in WRONG_STATES.items():
        for value in values:
            with pytest.raises(
                InputError, match=f"ckpt_path must be a whole checkpoint .* its (entry '{name}' must be|{name} is)"
            ):
                check_resumable(checkpoint | {name: value})
    ours = {"random_states": ["x", [torch.zeros(3)]], "run_seed": ["x", None, True, -1, 1 << 64]}
    for name, values in ours.items():
        for value in values:
            with pytest.raises(InputError, match=f"x: {name} must be a"):
                check_ours(checkpoint | {"sgalign": checkpoint["sgalign"] | {name: value}}, "x")
    with pytest.raises(InputError, match="x: datamodule_hyper_parameters must be a dict"):
        check_ours(checkpoint | {"datamodule_hyper_parameters": []}, "x")


BATCHES = "epoch_loop.batch_progress"


def group(checkpoint, number=0):
    return checkpoint["optimizer_states"][0]["param_groups"][number]


def loop(checkpoint, part="epoch_progress"):
    return checkpoint["loops"]["fit_loop"][part]


def callback(checkpoint, kind):
    return next(state for name, state in checkpoint["callbacks"].items() if name.startswith(kind))


# Changes of a checkpoint after which its states have another form than the run's own, by what the error says.
WRONG_FORMS = {
    "optimizer_states[0].param_groups[0].lr": lambda it: group(it).update(lr="x"),
    "optimizer_states[0].param_groups[1].lr must be a number above": lambda it: group(it, 1).update(lr=-1.0),
    "optimizer_states[0].param_groups[0] must be a dict with lr": lambda it: group(it).pop("initial_lr"),
    "optimizer_states must": lambda it: it["optimizer_states"].append({"state": {}, "param_groups": []}),
    "2 learning rate schedules, got 0": lambda it: it["lr_schedulers"].clear(),
    "lr_schedulers[0].last_epoch": lambda it: it["lr_schedulers"][0].update(last_epoch="x"),
    "lr_schedulers[0].last_epoch must be a whole": lambda it: it["lr_schedulers"][0].update(last_epoch=-1),
    "lr_schedulers[0].base_lrs": lambda it: it["lr_schedulers"][0].update(base_lrs=[0.001]),
    "lr_schedulers[1] must be a dict with": lambda it: it["lr_schedulers"][1].pop("num_bad_epochs"),
    "lr_schedulers[1].best": lambda it: it["lr_schedulers"][1].update(best=float("nan")),
    "lr_schedulers[1].patience": lambda it: it["lr_schedulers"][1].update(patience=2.5),
    "lr_schedulers[1].mode": lambda it: it["lr_schedulers"][1].update(mode=None),
    "fit_loop.epoch_progress.total.ready": lambda it: loop(it)["total"].update(ready=-1),
    "fit_loop.epoch_loop.batch_progress.current": lambda it: loop(it, BATCHES).update(current=[1]),
    "fit_loop.epoch_loop.batch_progress.is_last_batch": lambda it: loop(it, BATCHES).update(is_last_batch=1),
    "combined_loader must be a list of 1": lambda it: loop(it, "state_dict").update(combined_loader=5),
    "combined_loader must": lambda it: loop(it, "state_dict").update(combined_loader=[{}, {}]),
    "combined_loader[0] must be a dict,": lambda it: loop(it, "state_dict").update(combined_loader=[5]),
    "wait_count": lambda it: callback(it, "EarlyStopping").update(wait_count="x"),
    "best_score must be a tensor": lambda it: callback(it, "EarlyStopping").update(best_score=torch.zeros(2)),
    "best_score must be": lambda it: callback(it, "EarlyStopping").update(best_score=torch.tensor(float("nan"))),
    "must be a dict with wait_count": lambda it: callback(it, "EarlyStopping").pop("best_score"),
    "score of x.ckpt must be a tensor": lambda it: callback(it, "ModelCheckpoint").update(
        best_k_models={"x.ckpt": "x"}
    ),
    "score of y.ckpt must be a tensor": lambda it: callback(it, "ModelCheckpoint").update(
        best_k_models={"y.ckpt": None}
    ),
    "kth_best_model_path that is one of": lambda it: callback(it, "ModelCheckpoint").update(
        kth_best_model_path="x.ckpt"
    ),
    "kth_value must be a tensor": lambda it: callback(it, "ModelCheckpoint").update(kth_value="x"),
    "best_model_score must be a tensor": lambda it: callback(it, "ModelCheckpoint").update(best_model_score=0.5),
    "paths of .ckpt files": lambda it: callback(it, "ModelCheckpoint").update(
        best_k_models={"x.txt": torch.tensor(1.0)}
    ),
}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The checkpoint of a run with two schedules and two callbacks, and a function that resumes from a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")

    def fit(ckpt_path=None, epochs=1):
        module = MotifsModule(**SMALL_MOTIFS, optimizer="sgd", warmup_steps=5)
        callbacks = [ModelCheckpoint(folder, monitor="val/R@50"), EarlyStopping("val/R@50", mode="max", strict=False)]
        return run(module, data, ckpt_path, epochs, callbacks=callbacks, enable_checkpointing=True)

    fit().save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True), fit


@pytest.mark.parametrize("place", WRONG_FORMS)
def test_states_have_the_form_of_the_runs_own(place, stopped, tmp_path):
    """torch and Lightning would load them, and fail later or train in another way."""
    checkpoint, fit = copy.deepcopy(stopped[0]), stopped[1]
    WRONG_FORMS[place](checkpoint)
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match=f"ckpt_path must (have|be a whole checkpoint).*{re.escape(place)}"):
        fit(tmp_path / "b.ckpt", epochs=2)


@pytest.mark.parametrize("wrong", ["one number", "no dimensions", "missing", "not finite", "none at all", "expanded"])
def test_states_of_the_optimizer_fit_their_weights(wrong, data, tmp_path):
    """torch itself would read and write outside of them."""
    run(MotifsModule(**SMALL_MOTIFS), data).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    states = checkpoint["optimizer_states"][0]["state"]
    for state in states.values():
        if wrong == "missing":
            del state["exp_avg_sq"]
        elif wrong == "not finite":
            state["exp_avg"].fill_(float("nan"))
        elif wrong == "expanded":
            state["exp_avg"] = torch.zeros(1).expand(state["exp_avg"].shape)
        else:
            state["exp_avg"] = torch.ones(1) if wrong == "one number" else torch.tensor(1.0)
    if wrong == "none at all":
        states.clear()
    torch.save(checkpoint, tmp_path / "b.ckpt")
    if wrong == "none at all":  # and groups of other sizes
        del checkpoint["optimizer_states"][0]["param_groups"][0]["params"][0]
        torch.save(checkpoint, tmp_path / "groups.ckpt")
        with pytest.raises(ValueError) as caught:
            run(MotifsModule(**SMALL_MOTIFS), data, tmp_path / "groups.ckpt", epochs=2)
        assert cli._sentence(caught.value).startswith("ckpt_path must have the states of this run, but loading")
    if wrong == "expanded":  # copied to memory of its own
        run(MotifsModule(**SMALL_MOTIFS), data, tmp_path / "b.ckpt", epochs=2)
        return
    with pytest.raises(
        InputError,
        match="ckpt_path must have(, for each weight .*, the| a state of the| finite states of the) optimizer",
    ):
        run(MotifsModule(**SMALL_MOTIFS), data, tmp_path / "b.ckpt", epochs=2)


PATHS = "best_model_path", "last_model_path", "kth_best_model_path"


class Torch(ModelCheckpoint):
    FILE_EXTENSION = ".pt"


@pytest.mark.parametrize(
    ("kind", "folder", "path", "is_safe"),
    [
        (ModelCheckpoint, "/runs", "/runs/best.ckpt", True),
        (ModelCheckpoint, "/runs", "../old/best.ckpt", True),  # of an earlier folder
        (ModelCheckpoint, "/a/../runs", "/a/../runs/best.ckpt", True),
        (ModelCheckpoint, "/runs/1", "/a/../runs/0/best.ckpt", True),  # Lightning leaves it alone
        (ModelCheckpoint, "../runs", "../runs/best.ckpt", True),
        (ModelCheckpoint, "s3://mine/runs", "s3://mine/runs/best.ckpt", True),
        (Torch, "/runs", "/runs/best.pt", True),
        (ModelCheckpoint, "/runs", "/runs/../mine.ckpt", False),
        (ModelCheckpoint, "../runs", "../runs/../mine.ckpt", False),
        (ModelCheckpoint, "/runs", "s3://mine/mine.ckpt", False),
        (ModelCheckpoint, "s3://mine/runs", "s3://mine/runs/../mine.ckpt", False),
        (ModelCheckpoint, "/runs", "/runs/mine.txt", False),
        (ModelCheckpoint, "/runs", 5, False),
    ],
)
def test_a_resumed_run_deletes_no_other_files(kind, folder, path, is_safe):
    """Lightning deletes the old model when a better one replaces it."""
    callback = kind()
    callback.dirpath = folder
    trainer = SimpleNamespace(checkpoint_callbacks=[callback], early_stopping_callbacks=[])
    best = {"best_k_models": {path: torch.tensor(0.5)}, "kth_best_model_path": path}
    for state in (best, *({name: path} for name in PATHS)):
        checkpoint = {"callbacks": {callback.state_key: callback.state_dict() | state}}
        with nullcontext() if is_safe else pytest.raises(InputError, match="ckpt_path must"):
            check_callbacks(checkpoint, trainer)


def test_the_worst_model_is_one_of_the_best_unless_they_are_in_another_folder():
    """Lightning would look for it after an epoch."""
    callback = ModelCheckpoint("/runs", monitor="val/R@50", save_top_k=1)
    trainer = SimpleNamespace(checkpoint_callbacks=[callback], early_stopping_callbacks=[])
    state = callback.state_dict() | {"best_k_models": {"/runs/a.ckpt": torch.tensor(0.5)}}  # of a run with save_top_k 2
    with pytest.raises(InputError, match="one of its 1 best_k_models, or save_top_k of .* above 1, got '' and 1"):
        check_callbacks({"callbacks": {callback.state_key: state}}, trainer)
    check_callbacks({"callbacks": {callback.state_key: state | {"dirpath": "/others"}}}, trainer)


def test_states_of_other_callbacks_can_have_any_form(data, tmp_path):
    class Own(Callback):
        def state_dict(self):
            return {"best_model_path": "x.pt", "current_score": 0.5, "dirpath": ["a"], "best_k_models": 5}

    run(MotifsModule(**SMALL_MOTIFS), data, callbacks=[Own()]).save_checkpoint(tmp_path / "a.ckpt")
    assert run(MotifsModule(**SMALL_MOTIFS), data, tmp_path / "a.ckpt", 2, callbacks=[Own()]).global_step == 6


def test_the_scaler_of_mixed_precision_has_the_form_of_the_runs_own(stopped):
    checkpoint, fit = stopped
    run = fit()

    class Scaler:
        def state_dict(self):
            return {"scale": 65536.0, "_growth_tracker": 0}

    parts = {"optimizers": run.optimizers, "lr_scheduler_configs": run.lr_scheduler_configs, "fit_loop": run.fit_loop}
    trainer = SimpleNamespace(precision_plugin=Scaler(), **parts)
    for saved in ({}, {Scaler.__qualname__: {"scale": 2.0}}):  # without a scaler after a run in another precision
        check_states(checkpoint | saved, trainer)
    with pytest.raises(InputError, match="Scaler.scale must be a number above or equal to 0, got 'x'"):
        check_states(checkpoint | {Scaler.__qualname__: {"scale": "x"}}, trainer)


def test_other_entries_of_a_schedule_are_named_and_not_used(stopped, tmp_path, monkeypatch):
    """torch would put them in the place of methods."""
    lines = []
    monkeypatch.setattr(saved_states, "rank_zero_info", lines.append)
    checkpoint, fit = copy.deepcopy(stopped[0]), stopped[1]
    for state in checkpoint["lr_schedulers"]:
        state |= {"step": 5, "get_lr": 5, "optimizer": 5}
    torch.save(checkpoint, tmp_path / "b.ckpt")
    assert fit(tmp_path / "b.ckpt", epochs=2).global_step == 6
    assert len(lines) == 6 and "'get_lr' of a learning rate schedule in the checkpoint is not used" in lines


def test_a_schedule_that_has_fallen_to_zero_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    given = GivenOptions([optimizer], [schedule])
    schedule.load_state_dict(schedule.state_dict() | {"gamma": 0.0, "last_epoch": 3})
    with pytest.raises(InputError, match="its schedule multiplies it by 0.0 to the power of 1"):
        given.put_back([optimizer], [schedule])


def test_early_stopping_by_an_unknown_figure_is_one_sentence(data):
    with pytest.raises(RuntimeError) as caught:
        run(MotifsModule(**SMALL_MOTIFS), data, callbacks=[EarlyStopping("val/x")])
    assert cli._sentence(caught.value).startswith("Early stopping conditioned on metric `val/x`")


def nine_steps(folder, ckpt_path=None, interrupt=None, **limits):
    """Train on 3 batches and validate on 2, for 3 epochs unless limits end the run earlier. Save it at many moments.

    Return what the run has read, and its last weights and schedule.

    Args:
        folder: folder of the checkpoints: after each step, after each epoch, the last and the interrupted one.
        ckpt_path: checkpoint to resume from.
        interrupt: name of the hook in which the run is interrupted, and what it has read until then.
        limits: options of the trainer, and `epochs`.
    """
    data, read = SceneGraphData(batch_size=2), []
    data.train, data.validation = data.train[:6], data.validation[:4]

    class Reader(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.stop("epoch")

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            read.append((trainer.current_epoch, trainer.global_step, *batch.image_ids))
            self.stop("step")

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
            read.append((trainer.current_epoch, "validation", *batch.image_ids))
            self.stop("validation")

        def stop(self, hook):
            if (hook, len(read)) == interrupt:
                raise KeyboardInterrupt

    every = {"save_top_k": -1, "auto_insert_metric_name": False, "enable_version_counter": False}
    saved = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, **every),
        ModelCheckpoint(folder, "epoch{epoch}", **every),
        ModelCheckpoint(folder, "last", mode="max", enable_version_counter=False),
        ModelCheckpoint(folder, "interrupted", monitor="val/R@50", save_top_k=0, save_on_exception=True),
        EarlyStopping("val/mR@50", mode="max", patience=9, strict=False),
    ]
    torch.manual_seed(0)
    module = MotifsModule(**SMALL_MOTIFS, optimizer="sgd", warmup_steps=5)
    options = {"epochs": 3, "callbacks": [Reader(), *saved], "enable_checkpointing": True} | limits
    with suppress(SystemExit):  # which Lightning makes of a KeyboardInterrupt
        trainer = run(module, data, ckpt_path, **options)
        assert trainer.max_steps == limits.get("max_steps", -1)
        schedule = trainer.lr_scheduler_configs[1].scheduler
        return read, {**module.state_dict(), "plateau": torch.tensor([schedule.num_bad_epochs, schedule.last_epoch])}
    return read, {}


def are_equal(some, others):
    return all(tensor.equal(others[name]) for name, tensor in some.items())


LIMITS = pytest.mark.parametrize("limits", [{}, {"max_steps": 9}, {"max_steps": 9, "epochs": -1}], ids=str)


@LIMITS
def test_a_run_resumed_after_any_step_or_epoch_equals_an_uninterrupted_one(limits, tmp_path):
    read, last = nine_steps(tmp_path / "whole", **limits)
    assert len(read) == 15 and len(set(read)) == 15
    for name, left in {"1": 14, "epoch0": 10, "5": 8, "epoch1": 5, "8": 3}.items():
        resumed, found = nine_steps(tmp_path / "resumed", tmp_path / "whole" / f"{name}.ckpt", **limits)
        assert resumed == read[-left:] and are_equal(last, found), name


def test_the_plateau_counts_a_validation_after_which_the_checkpoint_was_written(tmp_path):
    """If not every epoch ends with a validation, Lightning writes checkpoints before the end of the epoch."""
    read, last = nine_steps(tmp_path / "whole", check_val_every_n_epoch=2)
    resumed, found = nine_steps(tmp_path / "resumed", tmp_path / "whole" / "epoch1.ckpt", check_val_every_n_epoch=2)
    assert resumed == read[-3:] and last["plateau"].tolist() == [0, 1] and are_equal(last, found)
    checkpoint = torch.load(tmp_path / "whole" / "epoch1.ckpt", weights_only=True)
    checkpoint["sgalign"]["plateau_figure"] = "x"
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="so plateau_figure must be a tensor of one number"):
        nine_steps(tmp_path / "x", tmp_path / "x.ckpt")


# The moment of an interruption, and the number of batches that the resumed run must not read again.
INTERRUPTIONS = {("step", 7): 6, ("step", 8): 7, ("validation", 9): 8, ("validation", 10): 8, ("epoch", 5): 5}


@pytest.mark.parametrize("interrupt", INTERRUPTIONS, ids=str)
@LIMITS
def test_a_run_continues_where_it_was_interrupted(limits, interrupt, tmp_path):
    """A step is repeated, and a validation from its first batch on."""
    read, last = nine_steps(tmp_path / "whole", **limits)
    assert nine_steps(tmp_path, interrupt=interrupt, **limits)[0] == read[: interrupt[1]]
    resumed, found = nine_steps(tmp_path / "resumed", tmp_path / "interrupted.ckpt", **limits)
    assert resumed == read[INTERRUPTIONS[interrupt] :] and are_equal(last, found)


@pytest.mark.parametrize("epochs", [3, -1])
def test_a_run_that_max_steps_ended_can_be_extended(epochs, tmp_path):
    """The rest of the epoch that it ended is not left out."""
    read, last = nine_steps(tmp_path / "whole", epochs=epochs, max_steps=9)
    for end, done in {2: 2, 3: 5, 7: 11}.items():
        assert nine_steps(tmp_path / f"{end}", epochs=epochs, max_steps=end)[0] == read[:done]
        extended, found = nine_steps(tmp_path / "b", tmp_path / f"{end}" / "last.ckpt", epochs=epochs, max_steps=9)
        assert extended == read[done:] and are_equal(last, found), end


def test_a_trainer_and_a_module_can_be_used_again(data, tmp_path):
    """Also after a refused checkpoint, and with options that are whole numbers."""
    module = MotifsModule(**SMALL_MOTIFS)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/R@50", save_top_k=2, enable_version_counter=False)
    twice = run(module, data, epochs=2, callbacks=[best], enable_checkpointing=True)
    twice.fit(module, data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert twice.global_step == 6
    resumed = run(MotifsModule(**SMALL_MOTIFS, learning_rate=1), data, tmp_path / "epoch=0.ckpt", max_steps=4, epochs=9)
    assert rates_of(resumed) == [1.0] and (resumed.global_step, resumed.max_steps) == (4, 4)
    checkpoint = read_checkpoint(tmp_path / "epoch=0.ckpt")
    group(checkpoint).update(lr="x")
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(InputError, match="lr must be a number"):
        run(module, data, tmp_path / "wrong.ckpt", max_steps=5, epochs=9)
    assert run(module, data, max_steps=5, epochs=9).global_step == 5
    nothing_left = run(module, data, tmp_path / "epoch=0.ckpt", max_steps=5, epochs=1)
    assert nothing_left.max_steps == 5


def test_the_position_in_an_epoch_has_whole_numbers(data):
    loader = run(MotifsModule(**SMALL_MOTIFS), data).train_dataloader
    for state in ({"epoch": 0}, {"epoch": 0, "batches": "x", "images": 16}, {"epoch": -1, "batches": 0, "images": 16}):
        with pytest.raises(InputError, match="ckpt_path must have the states of this run, so combined_loader"):
            loader.load_state_dict(state)


def test_changed_options_of_the_data_and_the_module_are_named(data, tmp_path, printed):
    """With `learning_rate_images`, the batch size changes the learning rate."""
    options = SMALL_MOTIFS | {"learning_rate_images": 16}
    run(MaskedMotifsModule(**options), data).save_checkpoint(tmp_path / "first.ckpt")
    changed = some_scenes(batch_size=8, seed=5, repeat_threshold=0.1)
    resumed = run(MotifsModule(**options), changed, tmp_path / "first.ckpt", epochs=2)
    assert rates_of(resumed) == [5e-4]
    assert printed == [
        "these options differ from the checkpoint: module MotifsModule instead of MaskedMotifsModule, data.batch_size "
        "8 instead of 16, data.seed 5 instead of 0, data.repeat_threshold 0.1 instead of 0.0, initial learning rate "
        "0.0005 instead of 0.001"
    ]


def test_given_weights_of_predicates_replace_those_of_the_checkpoint(data, tmp_path):
    run(MotifsModule(**SMALL_MOTIFS), data).save_checkpoint(tmp_path / "first.ckpt")
    for options in (
        {"predicate_weights": "inverse_frequency", "predicate_weight_power": 0.3},
        {"predicate_weights": "effective_number", "effective_number_beta": 0.9},
    ):
        new, resumed = (MotifsModule(**SMALL_MOTIFS, **options) for _ in range(2))
        run(new, data)
        resumed.on_load_checkpoint(torch.load(tmp_path / "first.ckpt", weights_only=True))  # as the command line does
        run(resumed, data, tmp_path / "first.ckpt", epochs=2)
        assert torch.equal(resumed.relation_loss.weight, new.relation_loss.weight)
        assert torch.equal(resumed.relation_loss.log_prior, new.relation_loss.log_prior)
        assert new.relation_loss.weight.std() > 0.1


def test_early_stopping_has_the_given_patience_and_the_state_of_the_checkpoint(data, tmp_path):
    def stopping(patience):
        return EarlyStopping("val/R@50", mode="max", min_delta=1.0, patience=patience)

    first = run(MotifsModule(**SMALL_MOTIFS), data, epochs=3, callbacks=[stopping(9)])
    assert first.current_epoch == 3
    first.save_checkpoint(tmp_path / "first.ckpt")
    again = run(MotifsModule(**SMALL_MOTIFS), data, tmp_path / "first.ckpt", epochs=9, callbacks=[stopping(4)])
    assert again.current_epoch == 5 and again.early_stopping_callback.patience == 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_mirror_keeps_its_own_head_or_shares_the_head(tied, data, tmp_path):
    """The weights would load, but the mirror's head would replace the supervised one."""
    run(AlignMotifsModule(**SMALL_MOTIFS, tied_head=tied), data).save_checkpoint(tmp_path / "first.ckpt")
    module = AlignMotifsModule(**SMALL_MOTIFS, tied_head=not tied)
    with pytest.raises(ValueError, match=f"tied_head must be {tied}, as in the checkpoint, got {not tied}"):
        trainer().test(module, data, ckpt_path=tmp_path / "first.ckpt", verbose=False)


def test_the_command_line_uses_a_given_learning_rate_and_refuses_another_seed(tmp_path, monkeypatch, capsys, printed):
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(pl.LightningModule, "on_train_end", lambda module: found.extend(rates_of(module.trainer)))
    config = ["fit", "--config", str(CONFIGS / "motifs_small.yaml"), "--trainer.limit_val_batches=1"]
    config += ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--data.batch_size=4"]
    checkpoint = ["--ckpt_path", str(tmp_path / "first.ckpt")]
    assert cli.main([*config, "--trainer.max_steps=1"]) == 0
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "first.ckpt")
    for form in ("--model.learning_rate", "--model.init_args.learning_rate"):
        assert cli.main([*config, "--trainer.max_steps=2", *checkpoint, form, "1e-5"]) == 0
    assert found == [1e-3, 1e-5, 1e-5]
    assert printed == ["these options differ from the checkpoint: learning_rate 1e-05 instead of 0.001"] * 2
    assert cli.main([*config, *checkpoint, "--seed_everything", "3"]) == 1
    assert "seed_everything must be 0, as in the checkpoint, got 3" in capsys.readouterr().err


def test_the_word_last_starts_a_run_and_then_resumes_it_from_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    events = []
    monkeypatch.setattr(MotifsModule, "load_initial_weights", lambda module: events.append("initial weights"))
    monkeypatch.setattr(
        pl.LightningModule, "on_train_end", lambda module: events.append((module.loaded_step, module.global_step))
    )
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    callback["init_args"] = {"dirpath": str(tmp_path / "run"), "filename": "last", "enable_version_counter": False}
    (tmp_path / "run.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    command = ["fit", "--config", str(CONFIGS / "motifs_small.yaml"), "--config", "run.yaml", "--ckpt_path", "last"]
    command += ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        assert cli.main([*command, "--trainer.max_steps=1"]) == 0
    assert events == ["initial weights", (-1, 1)]
    assert cli.main([*command, "--trainer.max_steps=2"]) == 0
    assert events == ["initial weights", (-1, 1), (1, 2)]
    assert cli.main([*command, "--seed_everything", "3"]) == 1
    assert "seed_everything must be 0, as in the checkpoint, got 3" in capsys.readouterr().err
    (tmp_path / "run" / "last.ckpt").write_bytes(b"PK\x03\x04 cut")
    assert cli.main(command) == 1
    assert f"{tmp_path / 'run' / 'last.ckpt'}: must be a checkpoint" in capsys.readouterr().err
