"""The one exception for what comes from outside and cannot be accepted."""


class InputError(ValueError):
    """A config, file, record or argument from outside is not acceptable.

    The message is one sentence for the user: what was given, what is accepted, what to do.
    The command line prints it without a traceback and exits with status 2.
    """
