"""Errors on the command line: one sentence for errors of our own checks, and a traceback for defects."""

import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning")
from lightning.pytorch import seed_everything  # noqa: E402

import sgalign_command  # noqa: E402
from sgalign import training  # noqa: E402
from sgalign.commands import doctor, evaluate, main  # noqa: E402
from sgalign.errors import InputError, shown  # noqa: E402

MESSAGE = "photo.jpg: not an image that can be read: replace or remove it"


def raise_defect(arguments):
    return list(zip([1, 2], [3], strict=True))


def raise_input_error(arguments):
    raise InputError(MESSAGE)


def test_error_of_our_checks_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", raise_input_error)
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == f"sgalign: {MESSAGE}\n"


def test_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(evaluate, "main", raise_defect)
    with pytest.raises(ValueError, match="zip"):
        main.main(["evaluate"])


OF_TORCH = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to {}"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError("Unable to allocate 8.00 GiB for an array with shape (1,)"), " for 8.00 GiB"),
        (RuntimeError(OF_TORCH.format("allocate 224000000000 bytes. Error code 12")), " for 224000000000 bytes"),
        (MemoryError(), ""),
    ],
)
def test_lack_of_memory_is_one_sentence(error, wanted, monkeypatch, capsys):
    def runs_out(arguments):
        raise error

    monkeypatch.setattr(evaluate, "main", runs_out)
    assert main.main(["evaluate"]) == 1
    advice = "free memory, or use smaller batches, images or layers"
    assert capsys.readouterr().err == f"sgalign: not enough memory{wanted}: {advice}\n"


def test_shown_values_are_short_and_made_in_no_time():
    part = OrderedDict(a=1)
    for _ in range(64):
        part = OrderedDict(a=part, b=part)
    assert len(shown(part)) <= 203
    assert shown({"a": 10**5000}) == "{'a': a number of 16610 bits}"


def test_the_end_of_the_reader_of_the_output_ends_the_command(tmp_path):
    """`head` and similar programs end before they have read everything."""
    command = f"{sys.executable} -W ignore -m sgalign --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.strip() in ("0", "141") and not result.stderr


def test_value_error_of_lightning_itself_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", lambda arguments: seed_everything(-1))
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err.startswith("sgalign: -1 is not in bounds")


@pytest.mark.parametrize("size", ["-1", str(1 << 31), "1" + "0" * 30])
def test_sizes_of_a_generated_data_set_that_cannot_be_are_refused(size, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["make-dataset", str(tmp_path / "new"), "--sizes", "1", size, "1"])
    assert "error: --sizes must be at least 0 and below 2^31, got [1, " in capsys.readouterr().err


def test_a_generated_data_set_has_a_scene(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["make-dataset", str(tmp_path / "new"), "--sizes", "0", "0", "0"])
    assert "error: --sizes must give at least one split a scene" in capsys.readouterr().err and not any(
        tmp_path.iterdir()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "scenes", "--json", "scenes/train.json"],
        ["check", "scenes", "--predictions", "predictions.json", "--json", "predictions.json"],
        ["evaluate", "--annotations", "scenes", "--detections", "predictions.json", "--csv", "scenes/train.json"],
    ],
)
def test_commands_do_not_overwrite_what_they_read(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main("make-dataset scenes --format coco --sizes 1 1 1 --no-images".split()) == 0
    Path("predictions.json").write_text("{}")
    before = Path(arguments[-1]).read_bytes()
    with pytest.raises(SystemExit):
        main.main(arguments)
    assert f"{arguments[-1]} must not be written, because the command reads it" in capsys.readouterr().err
    assert Path(arguments[-1]).read_bytes() == before


def raise_not_found(name):
    def raises(arguments):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return raises


@pytest.fixture
def without_lightning(monkeypatch):
    """An environment without Lightning, in which no installation says what the extra needs."""
    monkeypatch.setattr(doctor, "required", lambda extra: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "sgalign.training.lightning_cli", raising=False)
    monkeypatch.delattr(training, "lightning_cli", raising=False)


def test_missing_lightning_is_one_sentence(without_lightning, capsys):
    assert main.main(["fit"]) == 1
    assert capsys.readouterr().err == "sgalign: fit needs lightning: pip install 'sgalign[train]'\n"


def test_error_of_our_checks_is_one_sentence_without_lightning(without_lightning, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", raise_input_error)
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == f"sgalign: {MESSAGE}\n"


def test_missing_package_is_one_sentence(without_lightning, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", raise_not_found("torchvision.ops"))
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == "sgalign: evaluate needs torchvision: pip install 'sgalign[train]'\n"


def test_missing_module_of_ours_is_a_defect(monkeypatch):
    monkeypatch.setattr(evaluate, "main", raise_not_found("sgalign.no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main.main(["evaluate"])


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError(MESSAGE)


def test_error_in_a_worker_process_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", lambda arguments: list(DataLoader(Unreadable(), num_workers=1)))
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == f"sgalign: {MESSAGE}\n"


def test_input_error_is_a_value_error_and_can_be_pickled():
    error = pickle.loads(pickle.dumps(InputError(MESSAGE)))
    assert isinstance(error, ValueError) and isinstance(error, InputError) and str(error) == MESSAGE


def test_a_broken_pipe_that_is_not_the_output_is_not_hidden(monkeypatch, capsys):
    def breaks(arguments=None):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(main, "main", breaks)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        sgalign_command.run()
