"""The tokenizer of a stage: trained on the mixture as byte-level BPE, or read from a folder.

A trained tokenizer has the special tokens of the chat template at the end of its vocabulary, as the released Kimi K2
does. It splits text into single digits, runs of letters and runs of punctuation, each with an optional space before it.
An identifier such as `k3f` thus has the same tokens in quotes, in JSON and in a tool result.

A tokenizer that is read requires an end-of-document token. It requires the tokens of the chat template only when they
are used. Text is never encoded as a control token, whatever the file states about its tokens.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.pieces import BOS, EOS, PAD, ROLES, UNK
from moetrain.chat.registry import recognised, template_names
from moetrain.chat.template import ChatTemplate
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.byte_level import BYTES
from moetrain.data.config import NUM_BYTES
from moetrain.data.spare_tokens import with_tokens
from moetrain.data.tiktoken_file import TIKTOKEN_FILE, check_same, read_tiktoken
from moetrain.data.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_KEYS,
    TOKENIZER_CONFIG_FILE,
    check_ids,
    jinja_in,
    names_in,
    read_json,
    switch_off,
)
from moetrain.errors import DataError
from moetrain.files import write_text

_log = logging.getLogger(__name__)

SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Alternatives: letters, one digit, punctuation, trailing space, other space. None joins a quote to a letter."""

TOKENIZER_FILE = "tokenizer.json"
_LONG_TEXT = 20_000  # characters
_MARKER = re.compile(r"[<\[].*[>\]]")
"""Added tokens of this form are control tokens, also when the file does not mark them as special."""


class SpecialIds(dict[str, int]):
    """Ids of a tokenizer's special tokens, by their names in the chat template."""

    def __missing__(self, name: str) -> int:
        """Raise DataError, because the caller requires a token that the tokenizer lacks."""
        raise DataError(
            f"the tokenizer has no special token {name}: chats, dialogues and tool use require the tokens of the chat "
            "template; use a tokenizer that has them, or train on conversations with the template named as "
            "data.tokenizer.template, which puts them in unused rows of the vocabulary"
        )


_TEXTS = (
    "Hello, world: 42 times",
    "for i in x:\n\treturn  i",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "\u4f60\u597d",
    "\U0001f642",
)
"""Texts that a tokenizer that is read must encode: English, code, Cyrillic, Chinese, an emoji."""


class Tokenizer:
    """Encodes text and decodes ids. Text never encodes to a special id; special ids decode to their names."""

    def __init__(
        self,
        inner: HFTokenizer,
        *,
        names: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
        jinja: str = "",
    ) -> None:
        """Wrap a tokenizer of the library `tokenizers`.

        names: own names of the tokens in the roles of `[BOS]` and so on, where they differ. template: chat template;
        None recognises it from the special tokens and `jinja`, the template beside the tokenizer. Raises DataError when
        there is no end-of-document token, or when text can encode to a control token.
        """
        self._names, self._jinja_read = dict(names or {}), jinja
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        self.template_or_none = template or recognised(added, jinja=jinja)
        """The chat template; None when it is not known."""
        chat_tokens = self.template_or_none.special_tokens if self.template_or_none else []
        own_names = {name: name for name in (*ROLES, *chat_tokens)} | self._names
        ids_by_name = {name: inner.token_to_id(own_name) for name, own_name in own_names.items()}
        self.special_ids = SpecialIds({name: id_ for name, id_ in ids_by_name.items() if id_ is not None})
        if EOS not in self.special_ids:
            raise DataError(
                f"the tokenizer lacks {EOS}, the end of a document: add it, or name the token with this role as "
                f"eos_token in {TOKENIZER_CONFIG_FILE}, or its id as eos_token_id in config.json"
            )
        self.eos_id = self.special_ids[EOS]
        self.bos_id = self.special_ids.setdefault(BOS, self.eos_id)  # as in GPT-2
        self.pad_id = self.special_ids.setdefault(PAD, self.eos_id)  # padding is masked everywhere
        parts = [name for name in (UNK, PAD, BOS, EOS) if name in self.special_ids]  # one token may have several roles
        markers = [name for name in self.special_ids if name not in parts]
        self.special_names: dict[int, str] = {self.special_ids[name]: name for name in [*parts, *markers]}
        self._inner = inner
        self._own_names = {id_: str(inner.id_to_token(id_)) for id_ in self.special_names}
        others = sorted(
            token.content
            for token in inner.get_added_tokens_decoder().values()
            if not token.special and _MARKER.fullmatch(token.content) and token.content not in self._own_names.values()
        )
        self._unmarked = others
        """Tokens that text does not become, although neither the file nor the chat template says so."""
        self._encoder = _encoder_of(inner, [*self._own_names.values(), *others])
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """Rows that an embedding needs: the largest id plus one."""
        self._check_text_gives_no_control_ids()

    @property
    def jinja(self) -> str:
        """The Jinja chat template beside the tokenizer, in files; "" for none.

        It is that of the chat template if the tokenizer has all of its tokens, else the one that was read.
        """
        row = self.template_or_none
        has_all = row is not None and all(name in self.special_ids for name in row.markers)
        return row.jinja if row is not None and has_all else self._jinja_read

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a generation: end of turn, if the tokenizer has it, and end of document."""
        ends = [EOS] if self.template_or_none is None else [self.template_or_none.syntax.end, EOS]
        return list(dict.fromkeys(self.special_ids[name] for name in ends if name in self.special_ids))

    @property
    def template(self) -> ChatTemplate:
        """Return the chat template. Raises DataError when none is known."""
        if self.template_or_none is None:
            raise DataError(
                "the tokenizer has no chat template that is known: chats, dialogues and tool use require one; train on "
                f"conversations with data.tokenizer.template={'|'.join(template_names())}, which puts the tokens "
                "of the template in unused rows of the vocabulary"
            )
        return self.template_or_none

    @property
    def turn_end_id(self) -> int:
        """Return the id of the token that ends a turn of a chat."""
        return self.special_ids[self.template.syntax.end]

    @property
    def digest(self) -> str:
        """Return the sha256 of the tokenizer's file and of what else decides about tokens.

        These are the name of a chat template other than the default, and control tokens that the file does not mark.
        """
        template = "" if self.template_or_none in (None, KIMI_K2) else self.template.name
        content = self._inner.to_str(pretty=True) + template + "".join(self._unmarked)
        return hashlib.sha256(content.encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`: merges, vocabulary, added tokens, and how text is split."""
        content: dict[str, Any] = json.loads(self._inner.to_str())
        return content

    def check_chat(self) -> None:
        """Raise DataError when a token of the chat template is missing."""
        for name in self.template.markers:
            self.special_ids[name]

    def with_template(self, template: ChatTemplate, *, num_rows: int | None = None) -> "Tokenizer":
        """Return the tokenizer with another chat template. Tokens that it lacks take unused rows of the vocabulary.

        num_rows: rows of the model's embedding; None is any number. Raises ConfigError when there are too few.
        """
        missing = [name for name in template.markers if self._inner.token_to_id(name) is None]
        inner = with_tokens(self._inner, missing, num_rows=num_rows) if missing else self._inner
        return Tokenizer(inner, names=self._names, template=template)

    def _check_text_gives_no_control_ids(self) -> None:
        control = {id_ for id_, name in self.special_names.items() if name != UNK}
        names = [self._own_names[id_] for id_ in sorted(control)]
        samples = [*names, *(f"a{name}b" for name in names), *(f" {name} " for name in names), "".join(names)]
        for sample, ids in zip(samples, self.encode_batch(samples), strict=True):
            if control_ids := control.intersection(ids):
                raise DataError(
                    f"the tokenizer encodes the text {sample[:40]!r} as the control token "
                    f"{self._own_names[min(control_ids)]}, so a document could imitate markers; use a tokenizer that "
                    "encodes such text with ordinary tokens"
                )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special."""
        if len(text) > _LONG_TEXT:  # other threads of this process wait for a single call, not for a batch
            return self.encode_batch([text])[0]
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Special tokens give their names, invalid UTF-8 gives the replacement character."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, with all control tokens marked as special."""
        return str(self._encoder.to_str())

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of one token. Those of a text's tokens, joined, are the UTF-8 of the text.

        This holds for byte-level tokenizers, as all trained here; of others it returns the text of the token alone.
        """
        name = self._byte_names.get(token)
        return self.decode([token]).encode() if name is None else bytes(BYTES[character] for character in name)

    @functools.cached_property
    def _byte_names(self) -> dict[int, str]:
        """Names in the byte-level alphabet, by id; empty when the tokenizer is of another kind."""
        decoder = json.loads(self._inner.to_str())["decoder"] or {}
        parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        if not any(part.get("type") == "ByteLevel" for part in parts):
            return {}
        added = self._inner.get_added_tokens_decoder()
        vocabulary = self._inner.get_vocab(with_added_tokens=False).items()
        return {id_: name for name, id_ in vocabulary if id_ not in added and set(name) <= BYTES.keys()}

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer reads. Each file is written atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        own_name = {name: self._own_names[id_] for name, id_ in self.special_ids.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key: own_name[name] for name, key in CONFIG_KEYS.items() if name in own_name},
            "additional_special_tokens": [
                name for name in own_name if name not in (*CONFIG_KEYS, *map(own_name.get, CONFIG_KEYS))
            ],
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e9),
        }
        if self.jinja:
            write_text(folder / CHAT_TEMPLATE_FILE, self.jinja)
        write_text(folder / TOKENIZER_CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / TOKENIZER_FILE, self._inner.to_str(pretty=True))

    def _check_texts(self, path: Path) -> None:
        """Raise DataError when a text gives no token; warn when decoding its tokens does not return it."""
        changed: list[str] = []
        for text in _TEXTS:
            ids = self.encode(text)
            if not ids:
                raise DataError(
                    f"{path}: the text {text!r} gives no token, so text would be lost: copy the tokenizer again, or "
                    "use one with a byte-level pre_tokenizer, byte fallback or an unk_token"
                )
            changed += [text] if self.decode(ids) != text else []
        if changed:
            found = self.decode(self.encode(changed[0]))
            _log.warning("%s: the text %r comes back from its tokens as %r", path, changed[0], found)

    def _say_template(self, folder: Path) -> None:
        """Log which chat template is used instead of the one in `folder`, when they differ."""
        theirs, row = jinja_in(folder), self.template_or_none
        if theirs and row is not None and self.jinja == theirs != row.jinja:
            missing = next(name for name in row.markers if name not in self.special_ids)
            _log.warning(
                "%s: its chat template is a form of %s, and the tokenizer has no token %s: chats are refused, and "
                "exports keep the template (docs/templates.md)",
                *(folder, row.name, missing),
            )
        elif theirs and row is not None and not any(name in theirs for name in row.markers):
            _log.warning(
                "%s: the tokenizer has the tokens of the chat template %s, and chat_template has none of them: chats "
                "are rendered as %s; name another one as data.tokenizer.template when training if that is wrong",
                *(folder, row.name, row.name),
            )
        elif theirs and row is not None and theirs != row.jinja:
            _log.info("%s: its chat template is a form of %s, which is used (docs/templates.md)", folder, row.name)
        elif theirs and row is None:
            _log.info("%s: its chat template is unknown (plain text needs none)", folder)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` in `folder`, or `tiktoken.model`; truncation, padding and dropout are switched off.

        Raises DataError that names the path.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file() and (folder / TIKTOKEN_FILE).is_file():
            return cls._load_tiktoken(folder / TIKTOKEN_FILE)
        if not path.is_file():
            raise DataError(f"{path} does not exist: give the folder of a tokenizer, or null to train one")
        content = read_json(path)
        names = names_in(folder / TOKENIZER_CONFIG_FILE, content)
        switched_off = switch_off(content)
        try:
            inner = HFTokenizer.from_str(json.dumps(content))
            check_ids(inner, content)
            if (folder / TIKTOKEN_FILE).is_file():
                check_same(inner, folder / TIKTOKEN_FILE)
            tokenizer = cls(inner, names=names, jinja=jinja_in(folder))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the library raises nothing narrower for a file that is no tokenizer
            reason = " ".join(str(error).split())
            raise DataError(f"{path} holds no tokenizer ({reason}): copy the tokenizer there again") from error
        tokenizer._check_texts(path)
        tokenizer._say_template(folder)
        if switched_off:
            _log.info("%s sets %s: switched off, so that all text is encoded", path, " and ".join(switched_off))
        return tokenizer

    @classmethod
    def _load_tiktoken(cls, path: Path) -> "Tokenizer":
        """Convert a `tiktoken.model`, and check that each byte comes back."""
        inner = read_tiktoken(path)
        added = [{"content": token.content} for token in inner.get_added_tokens_decoder().values()]
        names = names_in(path.parent / TOKENIZER_CONFIG_FILE, {"added_tokens": added})
        try:
            tokenizer = cls(inner, names=names, jinja=jinja_in(path.parent))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        text = "".join(map(chr, (*range(0x250), 0x4E2D, 0x1F642)))  # has bytes of each length of UTF-8
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise DataError(f"{path}: decoding the tokens of a text does not return it: copy the release's files again")
        tokenizer._say_template(path.parent)
        _log.info("%s: %d tokens converted", path, tokenizer.vocab_size)
        return tokenizer


def holds_tokenizer(folder: Path) -> bool:
    """Return whether `folder` has a file that `Tokenizer.load` reads."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, TIKTOKEN_FILE))


def _encoder_of(inner: HFTokenizer, names: Iterable[str]) -> HFTokenizer:
    """Return a tokenizer that encodes like `inner`, except that the text of control tokens gives ordinary tokens.

    names: the control tokens. The library does this only for tokens marked as special. Some files lack the mark, such
    as Qwen's for `<think>`.
    """
    content = json.loads(inner.to_str())
    control = set(names)
    unmarked = [token for token in content["added_tokens"] if token["content"] in control and not token["special"]]
    encoder = inner
    if unmarked:
        for token in unmarked:
            token["special"] = True
        encoder = HFTokenizer.from_str(json.dumps(content))
    encoder.encode_special_tokens = True
    return encoder


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, template: ChatTemplate = KIMI_K2) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `vocab_size` tokens, or fewer when the texts contain too few pairs.

    It has the special tokens of `template`. The same texts give the same tokenizer file on any machine. Raises
    DataError when `vocab_size` is less than the number of bytes and special tokens.
    """
    special_tokens = template.special_tokens
    num_ordinary = vocab_size - len(special_tokens)
    if num_ordinary < NUM_BYTES:
        raise DataError(
            f"a tokenizer of {vocab_size} tokens has no room for the bytes: give at least "
            f"{NUM_BYTES + len(special_tokens)}, for {NUM_BYTES} bytes and {len(special_tokens)} special tokens"
        )
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens])
    return Tokenizer(inner, names=template.role_names, template=template)


def without_specials(text: str, *, template: ChatTemplate = KIMI_K2) -> str:
    """Return `text` with each special token replaced by a newline, for training a tokenizer on rendered dialogues.

    A space would become part of the token of the next word; a newline does not.
    """
    for name in template.special_tokens:
        text = text.replace(name, "\n")
    return text
