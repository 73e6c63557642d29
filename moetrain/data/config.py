"""Tokenizer, sources and their mixture. No torch here."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.chat.template import SPECIAL_TOKENS
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges

NUM_BYTES = 256
"""Ordinary tokens that a byte-level vocabulary has at least."""
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
"""Smallest vocabulary that a tokenizer can be trained to."""


class SourceKind(StrEnum):
    """Where documents come from."""

    stdlib_code = "stdlib_code"
    stdlib_english = "stdlib_english"
    maths = "maths"
    dialogues = "dialogues"
    hub = "hub"
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"


class Overlong(StrEnum):
    """What happens to a document longer than a row: cut into rows, cut at the end, or left out. Always counted."""

    split = "split"  # type: ignore[assignment]  # name == value; the method of str is not used on it
    truncate = "truncate"
    drop = "drop"


_WITH_PATH = (SourceKind.hub, SourceKind.jsonl, SourceKind.parquet, SourceKind.text)


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents."""

    kind: SourceKind = SourceKind.stdlib_code
    """stdlib_*: the running Python's own library, on every machine; maths: made by procedure; dialogues: the task
    family's demonstrations; hub: through `datasets`; jsonl, parquet, text: files."""
    weight: float = 1.0
    """Share of the tokens in the mixture, relative to the other sources."""
    path: str | None = None
    """Hub name, or a local file, folder or glob (hub, jsonl, parquet, text); a path that exists is no glob."""
    split: str = "train"
    """Split of a hub data set."""
    ignore: list[str] = field(default_factory=list)
    """Keys of records and of their messages that are left out (format=messages refuses those it does not know)."""
    field: str | None = None
    """Column that holds the text or the messages; null: `messages` with format=messages, else `text`."""
    format: str = "text"
    """Format of a record: text, messages (chat), or one that a plugin registered."""
    num_documents: int = 4000
    """Documents made by procedure (maths, dialogues)."""
    overlong: Overlong | None = None
    """Policy for documents longer than a row; null takes data.overlong."""
    max_characters: int | None = None
    """Characters read of this source at most, whole documents; null reads all. A hub source then streams."""

    @property
    def column(self) -> str:
        """Column of a record that its format reads."""
        return self.field or ("messages" if self.format == "messages" else "text")

    def check(self, name: str) -> None:
        """Raise `ConfigError` when the source `name` cannot be read like this; `DataConfig` calls it of each."""
        counts = ("num_documents", "max_characters")
        prefix = f"data.sources.{name}."
        check_ranges(self, prefix=prefix, ranges={COUNT: counts, NOT_NEGATIVE: ("weight",)})
        if self.kind in _WITH_PATH and not self.path:
            raise ConfigError(f"{prefix}path is {self.path}: a source of kind {self.kind} needs one")
        if self.path is not None and self.kind not in _WITH_PATH:
            raise ConfigError(
                f"{prefix}path is {self.path}, which a source of kind {self.kind} does not read: "
                f"give {prefix}kind too, one of {', '.join(_WITH_PATH)}"
            )


@dataclass(kw_only=True)
class TokenizerConfig:
    """Byte-level BPE, trained on the mixture, or one that exists."""

    path: str | None = None
    """Folder of an existing tokenizer; null takes that of the weights (init_from), or trains one."""
    retrain: bool = False
    """Train on from weights (init_from) with another tokenizer than theirs: a new one, or that of `path`. The weights
    do not know its tokens."""
    vocab_size: int | None = None
    """Tokens to train, special ones included, at most model.vocab_size. Null: as many as model.vocab_size, or fewer
    where the texts cannot fill it."""
    max_characters: int = 4_000_000
    """Characters of the mixture that it is trained on."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("max_characters",) if self.vocab_size is None else ("vocab_size", "max_characters")
        check_ranges(self, prefix="data.tokenizer.", ranges={COUNT: counts})
        if self.path is None and self.vocab_size is not None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"data.tokenizer.vocab_size is {self.vocab_size}: give at least {MIN_VOCAB_SIZE}, "
                f"{NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
            )


@dataclass(kw_only=True)
class MixConfig:
    """Other weights of the sources from some step of the run on, such as better data while the rate decays."""

    from_step: int | None = None
    """First optimizer step of this mix, counted from 0; give this or from_share."""
    from_share: float | None = None
    """The same as a share of train.steps, to the nearest step."""
    weights: dict[str, float] = field(default_factory=dict)
    """New weight of each source that is named; the others keep theirs. 0 leaves a source out from then on."""

    def __post_init__(self) -> None:
        """Check that there is one beginning, and ranges."""
        if (self.from_step is None) == (self.from_share is None):
            raise ConfigError(
                f"data.mix: from_step is {self.from_step} and from_share is {self.from_share}: give one of the two"
            )
        if self.from_step is not None and self.from_step < 1:
            raise ConfigError(
                f"data.mix: from_step is {self.from_step}: give at least 1 (data.sources.*.weight holds from step 0)"
            )
        if self.from_share is not None and not 0 < self.from_share < 1:
            raise ConfigError(f"data.mix: from_share is {self.from_share}: give a share between 0 and 1")
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"data.mix: the weight of {name} is {weight}: give 0 or more")

    def first_step(self, steps: int) -> int:
        """Return the step that it begins with in a run of `steps` steps."""
        if self.from_step is not None:
            return self.from_step
        assert self.from_share is not None
        return round(self.from_share * steps)


@dataclass(kw_only=True)
class DataConfig:
    """What the model reads."""

    seq_len: int = 512
    """Tokens a row (T)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name."""
    mix: list[MixConfig] = field(default_factory=list)
    """Changes of the sources' weights in the course of the run, in order."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    validation_fraction: float = 0.02
    """Share of the documents of each source held out for validation, chosen by a hash of the document."""
    validation_rows: int = 16
    """Rows of validation tokens a source."""
    overlong: Overlong = Overlong.split
    """Policy for documents longer than a row."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="data.", ranges={COUNT: ("validation_rows",)})
        if not 8 <= self.seq_len < 2**31:
            raise ConfigError(f"data.seq_len is {self.seq_len}: give at least 8 tokens")
        for name, source in self.sources.items():
            source.check(name)
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}: give a share between 0 and 1")
        for number, weights in enumerate(self.mix_weights()[1:]):
            for name in self.mix[number].weights:
                if name not in self.sources:
                    raise ConfigError(
                        f"data.mix[{number}].weights names {name}: give one of {', '.join(self.sources) or 'no source'}"
                    )
            if not any(weight > 0 for weight in weights.values()):
                raise ConfigError(f"data.mix[{number}] leaves no source with a weight above 0")

    def mix_weights(self) -> list[dict[str, float]]:
        """Return the weight of each source in each mix; the first one is that of `sources`."""
        mixes = [{name: source.weight for name, source in self.sources.items()}]
        for change in self.mix:
            mixes.append({**mixes[-1], **change.weights})
        return mixes
