"""Tests of calls from many threads and processes at once, and a small version of the campaign."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from target import ROOT, core_only
from torch.utils import flop_counter

import sgalign
from sgalign.ops import _core, _operands, _registration

pytestmark = core_only


def test_small_campaign_finds_equal_results():
    """The forked processes would wait forever if the core used several threads in them."""
    parts = ["one-after-another", "threads", "same-in-threads", "fork", "fork-in-thread", "workers-fork"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "campaigns" / "side_by_side.py"), "--rounds", "4"]
    result = subprocess.run([*command, *parts], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.endswith("| equal |")] == parts


def test_campaign_finds_different_results():
    sys.path.insert(0, str(ROOT / "tests" / "campaigns"))
    from side_by_side import compare, draw_work, serial

    expected = serial(draw_work(1, seed=0))
    assert compare(serial(draw_work(1, seed=1)), expected) == f"DIFFERENT: {len(expected)} of {len(expected)}"


def test_remembered_shapes_stay_bounded_if_threads_add_at_the_same_time(monkeypatch):
    monkeypatch.setattr(_operands, "REMEMBERED", 3)
    checked = []
    check = _operands.once_a_signature(lambda tensor: checked.append(tensor.dtype))

    class Shape:
        """A shape that is hashed when it is looked up, and again when it is added. Then another thread adds, too."""

        hashed = 0

        def __hash__(self):
            self.hashed += 1
            if self.hashed == 2:
                check(True, SimpleNamespace(shape=(), dtype="other", device="cpu"))
            return 0

    for dtype, shape in [("a", ()), ("b", ()), ("c", Shape()), ("d", ()), ("a", ())]:
        check(True, SimpleNamespace(shape=shape, dtype=dtype, device="cpu"))
    assert checked == ["a", "b", "c", "other", "d", "a"]  # "a" was forgotten when "d" was added


def test_threads_add_the_flop_formulas_once(monkeypatch):
    known = {packet: flops for packet, flops in flop_counter.flop_registry.items() if "sgalign" not in str(packet)}
    monkeypatch.setattr(flop_counter, "flop_registry", known)
    register = flop_counter.register_flop_formula

    def slowly(packet):
        time.sleep(0.02)  # lets the other threads look whether there is a formula
        return register(packet)

    monkeypatch.setattr(flop_counter, "register_flop_formula", slowly)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(_registration.add_flop_formulas) for _ in range(4)]:
            future.result()
    assert any("sgalign" in str(packet) for packet in known)


def test_instruction_set_may_change_while_threads_compute():
    core = _core.load()
    before, ended = core.instruction_set(), threading.Event()
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 300, 8)

    def attend():
        return sgalign.fused_masked_attention(query, key, key, mask_ratio=0.3, mask_seed=1)

    def change():
        while not ended.is_set():
            for name in core.instruction_sets():
                core.use_instruction_set(name)

    allowed = []
    for name in core.instruction_sets():
        core.use_instruction_set(name)
        allowed.append(attend())
    try:
        with ThreadPoolExecutor(4) as pool:
            changing = pool.submit(change)
            for found in pool.map(lambda _: attend(), range(200)):
                assert any(torch.equal(found, one) for one in allowed)
            ended.set()
            changing.result()
    finally:
        ended.set()
        core.use_instruction_set(before)


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="needs a Python without a global lock")
def test_core_does_not_bring_back_the_global_lock():
    code = "import sys; from sgalign.ops import _core; _core.load(); print(sys._is_gil_enabled())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"
