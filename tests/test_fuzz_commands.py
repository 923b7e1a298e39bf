"""A few cases of the campaign that runs commands with random options, so that it keeps working."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).resolve().parent / "campaigns"))
import fuzz_commands  # noqa: E402
from command_judging import Ended, expected, judge  # noqa: E402

LIGHT = ("check", "evaluate", "export", "make-dataset", "predict", "report", "view")  # commands that train nothing


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="the campaign works in /dev/shm")
def test_commands_with_random_options_finish_or_refuse(tmp_path):
    rows = fuzz_commands.campaign(range(30), 1, tmp_path, LIGHT, trained=False)
    assert sorted(row["case"] for row in rows) == list(range(30))
    assert not [row for row in rows if row["outcome"] not in ("finished", "refused", "usage error")]
    assert len({row["outcome"] for row in rows}) == 3
    assert "| together | 30 |" in fuzz_commands.table(rows)
    (again,) = fuzz_commands.campaign([7], 1, tmp_path, LIGHT, trained=False)
    assert again["outcome"] == next(row["outcome"] for row in rows if row["case"] == 7)


@pytest.mark.parametrize(
    ("code", "err", "files", "expected"),
    [
        (0, "", ["cwd/new.json"], "finished"),
        (1, "sgalign: --json must be a file\n", [], "refused"),
        (2, "sgalign check: error: unrecognized arguments: --x\n", [], "usage error"),
        (1, "sgalign: something is wrong\n", [], "DEFECT check: names no option"),
        (1, "sgalign: --json is wrong\nand more\n", [], "DEFECT check: more than a sentence"),
        (1, "Traceback (most recent call last):\nKeyError\n", [], "DEFECT check: traceback"),
        (1, "", [], "DEFECT check: code 1 without a message"),
        (0, "", ["cwd/new.json.7.partial"], "DEFECT check: partial file left"),
        (1, "sgalign: 1 image without a result: see a.jsonl", [], "DEFECT check: names no option"),
        (1, "sgalign: skipped: folder/a.jpg: no\nsgalign: 1 image without a result: see a.jsonl", [], "refused"),
        (0, "", ["cwd/other.json"], "DEFECT check: wrote where no option says so"),
        (-11, "", [], "DEFECT check: exit code -11"),
    ],
)
def test_the_campaign_judges_how_a_command_ends(code, err, files, expected, tmp_path):
    arguments = ["check", "folder", "--json", "new.json"]
    after = {name: (1, 1, 1) for name in files}
    assert judge(arguments, Ended(code, None, "", err), tmp_path, {}, after).startswith(expected)


@pytest.mark.parametrize(
    ("line", "name", "allowed"),
    [
        ("check in/coco --json new.json", "cwd/new.json", True),
        ("check in/coco --json=sub/new.json", "cwd/sub", True),
        ("check in/coco --json in/coco/train.json", "cwd/in/coco/train.json", True),
        ("check in/coco --json .", "cwd/in/coco/train.json", False),
        ("check in/coco", "cwd/in/coco/train.json", False),
        ("view in/graphs.jsonl", "cwd/in/graphs.jsonl", False),
        ("view in/predictions.h5", "cwd/predictions.html", True),
        ("view in/predictions.h5", "cwd/other.json", False),
        ("export in/motifs.ckpt new", "cwd/new/model.safetensors", True),
        ("predict in/coco --out new.jsonl", "cwd/new.failed.jsonl", True),
        ("predict in/coco --top-k 1", "cwd/123.json", False),
        ("fit --trainer.default_root_dir=new", "cwd/new/x.ckpt", True),
        ("make-dataset ../x", "x/train.json", True),
    ],
)
def test_a_command_may_write_only_where_an_output_is_named(line, name, allowed):
    assert expected(line.split(), name) == allowed


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="the campaign works in /dev/shm")
def test_a_worker_that_ends_before_a_case_is_a_defect_of_this_case(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_commands.Worker, "_isolate", lambda worker: 1 / 0)
    rows = fuzz_commands.campaign(range(4), 1, tmp_path, LIGHT, trained=False)
    assert sorted(row["case"] for row in rows) == [0, 1, 2, 3]
    assert all("ended by status 256" in row["outcome"] for row in rows)


@pytest.mark.parametrize(
    ("argument", "message", "named"),
    [
        ("in/data", "the file in/data is wrong", True),
        ("in/data", "'in' is in a/b.", False),
        ("in", "in not found", True),
        ("in", "a number is in two files", False),
        ("", "must be a file, but is a folder: '.'", True),
        ("--csv=", "must be a file, but is a folder: '.'", True),
        ("", "'': must be an image", True),
        ("x", "'': must be an image", False),
        ("x", "must be a file, but is a folder: '.'", False),
        ("--top-k", "top_k must be at least 1", True),
        ("3", "must be at least 4, got 3", True),
        ("3", "there are 13 relations", False),
    ],
)
def test_a_refusal_names_an_option_or_a_value_as_a_whole_word(argument, message, named, tmp_path):
    outcome = judge(["check", argument], Ended(1, None, "", f"sgalign: {message}\n"), tmp_path, {}, {})
    assert outcome == ("refused" if named else f"DEFECT check: names no option: {message}")


def test_an_error_that_leaves_a_command_and_a_damaged_file_are_defects(tmp_path):
    arguments = ["check", "folder", "--json", "new.json"]
    with pytest.raises(KeyError) as raised:
        {}["x"]
    error = Ended(None, raised.value, "", "")
    assert judge(arguments, error, tmp_path, {}, {}).startswith("DEFECT check: KeyError")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "new.json").write_text('{"a": ')
    assert "file is not whole" in judge(arguments, Ended(0, None, "", ""), tmp_path, {}, {"cwd/new.json": (6, 1, 1)})
