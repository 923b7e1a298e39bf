"""Tests of what a release contains: its version, the files of the source archive, and the data files of the wheel."""

import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from target import ROOT

from sgalign import __version__


@pytest.fixture(scope="module")
def tracked():
    """The paths of all files in the repository, without those whose names begin with a dot."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git repository")
    return {path for path in listed.stdout.splitlines() if not path.startswith(".") and (ROOT / path).exists()}


def test_all_files_name_the_same_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == __version__


def test_the_source_archive_is_made_without_git_and_a_wheel_from_it_has_all_files(tracked, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for path in tracked:
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tmp_path / "source" / path)
    (tmp_path / "source" / "sgalign" / "old.so").touch()
    run = {"check": True, "capture_output": True, "env": {"PATH": ""}}
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", **run)
    with tarfile.open(tmp_path / f"sgalign-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / f"sgalign-{__version__}"
    made = {"PKG-INFO", "setup.cfg"}
    assert {path for path in files_in(unpacked) if not path.startswith("sgalign.egg-info/")} - made == tracked
    subprocess.run([sys.executable, "setup.py", "build_py", "--build-lib", tmp_path / "wheel"], cwd=unpacked, **run)
    kernels = {f"sgalign/{path}" for path in tracked if path.startswith("kernels/")}
    package = {path for path in tracked if path.startswith("sgalign/") or path == "sgalign_command.py"}
    assert files_in(tmp_path / "wheel") == package | kernels


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
