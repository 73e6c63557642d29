"""Byte-level BPE on Hugging Face `tokenizers`: trained on the mixture, or read from a folder.

Special tokens are those of the chat template and come last in the vocabulary, as in the released Kimi K2. They are
never made from text: whoever wants one asks for its id. Words are split so that an identifier such as `k3f` gives the
same tokens in a prompt's quotes, in JSON and in a result: single digits, runs of letters, runs of punctuation, each
with an optional space before it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.template import BOS, EOS, JINJA, PAD, SPECIAL_TOKENS, UNK
from moetrain.data.config import MIN_VOCAB_SIZE, NUM_BYTES
from moetrain.errors import DataError
from moetrain.files import write_text

SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Letters, one digit, punctuation, trailing space, other space; nothing joins a quote to a letter."""

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """Text to ids and back. Text never yields a special id; ids of special tokens decode to their names."""

    def __init__(self, inner: HFTokenizer) -> None:
        found = {name: inner.token_to_id(name) for name in SPECIAL_TOKENS}
        self.special_ids: dict[str, int] = {name: id_ for name, id_ in found.items() if id_ is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in self.special_ids]
        if missing:
            raise DataError(f"the tokenizer lacks the special tokens {', '.join(missing)} of the chat template")
        inner.encode_special_tokens = True  # a file that spells "<|im_end|>" must not end a message
        self._inner = inner
        self.special_names: dict[int, str] = {id_: name for name, id_ in self.special_ids.items()}
        self.bos_id = self.special_ids[BOS]
        self.eos_id = self.special_ids[EOS]
        self.pad_id = self.special_ids[PAD]

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def digest(self) -> str:
        """Return the sha256 of the tokenizer's file."""
        return hashlib.sha256(self._inner.to_str(pretty=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens give their names, broken UTF-8 the replacement character."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer reads; each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in (BOS, EOS, PAD, UNK)],
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e9),
        }
        write_text(folder / CHAT_TEMPLATE_FILE, JINJA)
        write_text(folder / TOKENIZER_CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / TOKENIZER_FILE, self._inner.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` of `folder`. Raises DataError that names the path."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist: give the folder of a tokenizer, or null to train one")
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 at byte {error.start}: copy the tokenizer there again") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}") from error
        try:
            return cls(HFTokenizer.from_str(text))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the library raises nothing narrower for a file that is no tokenizer
            said = " ".join(str(error).split())
            raise DataError(f"{path} holds no tokenizer ({said}): copy the tokenizer there again") from error


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of exactly `vocab_size` tokens; the same texts give the same bytes on any machine.

    Raises DataError when the vocabulary has no room for the bytes, or the texts hold too few pairs to fill it.
    """
    num_ordinary = vocab_size - len(SPECIAL_TOKENS)
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"data.tokenizer.vocab_size is {vocab_size}: give at least {MIN_VOCAB_SIZE}, "
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
    if inner.get_vocab_size() != num_ordinary:
        raise DataError(
            f"the texts give {inner.get_vocab_size()} tokens where {num_ordinary} are wanted: "
            "give more text or a smaller data.tokenizer.vocab_size"
        )
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return Tokenizer(inner)


def without_specials(text: str) -> str:
    """Return `text` with each special token replaced by a newline: how rendered dialogues are shown to the trainer.

    A newline, unlike a space, does not give the word behind a marker a form of its own.
    """
    for name in SPECIAL_TOKENS:
        text = text.replace(name, "\n")
    return text
