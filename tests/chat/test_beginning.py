"""A conversation begins with the same tokens wherever it comes from."""

import json

from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import Piece, pieces_to_tokens, with_bos
from moetrain.cli.generate import chat_pieces
from moetrain.data.build import build_data
from moetrain.data.config import MIN_VOCAB_SIZE, DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.reactor import run_inline
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily
from moetrain.tasks.dialogues import dialogues
from moetrain.tasks.protocol import Split
from tests.chat.test_jinja import template


def test_five_ways_to_a_conversation_have_one_beginning(tmp_path) -> None:
    family = DatabaseFamily(TaskConfig(), 0)
    task = family.task(Split.train, 0)
    (question,) = task.prompt
    user = {"role": "user", "content": question.content}
    records = [{"messages": [user, {"role": "assistant", "content": f"answer {number}"}]} for number in range(2)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(
        seq_len=4096,
        sources={"chats": SourceConfig(kind=SourceKind.jsonl, path=str(path), format="messages")},
        tokenizer=TokenizerConfig(vocab_size=MIN_VOCAB_SIZE),
    )
    data = build_data(config, 0, tokenizer_folder=tmp_path / "tokenizer")
    tokenizer = data.tokenizer
    names = tokenizer.special_ids

    (document, _) = next(data.training["chats"].documents())
    (dialogue,) = dialogues(family, tokenizer, count=1, seed=0, source="dialogues")
    episode = Episode(task, name="task 0", stream=0, config=RolloutConfig(), tokenizer=tokenizer)
    run_inline(episode.begin(family, declare_tools=False))
    rollout = episode.sequence.tokens
    pieces = chat_pieces(question.content, template=tokenizer.template)
    generated, _ = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=names)
    exported = template().render(messages=[user], add_generation_prompt=True)

    head = [names["<|im_user|>"], *tokenizer.encode("user"), names["<|im_middle|>"]]
    expected = [*head, *tokenizer.encode(question.content), names["<|im_end|>"], names["<|im_assistant|>"]]
    for tokens in (document.tolist(), list(dialogue.tokens), rollout, generated):
        assert tokens[: len(expected)] == expected
    assert tokenizer.decode(generated) == tokenizer.decode(rollout) == exported
    text, _ = pieces_to_tokens(with_bos([Piece(text="plain")]), encode=tokenizer.encode, special_ids=names)
    assert text == [tokenizer.bos_id, *tokenizer.encode("plain")]
    assert question == Message(role=Role.user, content=question.content)
