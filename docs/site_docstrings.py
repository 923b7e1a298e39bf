"""An extension of griffe, which reads the docstrings for the API reference (see mkdocs.yml)."""

from __future__ import annotations

from typing import Any

import griffe

VARIADIC = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)


class JointEntries(griffe.Extension):
    """Support for entries that describe several arguments or several errors, such as "key, value: ...".

    Griffe takes "key, value" for the name of one argument that does not exist, so mkdocs.yml turns off griffe's check
    of names. This extension checks the names instead.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Warn of arguments that the signature lacks, and show errors without the parentheses of a tuple."""
        if obj.docstring is None or any(part.startswith("_") for part in obj.path.split(".")):
            return
        for section in obj.docstring.parsed:
            if isinstance(section, griffe.DocstringSectionParameters):
                self.check(obj, section)
            elif isinstance(section, griffe.DocstringSectionRaises):
                for error in section.value:
                    if isinstance(error.annotation, griffe.ExprTuple):
                        error.annotation.implicit = True

    def check(self, obj: griffe.Object, section: griffe.DocstringSectionParameters) -> None:
        """Warn of entries that name no argument, and give joint entries the type that their arguments share."""
        parameters = {each.name.lstrip("*"): each for each in getattr(obj, "parameters", [])}
        for entry in section.value:
            names = [name.lstrip("*") for name in entry.name.split(", ")]
            for name in names:
                if name not in parameters:
                    griffe.logger.warning(f"{obj.path}: the docstring describes {name!r}, which is no argument")
            if names[0] in parameters and parameters[names[0]].kind in VARIADIC:
                entry.value = None  # griffe's default of *modules and **options is an empty tuple or dict
            types = {str(parameters[name].annotation) for name in names if name in parameters}
            if len(names) > 1 and len(types) == 1 and names[0] in parameters:
                entry.annotation = parameters[names[0]].annotation
