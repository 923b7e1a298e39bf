"""Each deliberate defect of tests/breaks.py is found by the tests that are named beside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from breaks import BREAKS

ROOT = Path(__file__).resolve().parent.parent
QUICK = "--hypothesis-profile", "no shrinking"


def test_every_break_stands_once_in_its_file():
    times = {name: (ROOT / file).read_text().count(old) for name, (file, old, *_) in BREAKS.items()}
    assert set(times.values()) == {1}, times


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the project, which breaks are put into and taken out of.

    Its core is built for one instruction set and with little optimization, because it is built again for many breaks.
    """
    copy = tmp_path_factory.mktemp("project") / "sgalign"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "runs", "_C.*"), symlinks=True)
    setup = copy / "setup.py"
    quick = setup.read_text().replace('if platform.machine() in ("x86_64", "AMD64"):', "if False:")
    setup.write_text(quick.replace('"-O3"', '"-O1"'))
    build(copy)
    return copy


def build(project):
    built = run(project, "setup.py", "-q", "build_ext")
    assert built.returncode == 0, built.stderr[-3000:]


def run(project, *arguments):
    data = ROOT.parent / "shared" / "data"  # beside the project, not beside its copy
    environment = {"SGALIGN_VRD": str(data / "vrd"), "SGALIGN_VG": str(data / "vg")} | os.environ
    environment |= {"PYTHONPATH": str(project), "SGALIGN_CUDA": "0"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found(name, project):
    file, old, new, tests = BREAKS[name]
    path = project / file
    whole = path.read_text()
    cores = {core: core.read_bytes() for core in (project / "sgalign").glob("_C.*.so")}
    path.write_text(whole.replace(old, new))
    try:
        if file.startswith("csrc/"):
            build(project)
        tests, *chosen = tests.split(" -k ")
        keywords = ["-k", chosen[0]] if chosen else []
        result = run(project, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *QUICK, tests, *keywords)
    finally:
        path.write_text(whole)
        for core, content in cores.items():
            core.write_bytes(content)
    assert result.returncode == 1, f"the tests did not find {old!r} changed to {new!r}\n{result.stdout[-2000:]}"
