"""Config of `moetrain prepare`. Does not import torch."""

import os
from dataclasses import dataclass, field

from moetrain.data.config import FOREIGN_KINDS, SourceConfig, SourceKind
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, Range, check_ranges

_SHARD = Range(fits=lambda value: value >= 1000, cure="give at least 1000; each shard is at least one file")


@dataclass(kw_only=True)
class PrepareConfig:
    """How sources become shards of tokens."""

    workers: int | None = None
    """Number of processes; null takes the cores available to this process. The files that are written do not depend on
    it. A single worker runs in the process of the command."""
    shard_bytes: int = 256 * 2**20
    """Bytes of input per shard. A shard is written by one process, and a preparation that was stopped resumes with the
    next shard."""
    near_duplicates: bool = False
    """Also drop documents whose text is nearly that of an earlier document of the source, by MinHash over word 5-grams
    (14 bands of 8 hashes). Requires the extra `dedup`."""
    decontaminate: dict[str, SourceConfig] = field(default_factory=dict)
    """Evaluation sets by name, described like sources. Documents that share an n-gram of words with one are dropped."""
    ngram: int = 13
    """Words of an n-gram of `decontaminate`."""

    def num_workers(self) -> int:
        """Return the number of processes."""
        return self.workers if self.workers is not None else len(os.sched_getaffinity(0))

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="prepare.", ranges={COUNT: ("workers", "ngram"), _SHARD: ("shard_bytes",)})
        for name, source in self.decontaminate.items():
            source.check(name, section="prepare.decontaminate")
            if source.kind in (SourceKind.prepared, SourceKind.dialogues, *FOREIGN_KINDS):
                raise ConfigError(
                    f"prepare.decontaminate.{name}.kind is {source.kind}, which has no text to look for: give the "
                    "files of the evaluation set, as jsonl, parquet, text or hub"
                )
