"""The tokenizer of a stage: trained on the mixture as byte-level BPE, or read from a folder.

A trained tokenizer has the special tokens of the chat template at the end of its vocabulary, as the released Kimi K2
does. It splits words so that an identifier such as `k3f` has the same tokens in a prompt's quotes, in JSON and in a
result: single digits, runs of letters, runs of punctuation, each with an optional space before it.

A tokenizer that is read needs an end-of-document token, and the tokens of the chat template only where they are used.
Text never becomes a control token, whatever the file says of its tokens.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.jinja import JINJA
from moetrain.chat.template import BOS, EOS, IM_END, PAD, SPECIAL_TOKENS, UNK
from moetrain.data.config import MIN_VOCAB_SIZE, NUM_BYTES
from moetrain.errors import DataError
from moetrain.files import write_text

_log = logging.getLogger(__name__)

SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Letters, one digit, punctuation, trailing space, other space; nothing joins a quote to a letter."""

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


_CONFIG_KEYS = {BOS: "bos_token", EOS: "eos_token", PAD: "pad_token", UNK: "unk_token"}
"""Keys of `tokenizer_config.json` that name a token which plays this part under a name of its own."""


class SpecialIds(dict[str, int]):
    """Ids of the special tokens that a tokenizer has, by their names in the chat template."""

    def __missing__(self, name: str) -> int:
        """Raise DataError: what asks for this token cannot use this tokenizer."""
        raise DataError(
            f"the tokenizer has no special token {name}: chats, dialogues and tool use require the tokens of the chat "
            "template; use a tokenizer that has them"
        )


class Tokenizer:
    """Text to ids and back. Text never yields a special id; ids of special tokens decode to their names."""

    def __init__(self, inner: HFTokenizer, *, names: Mapping[str, str] | None = None) -> None:
        """Wrap a tokenizer of the library; `names` gives the tokens that play `[BOS]` and so on under other names.

        Raises DataError when no token ends a document, or when text can become a control token.
        """
        own_names = {name: name for name in SPECIAL_TOKENS} | dict(names or {})
        found = {name: inner.token_to_id(own_name) for name, own_name in own_names.items()}
        self.special_ids = SpecialIds({name: id_ for name, id_ in found.items() if id_ is not None})
        if EOS not in self.special_ids:
            raise DataError(
                f"the tokenizer lacks {EOS}, the end of a document: add it, or name the token that plays its part as "
                f"eos_token in {TOKENIZER_CONFIG_FILE}"
            )
        self.eos_id = self.special_ids[EOS]
        self.bos_id = self.special_ids.setdefault(BOS, self.eos_id)  # GPT-2 begins documents so
        self.pad_id = self.special_ids.setdefault(PAD, self.eos_id)  # padding is masked everywhere
        parts = [name for name in (UNK, PAD, BOS, EOS) if name in self.special_ids]  # one token may play several
        markers = [name for name in self.special_ids if name not in parts]
        self.special_names: dict[int, str] = {self.special_ids[name]: name for name in [*parts, *markers]}
        self._inner = inner
        self._own_names = {id_: str(inner.id_to_token(id_)) for id_ in self.special_names}
        self._encoder = _encoder_of(inner, self._own_names.values())
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """Rows that an embedding needs: the largest id plus one."""
        self._check_that_text_is_text()

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a generation: the end of a turn, where there is one, and of a document."""
        return [self.special_ids[name] for name in (IM_END, EOS) if name in self.special_ids]

    @property
    def digest(self) -> str:
        """Return the sha256 of the tokenizer's file."""
        return hashlib.sha256(self._inner.to_str(pretty=True).encode()).hexdigest()

    def check_chat(self) -> None:
        """Raise DataError when a token of the chat template is missing."""
        for name in SPECIAL_TOKENS:
            if name != UNK:
                self.special_ids[name]

    def _check_that_text_is_text(self) -> None:
        control = {id_ for id_, name in self.special_names.items() if name != UNK}
        names = [self._own_names[id_] for id_ in sorted(control)]
        samples = [*names, *(f"a{name}b" for name in names), *(f" {name} " for name in names), "".join(names)]
        for sample, ids in zip(samples, self.encode_batch(samples), strict=True):
            if made := control.intersection(ids):
                raise DataError(
                    f"the tokenizer turns the text {sample[:40]!r} into the control token "
                    f"{self._own_names[min(made)]}: a document could steer the model; use a tokenizer that spells "
                    "such text with ordinary tokens"
                )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens give their names, broken UTF-8 the replacement character."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer reads; each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        own_name = {name: self._own_names[id_] for name, id_ in self.special_ids.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key: own_name[name] for name, key in _CONFIG_KEYS.items() if name in own_name},
            "additional_special_tokens": [name for name in own_name if name not in _CONFIG_KEYS],
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e9),
        }
        if IM_END in self.special_ids:
            write_text(folder / CHAT_TEMPLATE_FILE, JINJA)
        write_text(folder / TOKENIZER_CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / TOKENIZER_FILE, self._inner.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` of `folder`, truncation, padding and dropout switched off.

        Raises DataError that names the path.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist: give the folder of a tokenizer, or null to train one")
        content = _read_json(path)
        names = _names_in(folder / TOKENIZER_CONFIG_FILE, content)
        switched_off = _switch_off(content)
        try:
            inner = HFTokenizer.from_str(json.dumps(content))
            _check_ids(inner, content)
            tokenizer = cls(inner, names=names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the library raises nothing narrower for a file that is no tokenizer
            said = " ".join(str(error).split())
            raise DataError(f"{path} holds no tokenizer ({said}): copy the tokenizer there again") from error
        if switched_off:
            _log.info("%s asks for %s: switched off, so that text is encoded whole", path, " and ".join(switched_off))
        return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: copy the tokenizer there again") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__} where an object is expected")
    return content


def _names_in(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the names under which `[BOS]` and so on stand in a tokenizer that does not have them by these names."""
    if not path.is_file():
        return {}
    config = _read_json(path)
    added = content.get("added_tokens")
    there = {token.get("content") for token in added if isinstance(token, dict)} if isinstance(added, list) else set()
    names = {}
    for name, key in _CONFIG_KEYS.items():
        said = config.get(key)
        own_name = said.get("content") if isinstance(said, dict) else said
        if name not in there and isinstance(own_name, str):
            names[name] = own_name
    return names


def _check_ids(inner: HFTokenizer, content: Mapping[str, Any]) -> None:
    """Raise DataError when the library numbers an added token otherwise than the file, as it does after a gap."""
    for token in content.get("added_tokens") or []:
        read = inner.token_to_id(token["content"])
        if read != token["id"]:
            raise DataError(
                f"the file gives {token['content']} the id {token['id']} and the library reads {read}: the ids of "
                "added tokens must follow the vocabulary without a gap"
            )


def _switch_off(content: dict[str, Any]) -> list[str]:
    """Remove from a tokenizer's file what would cut, lengthen or vary the tokens of a text; return what it was."""
    switched_off = [key for key in ("truncation", "padding") if content.get(key)]
    content |= dict.fromkeys(switched_off)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        model["dropout"] = None
        switched_off.append("dropout")
    return switched_off


def _encoder_of(inner: HFTokenizer, names: Iterable[str]) -> HFTokenizer:
    """Return a tokenizer that encodes as `inner` does and spells the control tokens `names` where text holds them.

    The library does that for tokens marked as special alone; some files leave the mark off, as those of Qwen do for
    `<think>`.
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


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of `vocab_size` tokens, or of fewer where the texts hold too few pairs to fill it.

    The same texts give the same bytes on any machine. Raises DataError when the vocabulary has no room for the bytes.
    """
    num_ordinary = vocab_size - len(SPECIAL_TOKENS)
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"a tokenizer of {vocab_size} tokens has no room for the bytes: give at least {MIN_VOCAB_SIZE}, "
            f"{NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
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
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return Tokenizer(inner)


def without_specials(text: str) -> str:
    """Return `text` with each special token replaced by a newline, for training a tokenizer on rendered dialogues.

    A newline, unlike a space, does not give the word after a marker a form of its own.
    """
    for name in SPECIAL_TOKENS:
        text = text.replace(name, "\n")
    return text
