"""`moetrain prepare`: prepares every source of a mixture, each in its own folder. Does not import torch."""

import logging
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

from moetrain.chat.pieces import pieces_to_text
from moetrain.chat.registry import template_named
from moetrain.chat.template import ChatTemplate
from moetrain.data.chat_tokenizer import load_tokenizer
from moetrain.data.config import FOREIGN_KINDS, DataConfig, SourceConfig, SourceKind
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.contamination import EvaluationTexts
from moetrain.data.prepare.inputs import Unit, unit_documents, units_of
from moetrain.data.prepare.source import Preparation, prepare_source
from moetrain.data.sources import Choice, key_hash, renderable
from moetrain.data.store.index import TOKENIZER, Index
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, train_tokenizer, without_specials
from moetrain.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_MAX_UNITS = 64
"""Units of a source from which a tokenizer's training text is taken, evenly spread."""


def _do_nothing() -> None:
    """Start a worker that needs nothing."""


def prepare(
    data: DataConfig,
    config: PrepareConfig,
    *,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    start_worker: Callable[[], None] = _do_nothing,
) -> dict[str, Index]:
    """Prepare every source in `folder/NAME`; return their indices.

    tokenizer: None trains one on part of the sources, of data.tokenizer.vocab_size tokens. start_worker: called at the
    start of each worker process, for example to register formats; it must be picklable. A source of kind dialogues is
    left out, because each stage makes its own. Raises ConfigError for settings that do not fit, and DataError for
    input that cannot be read.
    """
    sources = {name: source for name, source in data.sources.items() if source.kind is not SourceKind.dialogues}
    for name in data.sources.keys() - sources.keys():
        _log.info("data.sources.%s: not prepared, because a training stage makes its dialogues", name)
    for name, source in sources.items():
        _check(name, source)
    if not sources:
        raise ConfigError("data.sources has no source to prepare: give one, such as data.sources.web.kind=jsonl")
    evaluation = EvaluationTexts(config.decontaminate, ngram=config.ngram)
    own_folder = folder / TOKENIZER
    if tokenizer is None:
        tokenizer = _own_tokenizer(data, sources, folder=own_folder, shard_bytes=config.shard_bytes)
    else:
        _check_same(tokenizer, folder=folder)
        tokenizer.save(own_folder)
    preparation = Preparation(
        data=data,
        config=config,
        tokenizer=tokenizer,
        tokenizer_folder=own_folder,
        evaluation=evaluation,
        start_worker=start_worker,
    )
    return {name: prepare_source(name, folder / name, preparation=preparation) for name in sources}


def _check(name: str, source: SourceConfig) -> None:
    if source.kind is SourceKind.prepared:
        raise ConfigError(f"data.sources.{name} is prepared already: name the files that it was made of, or remove it")
    if name == TOKENIZER or "/" in name or name.startswith("."):
        raise ConfigError(f"data.sources has a source named {name}: choose a folder name other than {TOKENIZER}")
    if source.max_characters is not None and source.kind is not SourceKind.hub:
        raise ConfigError(
            f"data.sources.{name}.max_characters is {source.max_characters}: a source of kind {source.kind} is "
            "prepared whole; remove it, and name fewer files instead"
        )


def _check_same(tokenizer: Tokenizer, *, folder: Path) -> None:
    """Raise ConfigError when sources in `folder` were prepared with another tokenizer."""
    for source in folder.glob(f"*/{TOKENIZER}/{TOKENIZER_FILE}"):
        if Tokenizer.load(source.parent).digest != tokenizer.digest:
            raise ConfigError(
                f"{source.parent.parent} was prepared with another tokenizer: give another run.name, or remove it"
            )


def _own_tokenizer(data: DataConfig, sources: dict[str, SourceConfig], *, folder: Path, shard_bytes: int) -> Tokenizer:
    """Return the tokenizer that an earlier call trained in `folder`, or train it on the first texts of each unit."""
    size = data.tokenizer.vocab_size
    for name, source in sources.items():
        if source.kind in FOREIGN_KINDS:
            raise ConfigError(
                f"data.tokenizer.path is null, and data.sources.{name} is of kind {source.kind}: give the folder of "
                "the tokenizer that its tokens were made with"
            )
    if size is None:
        raise ConfigError(
            "data.tokenizer.path is null: give the folder of the tokenizer, or data.tokenizer.vocab_size to train one"
        )
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = load_tokenizer(data.tokenizer, folder)
        if tokenizer.vocab_size != size:
            raise ConfigError(
                f"data.tokenizer.vocab_size is {size}, and {folder} has a tokenizer of {tokenizer.vocab_size} tokens: "
                "give another run.name"
            )
        return tokenizer
    template = template_named(data.tokenizer.template)
    texts: list[str] = []
    cure = "text"
    for source in sources.values():
        budget = data.tokenizer.max_characters // len(sources)
        for text in _texts(source, fraction=data.validation_fraction, shard_bytes=shard_bytes, template=template):
            texts.append(text[:budget])
            budget -= len(text)
            if budget <= 0:
                cure = "data.tokenizer.max_characters"
                break
    tokenizer = train_tokenizer(texts, vocab_size=size, template=template)
    num_characters = sum(map(len, texts))
    if tokenizer.vocab_size < size:
        raise DataError(
            f"data.tokenizer.vocab_size is {size}, and {num_characters} characters give {tokenizer.vocab_size} tokens: "
            f"give a smaller number, or more {cure}"
        )
    tokenizer.save(folder)
    _log.info("tokenizer of %d tokens trained on %d characters", tokenizer.vocab_size, num_characters)
    return tokenizer


def _texts(source: SourceConfig, *, fraction: float, shard_bytes: int, template: ChatTemplate) -> Iterator[str]:
    """Yield texts of a source that are not held out, in turn from units that are spread over it; then from others."""
    units = units_of(source, shard_bytes=shard_bytes)
    step = max(1, -(-len(units) // _MAX_UNITS))
    for first in range(step):
        readers = [_unit_texts(source, unit, fraction=fraction, template=template) for unit in units[first::step]]
        yield from (text for text in chain.from_iterable(zip_longest(*readers)) if text is not None)


def _unit_texts(source: SourceConfig, unit: Unit, *, fraction: float, template: ChatTemplate) -> Iterator[str]:
    for document in renderable(unit_documents(source, unit, errors=[]), source, template=template, errors=[]):
        if key_hash(document.key, choice=Choice.hold_out) >= fraction:
            yield without_specials(pieces_to_text(document.rendered(template)), template=template)
