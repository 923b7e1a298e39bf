"""Tests of what a release contains: its version, the files of the source archive, and the data files of the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from target import ROOT

from sgalign import __version__

WORKFLOWS = ROOT / ".github" / "workflows"  # not in the source archive
in_repository = pytest.mark.skipif(not WORKFLOWS.exists(), reason="needs the repository")


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


def workflow(name):
    return yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text())


@in_repository
def test_workflows_test_the_versions_of_python_for_which_wheels_are_built():
    project = (ROOT / "pyproject.toml").read_text()
    built = [f"3.{minor}" for minor in re.findall(r'"cp3(\d+)-manylinux', project)]
    tested = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]
    assert tested["python"] == built
    assert {case["python"] for case in tested["include"]} <= set(built)
    oldest = [case["python"] for case in tested["include"] if case["packages"] == "oldest"]
    assert oldest == built[:1] == re.findall(r'requires-python = ">=(.*)"', project)


@in_repository
def test_workflows_call_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets, groups = set(re.findall(r"^(\w[\w-]*):", makefile, re.M)), (ROOT / "pyproject.toml").read_text()
    steps = 0
    for path in WORKFLOWS.glob("*.yml"):
        for job in workflow(path.stem)["jobs"].values():
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file()
                continue
            for command in [step["run"] for step in job["steps"] if "run" in step]:
                steps += 1
                for names in re.findall(r"^make (.*)$", command, re.M):
                    assert set(names.split()) <= targets, command
                for script in re.findall(r"(?:\.github|tests)/[\w/]+\.\w+", command):
                    assert os.access(ROOT / script, os.X_OK), script
                for group in re.findall(r"--group (\w+)", command):
                    assert f"\n{group} = [" in groups, command
    assert steps >= 6


@in_repository
def test_only_the_jobs_that_publish_may_write():
    may_write = {}
    for path in WORKFLOWS.glob("*.yml"):
        assert workflow(path.stem)["permissions"] == {"contents": "read"}, path
        for name, job in workflow(path.stem)["jobs"].items():
            assert "uses" in job or job["timeout-minutes"] <= (350 if name == "slow" else 120)
            if "permissions" in job:
                may_write[name] = set(job["permissions"])
                assert "environment" in job
    assert may_write == {"publish": {"id-token"}, "deploy": {"pages", "id-token"}}


@in_repository
@pytest.mark.parametrize(
    "tag, date, problem",
    [
        ("v1.2.3", "2026-01-31", ""),
        ("1.2.3", "2026-01-31", "the tag must be v1.2.3"),
        ("v1.2.4", "2026-01-31", "the tag must be v1.2.3"),
        ("v1.2.3", "unreleased", "CHANGELOG.md must have a section"),
    ],
)
def test_a_release_needs_the_tag_of_its_version_and_a_date(tag, date, problem, tmp_path):
    (tmp_path / ".github").mkdir()
    (tmp_path / "sgalign").mkdir()
    script = shutil.copy2(WORKFLOWS.parent / "check_tag.sh", tmp_path / ".github")
    (tmp_path / "sgalign" / "_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## 1.2.3, {date}\n")
    checked = subprocess.run([script, tag], capture_output=True, text=True)
    assert problem in checked.stderr and bool(checked.returncode) == bool(problem)
