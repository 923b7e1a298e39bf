"""Runs every target of the data sets' fuzzing on some random inputs, so that the code of the campaign stays valid."""

import dataclasses
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 and Python 3.11 to 3.13 only")
pytest.importorskip("h5py")
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz_datasets  # noqa: E402
import fuzzing  # noqa: E402


@pytest.mark.parametrize("name", fuzz_datasets.TARGETS)
def test_a_target_finds_no_defect_in_some_random_inputs(name):
    outcomes = Counter()
    for seed in range(20):
        word, _ = fuzzing.run(fuzz_datasets.TARGETS[name], random.Random(seed).randbytes(2000))
        assert not word.startswith("DEFECT"), f"input of seed {seed}: {word}"
        outcomes[word] += 1
    assert outcomes["loaded"] and outcomes["refused"], outcomes


def first_byte(draw, folder):
    return 1 / draw.ConsumeIntInRange(0, 1) and "not zero"


@pytest.mark.parametrize("content, code, end", [(b"\x01", 0, "not zero"), (b"", 1, "DEFECT ZeroDivisionError at ")])
def test_one_input_is_run_again_and_nothing_is_written(content, code, end, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.input").write_bytes(content)
    arguments = ["--input", str(tmp_path / "one.input"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fuzz", "target", *arguments])
    with pytest.raises(SystemExit) as ended:
        fuzzing.main({"target": first_byte, "other": first_byte})
    assert ended.value.code == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(end) and ("Traceback" in printed) == bool(code)
    assert [path.name for path in tmp_path.iterdir()] == ["one.input"]


class Copy(list):
    """The graphs and the tables of a data set, which a test can change."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.object_names, self.predicate_names = dataset.object_names, dataset.predicate_names
        self.findings = list(dataset.findings)


def without_a_relation(dataset):
    dataset[0] = dataclasses.replace(dataset[0], relations=dataset[0].relations[1:])


def with_a_wider_box(dataset):
    dataset[0].boxes[0, 2] += 0.5


def with_a_class_renamed(dataset):
    dataset.object_names = [*dataset.object_names[:-1], "other"]


def with_a_relation_counted_as_lost(dataset):
    dataset.findings.append(SimpleNamespace(kind="relation x", outcome="left out", count=1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without_a_relation, "graphs"),
        (with_a_wider_box, "graphs"),
        (with_a_class_renamed, "names of objects"),
        (with_a_relation_counted_as_lost, "counted {"),
    ],
)
@pytest.mark.parametrize("name", ["vrd", "coco", "vg150", "psg", "gqa", "open_images_csv", "open_images_json"])
def test_a_data_set_with_a_fault_is_a_defect(change, problem, name, monkeypatch):
    read, changed = fuzz_datasets.read, []

    def read_wrongly(*arguments):
        dataset = Copy(read(*arguments))
        change(dataset)
        changed.append(dataset)
        return dataset

    monkeypatch.setattr(fuzz_datasets, "read", read_wrongly)
    word, _ = fuzzing.run(fuzz_datasets.TARGETS[name], b"")
    assert changed and word.startswith("DEFECT AssertionError") and f": {problem}" in word, word
