"""Rows of prepared data: the same documents and masks as in memory, and files that do not fit are named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.data.build import Data, build_data
from moetrain.data.config import DataConfig, Overlong, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.loader import Mix
from moetrain.data.maths import maths_problems
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.run import prepare
from moetrain.data.store.index import check_contents, read_index
from moetrain.data.store.plan import check_plans
from moetrain.data.store.rows import plan_sources
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError

ASKED = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "4"}]


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, SourceConfig]:
    """Texts, of which some are longer than a row, and chats, of which only the answers are learned."""
    texts = [*maths_problems(seed=1, num_documents=150), "long " * 300, "a\n" * 500]
    chats = [{"messages": [*ASKED[:1], {**ASKED[1], "content": f"{n} " * (n % 40 + 1)}]} for n in range(60)]
    text_path = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    chat_path = write(tmp_path / "chats.jsonl", chats)
    return {
        "texts": SourceConfig(kind=SourceKind.jsonl, path=str(text_path), weight=0.7),
        "chats": SourceConfig(kind=SourceKind.jsonl, path=str(chat_path), format="messages", weight=0.3),
    }


@pytest.fixture
def tokenizer_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "given")
    return tmp_path / "given"


def config_of(sources: dict[str, SourceConfig], tokenizer_folder: Path, **options: object) -> DataConfig:
    return DataConfig(
        sources=sources,
        tokenizer=TokenizerConfig(path=str(tokenizer_folder)),
        validation_fraction=0.1,
        **{"seq_len": 64, "validation_rows": 1000, **options},
    )


def prepared_config(config: DataConfig, folder: Path, **options: int) -> DataConfig:
    """Prepare the sources of `config` in `folder`; return the config that reads them there."""
    tokenizer = Tokenizer.load(Path(config.tokenizer.path or ""))
    prepare(config, PrepareConfig(workers=1, **options), folder=folder, tokenizer=tokenizer)
    return reading(config, folder)


def reading(config: DataConfig, folder: Path) -> DataConfig:
    """Return `config` with its sources replaced by those prepared in `folder`."""
    kind = SourceKind.prepared
    sources = {
        name: SourceConfig(kind=kind, path=str(folder / name), weight=source.weight)
        for name, source in config.sources.items()
    }
    return dataclasses.replace(config, sources=sources)


def built(config: DataConfig, tmp_path: Path, *, seed: int = 0) -> Data:
    return build_data(config, seed, tokenizer_folder=tmp_path / "stage")


def documents(batch) -> list[tuple[list[int], list[bool]]]:
    """Return tokens and loss mask of each document of a batch, sorted."""
    found = []
    for tokens, mask, segments, positions in zip(
        batch.tokens_BT, batch.loss_mask_BT, batch.segments_BT, batch.positions_BT, strict=True
    ):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(int(inside.sum())))
            found.append((tokens[inside].tolist(), mask[inside].tolist()))
    return sorted(found)


@pytest.mark.parametrize("overlong", list(Overlong))
def test_prepared_rows_hold_the_documents_and_masks_of_rows_in_memory(
    overlong: Overlong, sources: dict[str, SourceConfig], tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = config_of(sources, tokenizer_folder, overlong=overlong)
    memory = built(config, tmp_path)
    stored = built(prepared_config(config, tmp_path / "prepared", shard_bytes=4000), tmp_path)
    for name in sources:
        pad_id = memory.tokenizer.pad_id
        one, two = (data.training[name] for data in (memory, stored))
        expected = documents(one.batch(range(one.num_rows), pad_id=pad_id))
        assert documents(two.batch(range(two.num_rows), pad_id=pad_id)) == expected
        assert dataclasses.replace(two.counts, num_rows=one.counts.num_rows) == one.counts
        assert documents(stored.validation[name].batch) == documents(memory.validation[name].batch)
        assert stored.validation[name].num_characters == memory.validation[name].num_characters
    assert len(list((tmp_path / "prepared" / "texts").glob("tokens-*.bin"))) > 2


def test_the_order_is_a_function_of_seed_and_row(
    sources: dict[str, SourceConfig], tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = prepared_config(config_of(sources, tokenizer_folder), tmp_path / "prepared")
    first, again, other = (built(config, tmp_path, seed=seed).loader for seed in (3, 3, 4))
    whole = first.rows_between(0, 40)
    parts = [again.rows_between(start, stop).tokens_BT for start, stop in ((0, 7), (7, 8), (8, 40))]
    assert torch.equal(whole.tokens_BT, torch.cat(parts))
    assert not torch.equal(whole.tokens_BT, other.rows_between(0, 40).tokens_BT)
    size = first.rows["texts"].num_rows
    places = [place.row for index in range(4 * size) if (place := first.place(index)).source == "texts"]
    assert sorted(places[:size]) == sorted(places[size : 2 * size]) == list(range(size))
    assert places[:size] != places[size : 2 * size]


def test_prepared_sources_mix_with_sources_in_memory_and_change_weights(
    sources: dict[str, SourceConfig], tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = config_of(sources, tokenizer_folder)
    kept = prepared_config(config, tmp_path / "prepared").sources["texts"]
    mixed = dataclasses.replace(config, sources={"texts": kept, "chats": sources["chats"]})
    mixes = [Mix(first_row=0, weights={"texts": 1.0, "chats": 0.0}), Mix(first_row=9, weights={"texts": 0, "chats": 1})]
    data = build_data(mixed, 0, tokenizer_folder=tmp_path / "stage", mixes=mixes)
    assert data.order_versions() == {"texts": 2} and set(data.in_memory()) == {"chats"}
    loader = data.loader
    assert [loader.place(index).source for index in range(18)] == ["texts"] * 9 + ["chats"] * 9
    assert loader.epochs(18).keys() == {"texts", "chats"}


def _replace(folder: Path, old: str, new: str) -> None:
    text = (folder / "index.json").read_text()
    assert old in text
    (folder / "index.json").write_text(text.replace(old, new, 1))


def _change(folder: Path, *keys: str | int, value: object) -> None:
    content = json.loads((folder / "index.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "texts has no index.json"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index.json is damaged"),
        (lambda folder: _replace(folder, '"num_tokens": ', '"num_tokens": "9", "": '), r"index.json is damaged"),
        (
            lambda folder: _replace(folder, '"vocab_size": ', '"vocab_size": -'),
            r"damaged .*vocab_size is",
        ),
        (lambda folder: _replace(folder, '"num_read": ', '"num_read": 1.'), r"index.json is damaged .*num_read is 1\."),
        (lambda folder: _change(folder, "files", 0, "name", value=3), "index.json is damaged .*name of file 2 is 3"),
        (
            lambda folder: _change(folder, "documents", "name", value=None),
            "damaged .*name of file 0 is None",
        ),
        (lambda folder: _change(folder, "tokenizer", value=None), "index.json is damaged .*tokenizer is None"),
        (lambda folder: _change(folder, "files", value=[]), "index.json is damaged .*files is empty"),
        (
            lambda folder: _change(folder, "files", 0, "num_tokens", value=5),
            "ends at token .* have 5 tokens",
        ),
        (lambda folder: _change(folder, "files", 0, "num_tokens", value=10**9), "index.json is damaged .*and it has"),
        (lambda folder: _change(folder, "counts", "num_contaminated", value=7), "damaged .*num_contaminated is 7"),
        (
            lambda folder: _change(folder, "counts", "num_contaminated", value={"a": "b"}),
            "num_contaminated of a is",
        ),
        (lambda folder: _change(folder, "inputs", value=None), "index.json is damaged .*inputs is None"),
        (lambda folder: (folder / "tokens-00000.bin").unlink(), "tokens-00000.bin is missing"),
        (lambda folder: (folder / "documents.bin").write_bytes(b"1234"), "documents.bin has 4 bytes, and .* names"),
        (lambda folder: (folder / "rows-64.bin").write_bytes(b""), "rows-64.bin does not have the .* remove .*plan-64"),
    ],
)
def test_a_folder_that_does_not_fit_its_index_is_named(
    damage, message: str, sources: dict[str, SourceConfig], tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = prepared_config(config_of(sources, tokenizer_folder), tmp_path / "prepared")
    damage(tmp_path / "prepared" / "texts")
    with pytest.raises(DataError, match=message):
        plan_sources(config, Tokenizer.load(tokenizer_folder))


@pytest.mark.parametrize(
    ("name", "first", "step"),
    [("rows-64.bin", 2, 8), ("pieces-64.bin", 7, 12), ("pieces-64.bin", 8, 12), ("pieces-64.bin", 9, 12)],
)
def test_a_damaged_plan_is_named(
    name: str, first: int, step: int, sources: dict[str, SourceConfig], tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = prepared_config(config_of(sources, tokenizer_folder), tmp_path / "prepared")
    built(config, tmp_path)
    folder = tmp_path / "prepared" / "texts"
    check_plans(folder)
    content = np.fromfile(folder / name, dtype="u1")
    content[first::step] ^= 64
    content.tofile(folder / name)
    with pytest.raises(DataError, match=rf"{name} has other content than plan-64.json states: remove .*plan-64.json"):
        check_plans(folder)
    rows = built(config, tmp_path).training["texts"]
    with pytest.raises(DataError, match=rf"{name}.* remove .*plan-64.json, and a new plan is made"):
        rows.batch(range(rows.num_rows), pad_id=0)
    (folder / "plan-64.json").unlink()
    built(config, tmp_path)
    check_plans(folder)


def test_changed_contents_and_strange_tokens_and_tokenizers_are_named(
    sources: dict[str, SourceConfig], tokenizer_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "prepared" / "texts"
    config = prepared_config(config_of(sources, tokenizer_folder), tmp_path / "prepared")
    tokens = np.fromfile(folder / "tokens-00000.bin", dtype="<u2")
    check_contents(folder, read_index(folder))
    tokens[5] = 60_000
    (folder / "tokens-00000.bin").write_bytes(tokens.tobytes())
    with pytest.raises(DataError, match=r"tokens-00000.bin has other content than index.json states"):
        check_contents(folder, read_index(folder))
    whole = (folder / "tokens-00000.bin").read_bytes()
    (folder / "tokens-00000.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"tokens-00000.bin has {len(whole) - 2} bytes, and should have {len(whole)}"):
        built(config, tmp_path)
    (folder / "tokens-00000.bin").write_bytes(whole)
    with pytest.raises(DataError, match=r"tokens-00000.bin token 5 is 60000, and the tokenizer has 400 tokens"):
        built(config, tmp_path).loader.rows_between(0, 400)
    from moetrain.data.tokenizer import train_tokenizer

    train_tokenizer(texts, vocab_size=300).save(tmp_path / "other")
    other = dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"data.sources.texts: .*texts was prepared with another tokenizer .*: give"):
        built(other, tmp_path)
