"""Tests of `sgalign ablate` and `sgalign report`: the files of studies, their runs, interruptions and the report."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
from covers import slow_except  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from target import ROOT  # noqa: E402
from trainers import CONFIGS, SMALL_MOTIFS, SMALL_SGTR, trainer  # noqa: E402

from sgalign.commands.main import main  # noqa: E402
from sgalign.errors import InputError  # noqa: E402
from sgalign.files import read_tensors  # noqa: E402
from sgalign.studies import claims, cluster, execute, figures, launch, plan, recording, tables  # noqa: E402
from sgalign.studies.plan import resolve, settings_of  # noqa: E402
from sgalign.studies.recording import RunRecorder  # noqa: E402
from sgalign.studies.results import read_result, run_folder, write_result  # noqa: E402
from sgalign.studies.study import read_study  # noqa: E402
from sgalign.training import MotifsModule, RelationModule, SceneGraphData  # noqa: E402

STUDIES = sorted((CONFIGS / "studies").rglob("*.yaml"))
SMALL = {f"model.{name}": value for name, value in SMALL_MOTIFS.items()}
QUIET = {"trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with generated scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "32", "8", "8"]) == 0
    return folder


def write_study(folder, **changes):
    """Write a study of Motifs and Align-Motifs, with changes of its keys, and return its file."""
    content = {
        "title": "A title",
        "config": str(CONFIGS / "align_motifs_small.yaml"),
        "choose": "val/mR@50",
        "set": SMALL | QUIET | {"trainer.max_epochs": 2},
        "arms": [
            {"name": "Motifs", "config": str(CONFIGS / "motifs_small.yaml")},
            {"name": "p = {mask_ratio}", "base": "Motifs", "grid": {"model.mask_ratio": [0.4]}},
        ],
    }
    path = folder / "small.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.fixture
def here(monkeypatch):
    """The names of the folders whose runs are done, in this process instead of others."""
    done = []

    def run_here(runs, jobs):
        done.extend(run.folder.name for run in runs)
        return [run for run in runs if execute.main([str(run.folder)])]

    monkeypatch.setattr(launch, "run_here", run_here)
    return done


def ablate(study, data, out, *more):
    """Run the command and return its exit code."""
    return main(["ablate", str(study), "--set", f"data.root={data}", "--out", str(out), *more])


# ---- files of studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_project_can_be_read(path):
    study = read_study(path)
    assert not study.arms[0].base and sum(bool(arm.base) for arm in study.arms) >= len(study.arms) / 2


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_fit_accepts_all_arms_of_the_studies_of_the_project(path, tmp_path):
    study = read_study(path)
    assert len(plan.plan(study, tmp_path, seeds=1)) == len(study.arms)


def test_a_grid_makes_an_arm_of_each_combination(tmp_path):
    grid = {"model.mask_ratio": [0.1, 0.2], "model.alignment_weight": [1, 10]}
    arm = {"name": "p = {mask_ratio}, weight {alignment_weight}", "grid": grid}
    study = read_study(write_study(tmp_path, arms=[arm]), {"trainer.max_epochs": "7"})
    assert [arm.name for arm in study.arms] == [f"p = {p}, weight {w}" for p in (0.1, 0.2) for w in (1, 10)]
    config = resolve(study, study.arms[1])
    assert config["model"]["init_args"]["mask_ratio"] == 0.1 and config["trainer"]["max_epochs"] == 7
    assert config["model"]["init_args"]["alignment_weight"] == 10


def test_the_name_of_a_base_takes_the_values_of_the_grid(tmp_path):
    grid = {"model.learning_rate": [0.001, 0.01]}
    arms = [
        {"name": "Motifs, rate {learning_rate}", "config": str(CONFIGS / "motifs_small.yaml"), "grid": grid},
        {"name": "mirror, rate {learning_rate}", "base": "Motifs, rate {learning_rate}", "grid": grid},
    ]
    bases = [arm.base for arm in read_study(write_study(tmp_path, arms=arms)).arms]
    assert bases == ["", "", "Motifs, rate 0.001", "Motifs, rate 0.01"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "the study must have only the keys .* got 'seed'"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"title": 7}, "title of the study must be text, got 7"),
        ({"choose": "mR@50"}, "choose must be a figure of the validation, such as val/mR@50, got 'mR@50'"),
        ({"arms": []}, "arms must not be empty"),
        ({"arms": ["Motifs"]}, "arm 1 must be a mapping, got 'Motifs'"),
        ({"arms": [{"set": {}}]}, "arm 1 must have the key 'name'"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "names of arms must differ, got 'a' twice"),
        ({"arms": [{"name": "a", "base": "b"}]}, r"base of 'a' must be one of \[\], got 'b'"),
        ({"arms": [{"name": "a", "config": "none.yaml"}]}, "arm 1 needs the config .*none.yaml, which does not exist"),
        ({"arms": [{"name": "a", "set": {"lr": 1}}]}, "must begin with model., data. or trainer., got 'lr'"),
        ({"arms": [{"name": "a", "grid": {"model.mask_ratio": 0.1}}]}, "must be a list of values, got 0.1"),
        ({"arms": [{"name": "a", "grid": {"model.mask_ratio": [0.1]}}]}, "must contain {mask_ratio}, got 'a'"),
    ],
)
def test_wrong_entries_of_a_study_are_named(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"small.yaml: .*{message}"):
        read_study(write_study(tmp_path, **changes))


def test_repeated_keys_and_broken_files_are_refused(tmp_path):
    path = tmp_path / "small.yaml"
    for text, message in (
        ("title: a\ntitle: b", "'title' occurs twice"),
        ("title: [", "must be a YAML file, got an"),
        ("title: !!timestamp x", "must be a YAML file, got an"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(path)
    with pytest.raises(FileNotFoundError, match="no such study"):
        read_study(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "model.nonsense=3",
            "small, arm 'Motifs': sgalign fit refuses its options: .*'nonsense' is not accepted",
        ),
        ("trainer.max_epochs=x", "Expected a <class 'int'> Given value: x"),
        ("model.mask_ratio=0.2", "small, arm 'Motifs': .* Option 'mask_ratio' is not accepted"),
    ],
)
def test_options_that_fit_refuses_are_named_with_their_arm(tmp_path, data, option, message, capsys):
    assert ablate(write_study(tmp_path), data, tmp_path / "out", "--set", option) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_arms_that_compute_the_same_are_refused(tmp_path):
    path = write_study(tmp_path, arms=[{"name": "a"}, {"name": "b", "set": {"model.mask_ratio": 0.1}}])
    with pytest.raises(ValueError, match="the arms 'a' and 'b' must differ in some option"):
        plan.plan(read_study(path), tmp_path)


# ---- identity


def identity(folder, overrides, **changes):
    study = read_study(write_study(folder, **changes), overrides)
    return settings_of(resolve(study, study.arms[1]), study.choose)


def test_only_options_that_change_the_result_change_the_identity(tmp_path, data):
    own = identity(tmp_path, {"data.root": str(data)})
    moved = shutil.copytree(data, tmp_path / "elsewhere" / data.name)
    for name, value in (
        ("data.num_workers", "2"),
        ("data.root", str(moved)),
        ("trainer.enable_progress_bar", "true"),
        ("trainer.logger", "false"),
    ):
        assert identity(tmp_path, {"data.root": str(data)} | {name: value}) == own, name
    for name, value in (
        ("data.batch_size", "4"),
        ("trainer.max_epochs", "3"),
        ("trainer.num_nodes", "2"),
        ("model.alignment_weight", "3"),
        ("trainer.callbacks+", "lightning.pytorch.callbacks.LearningRateMonitor"),
    ):
        assert identity(tmp_path, {"data.root": str(data)} | {name: value}) != own, name
    assert identity(tmp_path, {"data.root": str(data)}, choose="val/R@50") != own
    relations = json.loads((moved / "rel.json").read_text())
    relations["train"] = {image: rows[:1] for image, rows in relations["train"].items()}
    (moved / "rel.json").write_text(json.dumps(relations))
    plan.fingerprint.cache_clear()
    assert identity(tmp_path, {"data.root": str(moved)}) != own


def test_the_content_of_files_in_options_is_part_of_the_identity(tmp_path, monkeypatch):
    vectors = tmp_path / "vectors.txt"
    found = []
    for text in ("a 1 2", "a 1 3", "a 1 2"):
        vectors.write_text(text)
        plan.fingerprint.cache_clear()
        found.append(identity(tmp_path, {"model.word_vectors": str(vectors)}))
    assert found[0] == found[2] != found[1]
    monkeypatch.chdir(tmp_path)
    Path("adam").touch()  # a word, not a path
    assert identity(tmp_path, {"model.word_vectors": str(vectors)}) == found[0]


# ---- runs


def test_a_study_is_run_and_reported(tmp_path, data, here, capsys):
    study, out = write_study(tmp_path), tmp_path / "out"
    assert ablate(study, data, out, "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert f"{out}: 4 runs to do, 0 already done" in printed and "| p = 0.4 | Motifs | " in printed
    assert len(here) == 4 and [name[-1] for name in here] == ["0", "0", "1", "1"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"Motifs", "p = 0.4"} and {row["seed"] for row in rows} == {"0", "1"}
    assert {row["part"] for row in rows} == {"validation", "test", "cost"}
    assert {(row["epoch"], row["step"]) for row in rows} == {("1", "2"), ("2", "4")}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "small_curves.png" not in page and "<table>" in page
    result = read_result(next((out / "runs").iterdir()))
    found = [[rank < 50 for rank in ranks] for ranks in result["ranks"] if ranks]
    recall = sum(sum(image) / len(image) for image in found) / len(found)
    assert recall == pytest.approx(result["test"]["R@50"], abs=1e-5)
    assert [point["epoch"] for point in result["curve"]] == [1, 2] and result["cost"]["step"] > 0
    best = result["curve"][result["epoch"] - 1]
    assert best["mR@50"] == max(point["mR@50"] for point in result["curve"])
    # A run is what `fit` and `test` do, so its checkpoint has the figures of the result.
    folder = next((out / "runs").iterdir())
    assert {path.name for path in folder.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    capsys.readouterr()
    config = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "best.ckpt")]
    (folder / "result.json").rename(tmp_path / "before.json")
    assert main(["test", *config]) == 0
    before, after = (json.loads(path.read_text()) for path in (tmp_path / "before.json", folder / "result.json"))
    assert before["test"] == after["test"] and before["ranks"] == after["ranks"]
    # Complete runs are not repeated, and further seeds and arms only add runs.
    here.clear()
    assert ablate(study, data, out, "--seeds", "3") == 0 and len(here) == 2
    here.clear()
    arms = yaml.safe_load(study.read_text())["arms"]
    arms.append({"name": "half", "base": "Motifs", "set": {"model.mask_ratio": 0.5}})
    assert ablate(write_study(tmp_path, arms=arms), data, out) == 0 and len(here) == 1
    assert "4 runs of an earlier plan stay in" in capsys.readouterr().out


def test_validations_within_an_epoch_are_points_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    points = [{"epoch": 1, "step": step, "mR@50": step / 10} for step in (2, 4)]
    figures.draw_curves(tmp_path / "curves.png", {"Motifs": [{"curve": points}]}, "mR@50")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[2, 20], [4, 40]]


def test_the_figure_of_differences_colors_what_excludes_0(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    intervals = {
        "better": [(0.02, 0.01, 0.03)] * 3,
        "worse": [(-0.02, -0.03, -0.01)] * 3,
        "same": [(0.0, -0.01, 0.01)] * 3,
    }
    figures.draw_differences(tmp_path / "d.png", dict.fromkeys(intervals, "Motifs"), intervals | {"other images": []})
    axes = drawn[0].axes[0]
    lines = [line for line in axes.lines if line.get_marker() == "None"][:3]
    assert [line.get_color() for line in lines] == ["tab:blue", "tab:red", "gray"]
    assert [line.get_xdata().tolist() for line in lines] == [[1, 3], [-3, -1], [-1, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "worse", "same"]


def test_tables_say_what_was_not_compared():
    one = [{"seed": 0}]
    lines = tables.of_differences({"a": "b"}, {"a": one, "b": one}, {"a": []})
    assert lines[2:] == ["| a | b | other test images | other test images | other test images |"]
    lines = tables.of_differences({"a": "b"}, {"a": one, "b": one}, {"a": [(0.0, -0.1, 0.1)] * 3})
    assert "only one seed in common" in lines[-1] and "star" not in lines[-1]
    two = [{"seed": 0}, {"seed": 1}]
    lines = tables.of_differences({"a": "b"}, {"a": two, "b": two}, {"a": [(0.2, 0.1, 0.3)] * 3})
    assert "only one seed in common" not in lines[-1] and "A star marks" in lines[-1]


INTERVALS = [pytest.param(4, id="after_epochs"), pytest.param(2, id="within_epochs", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=INTERVALS)
def interval(request):
    """The number of batches between validations. An epoch has 4 batches."""
    return request.param


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory, interval):
    """The result of a run of Align-Motifs."""
    run = one_run(tmp_path_factory.mktemp("undisturbed"), data, interval)
    assert execute.main([str(run.folder)]) == 0
    result = comparable(run.folder)
    assert [point["step"] for point in result["curve"]] == [*range(interval, 13, interval)]
    return result


def one_run(out, data, interval):
    """Prepare the run of the second arm, which has 3 epochs of 4 batches, and return it."""
    options = SMALL | QUIET | {"trainer.max_epochs": 3, "trainer.val_check_interval": interval, "data.batch_size": 8}
    study = read_study(write_study(out, set=options), {"data.root": str(data)})
    run = plan.plan(study, out)[1][0]
    run.write()
    return run


def comparable(folder):
    """Return a run's result without its cost."""
    result = read_result(folder)
    assert result is not None
    del result["cost"]
    return result


class Killed(Exception):
    """The end of a process at this point. Nothing is saved at an exception."""


def kill_at(monkeypatch, kind, name, condition):
    """Let a method of a class raise `Killed` before its call, if `condition` of its object and trainer holds."""
    method = getattr(kind, name)

    def dies(self, trainer, *args):
        if condition(self, trainer):
            raise Killed
        return method(self, trainer, *args)

    monkeypatch.setattr(kind, name, dies)


POINTS = {
    "first_epoch": (RunRecorder, "on_train_batch_end", lambda self, trainer: trainer.global_step == 3),
    "second_epoch": (RunRecorder, "on_train_batch_end", lambda self, trainer: trainer.global_step == 6),
    "validation": (RunRecorder, "on_validation_end", lambda self, trainer: trainer.global_step == 8),
    "between_checkpoints": (
        ModelCheckpoint,
        "_save_topk_checkpoint",
        lambda self, trainer: self.filename == "last" and trainer.global_step == 8,
    ),
    "after_training": (RunRecorder, "on_fit_end", lambda self, trainer: True),
    "test": (RunRecorder, "on_test_end", lambda self, trainer: True),
}


@pytest.mark.parametrize("point", slow_except(["second_epoch", "between_checkpoints", "test"], POINTS))
def test_an_interrupted_run_goes_on_to_the_same_result(data, tmp_path, monkeypatch, undisturbed, interval, point):
    run = one_run(tmp_path, data, interval)
    with monkeypatch.context() as patch:
        kill_at(patch, *POINTS[point])
        with pytest.raises(Killed):
            execute.execute(run.folder)
    assert not (run.folder / "result.json").exists()
    assert execute.main([str(run.folder)]) == 0
    assert comparable(run.folder) == undisturbed


def test_the_best_checkpoint_survives_a_kill_even_if_the_epoch_does_not_repeat_exactly(data, tmp_path, monkeypatch):
    """On a GPU, a repeated epoch may be worse. Then an earlier one is the best, and its checkpoint must still exist."""
    figures = [0.2, 0.4, 0.1, 0.1]

    def log_next(self):
        self.log("val/mR@50", figures.pop(0))

    monkeypatch.setattr(MotifsModule, "on_validation_epoch_end", log_next)
    monkeypatch.setattr(MotifsModule, "on_test_epoch_end", RelationModule.on_validation_epoch_end)
    run = one_run(tmp_path, data, 4)
    with monkeypatch.context() as patch:
        kill_at(patch, *POINTS["between_checkpoints"])
        with pytest.raises(Killed):
            execute.execute(run.folder)
    assert execute.main([str(run.folder)]) == 0
    result = read_result(run.folder)
    assert result["epoch"] == 1 and [point["mR@50"] for point in result["curve"]] == [0.2, 0.1, 0.1]


@pytest.mark.parametrize(("point", "step"), [("second_epoch", 5), ("validation", 7)])
def test_a_run_goes_on_from_a_checkpoint_within_an_epoch(
    data, tmp_path, monkeypatch, undisturbed, interval, point, step
):
    monkeypatch.setattr(plan, "MINUTES", 0)  # a checkpoint after each step
    monkeypatch.setattr(recording, "EVERY", 1)
    run = one_run(tmp_path, data, interval)
    with monkeypatch.context() as patch:
        kill_at(patch, *POINTS[point])
        with pytest.raises(Killed):
            execute.execute(run.folder)
    latest = execute.latest_checkpoint(run.folder)
    assert latest == run.folder / "within.ckpt" and read_tensors(latest, "checkpoint")["global_step"] == step
    assert execute.main([str(run.folder)]) == 0
    assert comparable(run.folder) == undisturbed


KINDS = {
    "plateau": {"model.optimizer": "sgd", "model.warmup_steps": 2, "model.learning_rate": 1e-5},
    "accumulation": {"trainer.accumulate_grad_batches": 2},
    "unlabelled images": {"data": "sgalign.training.ScarceData", "data.labelled": 0.5},
    "averaged teacher": {"model": "AveragedTeacherModule"},
    "early stopping": {
        "trainer.callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/mR@50", "mode": "max", "patience": 2, "min_delta": 1.0},
            }
        ]
    },
}


@pytest.mark.parametrize("kind", slow_except(["plateau", "averaged teacher"], KINDS))
def test_interrupted_runs_of_all_kinds_go_on_to_the_same_weights_and_schedules(data, tmp_path, monkeypatch, kind):
    """The run is killed in the second and third epoch and before its end, with a checkpoint after each step."""
    monkeypatch.setattr(plan, "MINUTES", 0)
    monkeypatch.setattr(recording, "EVERY", 1)
    ends = []
    for name, kills in (("undisturbed", ()), ("killed", (5, 10))):
        options = SMALL | QUIET | {"trainer.max_epochs": 4, "data.batch_size": 8} | KINDS[kind]
        study = read_study(write_study(tmp_path / name, set=options), {"data.root": str(data)})
        run = plan.plan(study, tmp_path / name)[1][0]
        run.write()
        for batch in kills:
            with monkeypatch.context() as patch:
                kill_at(
                    patch, RunRecorder, "on_train_batch_start", lambda self, t, b=batch: t.fit_loop.total_batch_idx == b
                )
                with pytest.raises(Killed):
                    execute.execute(run.folder)
        if kills:
            with monkeypatch.context() as patch:
                kill_at(patch, RunRecorder, "_complete", lambda self, parameters: True)
                with pytest.raises(Killed):
                    execute.execute(run.folder)
        assert execute.main([str(run.folder)]) == 0
        last = read_tensors(run.folder / "last.ckpt", "checkpoint")
        ends.append((comparable(run.folder), last["state_dict"], last["lr_schedulers"]))
    (result, weights, schedules), (other, others, other_schedules) = ends
    assert result == other and schedules == other_schedules
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_killed_process_goes_on_to_the_same_result(data, tmp_path, undisturbed, interval):
    """The process is started and killed as the command does it, with SIGKILL."""
    run = one_run(tmp_path, data, interval)
    process = launch.start(run.folder, {"OMP_NUM_THREADS": "1"})
    while not (run.folder / "last.ckpt").exists():
        assert process.poll() is None, (run.folder / "log.txt").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (run.folder / "last.ckpt.99.partial").write_text("cut sho")
    assert execute.main([str(run.folder)]) == 0
    assert comparable(run.folder) == undisturbed and not list(run.folder.glob("*.partial"))


def test_a_misspelled_figure_that_chooses_the_weights_is_refused_before_training(data, tmp_path):
    run = trainer(callbacks=[RunRecorder(str(tmp_path), "val/mR@5")])
    with pytest.raises(ValueError, match="choose must be one of val/R@20, .*, got 'val/mR@5'"):
        run.fit(MotifsModule(**SMALL_MOTIFS), datamodule=SceneGraphData(str(data)))
    assert run.global_step == 0


@pytest.mark.parametrize(("free", "expected"), [(1 << 12, "No space left on device: '{}'"), (1 << 30, "a loss")])
def test_a_run_whose_log_did_not_fit_on_the_disk_failed_because_of_the_disk(free, expected, tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("Seed set to 0\nsgalign: a loss\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert launch.reason(1, tmp_path / "log.txt").endswith(expected.format(tmp_path))


def test_runs_in_other_processes_and_a_failing_run(data, tmp_path, capsys):
    """One arm diverges at once. It is reported and does not end the other arm."""
    arms = [{"name": "good"}, {"name": "bad", "base": "good", "set": {"model.learning_rate": 1e30}}]
    study, out = write_study(tmp_path, arms=arms), tmp_path / "out"
    assert ablate(study, data, out, "--jobs", "2") == 1
    printed = capsys.readouterr().out
    assert "small good, seed 0: test R@50" in printed and "1 of 2 runs failed" in printed
    assert "small bad, seed 0: FAILED: " in printed and "log.txt" in printed and "1 of 2 runs are complete" in printed


@pytest.mark.slow
def test_a_run_of_two_processes_has_the_ranks_of_all_images(data, tmp_path):
    options = SMALL | QUIET | {"trainer.max_epochs": 1, "trainer.devices": 2, "trainer.strategy": "ddp"}
    study, out = write_study(tmp_path, set=options, arms=[{"name": "two"}]), tmp_path / "out"
    assert ablate(study, data, out) == 0
    result = read_result(next((out / "runs").iterdir()))
    found = [[rank < 50 for rank in ranks] for ranks in result["ranks"] if ranks]
    assert len(result["ranks"]) == 8 and result["curve"][0]["step"] == 1
    recall = sum(sum(image) / len(image) for image in found) / len(found)
    assert recall == pytest.approx(result["test"]["R@50"], abs=1e-5)


def test_ablate_needs_at_least_one_seed_and_options_with_values(tmp_path):
    for more in (["--seeds", "0"], ["--jobs", "0"], ["--slurm", "partition=a"], ["--set", "data.root"]):
        with pytest.raises(SystemExit):
            main(["ablate", str(write_study(tmp_path)), "--out", str(tmp_path), *more])


def test_a_dry_run_estimates_and_writes_nothing(data, tmp_path, capsys):
    study = write_study(tmp_path, arms=[{"name": "only"}])
    assert ablate(study, data, tmp_path / "out", "--dry-run", "--seeds", "3") == 0
    printed = capsys.readouterr().out
    assert "small only: 3 seeds, 3 to do" in printed and "small only: 3 runs of " in printed
    assert "(4 steps of " in printed and "checkpoints" in printed
    assert not (tmp_path / "out").exists()


def test_gpus_are_shared_between_the_jobs(data, tmp_path, monkeypatch):
    study = read_study(write_study(tmp_path, set=SMALL | {"trainer.devices": 2}), {"data.root": str(data)})
    runs = [runs[0] for runs in plan.plan(study, tmp_path)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.slots(runs, 3) == [{"CUDA_VISIBLE_DEVICES": f"{2 * i},{2 * i + 1}"} for i in range(3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert launch.slots(runs, 1) == [{"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(ValueError, match="--jobs must be at most 1, because a run trains on 2 of the 2 GPUs, got 2"):
        launch.slots(runs, 2)


@pytest.mark.slow
def test_jobs_of_submitit_do_the_runs(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(cluster, "PAUSE", 0.2)
    study, out = write_study(tmp_path, arms=[{"name": "only"}]), tmp_path / "out"
    assert ablate(study, data, out, "--cluster", "local", "--slurm", "timeout_min=10") == 0
    assert (
        "submitted small only, seed 0 to local" in capsys.readouterr().out and len(list((out / "runs").iterdir())) == 1
    )
    assert ablate(study, data, out, "--cluster", "local", "--seeds", "2", "--slurm", "nonsense=1") == 1
    assert "--cluster local: submitit refuses" in capsys.readouterr().err


def test_a_job_that_is_preempted_ends_its_run_and_releases_the_claim(data, tmp_path):
    helpers = pytest.importorskip("submitit.helpers")
    options = SMALL | QUIET | {"trainer.max_epochs": 10000}
    run = plan.plan(read_study(write_study(tmp_path, set=options), {"data.root": str(data)}), tmp_path)[1][0]
    run.write()
    job, codes = cluster.Job(str(run.folder)), []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    while not (run.folder / "last.ckpt").exists():
        assert thread.is_alive(), (run.folder / "log.txt").read_text()
        time.sleep(0.05)
    assert isinstance(job.checkpoint(), helpers.DelayedSubmission)
    assert claims.holder(run.folder) is None and not list(run.folder.glob("claim.*"))
    thread.join()
    assert codes == [128 + signal.SIGTERM] and not (run.folder / "training.json").exists()


@pytest.mark.slow
def test_sigterm_ends_the_command_and_its_runs(data, tmp_path):
    study = write_study(tmp_path, set=SMALL | QUIET | {"trainer.max_epochs": 10000}, arms=[{"name": "only"}])
    command = [sys.executable, "-m", "sgalign", "ablate", str(study), "--set", f"data.root={data}"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], cwd=ROOT)
    while not list(tmp_path.glob("out/runs/*/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert claims.holder(folder) is None


def test_files_that_callbacks_write_do_not_change_the_identity(tmp_path):
    path = str(tmp_path / "written" / "by.callback")
    monitor = {"class_path": "sgalign.studies.estimate.Meter", "init_args": {"path": path, "max_steps": 1}}
    monitor["init_args"] |= {"max_epochs": 1, "validations": 1}
    changes = {"set": SMALL | QUIET | {"trainer.callbacks": [monitor]}}
    before = identity(tmp_path, {}, **changes)
    Path(path).parent.mkdir()
    Path(path).touch()
    assert identity(tmp_path, {}, **changes) == before


# ---- report


@pytest.fixture
def done(data, tmp_path, here):
    """The folder of a study with one run."""
    assert ablate(write_study(tmp_path, arms=[{"name": "only"}]), data, tmp_path / "out") == 0
    return tmp_path / "out"


def test_edited_copied_and_damaged_results_are_refused(done, capsys):
    (folder,) = (done / "runs").iterdir()
    path = folder / "result.json"
    text = path.read_text()
    for content in (text.replace('"epoch": 1', '"epoch": 2', 1), '{"cut', "[1]", '{"seed": 0}'):
        path.write_text(content)
        capsys.readouterr()
        assert main(["report", str(done)]) == 1
        error = capsys.readouterr().err
        assert "delete the folder and run sgalign ablate again" in error and error.count("\n") == 1
    path.write_text(text)
    folder.rename(folder.with_name("0123456789ab_0"))
    with pytest.raises(ValueError, match="the folder was renamed or the file copied"):
        read_result(folder.with_name("0123456789ab_0"))


def test_a_folder_without_studies_and_an_unknown_study_cannot_be_reported(done, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "must be a folder that sgalign ablate has written" in capsys.readouterr().err
    assert main(["report", str(done), "--study", "other"]) == 1
    assert "has the studies small, but not other" in capsys.readouterr().err


def test_study_cannot_be_used_with_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--checkpoint", "a.ckpt", "--image", "a.jpg", "--study", "a"])
    assert "--study selects runs and cannot be used with --checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_of_align_sgtr_has_the_figure_of_the_mirror(tmp_path, here, capsys):
    data = tmp_path / "images"
    assert main(["make-dataset", str(data), "--sizes", "4", "2", "2"]) == 0
    options = {f"model.{name}": value for name, value in SMALL_SGTR.items()} | QUIET
    options |= {"trainer.max_epochs": 1, "data.batch_size": 2, "data.images": True}
    config = str(CONFIGS / "align_sgtr_small.yaml")
    study = write_study(tmp_path, config=config, set=options, arms=[{"name": "Align-SGTR"}])
    assert ablate(study, data, tmp_path / "out") == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "small_mirror.png").stat().st_size > 10000
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 2


@pytest.mark.parametrize(
    "entry, value",
    [("seed", True), ("curve", []), ("curve", [{"epoch": 1}]), ("epoch", 2), ("test", {"R@50": None}), ("groups", [1]),
     ("groups", {"head": ["on", "on"]}), ("images", [5]), ("predicates", [[0, 1]]), ("predicates", [[1, 3]]),
     ("ranks", [[0]]), ("ranks", [[0, 101]]), ("ranks", [[-1, 0]]), ("cost", {"device": "cpu"})],
)  # fmt: skip
def test_a_result_of_another_form_is_refused_even_with_a_digest(entry, value, tmp_path):
    cost = {"device": "cpu", "parameters": 1, "training": 1.0, "test": 1.0, "memory": 1}
    result = {"seed": 0, "settings": {}, "curve": [{"epoch": 1, "step": 2, "R@50": 0.5}], "epoch": 1}
    result |= {"test": {"R@50": 0.5}, "groups": {"head": ["on"], "tail": ["by"]}, "images": ["a.jpg"], "cost": cost}
    result |= {"predicates": [[1, 2]], "ranks": [[0, 100]]}
    folder = run_folder(tmp_path, {}, 0)
    write_result(folder, result)
    assert read_result(folder) == result
    write_result(folder, result | {entry: value})
    with pytest.raises(ValueError, match=r"result\.json: (\w+) must be as sgalign ablate wrote it"):
        read_result(folder)


def test_the_record_in_a_checkpoint_has_the_form_of_the_runs_own(tmp_path):
    recorder = RunRecorder(str(tmp_path), "val/mR@50")
    saved = recorder.state_dict() | {"curve": [{"epoch": 1}, {"epoch": 2}], "scores": [0.5, float("-inf")], "memory": 7}
    for _ in range(2):  # also if the recorder has a curve
        recorder.load_state_dict(saved)
    assert recorder.curve == saved["curve"] and recorder.scores == saved["scores"]
    for wrong in ({"curve": 5}, {"stopped": "x"}, {"seconds": None}, {"memory": -1}):
        with pytest.raises(InputError, match=f"ckpt_path .* RunRecorder.{next(iter(wrong))} must be"):
            recorder.load_state_dict(saved | wrong)
