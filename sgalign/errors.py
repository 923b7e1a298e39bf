"""The error that our own checks raise."""


class InputError(ValueError):
    """An argument, option or file is not what it must be; the message says which, what it was and what it must be.

    The command line prints it as one sentence, as it does errors of the file system (OSError) and Lightning's
    MisconfigurationException. Anything else is a defect and keeps its traceback.
    """
