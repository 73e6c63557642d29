"""Converts the `tiktoken.model` of a Kimi release to a tokenizer of the library `tokenizers`, without running its code.

The file holds one token a line: its bytes in base64 and its rank. 256 slots for special tokens follow the ranks; the
names of some stand in `tokenizer_config.json`, the others are called `<|reserved_token_ID|>`. The pattern that splits
text is a literal in `tokenization_kimi.py`, which is parsed and never executed.

BPE in tiktoken joins the pair whose result has the smallest rank. The same follows from a list of merges: each way to
divide a token into two tokens, in the order of the result's rank. The original cuts a text after 400,000 characters,
and after 25,000 characters without (or of) white space; this conversion does not, so that such texts can differ there.
"""

import ast
import base64
import binascii
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.data.byte_level import CHARACTERS
from moetrain.data.tokenizer_files import read_json
from moetrain.errors import DataError

_log = logging.getLogger(__name__)

TIKTOKEN_FILE = "tiktoken.model"
NUM_SLOTS = 256
"""Ids after the ranks, for special tokens."""
_TEXTS = (
    "The model's weights weren't read: parseHTMLNode(x_TD, 1234567) != None\r\n\t  # TODO",
    "北京是中国的首都。MixedCase和中文 2024年、第1234567号 🙂👩\u200d🔬",
    "ΩΜΕΓΑ naïve Привет שלום e\u0301 \u00a0 \n\n",
)
_CODE_FILE = "tokenization_kimi.py"
_NOT_HAN = r"&&[^\p{Han}]"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}" + _NOT_HAN, r"\p{Ll}\p{Lm}\p{Lo}\p{M}" + _NOT_HAN
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Pattern of all Kimi releases from K2 on, for folders without `tokenization_kimi.py`."""


def read_tiktoken(path: Path) -> HFTokenizer:
    """Return the tokenizer in a `tiktoken.model`, with the names and the pattern that lie beside it.

    All slots are special tokens, in the order of their ids. Raises DataError that names the file and line: for a line
    that is no token, for ranks with a gap, for a byte without a token, for names outside the slots, and when
    `config.json` beside the file states another size of the vocabulary.
    """
    inner = _without_slots(path)
    num_ranks = inner.get_vocab_size()
    names = _names(path.parent / "tokenizer_config.json", num_ranks=num_ranks)
    _check_vocab_size(path, num_tokens=num_ranks + NUM_SLOTS)
    slots = range(num_ranks, num_ranks + NUM_SLOTS)
    tokens = [names.get(slot, f"<|reserved_token_{slot}|>") for slot in slots]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    for slot, token in zip(slots, tokens, strict=True):
        if inner.token_to_id(token) != slot:
            raise DataError(f"{path}: the special token {token} gets the id {inner.token_to_id(token)}, not {slot}")
    return inner


def _without_slots(path: Path) -> HFTokenizer:
    """Return the tokenizer without its special tokens."""
    ranks = _ranks(path)
    vocabulary = {_visible(token): rank for token, rank in ranks.items()}
    inner = HFTokenizer(models.BPE(vocab=vocabulary, merges=[*_merges(ranks)], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern(path.parent / _CODE_FILE)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def check_same(inner: HFTokenizer, path: Path) -> None:
    """Raise DataError when `inner`, the `tokenizer.json` beside a `tiktoken.model`, encodes a text otherwise.

    Some programs write such a file without the pattern of the release, so that words are split otherwise.
    """
    original = _without_slots(path)
    for text in _TEXTS:
        ids, theirs = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (inner, original))
        if ids != theirs:
            raise DataError(
                f"tokenizer.json gives {text[:40]!r} other tokens ({ids[:6]}) than {path.name} beside it "
                f"({theirs[:6]}): remove the one that the weights were not trained with"
            )


def _ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token, in order of rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path} line {number} is {line[:40]!r}: give the bytes of a token in base64 and its rank; copy the "
                "file again"
            ) from None
        if value != len(ranks) or token in ranks or not token:
            raise DataError(
                f"{path} line {number} has the rank {value} and the bytes {token[:20]!r}: the ranks must count from 0 "
                "without a gap, and no token may stand there twice; copy the file again"
            )
        ranks[token] = value
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise DataError(f"{path} has no token for the byte {byte:#04x}, so not every text can be encoded: copy it")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """Yield each way to divide a token into two tokens, ordered by the ranks of the token and of the two parts."""
    for token in ranks:
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = sorted((ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks)
        yield from ((_visible(a), _visible(b)) for _, _, a, b in found)


def _visible(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


def _names(path: Path, *, num_ranks: int) -> dict[int, str]:
    """Return the names of special tokens by id, from `added_tokens_decoder`."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: it names the special tokens of {TIKTOKEN_FILE}; copy it from the release"
        )
    entries = read_json(path).get("added_tokens_decoder")
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path} has no added_tokens_decoder, which names the special tokens of {TIKTOKEN_FILE}")
    names: dict[int, str] = {}
    for key, entry in entries.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or not key.isdecimal():
            raise DataError(f"{path}: added_tokens_decoder holds {key!r}: {str(entry)[:40]!r}, which is no token")
        if not num_ranks <= int(key) < num_ranks + NUM_SLOTS:
            raise DataError(
                f"{path} gives {name} the id {key}; {TIKTOKEN_FILE} has {num_ranks} ranks, so special tokens have the "
                f"ids {num_ranks} to {num_ranks + NUM_SLOTS - 1}: both files must be of the same release"
            )
        if name in names.values():
            raise DataError(f"{path}: added_tokens_decoder names {name} twice")
        names[int(key)] = name
    return names


def _check_vocab_size(path: Path, *, num_tokens: int) -> None:
    config = path.parent / "config.json"
    if not config.is_file():
        return
    values = read_json(config)
    inner = values.get("text_config")
    stated = (inner if isinstance(inner, dict) else values).get("vocab_size")
    if stated is not None and stated != num_tokens:
        raise DataError(
            f"{path} gives {num_tokens} tokens ({NUM_SLOTS} of them special), {config.name} has vocab_size {stated}: "
            "both files must be of the same release"
        )


def _pattern(path: Path) -> str:
    """Return the literal `pat_str` of the release's code, or the stored pattern when there is no such file."""
    if not path.is_file():
        _log.warning("%s does not exist: text is split by the pattern of Kimi K2", path)
        return KIMI_PATTERN
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise DataError(f"{path} is not Python code ({error}): copy it again, or remove it") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and "pat_str" in _targets(node):
            pattern = _literal(node.value)
            if pattern is None:
                raise DataError(
                    f"{path} line {node.lineno}: pat_str is no literal, and the code is not executed; remove the file "
                    "to use the pattern of Kimi K2, if it is the same"
                )
            try:
                Regex(pattern)
            except Exception as error:  # the library raises nothing narrower
                raise DataError(
                    f"{path} line {node.lineno}: pat_str is no pattern ({error}): copy the file again"
                ) from error
            return pattern
    _log.warning("%s has no pat_str: the pattern of Kimi K2 is used", path)
    return KIMI_PATTERN


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _literal(node: ast.expr) -> str | None:
    """Return the value of a string, or of `"x".join([...])` of strings; None for any other expression."""
    separator: Any = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        separator, node = _constant(node.func.value), node.args[0] if len(node.args) == 1 else node
        parts = _constant(node)
        if isinstance(separator, str) and isinstance(parts, list | tuple):
            return separator.join(parts) if all(isinstance(part, str) for part in parts) else None
        return None
    value = _constant(node)
    return value if isinstance(value, str) else None


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
