"""README and docs do what they say: marked Python blocks run, links lead somewhere, commands and extras exist."""

import re
from pathlib import Path

import pytest

from sgalign.commands import doctor
from sgalign.commands import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"<!-- run as a test -->\n```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_marked_blocks_run(block):
    try:
        exec(block, {})
    except ModuleNotFoundError as error:
        if error.name.startswith("sgalign"):
            raise
        pytest.skip(f"needs {error.name}")


def test_blocks_are_found():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_configs_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_commands_exist():
    commands = {"doctor", *cli.COMMANDS, *cli.TRAINER_COMMANDS}
    for page in PAGES:
        assert set(re.findall(r"(?:^ {4}|`|bin/)sgalign ([a-z][\w-]*)", page.read_text(), re.M)) <= commands, page


def test_doctor_looks_for_what_the_extras_install():
    listed = (ROOT / "pyproject.toml").read_text()
    for extra, packages in doctor.EXTRAS.items():
        block = re.search(rf"^{extra} = \[(.*?)\]$", listed, re.M | re.S)[1]
        assert set(packages) == set(re.findall(r'"([\w-]+)[^"]*"', block)), extra


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[([^]]*)\]", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sgalign").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == found | {"sgalign.kernels"}
