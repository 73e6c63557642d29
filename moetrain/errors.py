"""Errors for users: each message names the field or file, the value found, and what to do.

Every class is also a standard exception type. `exit_code` is what the command line returns: 1 for a failure of the
package or the run, 2 for invalid input of the user, 3 for a bound that a check missed.
"""


class MoetrainError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class ConfigError(MoetrainError, ValueError):
    """A field of the config has an invalid value."""

    exit_code = 2


class DataError(MoetrainError, ValueError):
    """A data file or source cannot be read, or its content is unusable."""

    exit_code = 2


class CheckpointError(MoetrainError, ValueError):
    """A checkpoint or export is missing or damaged, or does not fit the model."""

    exit_code = 2


class SaveError(MoetrainError, OSError):
    """A checkpoint or an export was not written, for example because the disk is full."""


class RolloutError(MoetrainError, RuntimeError):
    """Trajectories could not be collected."""


class ToolError(MoetrainError, RuntimeError):
    """A tool call failed; its text becomes an observation for the model."""


class TransientError(MoetrainError, RuntimeError):
    """An environment failed without side effects, so the same call may succeed when repeated."""


class BoundError(MoetrainError, AssertionError):
    """A check missed its bound."""

    exit_code = 3


class DivergenceError(MoetrainError, FloatingPointError):
    """The loss or the gradient became infinite or NaN."""


def described(error: BaseException) -> str:
    """Return the type and text of an error of foreign code, on one line. The text may itself fail."""
    return f"{type(error).__name__}: {line_of(error)}"


def line_of(error: BaseException) -> str:
    """Return the text of an error of foreign code, on one line."""
    return " ".join(text_of(error).splitlines())


def text_of(error: BaseException) -> str:
    """Return the text of an error of foreign code."""
    try:
        return str(error)
    except Exception:  # the code that makes the text is foreign, too
        return "its message cannot be formatted"
