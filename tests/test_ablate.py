"""`sgalign ablate` and `sgalign report` on a few generated images: resuming, scarce labels, and the statistics."""

import csv
import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
import lightning.pytorch as pl  # noqa: E402
from trainers import SMALL_MOTIFS as SMALL  # noqa: E402
from trainers import trainer  # noqa: E402

from sgalign.commands import ablate, studies  # noqa: E402
from sgalign.commands.cache_features import cache_features  # noqa: E402
from sgalign.commands.main import main  # noqa: E402
from sgalign.metrics.comparison import paired_difference  # noqa: E402
from sgalign.models import Detector, RegionFeatures  # noqa: E402
from sgalign.training import GrowingMaskModule, load_module  # noqa: E402
from sgalign.training.scarce import ScarceData  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate") / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "40", "8", "12"]) == 0
    return folder


@pytest.fixture
def chosen(monkeypatch):
    controls = {"dropout": "MaskedMotifsModule", "average": "AveragedTeacherModule"}
    arms = [studies.motifs(**SMALL), studies.align(**SMALL)]
    arms += [studies.Arm(name, "Motifs", module, SMALL, {}) for name, module in controls.items()]
    chosen = {
        "one": studies.Study("One", arms),
        "two": studies.Study("Two", [*arms[:2], studies.motifs("0", "Motifs", learning_rate=1e-9, **SMALL)]),
    }
    monkeypatch.setattr(studies, "STUDIES", chosen)
    return chosen


def test_runs_are_kept_shared_and_reported(folder, tmp_path, chosen, monkeypatch, capsys):
    command = ["ablate", "one", "--data", str(folder), "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    assert len(list((tmp_path / "runs").glob("*.json"))) == 8
    out = capsys.readouterr().out
    assert "8/8 average" in out and "| Align-Motifs | 2 |" in out and "| dropout | Motifs | " in out
    for name in ("one_curves.png", "one_predicates.png", "tables.md"):
        assert (tmp_path / name).stat().st_size > 100
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"Motifs", "Align-Motifs", "dropout", "average"}
    assert {row["part"] for row in rows} == {"validation", "test"} and {row["seed"] for row in rows} == {"0", "1"}

    # What is there is not done again, by another study neither.
    done = []
    monkeypatch.setattr(ablate, "run", lambda root, arm, *rest: done.append(arm.name) or real(root, arm, *rest))
    command[1:2] = ["one", "two"]
    assert main(command) == 0 and done == ["0", "0"]
    assert main(["report", str(tmp_path)]) == 0
    assert "## Two" in (tmp_path / "tables.md").read_text()

    # Of others' rows "two" has all but one; other data of the same name are not taken for these.
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other)
    relations = json.loads((other / "rel.json").read_text())
    relations["train"] = {image: rows[:1] for image, rows in relations["train"].items()}
    (other / "rel.json").write_text(json.dumps(relations))
    done.clear()
    assert main(["ablate", "one", "--data", str(other), "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert len(done) == 4
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "--data must be one of 'scenes " in error and error.count("'scenes ") == 2
    name = studies.data_name(str(other))
    assert main(["report", str(tmp_path), "--data", name]) == 0
    assert "## Two" not in (tmp_path / "tables.md").read_text()
    assert main(["report", str(tmp_path), "--data", name, "--study", "two"]) == 0
    assert "## Two" in (tmp_path / "tables.md").read_text()
    monkeypatch.setitem(chosen, "three", studies.Study("Three", [studies.motifs(**SMALL | {"hidden_dim": 9})]))
    before = (tmp_path / "results.csv").read_text()
    assert main(["report", str(tmp_path), "--data", name, "--study", "one", "three"]) == 1
    assert "has runs, but none of the studies three" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == before

    first = next(iter((tmp_path / "runs").glob("*.json")))
    for content in (first.read_text().replace('"epochs": 1', '"epochs": 2'), '{"cut', "[1]", '{"seed": 0}'):
        next(iter((tmp_path / "runs").glob("*.json"))).write_text(content)
        capsys.readouterr()
        assert main(["report", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert "delete it and run sgalign ablate again" in error and error.count("\n") == 1


real = ablate.run


def test_a_run_says_what_its_best_epoch_reaches(folder, tmp_path):
    result = ablate.run(str(folder), studies.align(**SMALL), 0, 2, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == result and list(tmp_path.iterdir()) == [
        tmp_path / "run.json"
    ]
    numbers = [epoch["R@100"] + epoch["mR@100"] for epoch in result["curve"]]
    assert len(numbers) == 2 and numbers[result["epoch"] - 1] == max(numbers)
    # The ranks that are kept say the same as the evaluator.
    found = [[rank < 50 for rank in ranks] for ranks in result["ranks"] if ranks]
    recall = sum(sum(image) / len(image) for image in found) / len(found)
    assert recall == pytest.approx(result["test"]["R@50"], abs=1e-5)
    again = ablate.run(str(folder), studies.align(**SMALL), 0, 2, tmp_path / "again.json")
    assert again["test"] == result["test"], "a run must repeat"


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_parts_without_relations_are_refused_before_training(folder, part, monkeypatch):
    read = ScarceData._read

    def read_bare(self, asked):
        return [dataclasses.replace(g, relations=g.relations[:0]) if asked == part else g for g in read(self, asked)]

    monkeypatch.setattr(ScarceData, "_read", read_bare)
    with pytest.raises(ValueError, match=f"must have relations in the {part} split, got none"):
        ScarceData(str(folder))


def test_nothing_to_report(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "must be a folder that sgalign ablate has written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ablate", "masking-ratio", "--out", str(tmp_path), "--seeds", "0"])
    capsys.readouterr()
    for option in (("--study", "controls"), ("--data", "scenes"), ("--epochs", "3")):
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path), "--checkpoint", "a.ckpt", "--image", "a.jpg", *option])
        assert f"{option[0]} selects runs and cannot be used with --checkpoint" in capsys.readouterr().err


def test_every_study_names_its_base_and_no_arm_twice():
    for name, study in studies.STUDIES.items():
        names = [arm.name for arm in study.arms]
        assert len(set(names)) == len(names), name
        assert not study.arms[0].base and all(arm.base in names for arm in study.arms[1:]), name
        for arm in study.arms:
            studies.MODULES[arm.module](**arm.options)


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule", "GrowingMaskModule"])
def test_checkpoints_of_controls_are_loaded_by_name(folder, tmp_path, name):
    module = studies.MODULES[name](**SMALL, mask_ratio=0.3)
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(module, ScarceData(str(folder)))
    run.save_checkpoint(tmp_path / "control.ckpt")
    loaded = load_module(tmp_path / "control.ckpt")
    assert type(loaded) is type(module) and loaded.options == module.options
    own, others = module.state_dict(), loaded.state_dict()
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


def test_the_control_without_a_mirror_trains_all_that_it_has(folder):
    module = studies.MODULES["MaskedMotifsModule"](**SMALL)
    trainer(limit_train_batches=1, limit_val_batches=0).fit(module, ScarceData(str(folder)))
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule"])
def test_controls_without_a_loss_of_objects_are_for_predcls(name):
    with pytest.raises(ValueError, match=f"protocol must be 'predcls' for {name}, got 'sgcls'"):
        studies.MODULES[name](protocol="sgcls", vision="cached")


def test_masking_grows_from_nothing_to_its_ratio(folder, tmp_path, monkeypatch):
    ratios, draw = [], GrowingMaskModule.draw_mask
    monkeypatch.setattr(
        GrowingMaskModule, "draw_mask", lambda self, *args: ratios.append(self.mask_ratio) or draw(self, *args)
    )
    arm = studies.Arm("growing", "", "GrowingMaskModule", SMALL | {"mask_ratio": 0.4}, {})
    ablate.run(str(folder), arm, 0, 2, tmp_path / "run.json")
    assert len(ratios) > 4 and ratios == pytest.approx([0.4 * step / len(ratios) for step in range(len(ratios))])


def test_features_are_those_in_the_folder_of_the_data(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "6", "2", "2"]) == 0
    data = ScarceData(str(folder))
    graphs = [*data.train, *data.validation, *data.test]
    torch.manual_seed(0)
    detector = Detector(len(data.object_names), backbone="resnet18", min_size=32, max_size=48, head_dim=16)
    cache_features(graphs, detector, RegionFeatures(dim=16), folder / "features")
    arm = studies.motifs(vision="cached", **SMALL)._replace(data={"features": "features"})
    monkeypatch.setattr(studies, "STUDIES", {"seen": studies.Study("Seen", [arm])})
    command = ["ablate", "seen", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    assert main([*command, "--data", str(folder)]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads(path.read_text())["settings"]["features"] == "features"
    capsys.readouterr()
    assert main(command) == 1
    assert "root must be a folder with cached features in features/, got none (generated" in capsys.readouterr().err


# ---- scarce labels


def relations(data):
    return sum(len(graph.relations) for graph in data.train)


def test_missing_and_wrong_labels(folder):
    whole, missing, wrong = (ScarceData(str(folder), **o) for o in ({}, {"missing": 0.5}, {"wrong": 1.0}))
    assert 0.35 < relations(missing) / relations(whole) < 0.65
    assert all(len(graph.relations) for graph in missing.train)
    assert relations(wrong) == relations(whole)
    pairs = [zip(a.relations.tolist(), b.relations.tolist()) for a, b in zip(wrong.train, whole.train, strict=True)]
    changed = [a[2] != b[2] for graph in pairs for a, b in graph if a[:2] == b[:2]]
    assert len(changed) == relations(whole) and sum(changed) > 0.5 * len(changed)
    assert torch.equal(missing.test[0].relations, whole.test[0].relations)
    few = ScarceData(str(folder), labelled=0.1, unlabelled=False)
    assert few.predicate_groups == whole.predicate_groups and len(whole.zero_shot_test)
    assert torch.equal(few.zero_shot_test, whole.zero_shot_test)


def test_unlabelled_images_have_targets_that_do_not_count(folder):
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
    assert len(ScarceData(str(folder), labelled=0.25, unlabelled=False).unlabelled) == 0


# ---- statistics


def made_run(ranks, predicates=([1, 1, 2], [1], [2, 2]), seed=0):
    return {"seed": seed, "predicates": list(predicates), "ranks": list(ranks), "groups": {"body": ["a", "b"]}}


def test_paired_difference_by_hand():
    none, some = made_run([[100] * 3, [100], [100] * 2]), made_run([[3, 100, 60], [2], [100, 7]])
    assert paired_difference([some], [some], "R", 50) == (0, 0, 0)
    difference, low, high = paired_difference([some], [none], "R", 50)
    assert difference == pytest.approx((1 / 3 + 1 + 1 / 2) / 3) and 0 < low < difference < high <= 1
    # Predicate 1: 1/2 and 1; predicate 2: 0 and 1/2.
    difference, _, _ = paired_difference([some], [none], "mR", 50)
    assert difference == pytest.approx((3 / 4 + 1 / 4) / 2)
    difference, _, _ = paired_difference([some], [none], "mR", 100)
    assert difference == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_paired_difference_is_over_common_seeds_and_the_same_images():
    none, some = made_run([[100] * 3, [100], [100] * 2]), made_run([[3, 100, 60], [2], [100, 7]])
    other = made_run([[0] * 3, [0], [0] * 2], seed=1)
    assert paired_difference([some, other], [none], "R", 50) == paired_difference([some], [none], "R", 50)
    with pytest.raises(ValueError, match=r"base must have at least one of the seeds \[1\], got \[0\]"):
        paired_difference([other], [none], "R", 50)
    with pytest.raises(ValueError, match="same test images"):
        paired_difference([made_run([[0]], [[1]])], [none], "R", 50)


def test_noise_is_within_the_interval():
    """Two models that find every relation with the same probability: of 40 comparisons few are called different."""
    generator = torch.Generator().manual_seed(0)
    predicates = [[1, 2, 1, 2]] * 60
    called = 0
    for _ in range(40):
        runs = [
            [
                made_run((torch.rand(60, 4, generator=generator) * 100).long().tolist(), predicates, seed)
                for seed in range(4)
            ]
            for _ in range(2)
        ]
        _, low, high = paired_difference(*runs, "R", 50)
        called += not low <= 0 <= high
    assert called <= 8, f"{called} of 40 differences of nothing were called real"
