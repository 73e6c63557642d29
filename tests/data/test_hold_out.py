"""Held-out documents: no source trains on a document that another one holds out, in memory or prepared."""

import json
from pathlib import Path

import pytest

from moetrain.compose import compose
from moetrain.data.build import Data, build_data
from moetrain.data.config import DataConfig, Overlong, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.maths import maths_problems
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.run import prepare
from moetrain.data.sources import Choice, key_hash
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.run.inputs import check_inputs

TEXTS = [f"{number} {text}" for number, text in enumerate(maths_problems(seed=2, num_documents=60))]


def write(path: Path, texts: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return SourceConfig(kind=SourceKind.jsonl, path=str(path))


def stored(
    folder: Path, texts: list[str], *, tokenizer: Tokenizer, fraction: float, overlong: Overlong = Overlong.split
) -> SourceConfig:
    folder.mkdir()
    source = write(folder / "texts.jsonl", texts)
    data = DataConfig(sources={"web": source}, seq_len=128, validation_fraction=fraction)
    prepare(data, PrepareConfig(workers=1), folder=folder, tokenizer=tokenizer)
    return SourceConfig(kind=SourceKind.prepared, path=str(folder / "web"), overlong=overlong)


def built(tokenizer: Tokenizer, folder: Path, **sources: SourceConfig) -> Data:
    tokenizer.save(folder / "tokenizer")
    config = TokenizerConfig(path=str(folder / "tokenizer"))
    data = DataConfig(sources=sources, seq_len=128, tokenizer=config, validation_rows=100)
    return build_data(data, 0, tokenizer_folder=folder / "stage")


def documents(data: Data, source: str, *, held_out: bool) -> set[tuple[int, ...]]:
    rows = data.training[source]
    batch = data.validation[source].batch if held_out else rows.batch(range(rows.num_rows), pad_id=0)
    return {
        tuple(tokens[segments == segment].tolist())
        for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True)
        for segment in range(1, int(segments.max()) + 1)
    }


@pytest.mark.parametrize("fraction", [0.3, 0.02, 1e-9])  # 1e-9: one document is held out all the same
def test_a_document_that_prepared_data_hold_out_is_not_trained_on_in_memory(
    tokenizer: Tokenizer, tmp_path: Path, fraction: float
) -> None:
    web = stored(tmp_path / "web", TEXTS, tokenizer=tokenizer, fraction=fraction)
    own = write(tmp_path / "own.jsonl", TEXTS[10:] + [f"own {text}" for text in TEXTS])
    data = built(tokenizer, tmp_path, web=web, own=own)
    held_out = documents(data, "web", held_out=True)
    assert held_out and held_out.isdisjoint(documents(data, "own", held_out=False))
    if fraction > 0.1:
        assert 10 < len(held_out) < 26
        assert documents(data, "own", held_out=True).isdisjoint(documents(data, "web", held_out=False))


def test_sources_that_were_prepared_with_different_shares_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = stored(tmp_path / "one", TEXTS, tokenizer=tokenizer, fraction=0.1)
    two = stored(tmp_path / "two", TEXTS, tokenizer=tokenizer, fraction=0.2)
    with pytest.raises(ConfigError, match=r"data.sources.one and data.sources.two were prepared with .* 0.1 and 0.2"):
        built(tokenizer, tmp_path, one=one, two=two)


def test_held_out_documents_that_give_no_row_are_not_validated(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text for text in TEXTS if key_hash(text, choice=Choice.hold_out) >= 0.1]
    long = (f"{number} {'long ' * 300}" for number in range(1000))
    texts.append(next(text for text in long if key_hash(text, choice=Choice.hold_out) < 0.1))
    web = stored(tmp_path / "web", texts, tokenizer=tokenizer, fraction=0.1, overlong=Overlong.drop)
    data = built(tokenizer, tmp_path, web=web, own=write(tmp_path / "own.jsonl", TEXTS))
    assert "web" not in data.validation and "data.sources.web is not validated" in caplog.text
    assert data.training["web"].num_rows > 0


def test_different_shares_are_refused_before_a_stage_starts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = ["model.vocab_size=400", "data=none"]
    for name, fraction in (("one", 0.1), ("two", 0.2)):
        folder = stored(tmp_path / name, TEXTS, tokenizer=tokenizer, fraction=fraction).path
        words += [f"data.sources.{name}.kind=prepared", f"data.sources.{name}.path={folder}"]
    run = compose("pretrain", words)
    with pytest.raises(ConfigError, match=r"were prepared with data.validation_fraction 0.1 and 0.2"):
        check_inputs(run)
    check_inputs(run, planned=[tmp_path / "two"])  # an earlier stage writes it
