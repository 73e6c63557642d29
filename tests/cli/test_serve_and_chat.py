"""`moetrain serve` and `moetrain chat` of an export: what they read, say and refuse."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from moetrain.cli import chat, serve
from moetrain.cli.command_line import composed
from moetrain.commands.weights import ChatRun
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.runtime import free_port
from moetrain.tasks import registry
from moetrain.tasks.protocol import Split, Task
from tests.cli.command import ENVIRONMENT, ROOT
from tests.even_task import even_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return even_export(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def harmless_signal() -> Iterator[None]:
    """Keep a signal that finds no server from ending the tests."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("harmless_signal")
def test_an_export_is_served_until_a_signal(export: Path) -> None:
    port = free_port()
    found: list[str | None] = []

    def ask() -> None:
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=8) as api:
                answer = api.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
                )
                found.append(answer.choices[0].finish_reason)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    words = [f"init_from={export}", f"serve.port={port}", "serve.num_slots=2", "serve.api_key=k"]
    assert serve.main(compose("serve", words)) == 0
    thread.join(10)
    assert found and found[0] in ("length", "stop", "tool_calls")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve.host=0.0.0.0"], "serve.host is 0.0.0.0, which other machines can reach"),
        (["serve.host="], "serve.host is '': give an address such as 127.0.0.1"),
        (["serve.model_name="], "serve.model_name is '': give a name"),
        (["serve.api_key="], "serve.api_key is not a valid key: give visible ASCII characters, or null for none"),
        (["serve.cache_megabytes=0"], "serve.cache_megabytes is 0"),
        (["serve.max_tokens=4096"], "serve.max_tokens is 4096: give at most model.max_position_embeddings=128"),
    ],
)
def test_a_server_that_cannot_start_is_refused_in_one_line(export: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve.main(compose("serve", [f"init_from={export}", *words]))


def test_an_empty_variable_is_no_key_and_another_one_is_checked(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_API_KEY", "")
    assert compose("serve", [f"init_from={export}"]).serve.key is None
    monkeypatch.setenv("MOETRAIN_API_KEY", "kéy")
    run = compose("serve", [f"init_from={export}"])
    with pytest.raises(ConfigError, match="MOETRAIN_API_KEY is not a valid key"):
        serve.main(run)


def test_missing_packages_are_named_with_the_cure(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_PACKAGES", ("starlette", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package is not installed: install it with pip install 'moetrain\["):
        serve.main(compose("serve", [f"init_from={export}"]))


def test_a_chat_reads_lines_of_a_pipe(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("hello\n\nné\n".encode())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="utf-8"))
    assert chat.main(compose("chat", [f"init_from={export}", "max_turn_tokens=12"])) == 0
    sys.stdout.flush()
    shown = raw.getvalue().decode()
    assert shown.count("[user] ") == 2 and "[user] hello\n" in shown and "[user] né\n" in shown


def test_a_task_is_played_to_its_verdict(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="utf-8"))
    words = [f"init_from={export}", "max_turn_tokens=12", "task_index=0", "task.database.max_calls=2"]
    assert chat.main(compose("chat", words)) == 0
    sys.stdout.flush()
    shown = raw.getvalue().decode()
    assert shown.startswith("[user] ") and "\n[note] " in shown


def test_a_task_without_a_number_is_the_first_one() -> None:
    assert composed("chat", ["init_from=x"]).task_index is None
    for word in ("task=marathon", "task=database", "task.database.max_calls=3"):
        assert composed("chat", ["init_from=x", word]).task_index == 0
    assert composed("chat", ["init_from=x", "task=marathon", "task_index=3"]).task_index == 3


@pytest.mark.parametrize("words", [["generate", "prompt=-"], ["chat", "max_turn_tokens=12"]])
def test_a_closed_standard_input_is_no_traceback(export: Path, words: list[str]) -> None:
    close = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", close, "-m", "moetrain.cli", *words, f"init_from={export}"]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == (2 if words[0] == "generate" else 0)
    assert "Traceback" not in run.stderr
    assert words[0] == "chat" or "prompt=-: standard input is closed" in run.stderr


class WithoutTasks:
    """A family of a plugin that has no tasks."""

    def task(self, split: Split, index: int) -> Task:
        """Fail."""
        raise IndexError(f"there is no task {index}")


def test_a_task_that_a_plugin_cannot_make_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "build", lambda *_: WithoutTasks())
    run: ChatRun = compose("chat", ["init_from=x", "task_index=7"])
    unused: Any = None
    with pytest.raises(ConfigError, match=r"task_index is 7: task\.name=database fails: .*there is no task 7"):
        chat._act(run, unused, tokenizer=unused, screen=unused, max_tokens=2048)
