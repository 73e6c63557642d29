"""All commands by name, and what those of `verify` and `bench` can be told. No torch here, and no Hydra."""

from dataclasses import dataclass, field

from moetrain.config import (
    EvalRun,
    ExportRun,
    GenerateRun,
    PretrainRun,
    ReadingRun,
    RecipeRun,
    ReportRun,
    RlRun,
    SftRun,
    StageRun,
)
from moetrain.errors import ConfigError
from moetrain.model.config import BalanceConfig


@dataclass(kw_only=True)
class VerifyExportsRun(StageRun):
    """Shows that an INT4 export is what was trained: for its masters, for transformers and for our own model."""

    masters: str | None = None
    """Stage or checkpoint that the export of init_from was made of."""
    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens a row."""
    fault: str = "none"
    """A fault to plant, that has to be found: none, code, scale or norm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.fault not in ("none", "code", "scale", "norm"):
            raise ConfigError(f"fault is {self.fault!r}: give none, code, scale or norm")


@dataclass(kw_only=True)
class BenchBalanceRun(ReadingRun):
    """Trains one model with several ways to balance its experts, on the same tokens, and compares loads and losses."""

    methods: dict[str, BalanceConfig] = field(default_factory=dict)
    """What is compared, by name: each takes the place of model.balance. Their steps alternate, so all of their models
    are in memory at once."""
    tail_share: float = 0.25
    """Share of the steps, the last ones, over which loads and training loss are averaged."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods is empty: name at least one, such as methods.mine.bias_rule=sign")
        if not 0 < self.tail_share <= 1:
            raise ConfigError(f"tail_share is {self.tail_share}: give a share above 0, up to 1")


SCHEMAS: dict[str, type] = {
    "run": RecipeRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "rl": RlRun,
    "export": ExportRun,
    "eval": EvalRun,
    "report": ReportRun,
    "verify exports": VerifyExportsRun,
    "bench balance": BenchBalanceRun,
    "generate": GenerateRun,
}
"""Root schema of each command; `configs/<command>.yaml` is its primary config."""
