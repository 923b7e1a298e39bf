"""Checks of the documentation site that need no mkdocs: the API pages, the navigation, links and lists."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from target import ROOT

API = ROOT / "docs" / "api"
PACKAGES = [
    "sgalign",
    "sgalign.nn",
    "sgalign.data",
    "sgalign.metrics",
    "sgalign.models",
    "sgalign.training",
    "sgalign.prediction",
    "sgalign.viewing",
]


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()
PAGES = [*hooks.PAGES, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]


def public_names(package: str) -> list[str]:
    """Return the `__all__` of a package without importing it."""
    for node in ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    raise AssertionError(f"{package} has no __all__")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api_reference(package: str):
    page = (API / f"{package.removeprefix('sgalign.')}.md").read_text()
    headings = set(re.findall(rf"^(?:::: {re.escape(package)}\.|## )(\w+)$", page, re.M))
    assert [name for name in public_names(package) if name not in headings] == []


def test_every_package_with_public_names_has_a_page():
    packages = [path.parent for path in (ROOT / "sgalign").rglob("__init__.py") if "__all__ = " in path.read_text()]
    assert {".".join(path.relative_to(ROOT).parts) for path in packages} == set(PACKAGES)


def strings(node: Any) -> Iterator[str]:
    """Yield the text at the leaves of lists and dicts."""
    if isinstance(node, str):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from strings(child)


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """A loader that reads a function of Python as None."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    listed = list(strings(config["nav"]))
    assert len(listed) == len(set(listed)), "a page is listed twice"
    assert {hooks.place(page) for page in PAGES} <= set(listed)
    assert all((ROOT / hooks.source(page)).is_file() for page in listed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository."""
    files = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "configs/motifs.yaml"]
    files += ["docs/a.md", "docs/b.md", "docs/pictures/p.svg", "docs/results/README.md", "bench/card/README.md"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    "path, text, expected",
    [
        ("README.md", "[a](docs/a.md#x), [b](docs/b.md)", "[a](a.md#x), [b](b.md)"),
        ("README.md", "[two\nlines](docs/a.md 'title')", "[two\nlines](a.md 'title')"),
        ("README.md", "[home](README.md) ![p](docs/pictures/p.svg)", "[home](index.md) ![p](pictures/p.svg)"),
        ("README.md", "[![p](docs/pictures/p.svg)](docs/a.md)", "[![p](pictures/p.svg)](a.md)"),
        ("docs/a.md", "[r](../README.md#x) [c](../CONTRIBUTING.md)", "[r](index.md#x) [c](contributing.md)"),
        ("docs/a.md", "[b](b.md#y) [own](#z) [r](results/README.md)", "[b](b.md#y) [own](#z) [r](results/README.md)"),
        ("docs/a.md", "[m](../configs/motifs.yaml)", "[m](files/configs/motifs.yaml)"),
        ("docs/a.md", "[l](../LICENSE)", "[l](files/LICENSE.txt)"),
        ("docs/results/README.md", "[m](../../configs/motifs.yaml)", "[m](../files/configs/motifs.yaml)"),
        ("docs/results/README.md", "[c](../../CHANGELOG.md)", "[c](../changelog.md)"),
        ("docs/a.md", "[h](../bench/card/README.md#x)", "[h](files/bench/card/README.md#x)"),
        ("bench/card/README.md", "[a](../../docs/a.md#x)", "[a](../../../a.md#x)"),
        ("docs/a.md", "[the `configs`](../configs/)", "the `configs`"),
        ("README.md", "[results](docs/results)", "[results](results/README.md)"),
        ("README.md", "[url](https://a.org/docs/a.md)", "[url](https://a.org/docs/a.md)"),
        ("README.md", "`[a](docs/a.md)` <!-- [a](docs/a.md) -->", "`[a](docs/a.md)` <!-- [a](docs/a.md) -->"),
        ("README.md", "```\n[a](docs/a.md)\n```\n[a](docs/a.md)", "```\n[a](docs/a.md)\n```\n[a](a.md)"),
        ("README.md", "- x\n\n    ~~~\n    [a](docs/a.md)\n    ~~~", "- x\n\n    ~~~\n    [a](docs/a.md)\n    ~~~"),
    ],
)
def test_links_lead_to_places_in_the_site(root: Path, path: str, text: str, expected: str):
    rewritten = hooks.rewrite(text, path, root)
    assert rewritten.text == expected and rewritten.missing == []


def test_linked_and_missing_files_are_listed(root: Path):
    text = "[m](../configs/motifs.yaml) [no](../no.md) [b](b.md) ![no](c.svg) [no](c.md#x) `[no](d.md)`"
    rewritten = hooks.rewrite(text, "docs/a.md", root)
    assert rewritten.files == ["configs/motifs.yaml", "docs/b.md"]
    assert rewritten.missing == ["../no.md", "c.svg", "c.md#x"]
    assert "[no](../no.md)" in rewritten.text


@pytest.mark.parametrize("page", ["README.md", "docs/a.md", "docs/results/README.md", "bench/card/README.md"])
def test_source_is_the_inverse_of_place(page: str):
    assert hooks.source(hooks.place(page)) == page


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_markdown(page: str):
    """The hooks do not rewrite links in HTML tags."""
    assert re.findall(r"<(?:img|source)\b|<a href", (ROOT / page).read_text()) == []


def list_faults(text: str) -> list[str]:
    """Return the lines that GitHub renders as parts of a list and Python-Markdown, which makes the site, does not.

    Python-Markdown needs four spaces for each level of a list, and a blank line between a paragraph and a list.
    """
    faults: list[str] = []
    in_list = False  # True if the last paragraph without indentation began with an item
    for block in re.split(r"\n\s*\n", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M).strip("\n")):
        lines = block.strip("\n").splitlines()
        indents = [len(line) - len(line.lstrip()) for line in lines]
        items = [bool(re.match(r" *(?:[-*+]|\d+\.) ", line)) for line in lines]
        if indents[:1] == [0]:
            in_list = items[0]
        elif not in_list and indents and indents[0] >= 4:
            continue  # a block of code
        for number, line in enumerate(lines):
            misplaced = (items[number] or number == 0) and indents[number] % 4
            if misplaced or (items[number] and not items[0]):
                faults.append(line)
    return faults


@pytest.mark.parametrize("page", PAGES)
def test_lists_are_lists_on_the_site_too(page: str):
    assert list_faults((ROOT / page).read_text()) == []


def test_faults_of_lists_are_found():
    assert list_faults("- a\n  b\n    - c\n\n    d\n\n- e\n- f\n\n1. g\n\n```\nh\n- i\n  - j\n```") == []
    assert list_faults("- a\n  - b\n") == ["  - b"] and list_faults("a\n- b\n") == ["- b"]
    assert list_faults("- a\n\n  b\n") == ["  b"] and list_faults("- a\n\n    b\n- c\n") == ["- c"]
    assert list_faults("a\n\n    b\n      - c\n") == []
