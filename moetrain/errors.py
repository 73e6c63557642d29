"""Errors that a user can meet: each names the field or file, the value found, and what would do.

Every class is also a standard exception type. `exit_code` is what the command line returns: 1 ours, 2 the user's input,
3 a bound of `moetrain verify` that was missed.
"""


class MoetrainError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class ConfigError(MoetrainError, ValueError):
    """A field of the configuration has a value that cannot work."""

    exit_code = 2


class DataError(MoetrainError, ValueError):
    """A data file or source cannot be read or holds something unusable."""

    exit_code = 2


class CheckpointError(MoetrainError, ValueError):
    """A checkpoint or export is missing, damaged or does not fit the model."""

    exit_code = 2


class RolloutError(MoetrainError, RuntimeError):
    """Trajectories could not be collected."""


class ToolError(MoetrainError, RuntimeError):
    """A tool call failed; its text becomes an observation for the model."""


class TransientError(MoetrainError, RuntimeError):
    """An environment failed without any effect, and the same act may work when it is repeated."""


class BoundError(MoetrainError, AssertionError):
    """A bound promised by `moetrain verify` was missed."""

    exit_code = 3


class DivergenceError(MoetrainError, FloatingPointError):
    """The loss or the gradient stopped being a finite number."""
