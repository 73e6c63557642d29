"""The config value that selects how generation computes. Imports no torch."""

from enum import StrEnum


class Mode(StrEnum):
    """`fast`: attention over cached latents, with the key and value projections absorbed. `deterministic`: the sums of
    training, so that the logprob of a sampled token equals the trainer's bit for bit; needs the native kernels.
    """

    fast = "fast"
    deterministic = "deterministic"
