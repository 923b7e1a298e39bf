"""The error type of the package's own checks."""

import reprlib


class InputError(ValueError):
    """An error about an invalid argument, option or file.

    The message names the argument, option or file, its value, and the condition that it must meet. The command line
    prints the message without a traceback. It prints file system errors (OSError), Lightning's own errors about options
    and the lack of memory in the same way. On the command line, any other error is a defect and keeps its traceback.
    """


# Values from a file may contain one part many times, so their whole text may be too long to be made.
_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 400
_SHORT.maxlevel = 4


def shown(value: object) -> str:
    """Return a value as text for an error message, cut to 200 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
