"""The file of a study: a base config, and the arms that it compares."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sgalign.errors import InputError
from sgalign.numbers import LARGEST_WHOLE

STUDY_KEYS = {"title", "config", "set", "seeds", "choose", "arms"}
ARM_KEYS = {"name", "base", "config", "set", "grid"}
KINDS: dict[type, str] = {dict: "a mapping", str: "text", list: "a list"}
MOST = 10_000  # values of a study, and combinations of a grid, far beyond those that anyone would run
SECTIONS = ("model", "data", "trainer")  # sections of a config whose options an arm may set


class Arm(NamedTuple):
    """An arm of a study, which is one row of its table.

    Attributes:
        name: name of the row.
        base: name of the arm that it is compared with. If empty, the arm is not compared.
        arguments: arguments of `sgalign fit`.
    """

    name: str
    base: str
    arguments: list[str]


class Study(NamedTuple):
    """A comparison of arms.

    Attributes:
        name: name of the file, without its suffix.
        title: title of the table.
        seeds: number of seeds per arm.
        choose: name of a logged figure, such as "val/mR@50". The epoch with its highest value is tested.
        arms: the arms, in the order of the table's rows.
    """

    name: str
    title: str
    seeds: int
    choose: str
    arms: list[Arm]


def read_study(path: Path, overrides: Mapping[str, str] | None = None) -> Study:
    """Read the file of a study, a YAML file with the keys of `STUDY_KEYS`.

    `arms` is a list of mappings with the keys of `ARM_KEYS`. Paths of configs are relative to the study's file. An
    arm's `config` replaces the study's. Options are set in this order, so later ones win: the study's `set`, the arm's
    `set`, the arm's `grid`, `overrides`. A `grid` gives each option a list of values, and makes one arm of each
    combination. In the arm's name and in that of its base, `{mask_ratio}` stands for the value of the option that ends
    in `.mask_ratio`.

    Args:
        path: the file.
        overrides: options of all arms, such as {"data.root": "VG"}.

    Raises:
        FileNotFoundError: if the file or one of its configs does not exist.
        ValueError: if the file is not a study. The error names the file and the key.
    """
    content = _read_yaml(path)
    _check(path, "the study", content, STUDY_KEYS, {"title": str, "config": str, "choose": str, "arms": list})
    check_text(path, content["title"])
    _check_options("--set", overrides or {})
    if not re.fullmatch(r"[\w-]+", path.stem):
        raise InputError(f"{path}: the file's name must consist of letters, digits, _ and -")
    seeds = content.get("seeds", 1)
    if type(seeds) is not int or seeds < 1:
        raise InputError(f"{path}: seeds must be a whole number of at least 1, got {seeds!r}")
    if not content["choose"].startswith("val/"):
        raise InputError(
            f"{path}: choose must be a figure of the validation, such as val/mR@50, got {content['choose']!r}"
        )
    arms: list[Arm] = []
    for number, entry in enumerate(content["arms"], 1):
        _check(path, f"arm {number}", entry, ARM_KEYS, {"name": str})
        config = path.parent / entry.get("config", content["config"])
        if not config.is_file():
            raise FileNotFoundError(f"{path}: arm {number} needs the config {config}, which does not exist")
        combinations = _combinations(path, number, entry.get("grid", {}))
        for key in entry.get("grid", {}):
            if (place := _place(key)) not in entry["name"]:
                raise InputError(
                    f"{path}: the name of an arm with {key} in its grid must contain {place}, got {entry['name']!r}"
                )
        for values in combinations:
            options = content.get("set", {}) | entry.get("set", {}) | values
            _check_options(path, options)
            arguments = ["--config", str(config)] + [f"--{key}={_text(value)}" for key, value in options.items()]
            arguments += [f"--{key}={value}" for key, value in (overrides or {}).items()]
            arms.append(Arm(_filled(entry["name"], values), _filled(entry.get("base") or "", values), arguments))
    names = [arm.name for arm in arms]
    for number, arm in enumerate(arms):
        check_text(path, arm.name)
        if arm.name in names[:number]:
            raise InputError(f"{path}: names of arms must differ, got {arm.name!r} twice")
        if arm.base and arm.base not in (others := [name for name in names if name != arm.name]):
            raise InputError(f"{path}: base of {arm.name!r} must be one of {others}, got {arm.base!r}")
    if not arms:
        raise InputError(f"{path}: arms must not be empty")
    return Study(path.stem, content["title"], seeds, content["choose"], arms)


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys. PyYAML's own would silently keep the last value."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST:  # merges of merges can double the number of keys in each line
            raise yaml.YAMLError(f"a mapping has more than {MOST:,} merged keys")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # the key "<<", which has no value of its own
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {repeated[0]!r} occurs twice in a mapping")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such study")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506, a subclass of SafeLoader
        _check_values(content)
        return content
    except (yaml.YAMLError, AttributeError, RecursionError, TypeError, ValueError) as error:
        # PyYAML raises an AttributeError for a malformed time stamp, and a TypeError for a key that is a list.
        raise InputError(f"{path}: must be a YAML file, got an error: {' '.join(str(error).split())}") from error


def _check_values(content: Any) -> None:
    """Raise YAMLError if values are too many or too large. Aliases can repeat a part more often than memory holds."""
    parts = [content]
    for part in parts:  # grows while it is walked
        if len(parts) > MOST:
            raise yaml.YAMLError(f"it has more than {MOST:,} values, with each alias counted as its values")
        if isinstance(part, dict | list):
            parts += [*part, *part.values()] if isinstance(part, dict) else part
        elif isinstance(part, int) and abs(part) > LARGEST_WHOLE:
            raise yaml.YAMLError(f"a whole number is larger than {LARGEST_WHOLE}")


def _check(path: Path, what: str, content: Any, known: set[str], required: dict[str, type]) -> None:
    """Raise InputError unless `content` is a mapping with known keys, all required ones, and values of their types."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: {what} must be a mapping, got {content!r}")
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{path}: {what} must have only the keys {', '.join(sorted(known))}, got {unknown[0]!r}")
    types = {"set": dict, "grid": dict, "base": str, "config": str} | required
    for key, kind in types.items():
        if key in required and key not in content:
            raise InputError(f"{path}: {what} must have the key {key!r}")
        if key in content and not isinstance(content[key], kind):
            raise InputError(f"{path}: {key} of {what} must be {KINDS[kind]}, got {content[key]!r}")


def _check_options(path: Path | str, options: Mapping[str, Any]) -> None:
    for key in options:
        if str(key).split(".")[0] not in SECTIONS:
            raise InputError(f"{path}: an option must begin with model., data. or trainer., got {key!r}")
        if key in ("data.seed", "data.init_args.seed"):
            raise InputError(f"{path}: {key} must not be set, because the seed of the run determines it")


def check_text(path: Path, text: Any) -> None:
    """Raise InputError if a name or a title would break the tables."""
    if not isinstance(text, str) or re.search(r"[|<>\n\r\ud800-\udfff]", text) or not text.strip():
        raise InputError(f"{path}: names and titles must be one line of text without |, < and >, got {text!r}")


def _combinations(path: Path, number: int, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the combinations of a grid's values, as one dict of options each. An empty grid has one combination."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: {key} in the grid of arm {number} must be a list of values, got {values!r}")
    if (count := math.prod(map(len, grid.values()))) > MOST:
        raise InputError(f"{path}: the grid of arm {number} must have at most {MOST:,} combinations, got {count:,}")
    return [dict(zip(grid, values)) for values in product(*grid.values())]


def _place(key: str) -> str:
    """Return the text that stands for an option's value in the name of an arm."""
    return "{" + key.rpartition(".")[2] + "}"


def _filled(name: str, values: Mapping[str, Any]) -> str:
    """Return the name of an arm with the values of a grid in place of their names in braces."""
    for key, value in values.items():
        name = name.replace(_place(key), _text(value))
    return name


def _text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
