"""The GPU report, the tuner and the profile, without the measurements, which need a GPU."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from target import ROOT

sys.path.append(str(ROOT))  # after the installed package
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads wait for each other for minutes on a busy machine
pytest.importorskip("triton", reason="the tuner reads the table of Triton's kernels")
from benchmarks import (  # noqa: E402
    attention_part,
    device_tests,
    gpu_report,
    measuring,
    profile,
    record,
    report_markdown,
    tune,
)
from sgalign.kernels import configs  # noqa: E402
from sgalign.ops import backends  # noqa: E402


@pytest.mark.parametrize("command", [gpu_report, tune, profile])
def test_commands_refuse_to_run_without_a_gpu(monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        command.main([])


@pytest.mark.parametrize("command", [gpu_report, tune])
def test_unknown_precision_is_refused_before_anything_is_written(monkeypatch, tmp_path, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(configs, "ASKED_PRECISION", "tf32")
    with pytest.raises(SystemExit, match="SGALIGN_TRITON_DOT_PRECISION must be tf32x3 or ieee, got 'tf32'"):
        command.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


WORKER = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {root!r})
from benchmarks import measuring
def work(pids):
    measuring.end_with_parent()
    pids.send("started")
    time.sleep(600)
if __name__ == "__main__":
    pids, sent = multiprocessing.Pipe(duplex=False)
    multiprocessing.get_context("spawn").Process(target=work, args=(sent,)).start()
    pids.recv()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_processes_end_with_their_parent(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    # The worker has the same pipe as its standard output, so this returns only when the worker has ended, too.
    run = subprocess.run([sys.executable, script], env=ONE_THREAD, stdout=subprocess.PIPE, timeout=120)
    assert run.returncode == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------------ the report


def in_this_process(parts, known, limits):
    for name, part in parts.items():
        figures = known[name]
        part(record.Record(figures, figures, math.inf))
        yield name, figures | {"seconds": 1.0}


def test_report_of_another_card_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up")
    content = json.dumps({"environment": {"installed": {"card": "another"}}})
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="was measured on another, but this card is Made Up"):
        gpu_report.write_report(tmp_path, {})
    assert (tmp_path / "report.json").read_text() == content


def test_figures_are_measured_again_only_on_request_or_for_new_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "usable", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    digests, runs = {"ours": "1", "theirs": "1"}, []

    def part(name):
        def run(found):
            for contender, digest in digests.items():
                found.attempt(("cases", contender), lambda: runs.append((name, contender)) or {}, digest=digest)  # noqa: B023

        return run

    def write(*options):
        runs.clear()
        gpu_report.write_report(tmp_path, {n: part(n) for n in ("attention a", "loss")}, *options, run=in_this_process)
        return runs

    everything = [(name, contender) for name in ("attention a", "loss") for contender in digests]
    assert write() == everything and write() == []
    assert write(["attention"]) == []
    assert write(["attention"], True) == everything[:2]
    digests["ours"] = "2"
    assert write(["loss"]) == [("loss", "ours")]
    assert write() == [("attention a", "ours")]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["loss"]["cases"] == {"ours": {"sources": "2"}, "theirs": {"sources": "1"}}
    del digests["theirs"]
    assert write() == []
    assert "theirs" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"loss": null}',
        '{"environment": {}',
        '{"loss": {"seconds": "soon"}}',
        '{"loss": {"seconds": NaN}}',
        '{"loss": {"rows": {"a": {"shape": 1}}}}',
        '{"steps": {"a": {"contenders": {}}}}',
    ],
)
def test_file_that_is_no_report_is_not_overwritten(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json.* remove it, or give another --out"):
        gpu_report.write_report(tmp_path, {"loss": lambda record: None})
    assert (tmp_path / "report.json").read_text() == content


def dies(found):
    """Measure four cases. The second ends the process, and the third is interrupted in the first run."""
    if found.deadline > 0:
        measuring.usable = lambda: True  # in the process that measures
    for name in ("before", "dies", "interrupted", "after"):
        found.attempt(("cases", name), case, name, digest="1")


def case(name):
    if name == "dies":
        os._exit(3)
    if name == "interrupted" and not os.path.exists("again"):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    return {"process": os.getpid()}


def is_misspelled(found):
    found.figures["case"] = {"failure": report_markdown.NOT_REACHED}
    if found.deadline > 0:
        found.atempt()


def test_figures_survive_if_the_process_dies_or_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {"loss": dies, "steps": is_misspelled}
    with pytest.raises(KeyboardInterrupt):
        gpu_report.write_report(tmp_path, parts)
    first = json.loads((tmp_path / "report.json").read_text())["loss"]["cases"]
    assert first["dies"]["failure"] == "the process died with status 3"
    assert first["interrupted"]["failure"] == first["after"]["failure"] == report_markdown.NOT_REACHED
    (tmp_path / "again").touch()
    report = gpu_report.write_report(tmp_path, parts)
    found = report["loss"]["cases"]
    assert found["before"] == first["before"] and found["dies"] == first["dies"]
    assert found["interrupted"]["process"] == found["after"]["process"] != first["before"]["process"]
    assert "has no attribute 'atempt'" in report["steps"]["failure"]


def test_failure_is_recorded_as_one_line():
    def fails():
        raise ValueError("no such shape\ntraceback")

    def skips():
        pytest.skip("not installed")

    assert record.attempted(fails) == {"failure": "ValueError: no such shape"}
    assert record.attempted(skips) == {"failure": "Skipped: not installed"}


def test_figures_depend_on_the_entries_of_the_table_that_they_use(monkeypatch):
    """A tuned entry makes only the figures stale for which Triton's attention looks it up."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up")
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    names = ["triton dual", "triton single", "triton single, masked", "cuda dual", "flex", "sdpa twice"]
    cases = list(itertools.product(names, ("bfloat16", "float32"), (True, False), (32, 64)))

    def digests():
        return {case: attention_part.depends_on(*case[:3], case[3:]) for case in cases}

    before = digests()
    entry = tune.Entry("key_value_gradient", 16, 2, 64, False)
    try:
        tune.use(entry, (16, 16, 4, 3))
        changed = {case for case, digest in digests().items() if digest != before[case]}
    finally:
        configs.read_table.cache_clear()
        configs.lookup.cache_clear()
    assert changed == {("triton dual", "bfloat16", True, 64)}


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
            [f"pytest ended with status -11 in {IDS[1]}: Segmentation fault"],
            IDS[2:],
        ),
        ("", 4, {}, [f"pytest ended with status 4 in {IDS[0]}: "], IDS[1:]),
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
def test_outcomes_of_tests_are_read_from_the_log(log, status, counts, failed, left):
    assert device_tests.outcomes(log, status, IDS) == (counts, failed, left)


def test_ctrl_c_before_the_first_outcome_is_no_failure():
    assert device_tests.outcomes("", None, IDS, interrupted=True) == ({}, [], IDS)


def test_tests_resume_where_time_was_up(tmp_path, monkeypatch):
    file = tmp_path / "test_made_up.py"
    file.write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('name', ['a b', 'c'])\n"
        "def test_quick(name): assert os.environ['SGALIGN_TEST_BACKEND'] == 'triton'\n"
        "def test_wrong(): assert False\n"
        "def test_slow(): time.sleep(100 * (not os.path.exists('again')))\n"
    )
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    monkeypatch.setattr(device_tests, "TEST_FILES", (file.name,))
    monkeypatch.setattr(device_tests, "digest", lambda *of: "1")
    suites = {"triton": device_tests.Suite("triton", pieces=1)}

    def run(known, seconds):
        found = dict(known)
        device_tests.run_suites(record.Record(found, found, time.monotonic() + seconds), suites)
        return found["triton"]

    first = run({}, 10)
    assert first == {
        "counts": {"passed": 2, "failed": 1},
        "failed": ["FAILED test_made_up.py::test_wrong"],
        "not run": ["test_made_up.py::test_slow"],
        "sources": "1",
    }
    (tmp_path / "again").touch()
    second = run({"triton": first}, 60)
    assert second == first | {"counts": {"passed": 3, "failed": 1}, "not run": []}


def test_run_ends_with_the_case_that_loses_the_device(monkeypatch):
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def illegal():
        lost.append(True)
        synchronize()

    monkeypatch.setattr(measuring, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    found = record.planned(lambda found: found.attempt(("checks", "flex"), illegal, digest="1"), {})
    assert report_markdown.unfinished(found)
    with pytest.raises(record.DeviceLost):
        record.Record(found, found, math.inf).attempt(("checks", "flex"), illegal, digest="1")
    assert "illegal memory access" in found["checks"]["flex"]["failure"] and not report_markdown.unfinished(found)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which has the memory of the process")
@pytest.mark.parametrize(
    "only", [("environment", "attention", "relation", "loss"), pytest.param((), marks=pytest.mark.slow)], ids=str
)
def test_rehearsal_of_the_report(tmp_path, only):
    """The report, or some of its parts, runs through without a GPU. A second run measures nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--rehearse", "--out", tmp_path]
    command += ["--only", *only] if only else []
    first = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert first.returncode == 0, [*report_markdown.failures(report), first.stderr]
    if not only:
        assert set(report) == set(gpu_report.PARTS) and not report_markdown.unfinished(report)
        assert report["tests"]["cpu"]["counts"] == {"passed": 4}
    assert all(check["right"] for part in report.values() for check in part.get("checks", {}).values())
    rows = [row for part in report for row in report_markdown.rows_of(report, part)]
    assert len(rows) == 3 * 4 + 4 + 1
    assert {contender["graph"] for row in rows for contender in row["contenders"].values()} == {4.0}
    assert "no figure comes from a GPU" in (tmp_path / "report.md").read_text().splitlines()[0]
    again = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert again.returncode == 0 and "..." not in again.stdout
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_check_finds_results_that_are_wrong_or_not_written():
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
        "installed": {"card": "Made Up", "backends": {"triton": "available"}},
        "rates": {"bytes per second": 1e12, "FLOP per second": {"bfloat16": 1e14}},
        "seconds": 1.0,
    },
    "tests": {
        "triton": {"counts": {"passed": 3, "failed": 1}, "failed": ["FAILED test_x"], "not run": ["a", "b"]},
        "seconds": 1.0,
    },
    "attention bfloat16": {
        "checks": {"triton dual": {"error": 0.5, "allowed": 0.01, "right": False}},
        "rows": {
            "8, 8, 180, 608, 32": {
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
        },
    },
    "steps": {"SGTR, float32": {"contenders": {"SGTR": contender(1.0), "Align-SGTR": contender(1.1)}, "counted": 1.2}},
    "loss": {"failure": "BrokenProcessPool: a process died"},
}


def test_markdown_has_the_figures_and_the_failures():
    text = report_markdown.markdown(REPORT)
    assert "# sgalign on Made Up" in text
    assert "| FlexAttention / dual, SGTR's shapes, forward and backward | at least 2 | 1.90 | 0 of 1 |" in text
    assert "| SDPA with dense masks / dual, SGTR's shapes, forward and backward | at least 3 | 5.00 | 1 of 1 |" in text
    assert "| share of the ceilings with at least 4096 queries and keys | at least 0.7 |  | not measured |" in text
    assert "| measured ratio / counted ratio of Align steps | at most 1.05 | 0.92 | 1 of 1 |" in text
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


def test_markdown_of_an_empty_report_has_no_figures():
    text = report_markdown.markdown({})
    assert text.count("not measured") == 4 and "##" in text


# ------------------------------------------------------------------------------------------------------ the tuner


def test_table_is_written_as_it_was_read(tmp_path):
    file = tmp_path / "configs.json"
    tune.write_table(file)
    assert file.read_text() == configs.TABLE.read_text()


def test_climb_finds_the_fastest_plan_that_fits():
    asked = []

    def time(plans):
        asked.extend(plans)
        # The fastest plan is 128, 32, 8, 1. A plan fits if its first block times its stages is at most 256.
        return {p: abs(p[0] - 128) + abs(p[1] - 32) + abs(p[2] - 8) + p[3] for p in plans if p[0] * p[3] <= 256}

    best, known = tune.climb((64, 64, 4, 2, 0), time)
    assert best == (128, 32, 8, 1, 0) and known[best] == 1
    assert len(asked) == len(set(asked))
    assert tune.climb((256, 64, 4, 2, 0), time)[0] == (128, 32, 8, 1, 0)  # from a plan that does not fit
    assert set(tune.climb((64, 64, 4, 2, 0), lambda plans: {})[1].values()) == {math.inf}


def test_warps_have_no_more_rows_than_their_blocks():
    """Otherwise Triton's products read past a block. Some kernels still give right results, by chance."""
    assert tune.overhangs("forward", (64, 16, 8, 1, 0), "sm_90")
    assert not tune.overhangs("forward", (64, 16, 8, 1, 0), "sm_80")
    assert not tune.overhangs("forward", (128, 64, 8, 1, 0), "sm_90")  # because its keys are columns
    assert tune.overhangs("key_value_gradient", (128, 64, 8, 1, 0), "sm_90")
    for kernel, bits, branches, channels, dropout in itertools.product(
        tune.KERNELS, tune.DTYPES, (1, 2), tune.CHANNELS, (False, True)
    ):
        plan = configs.lookup(kernel, "sm_90", bits, channels, branches, dropout)
        assert not tune.overhangs(kernel, plan, "sm_90"), (kernel, bits, branches, channels, plan)


def test_tuned_plans_are_used_and_kept_in_order(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_0")
    entry = tune.Entry("forward", 16, 2, 32, False)
    try:
        tune.use(entry._replace(channels=64), configs.lookup("forward", "default", 16, 64, 2, False))
        tune.use(entry, (16, 16, 2, 3, 0))
        tune.use(entry._replace(dropout=True), (32, 32, 2, 3, 0))
        assert configs.lookup("forward", "sm_0", 16, 32, 2, False) == (16, 16, 2, 3, 0)
        assert configs.lookup("forward", "sm_0", 16, 64, 2, False) == configs.lookup(
            "forward", "default", 16, 64, 2, False
        )
        assert configs.lookup("forward", "sm_0", 16, 32, 2, True) == (32, 32, 2, 3, 0)
        assert list(configs.read_table()["sm_0"]["forward"][entry.kind]) == ["32", "64"]
        assert "sm_0" not in json.loads(configs.TABLE.read_text())
    finally:
        configs.read_table.cache_clear()
        configs.lookup.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(bool(backends.interpreter_problem()), reason=str(backends.interpreter_problem()))
def test_rehearsal_of_the_tuner(tmp_path):
    """The tuner runs through without a GPU, and a second run tunes only the entries that are missing."""
    command = [sys.executable, "-m", "benchmarks.tune", "--rehearse", "--out", tmp_path]
    command += ["--bits", "16", "--channels", "32", "--kernels", "forward"]

    def run(*options):
        result = subprocess.run([*command, *options], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.count("ms\n")

    assert run() == 4
    record = json.loads((tmp_path / "tuned.json").read_text())
    kinds = [(line["branches"], line["dropout"]) for line in record["entries"]]
    assert kinds == [(2, False), (1, False), (2, True), (1, True)]
    assert all(set(line["ms"].values()) == {4.0} and len(line["ms"]) == 2 for line in record["entries"])
    table = json.loads((tmp_path / "configs.json").read_text())
    assert {configs.Config(*line["plan"]) for line in record["entries"]} == {
        configs.Config(*plan) for sizes in table["interpreter"]["forward"].values() for plan in sizes.values()
    }
    record["entries"].pop()
    (tmp_path / "tuned.json").write_text(json.dumps(record))
    assert run() == 1


RECORDED = {"kernel": "forward", "bits": 16, "branches": 2, "channels": 32, "dropout": False}
RECORDED |= {"plan": [64, 64, 4, 2], "ms": {}}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"card": "another", "entries": []}', "was measured on another, but this card is Made Up"),
        ('{"entries": 1}', "is not a record that can be resumed"),
        *(
            (json.dumps({"card": "Made Up", "entries": [RECORDED | wrong]}), "is not a record that can be resumed")
            for wrong in (
                {"plan": "12345"},
                {"plan": [64, -64, 4, 2]},
                {"kernel": "no such"},
                {"channels": 33},
                {"bits": "16"},
                {"dropout": 1},
            )
        ),
    ],
)
def test_record_that_does_not_fit_is_not_resumed(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up")
    (tmp_path / "tuned.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tune.read_tuned(tmp_path / "tuned.json")


def test_rehearsal_of_the_profile():
    command = [sys.executable, "-m", "benchmarks.profile", "--rehearse"]
    result = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("once profiled") == 2, result.stderr
