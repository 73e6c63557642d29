"""Configs of `data` and `prepare`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field

from moetrain.commands.stage import WeightsRun
from moetrain.commands.training import DocumentRun
from moetrain.data.config import DataConfig
from moetrain.data.prepare.config import PrepareConfig
from moetrain.ranges import COUNT, check_ranges


@dataclass(kw_only=True)
class DataRun(DocumentRun):
    """Show the training data of a stage: the size of each source, and rendered records with their learned parts marked.

    Accepts the overrides of `pretrain` and `sft` and ignores those that do not concern data. Learned parts are green,
    or between ⟦ and ⟧ when the output has no colour. Writes nothing.
    """

    records: int = 1
    """Number of records to show per source."""
    characters: int = 4000
    """Maximum number of characters to show per record."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_ranges(self, prefix="", ranges={COUNT: ("records", "characters")})


@dataclass(kw_only=True)
class PrepareRun(WeightsRun):
    """Tokenize sources once into memory-mapped shards, which training reads as sources of kind prepared.

    Each source becomes a folder <run.folder>/<run.name>/<run.stage>/<source>. The tokenizer is that of
    data.tokenizer.path or of the weights in init_from, or one of data.tokenizer.vocab_size tokens is trained. A stopped
    preparation resumes when the command is run again.
    """

    data: DataConfig = field(default_factory=DataConfig)
    """Sources to prepare, the tokenizer, and the rows that are planned (data.seq_len, data.overlong)."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Processes, shards, duplicates and decontamination."""
