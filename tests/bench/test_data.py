"""The measurements of `bench data` at the smallest size, in this process."""

import json
from pathlib import Path

import pytest

from moetrain.bench.data import write_corpus
from moetrain.bench.data_worker import main
from moetrain.data.config import MIN_VOCAB_SIZE
from moetrain.data.tokenizer import train_tokenizer


def test_a_corpus_is_prepared_and_random_tokens_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, folder = tmp_path / "corpus", tmp_path / "tokenizer"
    train_tokenizer([], vocab_size=MIN_VOCAB_SIZE).save(folder)
    assert write_corpus(corpus, num_bytes=40_000, num_files=2, seed=0) >= 40_000
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    assert write_corpus(corpus, num_bytes=40_000, num_files=2, seed=0) == sum(map(len, before.values()))
    main(["prepare", str(corpus), str(folder), str(tmp_path / "out"), "1", "10000"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] > 10_000 and figures["seconds"] > 0 and figures["resident_bytes"] > 10**6
    main(["read", str(tmp_path / "random"), str(folder), "50000", "128", "0.05"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens_per_s"] > 0 and figures["start_seconds"] > 0
