"""Configs of `data`, `prepare` and `bench data`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field

from moetrain.config import DocumentRun, StageRun
from moetrain.data.config import DataConfig
from moetrain.data.prepare.config import PrepareConfig
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges


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
class PrepareRun(StageRun):
    """Tokenize sources once into memory-mapped shards, which training reads as sources of kind prepared.

    Each source becomes a folder <run.folder>/<run.name>/<run.stage>/<source>. The tokenizer is that of
    data.tokenizer.path or of the weights in init_from, or one of data.tokenizer.vocab_size tokens is trained. A stopped
    preparation resumes when the command is run again.
    """

    data: DataConfig = field(default_factory=DataConfig)
    """Sources to prepare, the tokenizer, and the rows that are planned (data.seq_len, data.overlong)."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Processes, shards, duplicates and decontamination."""


@dataclass(kw_only=True)
class BenchDataRun(StageRun):
    """Compare preparing tokens with `datasets.map`, compare bytes after kills, and measure the loader."""

    megabytes: int = 100
    """Size of the synthetic JSONL that is prepared, in 10^6 bytes."""
    files: int = 8
    """Number of files of the synthetic JSONL."""
    peer_megabytes: int = 100
    """Size of the part that datasets.map tokenizes, in whole files."""
    shard_bytes: int = 8 * 2**20
    """Bytes of input per shard."""
    vocab_size: int = 16384
    """Tokens of the tokenizer that is trained for the measurement."""
    kills: int = 3
    """Number of times that a preparation is killed."""
    tokens: int = 100_000_000
    """Random tokens of the folder from which the loader reads."""
    seq_len: int = 2048
    """Tokens per row of the loader."""
    read_seconds: float = 10.0
    """Seconds for which the loader is measured."""
    keep: bool = False
    """Keep the corpus and the prepared folders."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("megabytes", "files", "peer_megabytes", "shard_bytes", "vocab_size", "tokens", "seq_len")
        check_ranges(self, prefix="", ranges={COUNT: counts, NOT_NEGATIVE: ("kills",), POSITIVE: ("read_seconds",)})
