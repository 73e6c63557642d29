"""`verify serve`: a short load with a kill in the middle keeps every bound, and a lost event is noticed."""

import json
from pathlib import Path
from random import Random

import pytest

from moetrain.chat.messages import Message, Role
from moetrain.cli import verify_serve
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.verify.serve_clients import Client, End, Kind
from tests.even_task import even_export, even_tokenizer
from tests.serve.servers import Script, serving


def test_a_load_with_a_kill_loses_nothing(tmp_path: Path) -> None:
    export = even_export(tmp_path / "tiny")
    words = [f"init_from={export}", f"run.folder={tmp_path}", "minutes=0.06", "clients=12"]
    words += ["prompt_words=6", "max_tokens=12"]
    words += ["overrides=['serve.cache_megabytes=1','serve.declare_tools=false']"]
    assert verify_serve.main(compose("verify serve", words)) == 0
    found = json.loads((tmp_path / "default/verify_serve/verify.json").read_text())
    assert len(found["down_s"]) == 1 and found["latencies_s"]["first token"]["p50"] > 0
    ends = {end for counts in found["counts"].values() for end in counts}
    assert {"answered", "refused", "left", "broken"} <= ends  # broken by the kill


def _say(_: str) -> Message:
    return Message(role=Role.assistant, content="word " * 4)


def test_what_a_client_sees_is_judged() -> None:
    tokenizer = even_tokenizer()
    with serving(tokenizer, lambda: Script(_say, tokenizer)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        client = Client(port=port, model="tiny", key=None, prompt_words=6, max_tokens=30, limit_s=20)
        expected = dict.fromkeys((Kind.plain, Kind.stream, Kind.repeat, Kind.slow), End.answered)
        expected |= {Kind.leave: End.left, Kind.half: End.left, Kind.malformed: End.refused}
        for kind, end in expected.items():
            request = client.use(kind, Random(1))
            assert request.end is end, (kind, request.end, request.detail)
        deaf = Client(port=port, model="tiny", key=None, prompt_words=6, max_tokens=30, limit_s=20, drops_ends=True)
        assert deaf.use(Kind.stream, Random(1)).end is End.broken
        unknown = Client(port=port, model="other", key=None, prompt_words=6, max_tokens=30, limit_s=20).use(
            Kind.plain, Random(1)
        )
        assert unknown.end is End.wrong and "404" in unknown.detail
    assert client.use(Kind.plain, Random(1)).end is End.broken


def test_overrides_leave_what_the_command_sets_itself() -> None:
    with pytest.raises(ConfigError, match="verify serve sets this itself"):
        compose("verify serve", ["overrides=['serve.port=80']"])
    with pytest.raises(ConfigError, match="init_from is null"):
        verify_serve.main(compose("verify serve", []))
