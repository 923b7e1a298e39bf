"""Tests of `sgalign ablate` and `sgalign report` on a few generated images."""

import contextlib
import csv
import dataclasses
import io
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


CONTROLS = {"dropout": "MaskedMotifsModule", "average": "AveragedTeacherModule"}
ARMS = [studies.motifs(**SMALL), studies.align(**SMALL)]
ARMS += [studies.Arm(name, "Motifs", module, SMALL, {}) for name, module in CONTROLS.items()]
STUDIES = {
    "one": studies.Study("One", ARMS),
    # Only the last arm of this study is not in the other one.
    "two": studies.Study("Two", [*ARMS[:2], studies.motifs("0", "Motifs", learning_rate=1e-9, **SMALL)]),
}


@pytest.fixture
def chosen(monkeypatch):
    """The studies, which replace the real ones."""
    chosen = dict(STUDIES)
    monkeypatch.setattr(studies, "STUDIES", chosen)
    return chosen


def ablate_command(folder, out, *names, seeds=2):
    """Return the command that does studies on the data set in a folder."""
    return ["ablate", *names, "--data", str(folder), "--seeds", str(seeds), "--epochs", "1", "--out", str(out)]


@pytest.fixture(scope="module")
def first_study(folder, tmp_path_factory):
    """The folder with all runs of study "one", and the printed text."""
    out = tmp_path_factory.mktemp("first_study")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(studies, "STUDIES", STUDIES)
        assert main(ablate_command(folder, out, "one")) == 0
    return out, printed.getvalue()


@pytest.fixture
def out(first_study, tmp_path):
    """A copy of the folder with the runs of study "one", which a test may change."""
    return shutil.copytree(first_study[0], tmp_path / "out")


@pytest.fixture
def done(monkeypatch):
    """The names of the arms that are run from now on."""
    done, run = [], ablate.run
    monkeypatch.setattr(ablate, "run", lambda root, arm, *rest: done.append(arm.name) or run(root, arm, *rest))
    return done


def test_ablate_writes_a_file_per_run_and_tables_and_figures(first_study):
    out, printed = first_study
    assert len(list((out / "runs").glob("*.json"))) == 8
    assert "8/8 average" in printed and "| Align-Motifs | 2 |" in printed and "| dropout | Motifs | " in printed
    for name in ("one_curves.png", "one_predicates.png", "tables.md"):
        assert (out / name).stat().st_size > 100
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"Motifs", "Align-Motifs", "dropout", "average"}
    assert {row["part"] for row in rows} == {"validation", "test"} and {row["seed"] for row in rows} == {"0", "1"}


def test_existing_runs_are_not_repeated_even_for_another_study(folder, out, chosen, done):
    assert main(ablate_command(folder, out, "one", "two")) == 0 and done == ["0", "0"]
    assert main(["report", str(out)]) == 0
    assert "## Two" in (out / "tables.md").read_text()


def test_runs_on_other_data_of_the_same_name_are_kept_apart(folder, out, chosen, done, tmp_path, monkeypatch, capsys):
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other)
    relations = json.loads((other / "rel.json").read_text())
    relations["train"] = {image: rows[:1] for image, rows in relations["train"].items()}
    (other / "rel.json").write_text(json.dumps(relations))
    assert main(ablate_command(other, out, "one", seeds=1)) == 0
    assert len(done) == 4
    capsys.readouterr()
    assert main(["report", str(out)]) == 1
    error = capsys.readouterr().err
    assert "--data must be one of 'scenes " in error and error.count("'scenes ") == 2
    # Study "two" lacks an arm on this data, so it is reported only if it is asked for.
    name = studies.data_name(str(other))
    assert main(["report", str(out), "--data", name]) == 0
    assert "## Two" not in (out / "tables.md").read_text()
    assert main(["report", str(out), "--data", name, "--study", "two"]) == 0
    assert "## Two" in (out / "tables.md").read_text()
    # A study without any run is refused before anything is written.
    monkeypatch.setitem(chosen, "three", studies.Study("Three", [studies.motifs(**SMALL | {"hidden_dim": 9})]))
    before = (out / "results.csv").read_text()
    assert main(["report", str(out), "--data", name, "--study", "one", "three"]) == 1
    assert "has runs, but none of the studies three" in capsys.readouterr().err
    assert (out / "results.csv").read_text() == before


def test_a_damaged_file_of_a_run_is_refused_in_one_sentence(out, chosen, capsys):
    path = next(iter((out / "runs").glob("*.json")))
    for content in (path.read_text().replace('"epochs": 1', '"epochs": 2'), '{"cut', "[1]", '{"seed": 0}'):
        path.write_text(content)
        capsys.readouterr()
        assert main(["report", str(out)]) == 1
        error = capsys.readouterr().err
        assert "delete it and run sgalign ablate again" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The result of a run of two epochs and its file."""
    path = tmp_path_factory.mktemp("finished") / "run.json"
    return ablate.run(str(folder), studies.align(**SMALL), 0, 2, path), path


def test_a_run_writes_its_result_and_no_other_file(finished):
    result, path = finished
    assert json.loads(path.read_text()) == result and list(path.parent.iterdir()) == [path]


def test_a_run_chooses_its_best_epoch(finished):
    result, _ = finished
    numbers = [epoch["R@100"] + epoch["mR@100"] for epoch in result["curve"]]
    assert len(numbers) == 2 and numbers[result["epoch"] - 1] == max(numbers)


def test_the_ranks_of_a_run_give_its_recall(finished):
    result, _ = finished
    found = [[rank < 50 for rank in ranks] for ranks in result["ranks"] if ranks]
    recall = sum(sum(image) / len(image) for image in found) / len(found)
    assert recall == pytest.approx(result["test"]["R@50"], abs=1e-5)


def test_a_run_repeats_exactly(folder, tmp_path, finished):
    again = ablate.run(str(folder), studies.align(**SMALL), 0, 2, tmp_path / "again.json")
    assert again["test"] == finished[0]["test"]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_parts_without_relations_are_refused_before_training(folder, part, monkeypatch):
    read = ScarceData._read

    def read_bare(self, asked):
        return [dataclasses.replace(g, relations=g.relations[:0]) if asked == part else g for g in read(self, asked)]

    monkeypatch.setattr(ScarceData, "_read", read_bare)
    with pytest.raises(ValueError, match=f"the {part} split must have relations, got none"):
        ScarceData(str(folder))


def test_a_folder_without_runs_cannot_be_reported(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "must be a folder that sgalign ablate has written" in capsys.readouterr().err


def test_ablate_needs_at_least_one_seed(tmp_path):
    with pytest.raises(SystemExit):
        main(["ablate", "masking-ratio", "--out", str(tmp_path), "--seeds", "0"])


@pytest.mark.parametrize("option", [("--study", "controls"), ("--data", "scenes"), ("--epochs", "3")])
def test_options_that_select_runs_cannot_be_used_with_a_checkpoint(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--checkpoint", "a.ckpt", "--image", "a.jpg", *option])
    assert f"{option[0]} selects runs and cannot be used with --checkpoint" in capsys.readouterr().err


def test_every_study_has_valid_arms_with_different_names_and_known_bases():
    for name, study in studies.STUDIES.items():
        names = [arm.name for arm in study.arms]
        assert len(set(names)) == len(names), name
        assert not study.arms[0].base and all(arm.base in names for arm in study.arms[1:]), name
        for arm in study.arms:
            studies.MODULES[arm.module](**arm.options)


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule", "GrowingMaskModule"])
def test_checkpoints_of_controls_are_loaded_as_their_own_module(folder, tmp_path, name):
    module = studies.MODULES[name](**SMALL, mask_ratio=0.3)
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(module, ScarceData(str(folder)))
    run.save_checkpoint(tmp_path / "control.ckpt")
    loaded = load_module(tmp_path / "control.ckpt")
    assert type(loaded) is type(module) and loaded.options == module.options
    own, others = module.state_dict(), loaded.state_dict()
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


def test_every_weight_of_the_control_without_a_mirror_gets_a_gradient(folder):
    module = studies.MODULES["MaskedMotifsModule"](**SMALL)
    trainer(limit_train_batches=1, limit_val_batches=0).fit(module, ScarceData(str(folder)))
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["MaskedMotifsModule", "AveragedTeacherModule"])
def test_controls_without_an_object_loss_support_only_predcls(name):
    with pytest.raises(ValueError, match=f"protocol must be 'predcls' for {name}, got 'sgcls'"):
        studies.MODULES[name](protocol="sgcls", vision="cached")


def test_the_mask_ratio_grows_linearly_from_0(folder, tmp_path, monkeypatch):
    ratios, draw = [], GrowingMaskModule.draw_mask
    monkeypatch.setattr(
        GrowingMaskModule, "draw_mask", lambda self, *args: ratios.append(self.mask_ratio) or draw(self, *args)
    )
    arm = studies.Arm("growing", "", "GrowingMaskModule", SMALL | {"mask_ratio": 0.4}, {})
    ablate.run(str(folder), arm, 0, 2, tmp_path / "run.json")
    assert len(ratios) > 4 and ratios == pytest.approx([0.4 * step / len(ratios) for step in range(len(ratios))])


@pytest.fixture
def study_of_features(monkeypatch):
    """A study "seen" that reads cached features from the folder `features` of the data set."""
    arm = studies.motifs(vision="cached", **SMALL)._replace(data={"features": "features"})
    monkeypatch.setattr(studies, "STUDIES", {"seen": studies.Study("Seen", [arm])})


def test_cached_features_are_read_from_the_folder_of_the_data(tmp_path, study_of_features):
    folder = tmp_path / "scenes"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "6", "2", "2"]) == 0
    data = ScarceData(str(folder))
    graphs = [*data.train, *data.validation, *data.test]
    torch.manual_seed(0)
    detector = Detector(len(data.object_names), backbone="resnet18", min_size=32, max_size=48, head_dim=16)
    cache_features(graphs, detector, RegionFeatures(dim=16), folder / "features")
    assert main(ablate_command(folder, tmp_path, "seen", seeds=1)) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads(path.read_text())["settings"]["features"] == "features"


def test_an_arm_with_cached_features_needs_a_folder_of_data(tmp_path, study_of_features, capsys):
    assert main(["ablate", "seen", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "root must be a folder with cached features in features/, got none (generated" in capsys.readouterr().err


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


# ---- statistics


def made_run(ranks, predicates=([1, 1, 2], [1], [2, 2]), seed=0):
    return {"seed": seed, "predicates": list(predicates), "ranks": list(ranks), "groups": {"body": ["a", "b"]}}


NONE = made_run([[100] * 3, [100], [100] * 2])  # finds no relation
SOME = made_run([[3, 100, 60], [2], [100, 7]])
ALL = made_run([[0] * 3, [0], [0] * 2], seed=1)


def test_a_run_does_not_differ_from_itself():
    assert paired_difference([SOME], [SOME], "R", 50) == (0, 0, 0)


def test_the_difference_of_recall_is_averaged_over_images_and_inside_its_interval():
    difference, low, high = paired_difference([SOME], [NONE], "R", 50)
    assert difference == pytest.approx((1 / 3 + 1 + 1 / 2) / 3) and 0 < low < difference < high <= 1


def test_the_difference_of_mean_recall_is_averaged_over_images_and_predicates():
    # The recalls of predicate 1 are 1/2 and 1, those of predicate 2 are 0 and 1/2.
    difference, _, _ = paired_difference([SOME], [NONE], "mR", 50)
    assert difference == pytest.approx((3 / 4 + 1 / 4) / 2)
    difference, _, _ = paired_difference([SOME], [NONE], "mR", 100)
    assert difference == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_only_runs_with_the_same_seed_are_compared():
    assert paired_difference([SOME, ALL], [NONE], "R", 50) == paired_difference([SOME], [NONE], "R", 50)
    with pytest.raises(ValueError, match=r"base must have at least one of the seeds \[1\], got \[0\]"):
        paired_difference([ALL], [NONE], "R", 50)


def test_runs_on_different_images_are_not_compared():
    with pytest.raises(ValueError, match="same test images"):
        paired_difference([made_run([[0]], [[1]])], [NONE], "R", 50)


def test_equal_models_are_rarely_called_different():
    """Both models find every relation with the same probability. Few of 40 intervals may exclude 0."""
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
    assert called <= 8, f"{called} of 40 comparisons of equal models called them different"
