import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import EOS, pieces_to_tokens
from moetrain.chat.registry import AUTO, template_named
from moetrain.data.build import build_data
from moetrain.data.chat_tokenizer import load_tokenizer
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, DataError
from tests.data.test_tokenizer import plain_tokenizer

EOS_CONFIG = {"eos_token": "<|endoftext|>"}
KIMI = template_named("kimi_k2")


def with_reserved(folder: Path, count: int) -> Path:
    plain_tokenizer(folder, config=EOS_CONFIG)
    path = folder / "tokenizer.json"
    inner = HFTokenizer.from_file(str(path))
    inner.add_special_tokens([AddedToken(f"<|reserved_token_{number}|>", special=True) for number in range(count)])
    inner.save(str(path))
    return folder


def test_tokens_that_a_template_needs_take_reserved_tokens_and_then_unused_rows(tmp_path: Path) -> None:
    plain = Tokenizer.load(with_reserved(tmp_path / "a", 3))
    chat = plain.with_template(KIMI, num_rows=plain.vocab_size + 9)
    missing = [name for name in KIMI.markers if name not in plain.special_ids]
    assert [chat.special_ids[name] for name in missing] == list(
        range(plain.vocab_size - 3, plain.vocab_size - 3 + len(missing))
    )
    assert chat.vocab_size == plain.vocab_size + len(missing) - 3
    for text in ("plain text", "".join(KIMI.markers), "<|reserved_token_1|>"):
        assert chat.encode(text) == plain.encode(text) and chat.decode(chat.encode(text)) == text
    assert (chat.eos_id, chat.bos_id) == (plain.eos_id, plain.bos_id)
    turn = Message(role=Role.assistant, reasoning="r", content="text")
    tokens, _ = pieces_to_tokens(KIMI.turn_pieces(turn), encode=chat.encode, special_ids=chat.special_ids)
    parsed = KIMI.parse_turn(tokens, decode=chat.decode, special_names=chat.special_names, first_index=0)
    assert parsed == turn

    chat.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.template is KIMI and again.special_ids == chat.special_ids and again.digest == chat.digest
    assert again.with_template(KIMI).digest == chat.digest  # nothing is missing


def test_too_few_rows_are_refused_with_the_number_that_is_needed(tmp_path: Path) -> None:
    config = TokenizerConfig(path=str(plain_tokenizer(tmp_path / "a", config=EOS_CONFIG)), template="kimi_k2")
    rows = Tokenizer.load(tmp_path / "a").vocab_size
    with pytest.raises(
        ConfigError, match=rf"it has 0 reserved tokens, .* leaves 5 rows: .* set model.vocab_size to {rows + 12}"
    ):
        load_tokenizer(config, tmp_path / "a", num_rows=rows + 5)
    assert load_tokenizer(config, tmp_path / "a", num_rows=rows + 12).vocab_size == rows + 12


def test_plain_text_needs_no_template_and_a_chat_names_the_cure(tmp_path: Path, write_jsonl) -> None:
    folder = plain_tokenizer(tmp_path / "a", config=EOS_CONFIG)
    texts = write_jsonl("texts.jsonl", [{"text": f"plain text {number}"} for number in range(4)])
    chats = write_jsonl(
        "chats.jsonl",
        [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}]} for n in range(4)],
    )

    def build(path: Path, template: str = AUTO, **source: str) -> list[int]:
        config = DataConfig(
            seq_len=64,
            sources={"x": SourceConfig(kind=SourceKind.jsonl, path=str(path), **source)},
            tokenizer=TokenizerConfig(path=str(folder), template=template),
        )
        data = build_data(config, 0, tokenizer_folder=tmp_path / "none")
        (document, _) = next(data.training["x"].documents())
        return list(document)

    eos = Tokenizer.load(folder).special_ids[EOS]
    document = build(texts)
    assert document[0] == document[-1] == eos and document.count(eos) == 2  # one beginning, and one end
    with pytest.raises(DataError, match=r"chats.jsonl:1 is a conversation, .*name one as data.tokenizer.template"):
        build(chats, format="messages")
    for name in ("kimi_k2", "deepseek_v31", "chatml"):
        assert eos not in build(chats, name, format="messages")  # the template has its own beginning
    assert json.loads((folder / "tokenizer_config.json").read_text()) == EOS_CONFIG  # the folder stays as it is
