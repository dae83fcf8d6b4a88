"""The one exception for what comes from outside and cannot be accepted."""


class InputError(ValueError):
    """A config, file, record or argument from outside is not acceptable.

    The message is one sentence for the user: what was given, what is accepted, what to do.
    The command line prints it without a traceback and exits with status 2.
    """


def reason_of(error: Exception) -> str:
    """What an exception of a library says, for a sentence: one line of at most 200 characters, without a full stop."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}".rstrip(".")
