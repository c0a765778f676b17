"""The errors that reach a user, each with the exit code of the command line.

A message names the place, the value found, the value expected and the remedy, in one or two lines.
"""


def one_line(error: BaseException) -> str:
    """The beginning of another library's message, in one line of a message of ours."""
    return " ".join(str(error).split())[:200]


def kind_and_reason(error: BaseException) -> str:
    """The name of another library's exception and the first line of its message."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


class PcscaleError(Exception):
    """An error whose text is meant for the user."""

    exit_code = 1


class RequestError(PcscaleError, ValueError):
    """The request is wrong: a flag, a key, a path, a checkpoint or the data."""

    exit_code = 2


class BudgetError(PcscaleError, ValueError):
    """The request cannot fit the stated budget; the message names the least that would do."""

    exit_code = 3


class RunError(PcscaleError, RuntimeError):
    """The request was right and the run failed: a full disk, losses that are not finite."""


class PeerFailed(PcscaleError):
    """Another process of the run has failed, and reports the reason itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run has failed")
        self.exit_code = exit_code


class Interrupted(PcscaleError):
    """The user asked to stop; a checkpoint was written first where one was due."""

    exit_code = 130
