import random

import pytest

from moetrain.chat.template import SPECIAL_TOKENS
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


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIAL_TOKENS) + " <|im_end|> [EOS]"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_names)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_last_ids_and_decode_to_their_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert sorted(tokenizer.special_names) == list(range(400 - len(SPECIAL_TOKENS), 400))
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
    with pytest.raises(DataError, match="vocab_size is 100: give at least 272"):
        train_tokenizer(["text"], vocab_size=100)


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="give more text or a smaller"):
        train_tokenizer(["ab ab ab"], vocab_size=1024)


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


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path) -> None:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import BPE

    HFTokenizer(BPE()).save(str(tmp_path / TOKENIZER_FILE))
    with pytest.raises(DataError, match=r"lacks the special tokens \[BOS\]"):
        Tokenizer.load(tmp_path)
