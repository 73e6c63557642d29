"""Formats: functions that turn a record of a data set into a document of pieces (text or special tokens).

A plugin adds a format with `register_format("alpaca", function)`. The function takes a record and the name of its
column. It returns text, or pieces when a part is not to be learned or a special token is needed, or a conversation,
which the chat template of the tokenizer renders.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrain.chat.messages import Message
from moetrain.chat.pieces import EOS, Piece, pieces_to_text
from moetrain.chat.records import UnknownKeyError, check_keys, read_declaration, read_messages, with_outer_objects
from moetrain.chat.template import ChatTemplate
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, before it is rendered. declaration: compact JSON of its tools, or ""."""

    messages: Sequence[Message]
    declaration: str = ""


Record = Mapping[str, Any]
Format = Callable[[Record, str], str | Sequence[Piece] | Chat]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document before tokenization. The hash of `key` decides whether it is for training or validation.

    chat: the conversation that it is, if it is one; `pieces` and `key` are then those of the default chat template, so
    that neither the split nor a source's digest depends on the template of a tokenizer. where: prints as the file and
    line of a conversation.
    """

    key: str
    pieces: tuple[Piece, ...]
    chat: Chat | None = None
    where: object = field(default="", compare=False)

    @property
    def text(self) -> str:
        """Return the text, with the names of special tokens."""
        return pieces_to_text(self.pieces)

    @property
    def identity(self) -> str:
        """Return what two documents that are identical share: the text, and what of it is learned."""
        learned = "".join("01"[piece.is_sampled] for piece in self.pieces)
        return self.text if "0" not in learned else f"{self.text}\0{learned}"

    @property
    def words(self) -> str:
        """Return the text without special tokens, which separate what stands beside them."""
        return "".join("\n" if piece.is_special else piece.text for piece in self.pieces)

    @property
    def has_text(self) -> bool:
        """Whether there is more than special tokens and white space."""
        return any(piece.text.strip() for piece in self.pieces if not piece.is_special)

    def rendered(self, template: ChatTemplate | None) -> Sequence[Piece]:
        """Return the pieces in a chat template. Raises DataError for a conversation that it cannot render."""
        if self.chat is None or template is KIMI_K2:
            return self.pieces
        if template is None:
            raise DataError(
                f"{self.where} is a conversation, and the tokenizer has no chat template that is known: name one as "
                "data.tokenizer.template"
            )
        try:
            return template.conversation_pieces(self.chat.messages, self.chat.declaration)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error


def text_document(text: str, *, key: str | None = None) -> Document:
    """Return a document of text that ends with `[EOS]`; its key is the text unless one is given."""
    pieces = (Piece(text=text, is_sampled=True), Piece(text=EOS, is_special=True, is_sampled=True))
    return Document(key=key or text, pieces=pieces)


def register_format(name: str, function: Format) -> None:
    """Register `function` as `data.sources.*.format=name`. Raises ConfigError when the name is taken."""
    if name in _FORMATS:
        raise ConfigError(f"the data format {name} is registered already: choose another name")
    _FORMATS[name] = function


def format_named(name: str) -> Format:
    """Return a registered format. Raises ConfigError that lists the registered ones."""
    if name not in _FORMATS:
        names = ", ".join(sorted(_FORMATS))
        raise ConfigError(f"data.sources.*.format is {name}: give one of {names}, or register it in a plugin")
    return _FORMATS[name]


def document_of(
    record: Record, *, column: str, format: Format, where: object, ignore: Collection[str] = ()
) -> Document:
    """Return the record as a document.

    ignore: keys that are removed from the record, and from the messages, calls and tools in it. where: prints as the
    file and line, with which a DataError begins.
    """
    if column not in record:
        has = f"it has {', '.join(map(str, record))}: name one of them as field" if record else "it is empty"
        raise DataError(f"{where} has no column {column}: {has}")
    try:
        result = format(_without(record, ignore, column=column), column)
        chat = result if isinstance(result, Chat) else None
        if isinstance(result, Chat):
            result = KIMI_K2.conversation_pieces(result.messages, result.declaration)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # raised by a plugin's format
        reason = " ".join(str(error).split())
        raise DataError(f"{where} does not fit its format: {type(error).__name__}: {reason}") from error
    if isinstance(result, str):
        return _encodable(text_document(result), where=where)
    document = Document(key=pieces_to_text(result), pieces=tuple(result), chat=chat, where=where)
    return _encodable(document, where=where)


def _without(record: Record, ignore: Collection[str], *, column: str) -> Record:
    """Return the record without the ignored keys, also in its messages, in their calls and in the declared tools."""
    if not ignore:
        return record
    inside = {column: _OBJECTS_INSIDE, "tools": _OBJECTS_INSIDE}
    return {key: _filtered(value, ignore, inside=inside.get(key)) for key, value in record.items() if key not in ignore}


_OBJECTS_INSIDE = ("content", "tool_calls", "function")
"""Keys of messages, calls and declarations whose objects are of the chat form too, unlike arguments and schemas."""


def _filtered(value: Any, ignore: Collection[str], *, inside: Collection[str] | None) -> Any:
    """Return a value without the ignored keys of its objects. inside: keys below which it goes on; None leaves it."""
    if inside is None:
        return value
    if isinstance(value, list):
        return [_filtered(item, ignore, inside=inside) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {key: item for key, item in value.items() if key not in ignore}
    return {key: _filtered(item, ignore, inside=inside if key in inside else None) for key, item in kept.items()}


def _encodable(document: Document, *, where: object) -> Document:
    """Return the document. Raises DataError when it contains a lone surrogate, which a JSON escape can produce."""
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(document.text[error.start])
        raise DataError(
            f"{where} holds U+{half:04X}, half of a surrogate pair, which UTF-8 cannot encode: remove it"
        ) from error
    return document


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(
            f"column {column} holds {type(value).__name__} {str(value)[:40]!r} where text is expected: name another "
            "field, or drop such records with data.sources.NAME.unreadable=drop"
        )
    return value


def _messages(record: Record, column: str) -> Chat:
    """Return a conversation in the chat-completions form, after the declaration of the tools in the column `tools`."""
    try:
        check_keys(record, (column, "tools", "parallel_tool_calls"), place="the record")
        declared = read_declaration(with_outer_objects(record.get("tools")))
        messages = read_messages(record[column])
    except UnknownKeyError as error:
        cure = "data.sources.NAME.ignore=[KEY] removes a key from records, messages, calls and declarations"
        raise DataError(f"{error} ({cure})") from None
    return Chat(messages=messages, declaration=declared)


_FORMATS: dict[str, Format] = {"text": _text, "messages": _messages}


def without_nulls(record: Record) -> Record:
    """Return a row of Arrow without the keys that are null in the objects inside its columns.

    Arrow fits one schema to all rows, so each object gains, as nulls, the keys of the same object in other rows. They
    cannot be told apart from nulls that the author wrote.
    """
    return {key: _without_nulls(value) for key, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
