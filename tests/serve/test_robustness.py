"""What a server does with bad requests, clients that go away, load, faults of the engine, and its own end."""

import contextlib
import http.client
import json
import logging
import os
import random
import signal
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moetrain.chat.messages import Message, Role
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.serve import service
from moetrain.serve.config import KEY_VARIABLE, ServeConfig
from moetrain.serve.server import Server, run_until_signal
from moetrain.serve.service import Served
from tests.even_task import even_tokenizer
from tests.serve.servers import Script, client, declared, get, post, serving, until

USER = {"role": "user", "content": "hello"}
BODY = {"messages": [USER]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return even_tokenizer()


def _long(_: str) -> Message:
    return Message(role=Role.assistant, content="word " * 100)


def _very_long(_: str) -> Message:
    return Message(role=Role.assistant, content="word " * 900)


def _echo(prompt: str) -> Message:
    """Answer with the user's own words."""
    return Message(role=Role.assistant, content=prompt.split("<|im_middle|>")[1].split("<|im_end|>")[0] * 3)


@pytest.fixture(scope="module")
def echo(tokenizer: Tokenizer) -> Iterator[Server]:
    with serving(tokenizer, lambda: Script(_echo, tokenizer), max_body_bytes=400_000, max_choices=4) as server:
        yield server


def _tool(**fields: Any) -> list[Any]:
    found = declared("f")
    found["function"] |= fields
    return [found]


def _schema(schema: dict[str, Any] | bool) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, b"", 400, "not JSON"),
        (CHAT, b"{", 400, "not JSON"),
        (CHAT, b"[1]", 400, "not a JSON object"),
        (CHAT, b'{"messages": "\xff"}', 400, "not UTF-8 at byte 14"),
        (CHAT, b'{"temperature": NaN}', 400, "NaN is no JSON"),
        (CHAT, b'{"seed": 1e999}', 400, "1e999 is too large"),
        (CHAT, b'{"seed": 1, "seed": 2}', 400, "the key 'seed' is there twice in one object"),
        (CHAT, b"[" * 15_000, 400, "nested too deeply"),
        (CHAT, b'{"seed": ' + b"9" * 9_000 + b"}", 400, "not JSON"),
        (CHAT, {}, 400, "give a list of messages"),
        (CHAT, {"messages": []}, 400, "messages is empty"),
        (CHAT, {"messages": ["x"]}, 400, "message 0 is str 'x': give an object"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "message 0: the role is 'robot'"),
        (CHAT, {"messages": [{"role": "user", "contnet": "x"}]}, 400, "did you mean content"),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]}, 400, "no call of the turn before"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "list of parts of type text"),
        (CHAT, BODY | {"model": "gpt-9"}, 404, "the model 'gpt-9' does not exist"),
        (CHAT, BODY | {"tempreature": 1}, 400, "did you mean temperature?"),
        (CHAT, BODY | {"temperature": "1"}, 400, "temperature is '1': give a number from 0 to 2"),
        (CHAT, BODY | {"temperature": 1e-9}, 400, "give 0 (greedy)"),
        (CHAT, BODY | {"top_p": 0}, 400, "top_p is 0"),
        (CHAT, BODY | {"n": 0}, 400, "n is 0: give a whole number from 1"),
        (CHAT, BODY | {"n": True}, 400, "n is True"),
        (CHAT, BODY | {"n": 5}, 400, "at most 4 are allowed"),
        (CHAT, BODY | {"max_tokens": 0}, 400, "max_tokens is 0"),
        (CHAT, BODY | {"max_tokens": 1999}, 400, "together at most 2000 are allowed"),
        (CHAT, BODY | {"max_tokens": 5, "max_completion_tokens": 6}, 400, "give one of the two"),
        (CHAT, {"messages": [{"role": "user", "content": "x1" * 5000}]}, 400, "together at most 2000"),
        (CHAT, BODY | {"top_logprobs": 2}, 400, "it requires logprobs=true"),
        (CHAT, BODY | {"stop": ["", "x"]}, 400, "stop is list"),
        (CHAT, BODY | {"logit_bias": {"x": 1}}, 400, "logit_bias has the key 'x'"),
        (CHAT, BODY | {"logit_bias": {"99999": 1}}, 400, "logit_bias has the token id 99999"),
        (CHAT, BODY | {"logit_bias": {"3": "a"}}, 400, "logit_bias.3 is 'a'"),
        (CHAT, BODY | {"frequency_penalty": 0.5}, 400, "this field is not supported"),
        (CHAT, BODY | {"stream_options": {"include_usage": True}}, 400, "requires stream=true"),
        (CHAT, BODY | {"tools": "[]"}, 400, "tools is '[]'"),
        (CHAT, BODY | {"tools": [{"name": "f"}]}, 400, "a declaration in tools is dict"),
        (CHAT, BODY | {"tools": _tool(name="a b")}, 400, "a tool has the name 'a b'"),
        (CHAT, BODY | {"tools": _tool() * 2}, 400, "tools declares f twice"),
        (CHAT, BODY | {"tools": {}}, 400, "tools is dict: give a list of declarations"),
        (CHAT, BODY | {"tools": 0}, 400, "tools is 0: give a list of declarations"),
        (CHAT, BODY | {"tools": _tool(parameters=[])}, 400, "the parameters of the declaration of f are"),
        (CHAT, BODY | {"tools": _tool(description=5)}, 400, "tools: f.description is 5: give a string"),
        (CHAT, BODY | {"tools": _tool(strict="yes")}, 400, "tools: f.strict is 'yes': give true or"),
        (CHAT, BODY | {"stop": False}, 400, "stop is False: give a string"),
        (CHAT, BODY | {"stop": {}}, 400, "stop is dict: give a string"),
        (CHAT, BODY | {"frequency_penalty": False}, 400, "frequency_penalty is False: this field is not supported"),
        ("/v1/completions", {"prompt": "x", "best_of": True}, 400, "best_of is True: this field is not supported"),
        ("/v1/completions", {"prompt": "x", "echo": 0}, 400, "echo is 0: this field is not supported"),
        (
            CHAT,
            BODY | {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 5}}},
            400,
            "response_format.json_schema.name is 5: give a string",
        ),
        (
            CHAT,
            BODY | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "("}}}},
            400,
            "unclosed group",
        ),
        (CHAT, BODY | {"tools": _tool(parameters={"type": "string"})}, 400, "not a JSON schema of type object"),
        (CHAT, BODY | {"tools": _tool(parameters={"not": {}})}, 400, 'cannot be used: Unimplemented keys: ["not"]'),
        (CHAT, BODY | {"tools": _tool(parameters={"x-guidance": {"lenient": True}})}, 400, "has the key x-guidance"),
        (CHAT, BODY | {"tools": _tool(parameters={"properties": 3})}, 400, "a JSON schema cannot be used"),
        (CHAT, BODY | _schema({"const": 2**53 + 1}), 400, "has the number 9007199254740993: numbers above 2^53"),
        (CHAT, BODY | _schema({"type": "integer", "multipleOf": 400_009}), 400, "multipleOf of more than 100000 tog"),
        (CHAT, BODY | _schema({"type": "number", "multipleOf": 0.400009}), 400, "multipleOf of more than 100000 toge"),
        (CHAT, BODY | _schema({"anyOf": [{"multipleOf": 60_000 + n} for n in range(2)]}), 400, "multipleOf of more"),
        (CHAT, BODY | _schema({"properties": {"default": {"enum": [2**53 + 1]}}}), 400, "has the number 9007199254740"),
        (CHAT, BODY | _schema(_nested(150)), 400, "nested more than 100 levels deep"),
        (CHAT, BODY | {"tools": _tool(parameters=_nested(150))}, 400, "nested more than 100 levels deep"),
        (CHAT, BODY | _schema({"enum": [*range(20_000)]}), 400, "more than 10000 values together"),
        (CHAT, BODY | _schema({"$ref": "#"}), 400, "a JSON schema cannot be used: NoExtensionBias"),
        (
            CHAT,
            BODY | _schema({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}),
            400,
            "a JSON schema cannot be used: Parser Error: Current row has",
        ),
        (CHAT, BODY | {"tool_choice": "required"}, 400, "it requires tools"),
        (CHAT, {"messages": [{"from": "human", "value": "hello"}]}, 400, "message 0 has no role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "message 0 has no content"),
        (CHAT, {"messages": [USER | {"weight": 0}]}, 400, "message 0 has the unknown key weight"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": {}}]}, 400, "give a list of calls"),
        (CHAT, BODY | {"logit_bias": {"5": 1, "05": -1}}, 400, "logit_bias has a token id twice"),
        (
            CHAT,
            BODY | {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}},
            400,
            "chat_template_kwargs.thinking says the opposite",
        ),
        (
            CHAT,
            BODY | {"tools": _tool(), "tool_choice": {"type": "function", "function": {"name": "f"}, "x": 1}},
            400,
            "unknown field tool_choice.x",
        ),
        (CHAT, BODY | _schema({"type": "integer", "minimum": 2**53 + 1}), 400, "only numbers beyond 2^53"),
        (CHAT, BODY | _schema({"type": "integer", "exclusiveMaximum": -(2**60)}), 400, "only numbers beyond 2^53"),
        (CHAT, BODY | _schema({"type": "number", "minimum": 0.5, "maximum": 10**400}), 400, "cannot be used"),
        (
            CHAT,
            BODY | _schema({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}),
            400,
            "exclusiveMinimum 0 and its other bound less than 1 away",
        ),
        (CHAT, BODY | {"tools": _tool(), "tool_choice": {"type": "function"}}, 400, "tools: f"),
        (CHAT, BODY | {"response_format": {"type": "xml"}}, 400, "response_format.type is 'xml'"),
        (CHAT, BODY | {"response_format": {"type": "json_schema"}}, 400, "json_schema.schema is null: give an obj"),
        (CHAT, BODY | _schema(True), 400, "json_schema.schema is true: give an object"),
        (CHAT, {}, 400, "there are no messages: give a list of messages"),
        (CHAT, {"messages": ["hi"]}, 400, "message 0 is str 'hi': give an object with role and content"),
        (CHAT, BODY | {"chat_template_kwargs": {"thinks": True}}, 400, "unknown field chat_template_kwargs.thinks"),
        ("/v1/completions", {}, 400, "prompt is None"),
        ("/v1/completions", {"prompt": [1, "x"]}, 400, "give a text, a list of token ids"),
        ("/v1/completions", {"prompt": [[1], [99_999]]}, 400, "prompt has the token id 99999"),
        ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo is True"),
        ("/v1/embeddings", {}, 404, "/v1/embeddings: Not Found"),
    ],
)
def test_a_bad_request_gets_an_error_in_the_form_of_the_api(
    echo: Server, path: str, body: bytes | dict[str, Any], status: int, said: str
) -> None:
    found, headers, content = post(echo, path, body)
    assert found == status and said in content["error"]["message"]
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(content) and headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "more",
    [
        {
            "tools": _tool(
                parameters={"type": "object", "properties": {"id": {"type": "integer", "maximum": 2**63 - 1}}}
            )
        },
        {"tools": _tool(parameters={"type": "object", "properties": {"id": {"type": "integer", "default": 2**64}}})},
        {"tools": _tool(parameters={"not": {}}), "tool_choice": "none"},
        _schema({"type": "number", "multipleOf": 0.01}),
        _schema({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        _schema({"type": "number", "minimum": 0, "maximum": 0.5}),
        _schema({"type": "number", "exclusiveMinimum": 0.25, "exclusiveMaximum": 0.5}),
    ],
)
def test_schemas_in_use_are_accepted(echo: Server, more: dict[str, Any]) -> None:
    assert post(echo, CHAT, BODY | more)[0] == 200


def _bomb(most: int) -> dict[str, Any]:
    """Return a schema that takes twice as long to compile with each pattern more."""
    return _schema({"allOf": [{"type": "string", "pattern": f"^(a|b){{0,{number}}}a"} for number in range(1, most)]})


def test_a_schema_that_takes_too_long_to_compile_is_refused_and_delays_no_other(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_MAX_COMPILE_S", 1.0)
    with serving(tokenizer, lambda: Script(_echo, tokenizer), max_request_s=60) as server:
        for most in (60, 61, 62):  # more than there are processes
            status, _, content = post(server, CHAT, BODY | _bomb(most))
            assert status == 400 and "compiling it takes more than 1 s" in content["error"]["message"]
        assert post(server, CHAT, BODY | _schema({"const": 1}))[0] == 200


def test_time_is_over_while_a_request_is_prepared(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, lambda: Script(_echo, tokenizer), max_request_s=1.0) as server:
        status, _, content = post(server, CHAT, BODY | _bomb(60))
        assert (status, content["error"]["code"]) == (504, "timeout")
    assert not server.is_running  # although a schema was being compiled


def test_too_many_prompts_are_refused_before_they_are_read(echo: Server) -> None:
    start = time.monotonic()
    status, _, content = post(echo, "/v1/completions", {"prompt": ["a"] * 70_000})
    assert status == 400 and "asks for 70000 answers" in content["error"]["message"]
    assert time.monotonic() - start < 2


def test_the_length_of_an_error_is_bounded(echo: Server) -> None:
    message = post(echo, CHAT, {"messages": [{"role": "x" * 300_000, "content": "y"}]})[2]["error"]["message"]
    assert len(message) < 1100 and message.endswith("...")


def test_a_wrong_method_is_refused_in_the_form_of_the_api(echo: Server) -> None:
    status, headers, content = get(echo, CHAT)
    assert status == 405 and "Method Not Allowed" in content["error"]["message"] and headers["allow"] == "POST"


def test_a_reason_does_not_show_the_grammar(echo: Server) -> None:
    message = post(echo, CHAT, BODY | _schema({"not": {}}))[2]["error"]["message"]
    assert message == 'a JSON schema cannot be used: Unimplemented keys: ["not"]'


def test_a_body_that_is_too_large_is_refused_before_it_is_read(echo: Server) -> None:
    assert post(echo, CHAT, b"x" * 400_001)[0] == 413
    connection = http.client.HTTPConnection(echo.url.removeprefix("http://"), timeout=20)
    parts = (b"x" * 10_000 for _ in range(50))  # without a content-length
    connection.request("POST", CHAT, body=parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == "body_too_large"
    connection.close()
    assert post(echo, CHAT, BODY)[0] == 200


def test_a_body_that_does_not_arrive_is_not_waited_for(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, lambda: Script(_echo, tokenizer), max_body_s=0.1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n".encode() + b"{")
            slow.settimeout(10)
            assert slow.recv(12) == b"HTTP/1.1 408"


def test_fields_without_effect_are_named_in_the_response(echo: Server) -> None:
    status, headers, _ = post(echo, CHAT, BODY | {"user": "me", "store": False, "metadata": None})
    assert status == 200 and headers["x-ignored-fields"] == "user, store"


def test_a_key_is_required_where_one_is_set(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    with serving(tokenizer, lambda: Script(_echo, tokenizer)) as server:
        with pytest.raises(openai.AuthenticationError):
            client(server, key="wrong").chat.completions.create(model="tiny", messages=[USER])  # type: ignore[list-item]
        assert post(server, CHAT, BODY)[0] == 401 and get(server, "/v1/models")[0] == 401
        assert get(server, "/health")[0] == 200
        answer = client(server, key="s3cret").chat.completions.create(model="tiny", messages=[USER])  # type: ignore[list-item]
        assert answer.choices[0].message.content == "hello" * 3


def test_an_open_address_requires_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        ServeConfig(host=host).check_exposure()
    for host in ("0.0.0.0", "::", "example.org"):
        ServeConfig(host=host, api_key="k").check_exposure()
        with pytest.raises(ConfigError, match=f"serve.host is {host}.*set {KEY_VARIABLE}"):
            ServeConfig(host=host).check_exposure()


def test_an_address_in_use_is_one_line(echo: Server, tokenizer: Tokenizer) -> None:
    port = int(echo.url.rsplit(":", 1)[1])
    with (
        pytest.raises(ConfigError, match=rf"serve.port {port}: Address already in use"),
        serving(tokenizer, lambda: Script(_echo, tokenizer), port=port),
    ):
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(tokenizer: Tokenizer, stream: bool) -> None:
    script = Script(_very_long, tokenizer)
    script.step_s = 0.005
    with serving(tokenizer, lambda: script) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
        connection.request("POST", CHAT, body=json.dumps(BODY | {"stream": stream, "n": 2}))
        if stream:
            connection.getresponse().read(200)
        until(lambda: script.num_steps > 5)
        connection.sock.close()
        connection.close()
        until(lambda: script.num_cancelled == 2)
        assert not script.is_busy
        assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in get(server, "/metrics")[2]


def test_a_slow_reader_delays_nobody(tokenizer: Tokenizer) -> None:
    script = Script(_long, tokenizer)
    with serving(tokenizer, lambda: script) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            body = json.dumps(BODY | {"stream": True, "n": 8}).encode()
            slow.sendall(
                b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body
            )
            until(lambda: script.num_steps > 20)
            assert post(server, CHAT, BODY)[0] == 200
            until(lambda: not script.is_busy)  # its own sequences end as well, unread
            assert slow.recv(15) == b"HTTP/1.1 200 OK"


def test_a_busy_server_says_when_to_come_back(tokenizer: Tokenizer) -> None:
    script = Script(_long, tokenizer)
    script.step_s = 0.01
    with serving(tokenizer, lambda: script, num_slots=2, max_waiting=1, max_choices=3) as server:

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server stops before it has answered
                post(server, CHAT, BODY | {"n": 3})

        threading.Thread(target=ask, daemon=True).start()
        until(lambda: script.num_steps > 1)
        status, headers, content = post(server, CHAT, BODY)
        assert (status, content["error"]["code"], headers["retry-after"]) == (503, "busy", "1")
        assert "x-should-retry" not in headers and get(server, "/health")[0] == 200


def test_a_request_beyond_its_time_ends_with_an_error(tokenizer: Tokenizer) -> None:
    script = Script(_long, tokenizer)
    script.step_s = 0.01
    with serving(tokenizer, lambda: script, max_request_s=0.1) as server:
        status, headers, content = post(server, CHAT, BODY)
        assert (status, content["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
        with pytest.raises(openai.APIError, match="took longer than"):
            for _ in client(server).chat.completions.create(model="tiny", messages=[USER], stream=True):  # type: ignore[list-item]
                pass
        until(lambda: script.num_cancelled == 2)


def test_a_step_that_fails_ends_the_running_requests_and_no_later_one(tokenizer: Tokenizer) -> None:
    made: list[Script] = []

    def make() -> Script:
        made.append(Script(_echo, tokenizer))
        made[-1].is_broken = len(made) == 1
        return made[-1]

    with serving(tokenizer, make) as server:
        status, _, content = post(server, CHAT, BODY)
        assert (status, content["error"]["code"]) == (500, "engine_error")
        assert post(server, CHAT, BODY)[0] == 200 and len(made) == 2


def test_a_server_whose_engine_cannot_be_built_again_says_so(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="moetrain.serve.engine_thread")  # records would keep the generation
    made: list[weakref.ref[Script]] = []
    was_freed: list[bool] = []

    def make() -> Script:
        if made:
            was_freed.append(made[0]() is None)
            raise MemoryError
        script = Script(_echo, tokenizer)
        script.is_broken = True
        made.append(weakref.ref(script))
        return script

    with serving(tokenizer, make) as server:
        assert post(server, CHAT, BODY)[2]["error"]["code"] == "engine_error"
        until(lambda: get(server, "/health")[0] == 503)
        assert get(server, "/health")[2] == {"status": "failed"}
        status, _, content = post(server, CHAT, BODY)
        assert status == 503 and "the engine has failed" in content["error"]["message"]
        assert was_freed == [True]
        assert 'num_requests_running{model_name="tiny"} 0.0' in get(server, "/metrics")[2]


def test_a_stopping_server_finishes_what_runs_and_refuses_what_comes(tokenizer: Tokenizer) -> None:
    script = Script(_long, tokenizer)
    script.step_s = 0.002
    found: list[Any] = []
    with serving(tokenizer, lambda: script) as server:
        threads = [threading.Thread(target=lambda: found.append(post(server, CHAT, BODY))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(script.prompts) == 3)
        server.drain()
        assert get(server, "/health")[0] == 503  # on a new connection
        status, headers, content = post(server, CHAT, BODY)
        assert (status, content["error"]["code"], headers["retry-after"]) == (503, "stopping", "1")
        server.wait(20)
        assert not server.is_running
        for thread in threads:
            thread.join(5)
        assert [status for status, _, _ in found] == [200] * 3
        assert {content["choices"][0]["finish_reason"] for _, _, content in found} == {"stop"}
        with pytest.raises(OSError, match="refused"):
            post(server, CHAT, BODY)


def _stream_text(server: Server, body: dict[str, Any]) -> str:
    request = urllib.request.Request(f"{server.url}{CHAT}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def test_a_drain_ends_in_its_time(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(_very_long, tokenizer)
    script.step_s = 0.02
    with serving(tokenizer, lambda: script, max_drain_s=0.1) as server:
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(post(server, CHAT, BODY))),
            threading.Thread(target=lambda: found.append(_stream_text(server, BODY | {"stream": True}))),
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(script.prompts) == 2 and script.num_steps > 3)
        half = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        server.drain()
        server.wait(10)
        assert not server.is_running and script.num_steps < 500
        for thread in threads:
            thread.join(10)
        (plain,) = (each for each in found if isinstance(each, tuple))
        (events,) = (each for each in found if isinstance(each, str))
        assert plain[0] == 503 and plain[2]["error"]["code"] == "stopping"
        assert '"code": "stopping"' in events.splitlines()[-2]
        assert half.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
    assert not [record for record in caplog.records if record.exc_info]


def test_sixty_four_clients_at_once_each_get_their_own_answer(tokenizer: Tokenizer) -> None:
    script = Script(_echo, tokenizer)
    script.step_s = 0.001
    errors: list[str] = []
    answered: list[str] = []

    def use(server: Server, number: int) -> None:
        try:
            ask(server, number)
        except Exception as error:
            errors.append(f"client {number}: {error!r}")

    def ask(server: Server, number: int) -> None:
        for kind in random.Random(number).sample(["plain", "stream", "leave", "bad"], k=4):
            text = f"client {number} says {len(answered)}"
            body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
            if kind == "bad":
                if post(server, CHAT, body | {"n": -1})[0] != 400:
                    errors.append(f"{text}: accepted")
                continue
            if kind == "plain":
                answer = api.chat.completions.create(**body).choices[0].message.content
            else:
                parts = []
                with api.chat.completions.create(stream=True, **body) as chunks:
                    for chunk in chunks:
                        parts.append(chunk.choices[0].delta.content or "")
                        if kind == "leave" and len(parts) > 4:
                            break
                if kind == "leave":
                    continue
                answer = "".join(parts)
            if answer != text * 3:
                errors.append(f"{text}: {answer!r}")
            answered.append(text)

    with serving(tokenizer, lambda: script, num_slots=16, max_waiting=200) as server:
        api = client(server)
        threads = [threading.Thread(target=use, args=(server, number)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not errors
        assert len(answered) == 64 * 2
        until(lambda: not script.is_busy)
        until(lambda: 'num_requests_running{model_name="tiny"} 0.0' in get(server, "/metrics")[2])


@pytest.mark.parametrize("number", [1, 2])
def test_the_first_signal_drains_and_the_second_stops_at_once(tokenizer: Tokenizer, number: int) -> None:
    script = Script(_very_long, tokenizer)
    script.step_s = 0.002
    served = Served(
        name="tiny", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_tokens=2000, digest="0123456789ab"
    )
    server = Server(served, config=ServeConfig(port=0), make_generation=lambda: script)
    found: list[object] = []

    def ask() -> None:
        until(lambda: server.is_running)
        try:
            found.append(post(server, CHAT, BODY | {"max_tokens": 200})[0])
        except OSError as error:
            found.append(type(error))

    def kill() -> None:
        until(lambda: script.num_steps > 3)
        for _ in range(number):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    threads = [threading.Thread(target=act) for act in (ask, kill)]
    for thread in threads:
        thread.start()
    code = run_until_signal(server)
    for thread in threads:
        thread.join(10)
    assert (code, found == [200]) == ((0, True) if number == 1 else (128 + signal.SIGTERM, False))
    server.wait(10)
    assert not server.is_running and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
