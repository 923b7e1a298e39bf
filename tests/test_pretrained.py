"""Tests of models as folders in the Hugging Face layout: what is written, read and refused."""

import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("safetensors")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from target import ROOT  # noqa: E402
from test_prediction import save_checkpoint  # noqa: E402
from trainers import CONFIGS, SMALL_MOTIFS, SMALL_SGTR, scenes, trainer  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402
from sgalign.commands.export import parser as export_parser  # noqa: E402
from sgalign.data import collate  # noqa: E402
from sgalign.studies.execute import latest_checkpoint  # noqa: E402
from sgalign.training import (  # noqa: E402
    AlignMotifsModule,
    AlignSGTRModule,
    DetectorModule,
    MotifsModule,
    SceneGraphData,
    SGTRModule,
    load_module,
    pretrained,
)
from sgalign.training.starting import load_detector  # noqa: E402


@pytest.fixture(scope="module", params=["motifs", "sgtr"])
def checkpoint(request, tmp_path_factory):
    """The checkpoint of a small model with a mirror."""
    path = tmp_path_factory.mktemp("checkpoint") / f"{request.param}.ckpt"
    torch.manual_seed(0)
    sgtr = request.param == "sgtr"
    save_checkpoint(AlignSGTRModule(**SMALL_SGTR) if sgtr else AlignMotifsModule(**SMALL_MOTIFS), path)
    return path


@pytest.fixture
def folder(checkpoint, tmp_path):
    """The folder of the model."""
    assert cli.main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def predictions(module):
    batch = collate(scenes("validation", 40, 0)[:2], 20, pixels=module.looks_at_images)
    with torch.no_grad():
        return module.eval().predictions(batch)


def assert_same(module, other):
    assert type(module) is type(other) and module.object_names == other.object_names
    assert module.predicate_names == other.predicate_names
    for (name, ours), (their_name, theirs) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == their_name and ours.dtype == theirs.dtype and ours.equal(theirs)
    for one, two in zip(predictions(module), predictions(other), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one if isinstance(one[name], torch.Tensor))


# ---- the folder


def test_a_model_is_the_same_after_the_way_through_a_folder(checkpoint, folder, tmp_path):
    module = load_module(checkpoint)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(module, load_module(folder))
    module.save_pretrained(tmp_path / "again")
    assert_same(module, load_module(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_class_without_a_mirror_loads_the_folder_of_one_with_a_mirror(folder, checkpoint):
    kinds = (MotifsModule, AlignSGTRModule) if "motifs" in checkpoint.name else (SGTRModule, AlignMotifsModule)
    module = kinds[0].from_pretrained(folder)
    assert type(module) is kinds[0] and not module.training
    with pytest.raises(ValueError, match=f"checkpoint must belong to {kinds[1].__name__}"):
        kinds[1].from_pretrained(folder)


def test_the_card_names_the_system_its_classes_options_and_results(checkpoint, tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,test/R@50,test/mR@50\n1,0.51234,0.25\n")
    command = ["export", str(checkpoint), str(tmp_path / "my model"), "--results", str(metrics), "--license", "mit"]
    assert cli.main(command) == 0
    card = (tmp_path / "my model" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "sgalign", "tags": ["scene-graph-generation"], "license": "mit"}
    for part in ("# my model", "mirrored", "16 object classes: person,", "20 predicates: near,", "| R@50 | 51.2 |"):
        assert part in text
    assert "| model.mask_ratio | 0.1 |" in text


def test_the_card_and_the_configuration_name_no_path_of_the_training_machine(tmp_path):
    (tmp_path / "home").mkdir()
    weights = tmp_path / "home" / "vectors.txt"
    weights.touch()
    module = MotifsModule(**SMALL_MOTIFS, word_vectors=str(weights))
    save_checkpoint(module, tmp_path / "m.ckpt")
    assert cli.main(["export", str(tmp_path / "m.ckpt"), str(tmp_path / "model")]) == 0
    texts = [(tmp_path / "model" / name).read_text() for name in ("README.md", "config.json")]
    assert all("vectors.txt" in text and str(tmp_path) not in text for text in texts)


@pytest.mark.parametrize("path", ["secret/vectors.txt", "../secret/vectors.txt", "~/secret/vectors.txt"])
def test_no_path_of_an_option_is_written_wherever_the_command_runs(path, tmp_path, capsys):
    save_checkpoint(MotifsModule(**SMALL_MOTIFS, word_vectors=path), tmp_path / "m.ckpt")
    assert cli.main(["export", str(tmp_path / "m.ckpt"), str(tmp_path / "model")]) == 0
    texts = [(tmp_path / "model" / name).read_text() for name in ("README.md", "config.json")]
    assert all("vectors.txt" in text and "secret" not in text for text in texts)
    assert "reduced to the last part of a path: model.word_vectors\n" in capsys.readouterr().out


def test_the_folder_of_pretrained_weights_that_transformers_notes_is_left_out(tmp_path):
    module = SGTRModule(**SMALL_SGTR)
    save_checkpoint(module, tmp_path / "m.ckpt")
    module.detector.detr.config._name_or_path = '/secret/"weights'
    module.save_pretrained(tmp_path / "model")
    assert "secret" not in (tmp_path / "model" / "config.json").read_text()
    assert_same(load_module(tmp_path / "model"), module)


def test_a_model_keeps_the_record_of_its_run_when_it_is_loaded_and_saved_again(tmp_path):
    data = SceneGraphData(batch_size=3)
    data.train, data.validation = data.train[:6], data.validation[:4]
    best = ModelCheckpoint(tmp_path, monitor="val/R@50", mode="max", filename="best")
    module = MotifsModule(**SMALL_MOTIFS)
    run = trainer(max_steps=2, callbacks=[best], enable_checkpointing=True)
    run.fit(module, data)
    module.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["step"] == 2 and config["training"]["data"]["batch_size"] == 3
    assert config["training"]["best"] == {"val/R@50": pytest.approx(float(best.best_model_score))}
    load_module(tmp_path / "model").save_pretrained(tmp_path / "other" / "model")
    for name in ("README.md", "config.json"):
        text = (tmp_path / "model" / name).read_text()
        assert (tmp_path / "other" / "model" / name).read_text() == text and "batch_size" in text


def test_the_command_says_what_the_folder_lacks(checkpoint, tmp_path, capsys):
    cli.main(["export", str(checkpoint), str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert "Left out: the states of the optimizer" in printed and "reduced" not in printed


def test_a_module_without_a_network_is_not_saved(tmp_path):
    for module in (MotifsModule(**SMALL_MOTIFS), SGTRModule(**SMALL_SGTR)):
        with pytest.raises(ValueError, match="Module must have a network to be saved"):
            module.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_results_can_be_those_of_evaluate(checkpoint, tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"R@50": 0.5, "R@50/on": 0.25}')
    cli.main(["export", str(checkpoint), str(tmp_path / "model"), "--results", str(tmp_path / "r.json")])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| R@50 | 50.0 |" in card and "R@50/on" not in card
    for text in ("true", "null", "[0.5]", '"0_5"', "1" + "0" * 400):
        (tmp_path / "wrong.json").write_text(f'{{"R@50": {text}}}')
        assert (
            cli.main(["export", str(checkpoint), str(tmp_path / "m"), "--results", str(tmp_path / "wrong.json")]) == 1
        )
        assert "wrong.json: 'R@50' must be a finite number" in capsys.readouterr().err
    (tmp_path / "twice.csv").write_text("test/R@50,test/R@50\n0.5,0.6\n")
    assert cli.main(["export", str(checkpoint), str(tmp_path / "m"), "--results", str(tmp_path / "twice.csv")]) == 1
    assert "twice.csv: must have columns with different names, but 'test/R@50'" in capsys.readouterr().err
    (tmp_path / "none.csv").write_text("epoch,val/R@50\n1,0.5\n")
    assert cli.main(["export", str(checkpoint), str(tmp_path / "m"), "--results", str(tmp_path / "none.csv")]) == 1
    assert "must have figures of the test split" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_a_folder_with_files_is_not_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["export", str(checkpoint), str(tmp_path)]) == 1
    assert "must be a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_current_folder_is_not_replaced(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(checkpoint), "."]) == 1
    assert "must not be the current folder" in capsys.readouterr().err


def test_the_files_have_the_permissions_that_the_umask_wants(checkpoint, tmp_path):
    before = os.umask(0o027)
    cli.main(["export", str(checkpoint), str(tmp_path / "model")])
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_export_leaves_nothing(kind, checkpoint, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise kind("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "model")]) == 1
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


# ---- sources


def test_the_script_for_the_model_of_the_package_has_its_options_and_valid_commands(tmp_path, capsys):
    recorder, record = tmp_path / "sgalign", tmp_path / "commands"
    recorder.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$RECORD"\nprintf "\\n" >> "$RECORD"\n')
    recorder.chmod(0o755)
    environment = os.environ | {"SGALIGN": str(recorder), "RECORD": str(record)}
    script = ROOT / "examples" / "train_scenes.sh"
    subprocess.run(["bash", str(script), str(tmp_path / "out")], env=environment, check=True, timeout=60)
    *trainings, testing, exporting = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
    for command in (*trainings, testing):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([*command, "--print_config"])
        assert exit.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        if command == trainings[-1]:
            made = config["model"]["init_args"], config["trainer"]["max_steps"], config["data"]["init_args"]
    options, steps, data = made
    shipped = json.loads((ROOT / "sgalign" / "pretrained" / "scenes" / "config.json").read_text())
    assert options | {"detector_weights": "last.ckpt"} == options | shipped["options"]
    assert (steps, data["batch_size"]) == (shipped["step"], shipped["training"]["data"]["batch_size"])
    export_parser().parse_args(exporting[1:])


def test_models_of_the_package_have_names(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "shipped" / "tiny")
    shutil.copytree(folder, tmp_path / "shipped" / "tiny.x7.partial")  # as after a kill
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "shipped")
    assert pretrained.shipped_models() == ["tiny"]
    assert_same(load_module("tiny"), load_module(folder))


def test_a_model_of_the_hub_is_downloaded_only_if_nothing_local_has_its_name(folder, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(load_module("owner/name@v1.0"), load_module(folder))
    assert asked == [("owner/name", "v1.0", ["README.md", "config.json", "model.safetensors"])]
    assert "owner/name@v1.0 is not a local path" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for source in ("owner/name", "runs/last.ckpt", "./owner/name", "a/b/c", "name"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_module(source)
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert_same(load_module("owner/name"), load_module(folder))
    assert len(asked) == 1


def test_a_failed_download_is_one_sentence(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no connection\nmany\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert cli.main(["predict", __file__, "--checkpoint", "owner/name"]) == 1
    assert "owner/name: must be a local path or a model that the Hugging Face Hub has" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["sgtr"], indirect=True)
def test_sgtr_starts_from_the_detector_in_a_folder_or_of_a_model_of_the_package(folder, monkeypatch):
    data = SceneGraphData()
    monkeypatch.setattr(pretrained, "SHIPPED", folder.parent)
    theirs = load_module(folder).detector.state_dict()
    for source in (str(folder), folder.name):
        module = AlignSGTRModule(**SMALL_SGTR, detector_weights=source, frozen=["detector"])
        module._set_classes(data.object_names, data.predicate_names, "the data")
        module.make_network(torch.ones(17, 17, 21))
        assert all(value.equal(theirs[name]) for name, value in module.detector.state_dict().items())


def test_motifs_starts_from_the_detector_in_a_folder(tmp_path):
    options = {"backbone": "resnet18", "head_dim": 8}
    theirs, ours = DetectorModule(**options), DetectorModule(**options)
    for module, name in ((theirs, "theirs.ckpt"), (ours, "ours.ckpt")):
        save_checkpoint(module, tmp_path / name)
    theirs.save_pretrained(tmp_path / "detector")
    load_detector(ours.network, str(tmp_path / "detector"), ours.object_names)
    own = ours.network.state_dict()
    assert all(value.equal(own[name]) for name, value in theirs.network.state_dict().items())
    other = DetectorModule(**options | {"head_dim": 9})
    save_checkpoint(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="detector: must hold a detector with .* head_dim 9"):
        load_detector(other.network, str(tmp_path / "detector"), other.object_names)


@pytest.mark.parametrize("checkpoint", ["motifs"], indirect=True)
def test_a_folder_can_be_tested_but_no_run_can_resume_from_it(folder, tmp_path, capsys):
    data = SceneGraphData()
    data.test = data.test[:4]
    (figures,) = trainer().test(load_module(folder), data, verbose=False)
    assert trainer().test(AlignMotifsModule(**SMALL_MOTIFS), data, str(folder), verbose=False) == [figures]
    with pytest.raises(ValueError, match="to resume a run, but it has no state of the optimizer"):
        trainer(max_steps=1).fit(AlignMotifsModule(**SMALL_MOTIFS), data, ckpt_path=str(folder))
    command = ["fit", "--config", str(CONFIGS / "align_motifs_small.yaml"), "--ckpt_path", str(folder)]
    assert cli.main([*command, "--seed_everything", "5", "--trainer.logger", "false"]) == 1
    assert "to resume a run, but it has no state of the optimizer" in capsys.readouterr().err


@pytest.mark.parametrize("detector", [None, [1], {}])
@pytest.mark.parametrize("checkpoint", ["sgtr"], indirect=True)
def test_the_folder_of_sgtr_needs_the_config_of_its_detector(detector, folder, monkeypatch):
    """Otherwise the detector would be built from the option `detector_weights`, which can name a model to download."""
    config = json.loads((folder / "config.json").read_text())
    config["options"]["detector_weights"] = "someone/model"
    config["model"] |= {"detector": detector}
    if detector is None:
        del config["model"]["detector"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="checkpoint must have the config of its detector"):
        load_module(folder)


@pytest.mark.parametrize("config", ["x", "{}"])
@pytest.mark.parametrize("checkpoint", ["sgtr"], indirect=True)
def test_a_damaged_config_of_sgtrs_detector_is_refused(config, folder):
    changed("detector", {"config": config})(folder)
    with pytest.raises(ValueError, match="must have valid options and names"):
        load_module(folder)


# ---- what is refused


def changed(name, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        place = config if name in config else config["model"]
        place[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_weights(change):
    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights, next(name for name, value in weights.items() if value.is_floating_point() and value.dim() == 2))
        save_file(weights, folder / "model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "must be a JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "got one of another library"),
        (changed("library_name", "transformers"), "got one of another library"),
        (changed("format", 2), "format must be 1, got 2"),
        (changed("options", None), "options must be a dict"),
        (changed("model", None), "model must be a dict"),
        (changed("object_names", "person"), "object_names must be a list"),
        (changed("predicate_names", [1]), "predicate_names must be a list of names"),
        (changed("training", [1]), "training must be a dict"),
        (changed("training", {"data": "x"}), "training.data must be a dict"),
        (changed("training", {"best": {"R@50": "high"}}), "training.best: R@50 must be a number"),
        (changed("module", "os.system"), "must be a checkpoint of a module of this package"),
        (changed("options", {"hidden_dim": "8"}), "must have valid options and names"),
        (changed("options", {"hidden_dim": 1 << 24}), "but its .* has shape"),  # the model would need a petabyte
        (changed("predicate_names", []), "must have valid options and names"),
        (cut, "must be a complete file of safetensors"),
        (with_weights(lambda weights, name: weights.pop(name)), "but it lacks"),
        (with_weights(lambda weights, name: weights.update({name: weights[name][:1].clone()})), "has shape"),
        (with_weights(lambda weights, name: weights.update({name: weights[name].int()})), "has type torch.int32"),
        (with_weights(lambda weights, name: weights[name].fill_(float("nan"))), "must have finite weights"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["motifs"], indirect=True)
def test_a_damaged_folder_is_refused(damage, message, folder):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_module(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(state_dict=None),
        lambda c: c["state_dict"].update(x=1),
        lambda c: c.update(hyper_parameters=5),
        lambda c: c["hyper_parameters"].update(embed_dim={}),
        lambda c: c["sgalign"].update(object_names=["a", "b"]),
    ],
)
@pytest.mark.parametrize("checkpoint", ["motifs"], indirect=True)
def test_a_changed_checkpoint_is_refused_by_name(change, checkpoint, tmp_path):
    change(content := torch.load(checkpoint))
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match=r"changed\.ckpt: "):
        load_module(tmp_path / "changed.ckpt")


@pytest.mark.parametrize("content", [{}, {"global_step": "x"}, [1]])
def test_the_latest_checkpoint_has_a_step(content, tmp_path):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt: global_step must be a whole number"):
        latest_checkpoint(tmp_path)
