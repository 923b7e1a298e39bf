"""Hooks and fixtures that the tests share."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from target import BACKEND, CASES_INTERPRETED, DEVICE, INTERPRETED, ROOT

from sgalign.ops import _core

ONE_WORKER = {"test_cuda.py", "test_distributed.py", "test_two_machines.py"}

# tests/test_breaks.py needs no smallest example of a failure, and looking for one takes minutes.
settings.register_profile("no shrinking", phases=[Phase.explicit, Phase.reuse, Phase.generate])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only a few cases of each test under Triton's interpreter, the same ones on every machine."""
    if not INTERPRETED:
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)

    def draw(item: pytest.Item) -> bytes:
        return hashlib.sha256(item.name.partition("[")[2].encode()).digest()

    chosen = {item for cases in by_test.values() for item in sorted(cases, key=draw)[:CASES_INTERPRETED]}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist has this hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of a file in ONE_WORKER to one worker, so that their costly fixture is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).name in ONE_WORKER else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before the fixtures are made
def pytest_runtest_setup() -> None:
    """Seed torch before each test.

    Without this, its random numbers would depend on the tests that ran before it. They still do if a fixture of the
    module draws numbers or sets a seed.
    """
    torch.manual_seed(0)


def pytest_runtest_logfinish() -> None:
    """End the run if the device was lost.

    A process cannot use its device again after an illegal access, so all later tests would fail.
    """
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device was lost: {error}", returncode=7)  # DEVICE_LOST in benchmarks/device_tests.py


@pytest.fixture(scope="session")
def vrd_root() -> Path:
    """The folder with the VRD annotations: SGALIGN_VRD if it is set, or shared data beside the source tree."""
    root = Path(os.environ.get("SGALIGN_VRD", ROOT.parent / "shared" / "data" / "vrd"))
    if not (root / "annotations_train.json").is_file():
        pytest.skip(f"no VRD annotations in {root}; set SGALIGN_VRD to the folder that has annotations_train.json")
    pytest.importorskip("PIL", reason="Pillow reads the sizes of images")
    return root


@pytest.fixture(scope="session")
def vg_root() -> Path:
    """The folder with Visual Genome's vocabularies: SGALIGN_VG if it is set, or shared data beside the source tree."""
    root = Path(os.environ.get("SGALIGN_VG", ROOT.parent / "shared" / "data" / "vg"))
    if not (root / "VG-SGG-dicts-with-attri.json").is_file():
        pytest.skip(f"no VG-SGG-dicts-with-attri.json in {root}; set SGALIGN_VG to the folder that has it")
    return root


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill newly allocated tensors with NaN, which shows elements that a kernel does not write."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(params=_core.load().instruction_sets() if BACKEND == "cpu" else ["any"])
def instruction_set(request):
    """Run the core with each instruction set of this processor.

    Other backends run each test once, with the parameter "any", so its id is the same on every machine.
    """
    core = _core.load()
    before = core.instruction_set()
    if BACKEND == "cpu":
        core.use_instruction_set(request.param)
    yield
    core.use_instruction_set(before)


@pytest.fixture
def threads():
    """The function that sets torch's number of threads. The fixture restores the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
