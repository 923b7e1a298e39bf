"""What benchmarks/gpu_report.py and tune.py do around the measuring, which takes a GPU."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the installed package comes first
pytest.importorskip("triton", reason="the tuner reads the table of Triton's kernels")
from benchmarks import attention_part, device_tests, gpu_report, measuring, relation_part, report_markdown, tune  # noqa: E402
from sgalign.kernels import configs  # noqa: E402


@pytest.mark.parametrize("command", [gpu_report, tune])
def test_without_a_gpu_it_says_so(monkeypatch, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ the report


def test_parts_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    runs = []

    def part(name, **figures):
        def run(before):
            runs.append((name, before.get("checks")))
            return dict(figures)

        return run

    def cut_off(before):
        raise KeyboardInterrupt

    def crash(before):
        raise RuntimeError("the card fell off\nand more")

    def out_of_time(before):
        return {"checks": {"triton": {"failure": report_markdown.NOT_REACHED}}}

    parts = {"environment": part("environment"), "loss": crash, "attention a": out_of_time, "steps": cut_off}
    with pytest.raises(KeyboardInterrupt):
        gpu_report.write_report(tmp_path, parts)
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written) == ["environment", "loss", "attention a"]
    assert written["loss"]["failure"] == "RuntimeError: the card fell off"
    parts |= {"loss": part("loss"), "attention a": part("a", rows=[]), "steps": part("steps")}
    gpu_report.write_report(tmp_path, parts)
    checks = written["attention a"]["checks"]
    # What failed is tried again, what time did not reach goes on from what there is.
    assert runs == [("environment", None), ("loss", None), ("a", checks), ("steps", None)]
    gpu_report.write_report(tmp_path, parts, ["attention", "steps"])
    assert runs[4:] == [("a", None), ("steps", None)]
    assert not (tmp_path / "report.md").read_text().count("fell off")
    monkeypatch.setattr(gpu_report, "sources", lambda: "changed")
    gpu_report.write_report(tmp_path, parts)
    assert [name for name, _ in runs[6:]] == ["environment", "loss", "a", "steps"]  # of other code: all anew


@pytest.mark.parametrize("content", ["", "[]", '{"loss": null}', '{"environment": {}'])
def test_what_is_no_report_is_not_written_over(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json.* remove it, or give another --out"):
        gpu_report.write_report(tmp_path, {"loss": dict})
    assert (tmp_path / "report.json").read_text() == content


def test_a_failure_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails():
        raise ValueError("no such shape\ntraceback")

    def skips():
        pytest.skip("not installed")

    assert measuring.attempt(fails) == {"failure": "ValueError: no such shape"}
    assert measuring.attempt(skips) == {"failure": "Skipped: not installed"}


IDS = ["tests/test_a.py::test_a[1, 2]", "tests/test_a.py::test_b", "tests/test_a.py::test_c"]
PASSED = f"{IDS[0]} PASSED [ 33%]\n{IDS[1]} SKIPPED (why) [ 66%]\n{IDS[2]} PASSED [100%]\n== 2 passed, 1 skipped ==\n"
FAILED = f"{IDS[0]} PASSED [ 33%]\n{IDS[1]} FAILED [ 66%]\n"
SUMMARY = f"{IDS[2]} ERROR\nFAILED {IDS[1]} - assert\n"
MARK = device_tests.SANITIZER_MARK


@pytest.mark.parametrize(
    "log, status, counts, failed, left",
    [
        (PASSED, 0, {"passed": 2, "skipped": 1}, [], []),
        (FAILED + SUMMARY, 1, {"passed": 1, "failed": 1, "error": 1}, [f"FAILED {IDS[1]} - assert"], []),
        (FAILED, None, {"passed": 1, "failed": 1}, [f"FAILED {IDS[1]}"], IDS[2:]),
        ("", None, {}, [f"time was up in {IDS[0]}: "], IDS[1:]),
        (FAILED, 7, {"passed": 1, "failed": 1}, [f"FAILED {IDS[1]}", f"the device was lost in {IDS[1]}"], IDS[2:]),
        (
            f"{IDS[0]} PASSED\nSegmentation fault",
            -11,
            {"passed": 1},
            [f"status -11 in {IDS[1]}: Segmentation fault"],
            IDS[2:],
        ),
        ("", 4, {}, [f"status 4 in {IDS[0]}: "], IDS[1:]),
        (f"{MARK}COMPUTE-SANITIZER\n{PASSED}{MARK}ERROR SUMMARY: 0 errors\n", 0, {"passed": 2, "skipped": 1}, [], []),
        (
            PASSED.replace(" PASSED", f"\n{MARK}Invalid read\nPASSED", 1),
            device_tests.SANITIZER_EXIT,
            {"passed": 2, "skipped": 1},
            [f"{MARK}Invalid read"],
            [],
        ),
    ],
)
def test_outcomes_of_a_run(log, status, counts, failed, left):
    assert device_tests.outcomes(log, status, IDS) == (counts, failed, left)


def test_tests_go_on_where_time_was_up(tmp_path, monkeypatch):
    file = tmp_path / "test_made_up.py"
    file.write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('name', ['a b', 'c'])\n"
        "def test_quick(name): assert os.environ['SGALIGN_TEST_BACKEND'] == 'made up'\n"
        "def test_wrong(): assert False\n"
        "def test_slow(): time.sleep(100 * (not os.path.exists('again')))\n"
    )
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    monkeypatch.setattr(device_tests, "TEST_FILES", (file.name,))
    monkeypatch.setattr(device_tests, "SECONDS", 15)
    monkeypatch.setattr(measuring, "available", lambda: ["made up"])
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    first = device_tests.run({})["made up"]
    assert first == {
        "counts": {"passed": 2, "failed": 1},
        "failed": ["FAILED test_made_up.py::test_wrong"],
        "not run": ["test_made_up.py::test_slow"],
    }
    (tmp_path / "again").touch()
    second = device_tests.run({"made up": first})["made up"]
    assert second == first | {"counts": {"passed": 3, "failed": 1}, "not run": []}


def test_what_was_measured_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    late = {"deadline": 0.0}
    for before in ({"graph": 1.0}, {"failure": "OutOfMemoryError"}):
        assert measuring.attempt(dict, before=before, **late) == before
    for before in (None, {"failure": report_markdown.NOT_REACHED}):
        assert measuring.attempt(dict, before=before, **late) == {"failure": report_markdown.NOT_REACHED}
        assert measuring.attempt(lambda: {"graph": 2.0}, before=before) == {"graph": 2.0}


def test_after_the_device_is_lost_nothing_is_measured_or_blamed(monkeypatch):
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def illegal():
        lost.append(True)
        synchronize()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    assert "illegal memory access" in measuring.attempt(illegal)["failure"]
    found = measuring.attempt(lambda: pytest.fail("measured on a lost device"))
    assert found == {"failure": report_markdown.NOT_REACHED} and report_markdown.unfinished({"rows": [{"sdpa": found}]})


@pytest.mark.skipif(sys.platform != "linux", reason="memory on the CPU is read from /proc")
@pytest.mark.parametrize("part", ["attention float32", "relation", "loss"])
def test_parts_go_on_from_what_was_measured(monkeypatch, part):
    """On the CPU, with made-up times: what a part makes, and that it measures what was not reached alone."""

    def run_all(calls):
        for call in calls:
            call()
        return 1.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for module, name, value in (
        (measuring, "DEVICE", torch.device("cpu")),
        (measuring, "graph_ms", run_all),
        (measuring, "call_ms", lambda call: 2.0),
        (measuring, "sets_beyond_cache", lambda mebibytes: 1),
        (measuring, "available", lambda: ["cpu"]),
        (attention_part, "SHAPES", {"float32": [(1, 2, 20, 40, 32)]}),
        (attention_part, "FLEX_SHAPES", []),
        (attention_part, "CHECKED_SHAPES", [(1, 2, 20, 40, 32), (1, 1, 30, 40, 64)]),
        (relation_part, "SHAPES", [(30, 9, 64, 11)]),
    ):
        monkeypatch.setattr(module, name, value)
    first = json.loads(json.dumps(gpu_report.PARTS[part]({})))
    assert first["checks"] and all(check["right"] for check in first["checks"].values())
    for row in first["rows"]:
        assert {contender["graph"] for contender in row["contenders"].values()} == {1.0}
    measured, *_, missing = first["rows"][0]["contenders"]
    first["rows"][0]["contenders"] |= {measured: {"graph": 42.0}, missing: {"failure": report_markdown.NOT_REACHED}}
    assert report_markdown.unfinished(first)
    second = gpu_report.PARTS[part](first)
    assert not report_markdown.unfinished(second)
    assert second["rows"][0]["contenders"][measured] == {"graph": 42.0}
    assert second["rows"][0]["contenders"][missing]["graph"] == 1.0


def test_check_finds_what_is_wrong_or_not_written():
    right = [torch.ones(3, dtype=torch.float64)]
    for got, is_right in ((1.0, True), (1.001, False), (math.nan, False)):
        found = measuring.checked(lambda got=got: [torch.full((3,), got)], lambda: right, "float32")
        assert found["right"] is is_right
    unwritten = measuring.checked(lambda: [torch.ones(3).new_empty(3)], lambda: right, "float32")
    assert math.isnan(unwritten["error"])


def contender(graph):
    return {"graph": graph, "call": 2 * graph, "peak": 100 * graph}


REPORT = {
    "environment": {
        "card": "Made Up",
        "bytes per second": 1e12,
        "FLOP per second": {"bfloat16": 1e14},
        "backends": {"triton": "available"},
        "seconds": 1.0,
    },
    "tests": {
        "triton": {"counts": {"passed": 3, "failed": 1}, "failed": ["FAILED test_x"], "not run": ["a", "b"]},
        "seconds": 1.0,
    },
    "attention bfloat16": {
        "checks": {"triton dual": {"error": 0.5, "allowed": 0.01, "right": False}},
        "rows": [
            {
                "shape": [8, 8, 180, 608, 32],
                "dtype": "bfloat16",
                "backward": True,
                "flops": 5e9,
                "bytes": 1e7,
                "contenders": {
                    "triton dual": contender(0.1),
                    "triton single": contender(0.08),
                    "sdpa twice": contender(0.5),
                    "flex": contender(0.19),
                    "eager": {"failure": "OutOfMemoryError: too much"},
                },
            }
        ],
    },
    "steps": {"SGTR, float32": {"contenders": {"SGTR": contender(1.0), "Align-SGTR": contender(1.1)}, "counted": 1.2}},
    "loss": {"failure": "BrokenProcessPool: a process died"},
}


def test_markdown():
    text = report_markdown.markdown(REPORT)
    assert "# sgalign on Made Up" in text
    assert "| FlexAttention / dual, SGTR's shapes, forward and backward | at least 2 | 1.90 | 0 of 1 |" in text
    assert "| SDPA with dense masks / dual, the same | at least 3 | 5.00 | 1 of 1 |" in text
    assert "| share of the ceilings, at least 4096 queries and keys | at least 0.7 |  | not measured |" in text
    assert "| Align steps / their counted ratio | at most 1.05 | 0.92 | 1 of 1 |" in text
    assert (
        "| 8, 8, 180, 608, 32 | triton | 0.100 | 0.200 | 5.00 |  | 1.90 | 1.25 |  | 5.00 | 10.0 | 50% | 10 | 50 |"
        in text
    )
    assert "| triton | 3 passed, 1 failed | 2 |" in text
    for failure in (
        "triton dual: error 5.0e-01",
        "eager: OutOfMemoryError",
        "loss: BrokenProcessPool",
        "FAILED test_x",
    ):
        assert failure in text
    for line in text.splitlines():
        if line.startswith("| 8, 8"):
            assert line.count("|") == text.splitlines()[text.splitlines().index(line) - 2].count("|")


def test_markdown_of_nothing_has_no_figures():
    text = report_markdown.markdown({})
    assert text.count("not measured") == 4 and "##" in text


# ------------------------------------------------------------------------------------------------------ the tuner


def test_table_is_written_as_it_is_read(tmp_path):
    file = tmp_path / "configs.json"
    tune.write_table(file)
    assert file.read_text() == configs.TABLE.read_text()


def test_climb_finds_the_fastest_that_can_be_used():
    asked = []

    def time(plans):
        asked.extend(plans)
        # best at 128, 32, 8, 1; what has more than 4 stages' worth of block does not fit
        return {p: abs(p[0] - 128) + abs(p[1] - 32) + abs(p[2] - 8) + p[3] for p in plans if p[0] * p[3] <= 256}

    assert tune.climb((64, 64, 4, 2), time) == ((128, 32, 8, 1), 1)
    assert len(asked) == len(set(asked))
    assert tune.climb((256, 64, 4, 2), time)[0] == (128, 32, 8, 1)  # one that does not fit is no dead end
    assert math.isinf(tune.climb((64, 64, 4, 2), lambda plans: {})[1])


def test_a_plan_is_used_and_ordered(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_0")
    entry = tune.Entry("forward", 16, 2, 32, False)
    try:
        tune.use(entry._replace(channels=64), configs.lookup("forward", "default", 16, 64, 2, False))
        tune.use(entry, (16, 16, 2, 3))
        tune.use(entry._replace(dropout=True), (32, 32, 2, 3))
        assert configs.lookup("forward", "sm_0", 16, 32, 2, False) == (16, 16, 2, 3)
        assert configs.lookup("forward", "sm_0", 16, 64, 2, False) == configs.lookup(
            "forward", "default", 16, 64, 2, False
        )
        assert configs.lookup("forward", "sm_0", 16, 32, 2, True) == (32, 32, 2, 3)
        assert list(configs.read_table()["sm_0"]["forward"][entry.kind]) == ["32", "64"]
        assert "sm_0" not in json.loads(configs.TABLE.read_text())
    finally:
        configs.read_table.cache_clear()
        configs.lookup.cache_clear()
