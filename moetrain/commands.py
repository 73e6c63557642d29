"""All commands by name, and what those of `verify` and `bench` can be told. No torch here, and no Hydra."""

from dataclasses import dataclass

from moetrain.config import (
    EvalRun,
    ExportRun,
    GenerateRun,
    PretrainRun,
    RecipeRun,
    ReportRun,
    RlRun,
    SftRun,
    StageRun,
)
from moetrain.errors import ConfigError


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


SCHEMAS: dict[str, type] = {
    "run": RecipeRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "rl": RlRun,
    "export": ExportRun,
    "eval": EvalRun,
    "report": ReportRun,
    "verify exports": VerifyExportsRun,
    "generate": GenerateRun,
}
"""Root schema of each command; `configs/<command>.yaml` is its primary config."""
