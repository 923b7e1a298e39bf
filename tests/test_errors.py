"""The command line prints the errors of our own checks as one sentence, and leaves defects their traceback."""

import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning")
from sgalign.commands import evaluate, main  # noqa: E402
from sgalign.errors import InputError  # noqa: E402

MESSAGE = "photo.jpg: not an image that can be read: replace or remove it"


def raise_defect(arguments):
    return list(zip([1, 2], [3], strict=True))


def raise_input_error(arguments):
    raise InputError(MESSAGE)


def test_an_error_of_our_checks_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", raise_input_error)
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == f"sgalign: {MESSAGE}\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(evaluate, "main", raise_defect)
    with pytest.raises(ValueError, match="zip"):
        main.main(["evaluate"])


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError(MESSAGE)


def test_a_worker_process_says_the_same(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", lambda arguments: list(DataLoader(Unreadable(), num_workers=1)))
    assert main.main(["evaluate"]) == 1
    assert capsys.readouterr().err == f"sgalign: {MESSAGE}\n"


def test_it_is_a_value_error_and_survives_pickling():
    error = pickle.loads(pickle.dumps(InputError(MESSAGE)))
    assert isinstance(error, ValueError) and isinstance(error, InputError) and str(error) == MESSAGE
