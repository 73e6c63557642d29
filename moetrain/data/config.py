"""Config of the data: sources, their mixture, and the tokenizer. Does not import torch."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.chat.registry import AUTO
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges

NUM_BYTES = 256
"""Tokens for single bytes, which every byte-level vocabulary has."""
MIN_VOCAB_SIZE = NUM_BYTES + len(KIMI_K2.special_tokens)
"""Smallest vocabulary that a tokenizer can be trained to, with the default chat template."""


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
    prepared = "prepared"
    megatron = "megatron"
    datatrove = "datatrove"


class Overlong(StrEnum):
    """What happens to a document longer than a row: split over rows, truncated, or dropped. Each case is counted."""

    split = "split"  # type: ignore[assignment]  # name == value; the method of str is not used on it
    truncate = "truncate"
    drop = "drop"


class Unreadable(StrEnum):
    """What happens to a record that its format cannot read: an error with file and line, or dropped and counted."""

    refuse = "refuse"
    drop = "drop"


FOREIGN_KINDS = (SourceKind.megatron, SourceKind.datatrove)
"""Kinds of sources that are tokens which other programs wrote."""
_WITH_PATH = (
    SourceKind.hub,
    SourceKind.jsonl,
    SourceKind.parquet,
    SourceKind.text,
    SourceKind.prepared,
    *FOREIGN_KINDS,
)


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents."""

    kind: SourceKind = SourceKind.stdlib_code
    """stdlib_code, stdlib_english: text of the running Python's standard library; maths: generated problems; dialogues:
    demonstrations of the task family; hub: a data set that `datasets` loads; jsonl, parquet, text: local files;
    prepared: a folder that `moetrain prepare` wrote; megatron, datatrove: tokens of these programs, which only
    `moetrain prepare` reads."""
    weight: float = 1.0
    """Share of the tokens in the mixture, relative to the other sources."""
    path: str | None = None
    """Name of a hub data set, a prepared folder, or a local file, folder or glob (all other kinds with a path). An
    existing path is never read as a glob."""
    split: str = "train"
    """Split of a hub data set."""
    ignore: list[str] = field(default_factory=list)
    """Keys that are removed from records and their messages. format=messages refuses other unknown keys."""
    field: str | None = None
    """Column with the text or the messages. Null uses `messages` for format=messages, else `text`."""
    format: str = "text"
    """Format of a record: text, messages (chat), or a format that a plugin registers."""
    unreadable: Unreadable = Unreadable.refuse
    """What happens to a record that the format cannot read: refuse ends the command with its file and line; drop leaves
    it out, and counts it in the log and in data/<source>/num_dropped_unreadable."""
    num_documents: int = 4000
    """Number of documents to generate (kinds maths and dialogues)."""
    overlong: Overlong | None = None
    """Policy for documents longer than a row; null uses data.overlong."""
    max_characters: int | None = None
    """Largest number of characters to read, in whole documents; null reads all. With a limit, a hub source streams."""

    @property
    def column(self) -> str:
        """Name of the column that the format reads."""
        return self.field or ("messages" if self.format == "messages" else "text")

    def check(self, name: str, *, section: str = "data.sources") -> None:
        """Raise ConfigError when the settings of the source `name` do not fit its kind. Called by its section."""
        counts = ("num_documents", "max_characters")
        prefix = f"{section}.{name}."
        check_ranges(self, prefix=prefix, ranges={COUNT: counts, NOT_NEGATIVE: ("weight",)})
        if self.kind in _WITH_PATH and not self.path:
            raise ConfigError(f"{prefix}path is {self.path}: a source of kind {self.kind} requires one")
        if self.path is not None and self.kind not in _WITH_PATH:
            raise ConfigError(
                f"{prefix}path is {self.path}, which a source of kind {self.kind} does not read: "
                f"set {prefix}kind to one of {', '.join(_WITH_PATH)}, or remove the path"
            )
        if self.kind is SourceKind.prepared and self.max_characters is not None:
            raise ConfigError(
                f"{prefix}max_characters is {self.max_characters}, but a prepared source is read whole: remove it"
            )


@dataclass(kw_only=True)
class TokenizerConfig:
    """A byte-level BPE tokenizer trained on the mixture, or an existing tokenizer."""

    path: str | None = None
    """Folder of an existing tokenizer. Null uses the tokenizer of the weights (init_from), or trains one without
    weights."""
    retrain: bool = False
    """Allow training from weights (init_from) with another tokenizer than theirs: a newly trained one, or the one in
    `path`. The weights were not trained on its tokens."""
    template: str = AUTO
    """Chat template: kimi_k2, deepseek_v3, deepseek_v31, chatml, or one of a plugin. auto recognises the template of a
    tokenizer that is read, and gives kimi_k2 to one that is trained. When a template is named, tokens that it needs and
    the tokenizer lacks take unused rows of the vocabulary."""
    vocab_size: int | None = None
    """Tokens of a trained tokenizer, including special tokens; at most model.vocab_size. Null uses model.vocab_size, or
    fewer when the texts do not contain enough different pairs."""
    shrink_model: bool | None = None
    """Give the model as many rows (model.vocab_size) as the trained tokenizer has tokens, when the texts give fewer.
    Null means yes where a tokenizer is trained without initial weights, unless model.vocab_size or
    data.tokenizer.vocab_size is given."""
    max_characters: int = 4_000_000
    """Largest number of characters of the mixture that the tokenizer is trained on."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("max_characters",) if self.vocab_size is None else ("vocab_size", "max_characters")
        check_ranges(self, prefix="data.tokenizer.", ranges={COUNT: counts})
        if self.path is None and self.vocab_size is not None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"data.tokenizer.vocab_size is {self.vocab_size}: give at least {MIN_VOCAB_SIZE}, "
                f"for {NUM_BYTES} bytes and {MIN_VOCAB_SIZE - NUM_BYTES} special tokens"
            )


@dataclass(kw_only=True)
class MixConfig:
    """New weights of the sources from a step of the run on, for example better data while the learning rate decays."""

    from_step: int | None = None
    """First optimizer step of this mix, counted from 0. Give either this or from_share."""
    from_share: float | None = None
    """First step of this mix as a share of train.steps, rounded to the nearest step."""
    weights: dict[str, float] = field(default_factory=dict)
    """New weights by source; sources that are not named keep theirs. From this step on, a source of weight 0 is not
    read."""

    def __post_init__(self) -> None:
        """Check that exactly one of from_step and from_share is given, and check ranges."""
        if (self.from_step is None) == (self.from_share is None):
            raise ConfigError(
                f"data.mix: from_step is {self.from_step} and from_share is {self.from_share}: give one of the two"
            )
        if self.from_step is not None and self.from_step < 1:
            raise ConfigError(
                f"data.mix: from_step is {self.from_step}: give at least 1 (data.sources.*.weight applies from step 0)"
            )
        if self.from_share is not None and not 0 < self.from_share < 1:
            raise ConfigError(f"data.mix: from_share is {self.from_share}: give a share between 0 and 1")
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"data.mix: the weight of {name} is {weight}: give 0 or more")

    def first_step(self, steps: int) -> int:
        """Return the first step of this mix in a run of `steps` steps."""
        if self.from_step is not None:
            return self.from_step
        assert self.from_share is not None
        return round(self.from_share * steps)


@dataclass(kw_only=True)
class DataConfig:
    """Training and validation data."""

    seq_len: int = 512
    """Tokens per row (T)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name."""
    mix: list[MixConfig] = field(default_factory=list)
    """Changes of the sources' weights during the run, in order of their first step."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    validation_fraction: float = 0.02
    """Share of the documents of each source held out for validation, chosen by a hash of the document. In prepared data
    the share is fixed."""
    validation_rows: int = 16
    """Largest number of validation rows per source."""
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
                raise ConfigError(f"data.mix[{number}] leaves no source with a weight above 0: give at least one")

    def mix_weights(self) -> list[dict[str, float]]:
        """Return the weights by source of each mix; the first has the weights in `sources`."""
        mixes = [{name: source.weight for name, source in self.sources.items()}]
        for change in self.mix:
            mixes.append({**mixes[-1], **change.weights})
        return mixes
