"""The error type of the package's own checks."""

import reprlib
import traceback
from typing import Any


class InputError(ValueError):
    """An error about an invalid argument, option or file.

    The message names the argument, option or file, its value, and the condition that it must meet. The command line
    prints the message without a traceback. It prints file system errors (OSError), Lightning's own errors about options
    and the lack of memory in the same way. On the command line, any other error is a defect and keeps its traceback.
    """


class _Short(reprlib.Repr):
    """Short texts of values from files.

    A value may contain one part many times, so its whole text may be too long to be made.
    """

    def repr1(self, x: Any, level: int) -> str:
        for kind in (dict, list, tuple, set, frozenset):  # also for subclasses such as OrderedDict
            if isinstance(x, kind):
                return str(getattr(self, f"repr_{kind.__name__}")(x, level))
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:  # Python refuses to print more than 4300 digits
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 400
_SHORT.maxlevel = 4


def shown(value: object) -> str:
    """Return a value as text for an error message, cut to 200 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_lack_of_memory(error: BaseException) -> bool:
    """Return True if memory could not be allocated: on the host by Python, numpy or torch, or on a GPU."""
    of_torch = "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def modules_of(error: BaseException) -> list[str]:
    """Return the names of the modules whose code an error has left, the one that raised it last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]


def packages_of(error: BaseException) -> list[str]:
    """Return the names of the packages whose code an error has left, the one that raised it last."""
    return [module.partition(".")[0] for module in modules_of(error)]
