"""The one exception for input that the user has to mend."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to mend it.

    `main` prints the message without a traceback and exits with status 1.
    """
