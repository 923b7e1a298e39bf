"""The error type of the package's own checks."""


class InputError(ValueError):
    """An error about an invalid argument, option or file.

    The message names the argument, option or file, its value, and the condition that it must meet. The command line
    prints the message without a traceback. It prints file system errors (OSError), Lightning's own errors about options
    and the lack of memory in the same way. On the command line, any other error is a defect and keeps its traceback.
    """


def shown(value: object) -> str:
    """Return a value as text for an error message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
