"""The config of `moetrain verify gpu`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.config import StageRun
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, check_ranges


class GpuPart(StrEnum):
    """A part of `verify gpu`: what only runs on a GPU, compared with the same on the CPU; a recipe; the benchmarks.

    training: losses of training steps. flash_attention, grouped_products, int4_kernel: operations. decode: logits and
    sampled tokens. recipe: all stages of k2_nano_test. bench_train, bench_decode: both commands without peers.
    """

    training = "training"
    flash_attention = "flash_attention"
    grouped_products = "grouped_products"
    int4_kernel = "int4_kernel"
    decode = "decode"
    recipe = "recipe"
    bench_train = "bench_train"
    bench_decode = "bench_decode"


@dataclass(kw_only=True)
class VerifyGpuRun(StageRun):
    """Check on one GPU, without downloads, what cannot be checked on a CPU.

    Each part runs in a process of its own; a part that fails or takes too long does not stop the others.
    """

    parts: list[GpuPart] = field(default_factory=lambda: list(GpuPart))
    """Parts to run, in this order."""
    part_seconds: int = 200
    """Longest time of a part; one that takes longer is ended and counts as failed."""
    total_seconds: int = 450
    """Longest time of all parts together; parts that have no time left count as failed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("part_seconds", "total_seconds")})
        if not self.parts:
            raise ConfigError("parts is empty: give at least one, such as parts=[int4_kernel]")
