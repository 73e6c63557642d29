"""Builds the data of a stage from its config: tokenizer, training rows, validation rows, digests and counts.

The validation split depends on the documents only and not on the run's seed, so that runs with different seeds are
validated on the same tokens. The seed sets the order in which documents are packed and rows are read.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moetrain.chat.pieces import pieces_to_text
from moetrain.chat.registry import template_named
from moetrain.chat.template import ChatTemplate
from moetrain.data.chat_tokenizer import load_tokenizer
from moetrain.data.config import DataConfig, SourceKind
from moetrain.data.fit import PackingCounts
from moetrain.data.formats import Document
from moetrain.data.hold_out import HoldOut, hold_out_of
from moetrain.data.loader import Loader, Mix, Rows
from moetrain.data.order import ORDER_VERSION
from moetrain.data.packing import PackedRows, TokenizedDocument, ValidationRows, pack
from moetrain.data.sources import Choice, digest_of, key_hash, read_documents, renderable
from moetrain.data.store.index import TOKENIZER, Part, prepared_folders
from moetrain.data.store.rows import PreparedRows, prepared_sources
from moetrain.data.tokenize import tokenize
from moetrain.data.tokenizer import Tokenizer, holds_tokenizer, train_tokenizer, without_specials
from moetrain.errors import ConfigError, DataError
from moetrain.files import user_path
from moetrain.log import progress
from moetrain.runtime import python_stream

_log = logging.getLogger(__name__)

_DIALOGUE_SHARE = 0.25
"""Characters of dialogues in the tokenizer's training text, as a share of `data.tokenizer.max_characters`."""
_VALIDATION_SEED = 0
"""Seed of the order in which validation documents are packed and their rows chosen; the same for all runs."""
_DOCUMENTS_PER_CALL = 64
"""Documents tokenized per call; the progress bar advances after each call."""


@dataclass(kw_only=True)
class Data:
    """Data of a stage."""

    loader: Loader
    training: dict[str, Rows]
    """Training rows of each source, including sources of weight 0."""
    validation: dict[str, ValidationRows]
    tokenizer: Tokenizer
    digests: dict[str, str]
    """sha256 of each source's documents and of the tokenizer; every result contains them."""
    counts: dict[str, PackingCounts]
    """Counts of each source's training documents."""

    def in_memory(self) -> dict[str, PackedRows]:
        """Return the training rows of the sources that are not prepared."""
        return {name: rows for name, rows in self.training.items() if isinstance(rows, PackedRows)}

    def order_versions(self) -> dict[str, int]:
        """Return the version of the order of rows by source, for the sources that are prepared."""
        return {name: ORDER_VERSION for name, rows in self.training.items() if isinstance(rows, PreparedRows)}

    def metrics(self) -> dict[str, float]:
        """Return the counts as metrics, `data/<source>/num_rows` and so on."""
        return {
            f"data/{name}/{key}": float(value)
            for name, counts in self.counts.items()
            for key, value in asdict(counts).items()
        }


def build_data(
    config: DataConfig,
    seed: int,
    *,
    tokenizer_folder: Path,
    dialogues: Mapping[str, Iterable[TokenizedDocument]] | None = None,
    mixes: Sequence[Mix] = (),
    taken: Mapping[str, int] | None = None,
) -> Data:
    """Return the data of a stage. The tokenizer is loaded or trained as in `prepare_tokenizer`.

    dialogues: documents of each source of kind dialogues. mixes: weights of the sources by the first row at which they
    apply; empty uses the weights in `config.sources` for all rows. taken: see `Loader`. Raises ConfigError for settings
    that do not fit the data, and DataError for data that cannot be read or is empty.
    """
    given = dict(dialogues or {})
    _check_dialogues(config, given)
    unreadable: dict[str, list[str]] = {name: [] for name in config.sources}
    texts = _read_texts(config, unreadable=unreadable)
    tokenizer = _tokenizer(config, texts, folder=tokenizer_folder, num_rows=None, dialogue_texts=())
    texts = _renderable(texts, config, template=tokenizer.template_or_none, unreadable=unreadable)
    digests = {name: digest_of(documents) for name, documents in texts.items()}
    tokenized = {name: _tokenize(documents, tokenizer, name=name) for name, documents in texts.items()}
    keys = {name: [document.key for document in documents] for name, documents in texts.items()}
    for name, documents in given.items():
        tokenized[name] = _distinct(documents)
        if not tokenized[name]:
            raise DataError(f"data.sources.{name} has no dialogues: give it more num_documents, or weight 0")
        keys[name] = [_identity(document) for document in tokenized[name]]
        digests[name] = hashlib.sha256("".join(keys[name]).encode()).hexdigest()
    training, held_out = _split(tokenized, keys, rule=hold_out_of(config))
    prepared = prepared_sources(config, tokenizer)
    digests |= {name: source.digest for name, source in prepared.items()}
    rows = _rows(training, config, seed=seed, tokenizer=tokenizer)
    rows |= {name: source.rows(Part.training) for name, source in prepared.items()}
    for name, packed in rows.items():
        dropped = prepared[name].index.counts.num_unreadable if name in prepared else len(unreadable[name])
        packed.counts.num_dropped_unreadable = dropped
        _log_counts(name, packed.counts, seq_len=config.seq_len)
    return Data(
        loader=Loader(
            rows,
            mixes=mixes or [Mix(first_row=0, weights=config.mix_weights()[0])],
            seed=seed,
            pad_id=tokenizer.pad_id,
            taken=taken,
        ),
        training=rows,
        validation=_validation(
            _rows(held_out, config, seed=_VALIDATION_SEED, tokenizer=tokenizer)
            | {name: source.rows(Part.held_out) for name, source in prepared.items()},
            config,
            tokenizer=tokenizer,
        ),
        tokenizer=tokenizer,
        digests=digests | {"tokenizer": tokenizer.digest},
        counts={name: packed.counts for name, packed in rows.items()},
    )


def _renderable(
    texts: Mapping[str, list[Document]],
    config: DataConfig,
    *,
    template: ChatTemplate | None,
    unreadable: Mapping[str, list[str]],
) -> dict[str, list[Document]]:
    """Return the documents of each source without those that the template refuses, if the source drops these."""
    return {
        name: [*renderable(documents, config.sources[name], template=template, errors=unreadable[name])]
        for name, documents in texts.items()
    }


def prepare_tokenizer(
    config: DataConfig, *, folder: Path, num_rows: int | None = None, dialogue_texts: Iterable[str] = ()
) -> Tokenizer:
    """Return the tokenizer in `config.tokenizer.path`, else that in `folder`, else that of a prepared source.

    Without one, train one and save it in `folder`.

    num_rows: rows of the model's embedding, the upper limit of the vocabulary; None when there is no model.

    Training text is the training split of each source, up to its weight's share of `max_characters`, and
    `dialogue_texts`: rendered dialogues, whose special tokens this function replaces by newlines. `build_data` takes
    dialogues as tokens, so a stage with dialogues calls this function first.
    """
    texts = {} if _tokenizer_folder(config, folder) else _read_texts(config)
    return _tokenizer(config, texts, folder=folder, num_rows=num_rows, dialogue_texts=dialogue_texts)


def _check_dialogues(config: DataConfig, dialogues: Mapping[str, object]) -> None:
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one source")
    wanted = {name for name, source in config.sources.items() if source.kind is SourceKind.dialogues}
    if wanted != set(dialogues):
        raise ConfigError(
            f"data.sources of kind dialogues are {sorted(wanted)}, but this stage makes {sorted(dialogues)}: "
            "remove the sources that it does not make"
        )


def _read_texts(config: DataConfig, *, unreadable: dict[str, list[str]] | None = None) -> dict[str, list[Document]]:
    """Return the documents of each source of texts. unreadable: gets the errors of dropped records, by source."""
    return {
        name: read_documents(source, name=name, unreadable=(unreadable or {}).get(name))
        for name, source in config.sources.items()
        if source.kind not in (SourceKind.dialogues, SourceKind.prepared)
    }


def _tokenizer(
    config: DataConfig,
    texts: Mapping[str, list[Document]],
    *,
    folder: Path,
    num_rows: int | None,
    dialogue_texts: Iterable[str],
) -> Tokenizer:
    source = _tokenizer_folder(config, folder)
    if source is not None:
        tokenizer = load_tokenizer(config.tokenizer, source, num_rows=num_rows)
        _check_size(tokenizer, config, source=source, num_rows=num_rows)
        _log.info("tokenizer of %d tokens read from %s", tokenizer.vocab_size, source)
        return tokenizer
    wanted = config.tokenizer.vocab_size
    size = num_rows if wanted is None else wanted
    if size is None:
        raise ConfigError("data.tokenizer.vocab_size is null and there is no model: give the number of tokens to train")
    template = template_named(config.tokenizer.template)
    chosen = [*_tokenizer_texts(config, texts), *_dialogue_texts(config, dialogue_texts)]
    tokenizer = train_tokenizer(chosen, vocab_size=size, template=template)
    if tokenizer.vocab_size < size and wanted is not None:
        raise DataError(
            f"data.tokenizer.vocab_size is {wanted}, the texts give {tokenizer.vocab_size} tokens: give more text, or "
            f"remove data.tokenizer.vocab_size; model.vocab_size can be {tokenizer.vocab_size} or any larger number "
            "(a model that starts from weights keeps theirs)"
        )
    if num_rows is not None and tokenizer.vocab_size < num_rows and not config.tokenizer.shrink_model:
        _log.warning(
            "model.vocab_size is %d, and the tokenizer has %d tokens: the remaining rows of the embedding are never "
            "used%s",
            *(num_rows, tokenizer.vocab_size),
            "" if config.tokenizer.retrain else f"; model.vocab_size={tokenizer.vocab_size} removes them",
        )
    tokenizer.save(folder)
    num_characters = sum(map(len, chosen))
    _log.info("tokenizer of %d tokens trained on %d characters", tokenizer.vocab_size, num_characters)
    return tokenizer


def _tokenizer_folder(config: DataConfig, folder: Path) -> Path | None:
    """Return the folder of the tokenizer: the configured one, else `folder`, else that of the first prepared source."""
    if config.tokenizer.path is not None:
        return user_path(config.tokenizer.path)
    if holds_tokenizer(folder):
        return folder
    for source in prepared_folders(config).values():
        if not holds_tokenizer(source / TOKENIZER):
            raise DataError(f"{source / TOKENIZER} is missing: copy the prepared folder again, as a whole")
        return source / TOKENIZER
    return None


def _check_size(tokenizer: Tokenizer, config: DataConfig, *, source: Path, num_rows: int | None) -> None:
    wanted, num_tokens = config.tokenizer.vocab_size, tokenizer.vocab_size
    if wanted is not None and wanted != num_tokens:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {wanted}, the tokenizer in {source} has {num_tokens} tokens: "
            "remove data.tokenizer.vocab_size, which applies to trained tokenizers only"
        )
    if num_rows is not None and num_tokens > num_rows:
        raise ConfigError(
            f"model.vocab_size is {num_rows}, the tokenizer in {source} has {num_tokens} tokens: "
            f"set model.vocab_size to {num_tokens} or more, or give the tokenizer of the weights"
        )


def _tokenizer_texts(config: DataConfig, texts: Mapping[str, list[Document]]) -> list[str]:
    template = template_named(config.tokenizer.template)
    total, rule = sum(config.sources[name].weight for name in texts), hold_out_of(config)
    chosen = []
    for name, documents in texts.items():
        budget = config.tokenizer.max_characters * config.sources[name].weight / total if total else 0.0
        parts = rule.parts([document.key for document in documents])
        training = [document for document, part in zip(documents, parts, strict=True) if part is Part.training]
        training = [*renderable(training, config.sources[name], template=template, errors=[])]
        for document in sorted(training, key=lambda document: key_hash(document.key, choice=Choice.train_tokenizer)):
            if budget <= 0:
                break
            text = pieces_to_text(document.rendered(template))
            chosen.append(without_specials(text, template=template)[: int(budget) + 1])
            budget -= len(text)
    return chosen


def _dialogue_texts(config: DataConfig, texts: Iterable[str]) -> list[str]:
    template = template_named(config.tokenizer.template)
    budget = config.tokenizer.max_characters * _DIALOGUE_SHARE
    chosen = []
    for text in texts:
        if budget <= 0:
            break
        chosen.append(without_specials(text, template=template))
        budget -= len(text)
    return chosen


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer, *, name: str) -> list[TokenizedDocument]:
    """Return the documents as tokens, each starting with `[BOS]` or its own special token."""
    tokenized = []
    chunks = range(0, len(documents), _DOCUMENTS_PER_CALL)
    with progress(len(chunks), f"tokenize {name}") as advance:
        for begin in chunks:
            try:
                for tokens_N, mask_N in tokenize(documents[begin : begin + _DOCUMENTS_PER_CALL], tokenizer):
                    tokenized.append(TokenizedDocument(tokens=tokens_N, loss_mask=mask_N, source=name))
            except DataError as error:
                raise DataError(f"data.sources.{name}: {error}") from error
            advance("")
    return tokenized


def _identity(document: TokenizedDocument) -> str:
    return hashlib.sha256(np.asarray(document.tokens, dtype=np.int64).tobytes()).hexdigest()


def _distinct(documents: Iterable[TokenizedDocument]) -> list[TokenizedDocument]:
    return list({_identity(document): document for document in documents}.values())


def _split(
    tokenized: Mapping[str, list[TokenizedDocument]], keys: Mapping[str, list[str]], *, rule: HoldOut
) -> tuple[dict[str, list[TokenizedDocument]], dict[str, list[TokenizedDocument]]]:
    """Return training and validation documents. Documents held out in one source are excluded from training in all."""
    held_out: dict[str, list[TokenizedDocument]] = {}
    training: dict[str, list[TokenizedDocument]] = {}
    for name, documents in tokenized.items():
        parts = rule.parts(keys[name])
        held_out[name] = [document for document, part in zip(documents, parts, strict=True) if part is Part.held_out]
        training[name] = [document for document, part in zip(documents, parts, strict=True) if part is Part.training]
        if not held_out[name]:
            _log.warning("data.sources.%s has a single document: it is trained on, and none is held out", name)
    out_of_any = {_identity(document) for documents in held_out.values() for document in documents}
    for name, documents in training.items():
        kept = [document for document in documents if _identity(document) not in out_of_any]
        if len(kept) < len(documents):
            num_dropped = len(documents) - len(kept)
            _log.info("data.sources.%s: %d documents dropped, held out in another source", name, num_dropped)
        training[name] = kept
    return training, held_out


def _rows(
    documents: Mapping[str, list[TokenizedDocument]], config: DataConfig, *, seed: int, tokenizer: Tokenizer
) -> dict[str, Rows]:
    return {
        name: _packed(of_source, config, name=name, seed=seed, tokenizer=tokenizer)
        for name, of_source in documents.items()
    }


def _packed(
    documents: list[TokenizedDocument], config: DataConfig, *, name: str, seed: int, tokenizer: Tokenizer
) -> PackedRows:
    order = list(documents)
    python_stream(seed, "data/pack").shuffle(order)
    overlong = config.sources[name].overlong or config.overlong
    return pack(order, seq_len=config.seq_len, overlong=overlong, bos_id=tokenizer.bos_id)


def _validation(held_out: Mapping[str, Rows], config: DataConfig, *, tokenizer: Tokenizer) -> dict[str, ValidationRows]:
    """Return the validation rows of each source whose rows contain text to predict; log the names of the others."""
    validation = {}
    for name, rows in held_out.items():
        if not rows.counts.num_documents:
            continue
        chosen = _validation_rows(rows, config, tokenizer=tokenizer)
        if chosen.num_characters:
            validation[name] = chosen
        else:
            _log.warning(
                "data.sources.%s is not validated, because its validation rows contain no text to predict; "
                "use a larger data.seq_len or data.validation_rows, or shorter documents",
                name,
            )
    return validation


def _validation_rows(rows: Rows, config: DataConfig, *, tokenizer: Tokenizer) -> ValidationRows:
    batch = rows.batch(rows.sample(config.validation_rows, seed=_VALIDATION_SEED), pad_id=tokenizer.pad_id)
    num_characters = 0
    specials = list(tokenizer.special_names)
    for tokens, mask, segments in zip(
        batch.tokens_BT.numpy(), batch.loss_mask_BT.numpy(), batch.segments_BT.numpy(), strict=True
    ):
        for segment in range(1, int(segments.max()) + 1):
            predicted = tokens[mask & (segments == segment)]
            num_characters += len(tokenizer.decode(predicted[~np.isin(predicted, specials)].tolist()))
    return ValidationRows(batch=batch, num_characters=num_characters)


def _log_counts(name: str, counts: PackingCounts, *, seq_len: int) -> None:
    fill = counts.num_tokens / max(1, counts.num_rows * seq_len)
    _log.info(
        "data.sources.%s: %d documents, %d tokens in %d rows (%.1f%% full); longer than a row: %d split, %d truncated, "
        "%d dropped; without a token to predict: %d dropped",
        *(name, counts.num_documents, counts.num_tokens, counts.num_rows, 100 * fill),
        *(counts.num_split, counts.num_truncated, counts.num_dropped, counts.num_dropped_untrainable),
    )
