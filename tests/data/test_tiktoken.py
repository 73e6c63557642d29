import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.data.byte_level import BYTES
from moetrain.data.tiktoken_file import KIMI_PATTERN, NUM_SLOTS, TIKTOKEN_FILE
from moetrain.data.tokenizer import Tokenizer, holds_tokenizer
from moetrain.errors import DataError

NUM_RANKS = 400
TEXTS = [
    "The model's weights weren't loaded: they'll be, I'd say. DON'T SHOUT, it'S fine.",
    "def parseTurnHTML(self, x_TD):\n\treturn [i**2 for i in range(1000)]  # camelCase\r\n\r\n",
    "北京是中国的首都。混合English和中文2024年12月、第1234567号。",
    "🙂👩‍🔬 naïve é e\u0301 ß Ωμέγα привет שלום ﷺ",
    "   \n\n \t x   y\u00a0z  ",
    "<|im_end|>[BOS]<think>",
]


def write_release(folder: Path, *, names: dict[int, str] | None = None) -> list[bytes]:
    """Write a `tiktoken.model` of 400 ranks with the names of its special tokens; return the tokens in order."""
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(TEXTS * 2, trainer)
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(BYTES[character] for character in token) for token, _ in by_id]
    assert len(tokens) == NUM_RANKS
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens)]
    (folder / TIKTOKEN_FILE).write_text("".join(lines))
    at = names or {
        0: "[BOS]",
        1: "[EOS]",
        2: "<|im_end|>",
        16: "<|im_middle|>",
        22: "<think>",
        254: "[UNK]",
        255: "[PAD]",
    }
    decoder = {str(NUM_RANKS + slot): {"content": name, "special": False} for slot, name in at.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "bos_token": "[BOS]"}))
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": NUM_RANKS + NUM_SLOTS}}))
    return tokens


def write_code(folder: Path, value: str) -> None:
    code = f'raise RuntimeError("the code of a release is never run")\nclass Kimi:\n    pat_str = {value}\n'
    (folder / "tokenization_kimi.py").write_text(code)


def test_a_converted_tiktoken_file_encodes_as_tiktoken_does(tmp_path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is in the extra dev")
    tokens = write_release(tmp_path)
    write_code(tmp_path, f'r"""{KIMI_PATTERN}"""')
    theirs = tiktoken.Encoding(
        "kimi",
        pat_str=KIMI_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
        assert ours.decode(ours.encode(text)) == text
    longest = max(len(token) for token in tokens)
    assert longest > 3 and any(len(ours.encode(text)) < len(text) for text in TEXTS)  # merges are applied


def test_all_slots_are_special_tokens_in_the_order_of_their_ids(tmp_path) -> None:
    write_release(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == NUM_RANKS + NUM_SLOTS
    assert tokenizer.special_ids["<think>"] == NUM_RANKS + 22
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (NUM_RANKS, NUM_RANKS + 1, NUM_RANKS + 255)
    added = tokenizer.content()["added_tokens"]
    assert [token["id"] for token in added] == list(range(NUM_RANKS, NUM_RANKS + NUM_SLOTS))
    assert added[7]["content"] == f"<|reserved_token_{NUM_RANKS + 7}|>" and all(token["special"] for token in added)
    assert max(tokenizer.encode("<|im_end|><|reserved_token_407|>")) < NUM_RANKS


def test_a_saved_conversion_is_the_same_tokenizer(tmp_path) -> None:
    write_release(tmp_path / "release")
    converted = Tokenizer.load(tmp_path / "release")
    converted.save(tmp_path / "own")
    own = Tokenizer.load(tmp_path / "own")
    assert own.digest == converted.digest and own.special_ids == converted.special_ids
    assert holds_tokenizer(tmp_path / "own") and holds_tokenizer(tmp_path / "release")
    assert not holds_tokenizer(tmp_path)


def test_a_tokenizer_file_that_splits_text_otherwise_than_the_original_is_refused(tmp_path) -> None:
    write_release(tmp_path)
    converted = Tokenizer.load(tmp_path)
    converted.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest == converted.digest  # the file is the same tokenizer
    content = converted.content()
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r" ?\p{L}+| ?[^\s\p{L}]+|\s+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"other tokens .* than tiktoken.model beside it .*: remove the one"):
        Tokenizer.load(tmp_path)


def test_the_pattern_of_the_releases_code_is_read_and_the_code_is_not_run(tmp_path) -> None:
    write_release(tmp_path)
    write_code(tmp_path, r'"|".join([r"""\p{L}""", r"[^\p{L}]+"])')
    assert Tokenizer.load(tmp_path).content()["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {
        "Regex": r"\p{L}|[^\p{L}]+"
    }
    write_code(tmp_path, '"|".join(parts())')
    with pytest.raises(DataError, match=r"tokenization_kimi.py line 3: pat_str is no literal"):
        Tokenizer.load(tmp_path)


def change_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "both files must be of the same release"),
        (lambda lines: [*lines[:300], "nonsense\n", *lines[300:]], "line 301 is b'nonsense'"),
        (lambda lines: [*lines[:300], *lines[301:]], "line 301 has the rank 301"),
        (lambda lines: ["!!!! 0\n", *lines[1:]], "line 1 is b'!!!! 0'"),
        (
            lambda lines: [base64.b64encode(b"zzzz").decode() + " 0\n", *lines[1:]],
            "has no token for the byte",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message) -> None:
    write_release(tmp_path)
    change_lines(tmp_path / TIKTOKEN_FILE, change)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_names_outside_the_slots_and_another_vocabulary_size_are_refused(tmp_path) -> None:
    write_release(tmp_path, names={0: "[BOS]", 1: "[EOS]", NUM_SLOTS: "<think>"})
    with pytest.raises(DataError, match=r"gives <think> the id 656; tiktoken.model has 400 ranks"):
        Tokenizer.load(tmp_path)
    write_release(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 700}')
    with pytest.raises(DataError, match=r"gives 656 tokens .256 of them special., config.json has vocab_size 700"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer_config.json does not exist: it names the special tokens"):
        Tokenizer.load(tmp_path)
