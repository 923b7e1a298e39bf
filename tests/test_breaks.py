"""Each deliberate defect of tests/breaks.py is found by the tests that are named beside it."""

import os
import shutil
import subprocess
import sys

import pytest
from breaks import BREAKS
from target import ROOT

QUICK = "--hypothesis-profile", "no shrinking"


def test_the_old_text_of_every_break_occurs_once_in_its_file():
    times = {name: (ROOT / file).read_text().count(old) for name, (file, old, *_) in BREAKS.items()}
    assert set(times.values()) == {1}, times


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the project. Each test puts a break into it, and takes it out again.

    Its core is built for one instruction set and with little optimization, because it is built again for many breaks.
    """
    copy = tmp_path_factory.mktemp("project") / "sgalign"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "runs", "_C.*"), symlinks=True)
    setup = copy / "setup.py"
    content = setup.read_text()
    for old, new in (
        ('if platform.machine() in ("x86_64", "AMD64"):', "if False:"),
        ('FLAGS = ["-O3"', 'FLAGS = ["-O1"'),
    ):
        assert content.count(old) == 1
        content = content.replace(old, new)
    setup.write_text(content)
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


def run_tests(project, tests):
    """Run the tests that a break names, and stop at the first failure."""
    file, *keywords = tests.split(" -k ")
    chosen = ["-k", *keywords] if keywords else []
    return run(project, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *QUICK, file, *chosen)


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted({made.tests for made in BREAKS.values()}))
def test_the_tests_of_the_breaks_pass_without_a_break(tests, project):
    """If they failed without a break, they would seem to find every break."""
    result = run_tests(project, tests)
    assert result.returncode == 0, result.stdout[-2000:]


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
        result = run_tests(project, tests)
    finally:
        path.write_text(whole)
        for core, content in cores.items():
            core.write_bytes(content)
    assert result.returncode == 1, f"the tests did not find {old!r} changed to {new!r}\n{result.stdout[-2000:]}"
