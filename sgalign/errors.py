"""The error type of the package's own checks."""


class InputError(ValueError):
    """An error about an invalid argument, option or file.

    The message names it and says what it was and what it must be. The command line prints this error as one sentence
    without a traceback. It treats file system errors (OSError) and Lightning's MisconfigurationException in the same
    way. Any other error is a defect and keeps its traceback.
    """
