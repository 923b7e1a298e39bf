"""Checks that README and docs are right: marked blocks run, and links, commands, extras and pictures exist."""

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from covers import slow_except
from target import COMMAND, ROOT

from sgalign.commands import doctor
from sgalign.commands import main as cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = "<!-- run as a test -->\n"
WALKTHROUGHS = {page.name: page for page in PAGES if f"{MARK}```sh" in page.read_text()}
QUICK = ["train_your_data.md", "evaluate_any_system.md", "view_predictions.md"]  # the others are slow tests
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in WALKTHROUGHS
    for number, block in enumerate(re.findall(MARK + r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_marked_blocks_run(block):
    try:
        exec(block, {})
    except ModuleNotFoundError as error:
        if error.name.startswith("sgalign"):
            raise
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize("name", slow_except(QUICK, WALKTHROUGHS))
def test_walkthroughs_run(name, tmp_path):
    """A page with marked shell blocks is a walkthrough. All its marked blocks run one after the other in one folder."""
    if missing := doctor.missing("train"):
        pytest.skip(missing[0])
    command = tmp_path / "bin" / "sgalign"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -c "{COMMAND}" "$@"\n')
    command.chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for language, block in re.findall(MARK + r"```(sh|python)\n(.*?)```", WALKTHROUGHS[name].read_text(), re.S):
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        result = subprocess.run([*shell, block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        for name in re.findall(r"--(?:out|json|csv) (\S+)", block):
            assert (tmp_path / name).stat().st_size > 0, name
        if "--draw" in block:
            assert len(list((tmp_path / "given.pictures").glob("*.png"))) == 3


def test_marked_blocks_are_found():
    tutorials = "train_your_data.md", "evaluate_any_system.md", "predict_photographs.md", "view_predictions.md"
    assert WALKTHROUGHS.keys() == set(tutorials)
    pages = {block.id.rpartition("-")[0] for block in BLOCKS}
    assert pages >= {"README.md", "call_the_kernels.md", "align_your_model.md", "attention.md", "evaluation.md"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_pictures_of_the_readme_are_drawn(tmp_path):
    """The script draws each picture, and the bars of the chart have the numbers of report.md."""
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))
    script["main"](tmp_path)
    linked = re.findall(r"\]\((docs/pictures/[^)]+)\)", (ROOT / "README.md").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {Path(link).name for link in linked}
    assert [text.get_text() for text in script["speed"]().axes[0].texts] == [
        *("1.0", "1.0", "1.0", "1.0", "1.0", "1.0", "1.0"),
        *("1.6", "1.6", "1.4", "1.7", "6.3", "1.0", "not\nmeasured"),  # flex
        *("2.5", "2.3", "2.0", "2.4", "4.6", "1.5", "1.1"),  # sdpa twice
        *("2.3", "3.0", "2.3", "2.8", "4.1", "2.7", "1.5"),  # sdpa concatenated
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_configs_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", re.sub(r"```.*?```", "", text, flags=re.S)):
        assert (page.parent / link).exists(), link
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_mentioned_commands_exist():
    commands = {"doctor", *cli.COMMANDS, *cli.TRAINER_COMMANDS}
    for page in PAGES:
        assert set(re.findall(r"(?:^ {4}|`|bin/)sgalign ([a-z][\w-]*)", page.read_text(), re.M)) <= commands, page


def test_doctor_looks_for_the_packages_of_the_extras(monkeypatch):
    metadata = ["torch>=2.11", 'h5py>=3.10; extra == "train"', 'jsonargparse[signatures]>=4.40; extra == "train"']
    metadata += ["pytest-xdist>=3.6 ; extra == 'test'", 'ruff==1; python_version < "4" and extra == "lint"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: metadata)
    assert doctor.required("train") == ["h5py", "jsonargparse"] and doctor.required("test") == ["pytest-xdist"]
    assert doctor.required("lint") == ["ruff"]


def test_doctor_says_that_sgalign_is_not_installed(monkeypatch, capsys):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", requires)
    assert doctor.main() == 0 and doctor.missing("train") == []
    assert "[train] unknown: sgalign is not installed" in capsys.readouterr().out


def test_pyproject_lists_every_package():
    listed = re.search(r"^packages = \[([^]]*)\]", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sgalign").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == found | {"sgalign.kernels"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the syntax tree of each module of the package, as it is installed."""
    for package, folder in (("sgalign", ROOT / "sgalign"), ("sgalign.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), ast.parse(path.read_text())


def imported_layers() -> set[tuple[str, str]]:
    """Return pairs of layers, the first of which imports from the second.

    The layer of a module is the second part of its name.
    """
    layers = {name.split(".")[1] for name, _ in modules() if "." in name}
    found = set()
    for name, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "sgalign":
                continue
            targets = [node.module] if "." in node.module else [f"sgalign.{alias.name}" for alias in node.names]
            found |= {(name.split(".")[1], target.split(".")[1]) for target in targets if "." in name}
    return {(above, below) for above, below in found if above != below and below in layers}


def test_drawing_of_layers_matches_the_imports():
    drawing = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    drawn = set(re.findall(r"(\w+) --> (\w+)", drawing))
    imported = {edge for edge in imported_layers() if not {"__main__", "_version"} & set(edge)}
    assert len(drawn) > 8 and drawn <= imported, "an arrow without an import"
    reached = set(drawn)
    while more := {(a, d) for a, b in reached for c, d in drawn if b == c} - reached:
        reached |= more
    assert imported <= reached, "an import that no arrow leads to"


def test_modules_and_functions_are_short():
    """The limits that CONTRIBUTING.md states."""
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150
    paths = [*(ROOT / "sgalign").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for path in paths:
        assert len(path.read_text().splitlines()) <= 450, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, f"{path}: {node.name}"
