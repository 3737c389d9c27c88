"""The one exception that means "the input is at fault, not the program"."""


class InputError(ValueError):
    """Bad input from a person: one line that names the value, the limit and the fix.

    The command line prints it without a traceback and exits with a non-zero status.
    """
