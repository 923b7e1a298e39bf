"""Tests of what a release contains: its version, the files of the source archive, and the data files of the wheel."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from target import ROOT

from sgalign import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def test_the_source_archive_is_made_without_git_and_has_all_files(tracked, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for path in tracked:
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tmp_path / "source" / path)
    (tmp_path / "source" / "sgalign" / "old.so").touch()
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True, env={"PATH": ""}
    )
    with tarfile.open(tmp_path / f"sgalign-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("sgalign.egg-info/")} - made == tracked


def test_a_wheel_has_all_packages_and_all_data_files(tracked):
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {
        path.rpartition("/")[0] for path in tracked if re.fullmatch(r"(sgalign|kernels)(/.*)?/__init__\.py", path)
    }
    places = {
        package: setuptools["package-dir"].get(package, package.replace(".", "/")) for package in setuptools["packages"]
    }
    assert set(places.values()) == folders
    data = [f"{places[package]}/{glob}" for package, globs in setuptools["package-data"].items() for glob in globs]
    others = [path for path in tracked if path.startswith(("sgalign/", "kernels/")) and not path.endswith(".py")]
    assert [path for path in others if not any(fnmatch.fnmatch(path, glob) for glob in data)] == []
    assert all(any(fnmatch.fnmatch(path, glob) for path in others) for glob in data)
