import json

import pytest

from moetrain.data.maths import maths_problems
from moetrain.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    calls = [f'call {{"id": "k{digit}f", "name": "find"}}' for digit in range(10)]
    return [*maths_problems(seed=3, num_documents=200), *calls]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, vocab_size=400)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name: str, records: list[object]):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
