"""`moetrain bench serve` of a scripted server: requests, tokens and latencies are those that happened."""

import json
from pathlib import Path

import pytest

from moetrain.chat.messages import Message, Role
from moetrain.cli import bench_serve
from moetrain.compose import compose
from moetrain.errors import ConfigError
from tests.even_task import even_tokenizer
from tests.serve.servers import Script, serving


def test_a_measurement_counts_what_clients_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = even_tokenizer()
    script = Script(lambda _: Message(role=Role.assistant, content="word " * 4), tokenizer)
    script.step_s = 0.002
    with serving(tokenizer, lambda: script) as server:
        words = [f"url={server.url}/v1", "clients=[1,3]", "seconds=0.2", "prompt_words=5", f"run.folder={tmp_path}"]
        assert bench_serve.main(compose("bench serve", words)) == 0
    rows = json.loads((tmp_path / "default/bench_serve/bench.json").read_text())["rows"]
    assert [row["clients"] for row in rows] == [1, 3]
    assert sum(row["requests"] for row in rows) + 1 == len(script.prompts)
    for row in rows:
        assert row["failures"] == 0 and row["requests"] >= row["clients"]
        assert 0.002 <= row["first_token_s_p50"] <= row["whole_s_p99"]
        assert row["between_s_p95"] > 0.001 and row["tokens_per_s"] < row["clients"] / 0.002
    assert "first token" in capsys.readouterr().out


def test_one_of_url_and_weights_is_required() -> None:
    for words in ([], ["url=http://x/v1", "init_from=runs"]):
        with pytest.raises(ConfigError, match="give one of the two"):
            bench_serve.main(compose("bench serve", words))
