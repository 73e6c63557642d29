import dataclasses
import json

import numpy as np
import pytest
import torch

from moetrain.data.build import Data, build_data, prepare_tokenizer
from moetrain.data.config import DataConfig, Overlong, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.hold_out import HoldOut
from moetrain.data.packing import TokenizedDocument
from moetrain.data.sources import read_documents
from moetrain.data.store.index import Part
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer
from moetrain.errors import ConfigError, DataError


def config_of(**sources: SourceConfig) -> DataConfig:
    tokenizer = TokenizerConfig(vocab_size=320, max_characters=50_000)
    return DataConfig(seq_len=64, sources=sources, tokenizer=tokenizer, validation_fraction=0.1, validation_rows=4)


def maths(number: int = 120, **options) -> SourceConfig:
    return SourceConfig(kind=SourceKind.maths, num_documents=number, **options)


def documents_in(batch) -> set[bytes]:
    found = set()
    for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            found.add(np.asarray(tokens[segments == segment]).tobytes())
    return found


def trained_documents(data: Data) -> set[bytes]:
    rows = data.loader.rows.values()
    return {tokens.astype(np.int64).tobytes() for packed in rows for tokens, _ in packed.documents()}


def test_what_is_held_out_of_one_source_is_trained_on_in_none(write_jsonl, tmp_path) -> None:
    from moetrain.data.maths import maths_problems

    same = [{"text": text} for text in maths_problems(seed=0, num_documents=120)]
    copy = SourceConfig(kind=SourceKind.jsonl, path=str(write_jsonl("copy.jsonl", [*same, *same[:9]])))
    config = dataclasses.replace(config_of(one=maths(), two=copy), seq_len=2048, validation_rows=1000)
    data = build_data(config, 0, tokenizer_folder=tmp_path / "tokenizer")
    held_out = set.union(*(documents_in(rows.batch) for rows in data.validation.values()))
    trained = trained_documents(data)
    assert held_out and trained and not held_out & trained
    assert len(held_out | trained) == len({item["text"] for item in same})


def test_validation_does_not_depend_on_the_seed_and_training_does(tmp_path) -> None:
    first, second = (build_data(config_of(one=maths()), seed, tokenizer_folder=tmp_path) for seed in (0, 1))
    assert torch.equal(first.validation["one"].batch.tokens_BT, second.validation["one"].batch.tokens_BT)
    assert not torch.equal(first.loader.batch(0, 4).tokens_BT, second.loader.batch(0, 4).tokens_BT)
    assert first.digests == second.digests


def test_building_twice_gives_the_same_data(tmp_path) -> None:
    first, second = (build_data(config_of(one=maths()), 5, tokenizer_folder=tmp_path / name) for name in "ab")
    assert first.digests == second.digests
    assert set(first.digests) == {"one", "tokenizer"}
    for step in range(3):
        assert torch.equal(first.loader.batch(step, 4).tokens_BT, second.loader.batch(step, 4).tokens_BT)


def test_documents_begin_with_bos_and_end_with_eos_and_every_other_token_is_text(tmp_path) -> None:
    data = build_data(config_of(one=maths()), 0, tokenizer_folder=tmp_path)
    batch, tokenizer = data.validation["one"].batch, data.tokenizer
    used = batch.segments_BT > 0
    assert ((batch.tokens_BT == tokenizer.bos_id) & used).sum() == ((batch.positions_BT == 0) & used).sum()
    assert (batch.tokens_BT == tokenizer.eos_id).any()
    assert data.counts["one"].num_split > 0


def test_characters_of_validation_are_those_of_its_texts(tmp_path) -> None:
    config = dataclasses.replace(config_of(one=maths()), seq_len=2048, validation_rows=1000)
    data = build_data(config, 0, tokenizer_folder=tmp_path)
    rows = data.validation["one"]
    text = data.tokenizer.decode(rows.batch.tokens_BT[rows.batch.loss_mask_BT].tolist()).replace("[EOS]", "")
    assert rows.num_characters == len(text)


def test_dialogues_are_mixed_in_with_their_masks(tmp_path) -> None:
    config = config_of(one=maths(), talk=SourceConfig(kind=SourceKind.dialogues, weight=1.0))
    tokenizer = prepare_tokenizer(config, folder=tmp_path, dialogue_texts=["<|im_user|>user<|im_middle|>hello"] * 20)
    dialogues = [
        TokenizedDocument(
            tokens=[tokenizer.bos_id, *tokenizer.encode(f"ask {index} say {index}")],
            loss_mask=[False] * 3 + [True] * (len(tokenizer.encode(f"ask {index} say {index}")) - 2),
            source="talk",
        )
        for index in range(40)
    ]
    data = build_data(config, 0, tokenizer_folder=tmp_path, dialogues={"talk": iter([*dialogues, dialogues[0]])})
    assert data.tokenizer.digest == tokenizer.digest
    assert data.counts["talk"].num_documents + 1 <= 40
    assert data.counts["talk"].num_targets < data.counts["talk"].num_tokens - data.counts["talk"].num_pieces
    assert set(data.validation) == {"one", "talk"}
    assert data.metrics()["data/talk/num_targets"] == data.counts["talk"].num_targets


def test_a_later_stage_reads_the_tokenizer_of_the_folder(tmp_path) -> None:
    first = prepare_tokenizer(config_of(one=maths()), folder=tmp_path)
    second = prepare_tokenizer(config_of(one=maths(30)), folder=tmp_path)
    assert first.digest == second.digest
    given = config_of(one=maths())
    given.tokenizer.path = str(tmp_path)
    assert prepare_tokenizer(given, folder=tmp_path / "unused").digest == first.digest
    assert not (tmp_path / "unused").exists()


def test_a_tokenizer_of_another_size_is_refused(tmp_path) -> None:
    prepare_tokenizer(config_of(one=maths()), folder=tmp_path)
    config = config_of(one=maths())
    config.tokenizer.vocab_size = 512
    with pytest.raises(ConfigError, match=r"vocab_size is 512, the tokenizer in .* has 320 tokens: remove"):
        prepare_tokenizer(config, folder=tmp_path)


def test_a_model_may_have_more_rows_than_the_tokenizer_has_tokens_and_not_fewer(tmp_path) -> None:
    prepare_tokenizer(config_of(one=maths()), folder=tmp_path)
    config = config_of(one=maths())
    config.tokenizer = TokenizerConfig(path=str(tmp_path))
    assert prepare_tokenizer(config, folder=tmp_path, num_rows=448).vocab_size == 320
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 300, the tokenizer in .* has 320 tokens: set"):
        prepare_tokenizer(config, folder=tmp_path, num_rows=300)


def test_texts_that_cannot_fill_the_vocabulary_give_a_smaller_tokenizer(tmp_path, caplog, write_jsonl) -> None:
    path = write_jsonl("few.jsonl", [{"text": f"few words {number}"} for number in range(9)])
    config = config_of(one=SourceConfig(kind=SourceKind.jsonl, path=str(path)))
    config.tokenizer = TokenizerConfig()
    num_tokens = prepare_tokenizer(config, folder=tmp_path / "a", num_rows=1024).vocab_size
    said = f"model.vocab_size is 1024, and the tokenizer has {num_tokens} tokens: the remaining rows"
    assert said in caplog.text
    caplog.clear()
    config.tokenizer = TokenizerConfig(shrink_model=True)
    assert prepare_tokenizer(config, folder=tmp_path / "c", num_rows=1024).vocab_size == num_tokens
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    config.tokenizer = TokenizerConfig(vocab_size=1000)
    wanted = rf"data\.tokenizer\.vocab_size is 1000, the texts give {num_tokens} tokens.*model\.vocab_size can be"
    with pytest.raises(DataError, match=wanted):
        prepare_tokenizer(config, folder=tmp_path / "b", num_rows=1024)
    assert not (tmp_path / "b").exists()


def test_chats_need_the_tokens_of_the_template(tmp_path, write_jsonl) -> None:
    prepare_tokenizer(config_of(one=maths()), folder=tmp_path)
    path = tmp_path / TOKENIZER_FILE
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:4]
    path.write_text(json.dumps(content))
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    source = SourceConfig(
        kind=SourceKind.jsonl, path=str(write_jsonl("c.jsonl", [{"messages": chat}])), format="messages"
    )
    config = dataclasses.replace(config_of(talk=source), tokenizer=TokenizerConfig())
    with pytest.raises(DataError, match=r"data\.sources\.talk: the tokenizer has no special token <\|im_user\|>"):
        build_data(config, 0, tokenizer_folder=tmp_path)
    assert build_data(dataclasses.replace(config, sources={"one": maths()}), 0, tokenizer_folder=tmp_path).training


def test_dialogues_that_do_not_match_the_sources_are_refused(tmp_path) -> None:
    config = config_of(talk=SourceConfig(kind=SourceKind.dialogues))
    with pytest.raises(ConfigError, match=r"of kind dialogues are \['talk'\], but this stage makes \[\]"):
        build_data(config, 0, tokenizer_folder=tmp_path)


def test_no_sources_and_broken_sources_leave_nothing_written(tmp_path, write_jsonl) -> None:
    folder = tmp_path / "tokenizer"
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        build_data(config_of(), 0, tokenizer_folder=folder)
    path = write_jsonl("a.jsonl", [{"text": "one"}])
    path.write_text(path.read_text() + "{")
    broken = SourceConfig(kind=SourceKind.jsonl, path=str(path))
    with pytest.raises(DataError, match=r"a.jsonl:2 is not JSON"):
        build_data(config_of(one=maths(), two=broken), 0, tokenizer_folder=folder)
    assert not folder.exists()


def test_overlong_documents_are_counted_by_policy(tmp_path, write_jsonl) -> None:
    long = [f"document {number}: " + "many words " * 60 for number in range(20)]
    source = SourceConfig(
        kind=SourceKind.jsonl, path=str(write_jsonl("a.jsonl", [{"text": t} for t in [*long, "short"]]))
    )
    for policy, field in [(Overlong.split, "num_split"), (Overlong.drop, "num_dropped")]:
        config = dataclasses.replace(config_of(one=source), overlong=policy, validation_fraction=1e-9)
        config.tokenizer.vocab_size = 280
        data = build_data(config, 0, tokenizer_folder=tmp_path)
        assert dataclasses.asdict(data.counts["one"])[field] > 0
        # Dropping leaves none of the one that is held out: there is nothing to measure, and nothing to divide by.
        assert set(data.validation) == ({"one"} if policy is Overlong.split else set())


def held_out_of(keys: list[str], *, fraction: float) -> list[bool]:
    return [part is Part.held_out for part in HoldOut(fraction=fraction).parts(keys)]


@pytest.mark.parametrize("max_characters", [None, 3_000_000, 1_000_000, 600_000, 200_000])
def test_a_limit_of_characters_leaves_the_share_of_held_out_documents_as_stated(
    write_jsonl, max_characters: int | None
) -> None:
    path = write_jsonl("many.jsonl", [{"text": f"document {number} " * 20} for number in range(12_000)])
    source = SourceConfig(kind=SourceKind.jsonl, path=str(path), max_characters=max_characters)
    documents = read_documents(source, name="many")
    held_out = held_out_of([document.key for document in documents], fraction=0.02)
    expected = 0.02 * len(documents)
    assert abs(sum(held_out) - expected) < 4 * expected**0.5  # four standard deviations of a fair draw


def test_data_built_under_a_limit_of_characters_trains_on_nearly_all_of_it(tmp_path) -> None:
    config = dataclasses.replace(config_of(one=maths(2000, max_characters=60_000)), seq_len=2048, validation_rows=1000)
    data = build_data(config, 0, tokenizer_folder=tmp_path)
    share = data.validation["one"].batch.num_targets / (
        data.validation["one"].batch.num_targets + data.counts["one"].num_targets
    )
    assert 0.05 < share < 0.15  # validation_fraction is 0.1


def test_the_split_holds_out_about_the_fraction_and_at_least_one() -> None:
    keys = [f"document {index}" for index in range(4000)]
    held_out = held_out_of(keys, fraction=0.05)
    assert 140 < sum(held_out) < 260
    assert [flag for key, flag in zip(keys, held_out, strict=True) if key in keys[:50]] == held_out[:50]
    assert sum(held_out_of(keys[:5], fraction=1e-9)) == 1
    assert held_out_of(["alone"], fraction=0.99) == [False]


def test_the_tokenizer_of_a_stage_loads_from_its_folder(tmp_path) -> None:
    data = build_data(config_of(one=maths()), 0, tokenizer_folder=tmp_path)
    assert Tokenizer.load(tmp_path).digest == data.digests["tokenizer"]
