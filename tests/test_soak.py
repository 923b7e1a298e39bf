"""Tests of the soak campaign: a deliberate leak of each kind is found, and small versions of its parts run."""

import csv
import gc
import logging
import mmap
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from target import BACKEND, ROOT

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "tests" / "campaigns"))
import soak  # noqa: E402
from soaking import SAMPLES, Limits, Monitor, verdicts  # noqa: E402

pytestmark = [
    pytest.mark.skipif(BACKEND != "cpu", reason="the campaign runs on the CPU"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc"),
]
STEPS = 30


@pytest.fixture(autouse=True)
def process_as_before():
    loggers = [logging.getLogger(name) for name in ("sgalign", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    yield
    gc.unfreeze()
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


def failed(step):
    """Return the quantities of a run that are not flat, as the campaign judges them."""
    monitor = Monitor("a leak", steps=STEPS)
    for _ in range(STEPS):
        step(monitor.step)
        monitor.count()
    return {verdict.quantity for verdict in verdicts(monitor.samples, Limits()) if not verdict.flat}


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_leak_of_each_kind_is_found():
    kept, ended = [], threading.Event()

    def in_new_pages():  # an allocator could use pages that it has freed before
        kept.append(mmap.mmap(-1, 2**18))
        kept[-1].write(b"x" * 2**18)

    def in_thread():
        kept.append(threading.Thread(target=ended.wait))
        kept[-1].start()

    def in_child():
        kept.append(subprocess.Popen(["sleep", "60"]))

    leaks = {
        "memory": lambda step: in_new_pages(),
        "objects": lambda step: kept.extend(types.SimpleNamespace() for _ in range(20)),
        "tensors": lambda step: kept.append(torch.ones(1)),
        "handles": lambda step: kept.append(open("/dev/null")),
        "threads": lambda step: in_thread(),
        "children": lambda step: in_child(),
    }
    try:
        for quantity, leak in leaks.items():
            assert quantity in failed(leak), quantity
    finally:
        ended.set()
        for thing in kept:
            if isinstance(thing, subprocess.Popen):
                thing.kill()
                thing.wait()
            elif isinstance(thing, threading.Thread):
                thing.join()


def test_a_slower_and_slower_run_is_found():
    assert "speed" in failed(lambda step: burn(0.0007 * (step + 1)))


def test_a_run_without_a_leak_passes():
    assert failed(lambda step: burn(0.004)) == set()


def test_a_long_step_gives_one_sample(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor, steps = Monitor("a long step", seconds=SAMPLES), []
    for seconds in (1, 0.5, 0.5, 3.5, 0.25, 0.25, 0.5, 0.5):
        now[0] += seconds
        before = len(monitor.samples)
        monitor.count()
        steps.append(len(monitor.samples) - before)
    assert steps == [1, 0, 1, 1, 0, 1, 0, 1]


def test_a_wrong_call_that_raises_no_error_is_found():
    with pytest.raises(AssertionError, match="must raise an error"):
        soak.must_raise(dict, ValueError)


@pytest.mark.parametrize("part", [name for name in soak.PARTS if name not in soak.TRAINING] + ["training"])
def test_small_part(part, capsys):
    samples = soak.run(part, Monitor(part, steps=3))
    assert [sample.step for sample in samples] == [1, 2, 3]


def test_campaign_writes_samples_and_a_picture(tmp_path, capsys):
    soak.main(["random_attention_mask", "--calls", "50", "--out", str(tmp_path)])
    assert "| random_attention_mask | 50 |" in capsys.readouterr().out
    with (tmp_path / "soak.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 51))
    assert (tmp_path / "soak.png").stat().st_size > 10_000
