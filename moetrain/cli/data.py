"""`moetrain data`."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.chat.pieces import Piece
from moetrain.chat.registry import template_named
from moetrain.chat.template import ChatTemplate
from moetrain.commands.data import DataRun
from moetrain.data.chat_tokenizer import with_named_template
from moetrain.data.config import SourceConfig, SourceKind
from moetrain.data.preview import SourceSize, measure, spans
from moetrain.data.sources import read_source, renderable
from moetrain.data.store.describe import PreparedPreview
from moetrain.data.store.index import TOKENIZER, prepared_folders
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import user_path

_log = logging.getLogger(__name__)

_WIDTH = 10_000
"""Maximum width of a line in characters. The terminal wraps long lines, so no name or text is truncated."""
_SAMPLED_DIALOGUES = 64
"""Number of dialogues generated to estimate the size of a source of kind dialogues."""


def main(run: DataRun) -> int:
    """Print the size of each source and some of its rendered records; return the exit code."""
    console = Console(highlight=False, soft_wrap=True, width=_WIDTH)
    tokenizer = _tokenizer(run)
    template = tokenizer.template_or_none if tokenizer else template_named(run.data.tokenizer.template)
    sizes: dict[str, SourceSize] = {}
    for name, source in run.data.sources.items():
        if source.kind is SourceKind.prepared:
            assert tokenizer is not None  # that of this source, if no other was given
            preview = PreparedPreview(user_path(str(source.path)), tokenizer=tokenizer)
            sizes[name] = preview.size()
            shown: list[Iterable[Piece]] = list(islice(preview.documents(), run.records))
        else:
            found = _documents(run, name, source, template=template)
            shown = list(islice(found.documents, run.records))
            sizes[name] = measure(
                chain(shown, found.documents),
                num_documents=found.total,
                num_duplicates=found.num_duplicates,
                num_dropped=found.num_dropped,
                tokenizer=tokenizer,
            )
        for number, pieces in enumerate(shown):
            console.print(Text(f"--- {name}, record {number}", style="bold"))
            console.print(_rendered(pieces, run=run, console=console))
    console.print(_table(sizes))
    if any(size.is_sampled for size in sizes.values()):
        console.print("~: estimated from part of the source.", markup=False)
    if tokenizer is None:
        console.print("Tokens are not counted: give data.tokenizer.path or init_from.", markup=False)
    return 0


def _tokenizer(run: DataRun) -> Tokenizer | None:
    if run.data.tokenizer.path is not None:
        tokenizer = Tokenizer.load(user_path(run.data.tokenizer.path))
    elif run.init_from is None:
        folder = next(iter(prepared_folders(run.data).values()), None)
        if folder is None:
            return None
        tokenizer = Tokenizer.load(folder / TOKENIZER)
    else:
        from moetrain.run.weights import read_weights, tokenizer_of  # loads torch

        tokenizer = tokenizer_of(read_weights(run.init_from))
    return with_named_template(tokenizer, run.data.tokenizer)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Documents of a source. total: their number, of which `documents` may yield only the first."""

    documents: Iterator[Iterable[Piece]]
    total: int
    num_duplicates: int = 0
    num_dropped: int = 0


def _documents(run: DataRun, name: str, source: SourceConfig, *, template: ChatTemplate | None) -> _Found:
    """Return the documents of a source. One of kind dialogues yields only its first documents."""
    if source.kind is not SourceKind.dialogues:
        unreadable: list[str] = []
        errors: list[str] = []
        read = read_source(source, name=name, unreadable=unreadable)
        kept = [*renderable(read.documents, source, template=template, errors=errors)]
        if errors:
            _log.warning("data.sources.%s: %d conversations dropped; the first is %s", name, len(errors), errors[0])
        pieces = (document.rendered(template) for document in kept)
        num_dropped = read.num_empty + len(unreadable) + len(errors)
        return _Found(documents=pieces, total=len(kept), num_duplicates=read.num_identical, num_dropped=num_dropped)
    from moetrain.tasks import registry
    from moetrain.tasks.dialogues import conversations  # loads torch

    if template is None:
        raise DataError(
            f"data.sources.{name}: the tokenizer has no known chat template: name it as data.tokenizer.template"
        )
    family = registry.build(run.task, run.run.seed)
    count = min(source.num_documents, max(_SAMPLED_DIALOGUES, run.records))
    dialogues = conversations(
        family, template=template, count=count, seed=run.run.seed, declare_tools=run.task.declare_tools
    )
    return _Found(documents=iter(dialogues), total=source.num_documents)


def _rendered(pieces: Iterable[Piece], *, run: DataRun, console: Console) -> Text:
    """Return a record with its learned parts in green, or between ⟦ and ⟧ when the output has no colour."""
    text = Text()
    for part, is_learned in spans(pieces, max_characters=run.characters):
        if is_learned and console.color_system is None:
            part = f"⟦{part}⟧"
        text.append(part, style="green" if is_learned else "")
    return text


def _table(sizes: dict[str, SourceSize]) -> Table:
    table = Table(box=None)
    columns = ("source", "documents", "duplicates", "dropped", "characters", "tokens", "chars/token", "learned")
    for column in (*columns, "median", "99 %", "longest"):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    for name, size in sizes.items():
        about = "~" if size.is_sampled else ""
        tokens = "-" if size.num_tokens is None else f"{about}{size.num_tokens:,}"
        characters = f"{about}{size.num_characters:,}" if size.num_characters else "-"
        ratio = f"{size.num_characters / size.num_tokens:.2f}" if size.num_tokens and size.num_characters else "-"
        lengths = size.lengths
        table.add_row(
            *(Text(name), f"{size.num_documents:,}", f"{size.num_duplicates:,}", f"{size.num_dropped:,}"),
            *(characters, tokens, ratio),
            f"{size.learned_share:.0%}",
            *(["-"] * 3 if lengths is None else [f"{lengths.median:,}", f"{lengths.high:,}", f"{lengths.longest:,}"]),
        )
    return table
