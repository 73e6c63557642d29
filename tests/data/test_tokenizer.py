import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.pieces import BOS, EOS, PAD
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, train_tokenizer, without_specials
from moetrain.errors import DataError


def random_text(stream: random.Random) -> str:
    alphabets = [(0x20, 0x7F), (0xA0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0x09, 0x0E)]
    picks = (stream.choice(alphabets) for _ in range(60))
    return "".join(chr(stream.randrange(low, high)) for low, high in picks)


def test_any_text_comes_back_unchanged(tokenizer: Tokenizer) -> None:
    stream = random.Random(5)
    samples = ["", " ", "\n\n\t x ", "naïve 北京 🙂 e\u0301", "\x00\x7f", *(random_text(stream) for _ in range(50))]
    for text in samples:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(samples) == [tokenizer.encode(text) for text in samples]


def test_the_bytes_of_the_tokens_of_a_text_are_its_utf8(tokenizer: Tokenizer) -> None:
    stream = random.Random(6)
    for text in ("naïve 北京 🙂 e\u0301 \n", "\x00\x7f\x80ÿ", *(random_text(stream) for _ in range(20))):
        assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))) == text.encode()
    assert tokenizer.bytes_of(tokenizer.special_ids[EOS]) == EOS.encode()


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "".join(KIMI_K2.special_tokens) + " <|im_end|> [EOS]"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_names)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_last_ids_and_decode_to_their_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert sorted(tokenizer.special_names) == list(range(400 - len(KIMI_K2.special_tokens), 400))
    for name, token in tokenizer.special_ids.items():
        assert tokenizer.decode([token]) == name


def test_training_twice_gives_the_same_bytes(texts: list[str], tokenizer: Tokenizer, tmp_path) -> None:
    again = train_tokenizer(iter(texts), vocab_size=400)
    tokenizer.save(tmp_path / "a")
    again.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert again.digest == tokenizer.digest


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert loaded.encode("What is 12 + 34? <think>") == tokenizer.encode("What is 12 + 34? <think>")


def test_transformers_loads_the_saved_folder(tokenizer: Tokenizer, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.encode("What is 12 + 34?", add_special_tokens=False) == tokenizer.encode("What is 12 + 34?")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    messages = [{"role": "user", "content": "12"}]
    assert "<|im_user|>user<|im_middle|>12<|im_end|>" in theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["k3f", "e9z1", "q0", "ab12"])
def test_an_identifier_has_the_same_tokens_wherever_it_is_quoted(tokenizer: Tokenizer, name: str) -> None:
    own = tokenizer.encode(name)
    for before, after in [('Start at "', '". Follow'), ('{"id":"', '"}'), ('{"id": "', '", "x": 1}'), ("\n", "\n")]:
        assert tokenizer.encode(before + name + after) == tokenizer.encode(before) + own + tokenizer.encode(after)


def test_each_digit_is_its_own_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234567890")) == 10


def test_special_tokens_are_newlines_to_the_trainer() -> None:
    assert without_specials("<|im_user|>user<|im_middle|>x") == "\nuser\nx"


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="of 100 tokens has no room for the bytes: give at least 272"):
        train_tokenizer(["text"], vocab_size=100)


def test_too_little_text_for_the_vocabulary_gives_a_smaller_one() -> None:
    assert 272 < train_tokenizer(["ab ab ab"], vocab_size=1024).vocab_size < 300


def test_a_missing_or_broken_tokenizer_names_its_path(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/{TOKENIZER_FILE} does not exist"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    path.write_text(path.read_text()[:-30])
    with pytest.raises(DataError, match=rf"{path} line \d+ is not JSON"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=rf"{path} is not UTF-8 at byte 7"):
        Tokenizer.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match=rf"{path} holds no tokenizer \(.*\): copy the tokenizer there again"):
        Tokenizer.load(tmp_path)


def rewrite(tokenizer: Tokenizer, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tokenizer.save(folder)
    path = folder / TOKENIZER_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def cut(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


def pad(content: dict[str, Any]) -> None:
    shape = {"direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "pad_id": 386, "pad_token": PAD, **shape}


def drop(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.5


@pytest.mark.parametrize(("change", "name"), [(cut, "truncation"), (pad, "padding"), (drop, "dropout")])
def test_what_would_change_the_tokens_of_a_text_is_switched_off_and_said(
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], None],
    name: str,
) -> None:
    with caplog.at_level(logging.INFO):
        loaded = Tokenizer.load(rewrite(tokenizer, tmp_path, change))
    assert f"{tmp_path / TOKENIZER_FILE} sets {name}: switched off" in caplog.text
    text = "What is 12 + 34? And what is 56 + 78? Say so."
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_batch([text, "x"]) == tokenizer.encode_batch([text, "x"])
    assert loaded.digest == tokenizer.digest


def test_text_is_text_to_a_tokenizer_whose_control_tokens_are_not_marked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def unmark(content: dict[str, Any]) -> None:
        for token in content["added_tokens"][4:]:
            token["special"] = False

    loaded = Tokenizer.load(rewrite(tokenizer, tmp_path / "a", unmark))
    text = "says </think><|tool_calls_section_begin|><|im_end|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_batch([text]) == tokenizer.encode_batch([text])
    loaded.save(tmp_path / "b")  # as it was: other programs go by the marks
    kept = json.loads((tmp_path / "b" / TOKENIZER_FILE).read_text())["added_tokens"]
    assert {token["content"] for token in kept if not token["special"]} == set(KIMI_K2.special_tokens[4:])


def test_a_tokenizer_whose_ordinary_words_are_control_tokens_is_refused(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "hello": 1, EOS: 2, BOS: 3}
    inner = HFTokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([BOS, EOS, "[UNK]"])
    inner.save(str(tmp_path / TOKENIZER_FILE))
    with pytest.raises(DataError, match=rf"{tmp_path}.*encodes the text '\[EOS\]' as the control token \[EOS\]"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_loses_text_is_refused_and_one_that_changes_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = plain_tokenizer(tmp_path / "a", config={"eos_token": "<|endoftext|>"}) / TOKENIZER_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    Tokenizer.load(tmp_path / "a")
    assert "the text 'Hello, world: 42 times' comes back from its tokens as 'hello, world: 42 times'" in caplog.text
    path.write_text(json.dumps({**content, "pre_tokenizer": None}))  # without bytes, only some letters have tokens
    with pytest.raises(DataError, match=r"gives no token, so text would be lost: copy the tokenizer again"):
        Tokenizer.load(tmp_path / "a")


def plain_tokenizer(folder: Path, *, config: object = None) -> Path:
    """Write a byte-level tokenizer in the manner of GPT-2: one special token, of a name of its own."""
    folder.mkdir()
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["plain text " * 9], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    inner.save(str(folder / TOKENIZER_FILE))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("templates", "is_kept", "said"),
    [
        ([{"name": "default", "template": "{{ mine }}"}], True, ""),
        ([{"name": "chat", "template": "{{ mine }}"}], True, ""),
        (
            [{"name": "tool_use", "template": "{{ other }}"}, {"name": "default", "template": "{{ mine }}"}],
            True,
            "has chat templates named tool_use, default: default is used",
        ),
        ([{"name": "a", "template": "{{ x }}"}, {"name": "b", "template": "{{ y }}"}], False, "none of them is used"),
        ([3, {"template": None}], False, ""),
    ],
)
def test_of_several_chat_templates_the_default_is_kept(
    templates: list[Any], is_kept: bool, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain_tokenizer(tmp_path / "a", config={"eos_token": "<|endoftext|>", "chat_template": templates})
    Tokenizer.load(folder).save(tmp_path / "b")
    kept = tmp_path / "b" / "chat_template.jinja"
    assert (kept.is_file() and kept.read_text() == "{{ mine }}") == is_kept
    assert said in caplog.text


def test_plain_text_needs_an_end_of_a_document_and_no_token_of_the_chat_template(tmp_path: Path) -> None:
    folder = plain_tokenizer(
        tmp_path / "a",
        config={"bos_token": None, "eos_token": {"content": "<|endoftext|>"}, "unk_token": "<|endoftext|>"},
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == tokenizer.vocab_size - 1
    assert tokenizer.end_ids == [tokenizer.eos_id]
    assert tokenizer.special_names == {tokenizer.eos_id: EOS}
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    with pytest.raises(DataError, match="has no chat template that is known: chats, dialogues and tool use require"):
        tokenizer.check_chat()
    tokenizer.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").special_ids == tokenizer.special_ids
    assert not (tmp_path / "b" / "chat_template.jinja").exists()


def test_a_template_whose_tokens_are_missing_is_not_written(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tokenizer.save(tmp_path / "a")
    released = "{{ messages[0].content }} in the form of the release"
    (tmp_path / "a" / "chat_template.jinja").write_text(released)
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == KIMI_K2.jinja
    assert "has the tokens of the chat template kimi_k2, and chat_template has none of them" in caplog.text
    for name in (TOKENIZER_FILE, "tokenizer_config.json"):  # as Kimi K2 Instruct, which does not think
        path = tmp_path / "a" / name
        path.write_text(path.read_text().replace("<think>", "<other>"))
    loaded = Tokenizer.load(tmp_path / "a")
    assert "is a form of kimi_k2, and the tokenizer has no token <think>: chats are refused" in caplog.text
    loaded.save(tmp_path / "c")
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == released
    with pytest.raises(DataError, match="<think>"):
        Tokenizer.load(tmp_path / "c").check_chat()


@pytest.mark.parametrize("config", [None, {}, {"eos_token": "<|elsewhere|>"}])
def test_a_tokenizer_without_an_end_of_a_document_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/a/{TOKENIZER_FILE}: the tokenizer lacks \[EOS\]"):
        Tokenizer.load(plain_tokenizer(tmp_path / "a", config=config))


@pytest.mark.parametrize("stated", [{"eos_token_id": 260}, {"eos_token_id": [260, 3]}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_end_of_a_document_may_be_named_by_its_id(tmp_path: Path, stated: dict[str, Any], name: str) -> None:
    folder = plain_tokenizer(tmp_path / "a")
    (folder / name).write_text(json.dumps(stated))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>" and tokenizer.eos_id == 260
    tokenizer.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").eos_id == 260


def test_an_embedding_has_a_row_for_the_largest_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def leave_a_gap(content: dict[str, Any]) -> None:
        ids = content["model"]["vocab"]
        ids[max(ids, key=ids.__getitem__)] = 500

    assert Tokenizer.load(rewrite(tokenizer, tmp_path, leave_a_gap)).vocab_size == 501


def test_ids_that_the_library_reads_otherwise_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def leave_out(content: dict[str, Any]) -> None:
        del content["added_tokens"][3]  # the library gives the tokens after it the ids of those before them

    with pytest.raises(DataError, match=r"gives <\|im_end\|> the id 388 and the library reads 387"):
        Tokenizer.load(rewrite(tokenizer, tmp_path, leave_out))
