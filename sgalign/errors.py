"""The error that our own checks raise."""


class InputError(ValueError):
    """An argument, option or file is not what it must be; the message says which, what it was and what it must be.

    The command line prints it as one sentence. Any other error keeps its traceback, because it is a defect.
    """
