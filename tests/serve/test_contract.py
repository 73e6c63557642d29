"""What the official client sees: a whole loop of tool calls, streams, choices, logprobs, schemas and seeds."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import (
    CALL_ARGUMENT,
    CALL_BEGIN,
    CALL_END,
    IM_END,
    KIMI_K2,
    SECTION_BEGIN,
    SECTION_END,
    THINK_END,
)
from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.guided import GuidedConstraint
from moetrain.inference.protocol import Model
from moetrain.inference.speculation import Speculation
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import QuantConfig
from moetrain.serve.answers import TextAnswer
from moetrain.serve.job import Token
from moetrain.serve.server import Server
from tests.even_task import MODEL, even_tokenizer
from tests.serve.servers import Script, client, declared, get, joined, post, serving

TOOLS = [declared("look", at={"type": "integer"}), declared("stop")]
USER = {"role": "user", "content": "what is there?"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return even_tokenizer()


@pytest.fixture(scope="module")
def generating() -> Model:
    """A model with random weights."""
    model = Transformer(MODEL, compute_dtype=torch.float32)
    initialize(model, 1)
    return build_model(model.state_dict(), config=MODEL, quant=QuantConfig(), library=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tokenizer: Tokenizer, generating: Model) -> Iterator[Server]:
    """A server of a model with random weights."""
    with serving(
        tokenizer,
        lambda: GenerationEngine(generating, num_slots=4, max_tokens=128, speculation=Speculation.auto),
        max_tokens=128,
        declare_tools=False,
    ) as server:
        yield server


def _calls(*arguments: str) -> Message:
    calls = [ToolCall(name="look", arguments=text, id=f"functions.look:{9 + n}") for n, text in enumerate(arguments)]
    return Message(role=Role.assistant, reasoning="I look.", tool_calls=calls)


def _loop(prompt: str) -> Message:
    """Look twice at once, then once more, then answer."""
    results = prompt.count("## Return of")
    if results == 0:
        return _calls('{"at": 1}', '{"at": 2}')
    return _calls('{"at": 3}') if results == 2 else Message(role=Role.assistant, reasoning="Done.", content="Café: 3 ✓")


def _whole(api: openai.OpenAI, messages: list[Any]) -> tuple[dict[str, Any], str]:
    choice = api.chat.completions.create(model="tiny", messages=messages, tools=TOOLS).choices[0]  # type: ignore[call-overload]
    return choice.message.model_dump(exclude_none=True), choice.finish_reason


def _streamed(api: openai.OpenAI, messages: list[Any]) -> tuple[dict[str, Any], str]:
    deltas, reasons = [], []
    for chunk in api.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, stream=True):  # type: ignore[call-overload]
        (choice,) = chunk.choices
        deltas.append(choice.delta.model_dump(exclude_none=True))
        reasons.append(choice.finish_reason)
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert set(reasons[:-1]) == {None}
    return joined(deltas), reasons[-1]


@pytest.mark.parametrize("ask", [_whole, _streamed])
def test_a_loop_of_parallel_calls_and_results_ends_with_an_answer(tokenizer: Tokenizer, ask: Any) -> None:
    script = Script(_loop, tokenizer)
    messages: list[Any] = [USER]
    with serving(tokenizer, lambda: script) as server:
        api = client(server)
        reasons = []
        while not reasons or reasons[-1] == "tool_calls":
            message, reason = ask(api, messages)
            reasons.append(reason)
            messages.append(message)
            for number, call in enumerate(message.get("tool_calls", [])):
                call["id"] = f"call_{number}x{len(messages)}"  # some clients write ids of their own
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"stone {number}"})
    assert reasons == ["tool_calls", "tool_calls", "stop"]
    assert messages[-1]["content"] == "Café: 3 ✓" and messages[-1]["reasoning_content"] == "Done."
    assert messages[-1]["reasoning"] == "Done."
    first, last = script.prompts[0], script.prompts[-1]
    assert first.startswith('<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"look"')
    assert first.endswith("<|im_user|>user<|im_middle|>what is there?<|im_end|><|im_assistant|>assistant<|im_middle|>")
    turn = (
        "<think>I look.</think><|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{"at": 1}<|tool_call_end|>'
        '<|tool_call_begin|>functions.look:1<|tool_call_argument_begin|>{"at": 2}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>look<|im_middle|>## Return of functions.look:0\nstone 0<|im_end|>"
        "<|im_system|>look<|im_middle|>## Return of functions.look:1\nstone 1<|im_end|>"
    )
    assert turn in last and '<|tool_call_begin|>functions.look:2<|tool_call_argument_begin|>{"at": 3}' in last


def test_ids_of_calls_count_over_the_conversation_whatever_the_model_writes(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, lambda: Script(_loop, tokenizer)) as server:
        message, _ = _whole(client(server), [USER])
        assert [call["id"] for call in message["tool_calls"]] == ["functions.look:0", "functions.look:1"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "s"} for call in message["tool_calls"]]
        message, _ = _whole(client(server), [USER, message, *results])
        assert [call["id"] for call in message["tool_calls"]] == ["functions.look:2"]


def test_a_turn_that_is_cut_off_is_no_complete_call(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, lambda: Script(_loop, tokenizer)) as server:
        for limit in (1, 15, 40, 60):
            choice = client(server).chat.completions.create(model="tiny", messages=[USER], max_tokens=limit).choices[0]  # type: ignore[list-item]
            assert choice.finish_reason == "length"
            for call in choice.message.tool_calls or []:
                json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_a_turn_that_ends_inside_of_a_call_says_so_in_both_forms(tokenizer: Tokenizer) -> None:
    """A stream has sent the beginning of the call already."""
    call = KIMI_K2.turn_pieces(
        Message(role=Role.assistant, tool_calls=[ToolCall(name="look", arguments="{}", id="functions.look:0")])
    )
    ids = tokenizer.special_ids
    tokens = pieces_to_tokens(call, encode=tokenizer.encode, special_ids=ids)[0]
    cut = [*tokens[: tokens.index(ids[KIMI_K2.syntax.call_end])], ids[KIMI_K2.syntax.end]]
    with serving(tokenizer, lambda: Script(lambda _: list(cut), tokenizer)) as server:
        message, reason = _whole(client(server), [USER])
        assert reason == "length" and "tool_calls" not in message
        chunks = list(client(server).chat.completions.create(model="tiny", messages=[USER], stream=True))  # type: ignore[list-item]
        assert chunks[-1].choices[0].finish_reason == "length"


def test_tokens_of_parts_of_characters_have_keys_of_their_own_and_offsets_count_characters(
    tokenizer: Tokenizer,
) -> None:
    text = "a🙂é b"
    answer = TextAnswer(tokenizer, end_ids=tokenizer.end_ids, stops=[])
    ids = [token for character in text for token in _bytes_as_tokens(character, tokenizer)]
    alternatives = ((ids[1], -0.1), (ids[2], -0.2), (ids[0], -0.3))
    tokens = [Token(id=id_, logprob=-1.0, free_logprob=None, alternatives=alternatives) for id_ in ids]
    found = answer.logprobs(tokens[:3]), answer.logprobs(tokens[3:])
    offsets = [offset for part in found for offset in part["text_offset"]]
    names = [name for part in found for name in part["tokens"]]
    assert names == ["a", *(f"bytes:\\x{byte:02x}" for byte in "🙂é".encode()), " ", "b"]
    assert offsets == [0, 1, 1, 1, 1, 2, 2, 3, 4]
    first, second = "🙂".encode()[:2]
    assert found[0]["top_logprobs"][0] == {f"bytes:\\x{first:02x}": -0.1, f"bytes:\\x{second:02x}": -0.2, "a": -0.3}


def _bytes_as_tokens(character: str, tokenizer: Tokenizer) -> list[int]:
    by_bytes = {tokenizer.bytes_of(id_): id_ for id_ in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in character.encode()]


def test_text_is_split_neither_inside_a_character_nor_inside_a_stop_string(tokenizer: Tokenizer) -> None:
    content = "naïve 北京 🙂 one. END of it"
    script = lambda _: Message(role=Role.assistant, content=content)  # noqa: E731
    with serving(tokenizer, lambda: Script(script, tokenizer)) as server:
        for stop, expected in (
            (None, content),
            ([" END", "zzz"], content[: content.index(" END")]),
            ("🙂", "naïve 北京 "),
        ):
            body = {"messages": [USER], "stop": stop}
            chunks = client(server).chat.completions.create(model="tiny", stream=True, **body)  # type: ignore[call-overload]
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
            assert "".join(texts) == expected and "\ufffd" not in "".join(texts)
            assert len([text for text in texts if text]) > 3
            whole = client(server).chat.completions.create(model="tiny", **body).choices[0]  # type: ignore[call-overload]
            assert whole.message.content == expected and whole.finish_reason == "stop"


def test_each_answer_to_several_prompts_has_its_prompt_and_does_not_depend_on_the_others(tiny: Server) -> None:
    prompts = ["alpha beta gamma", "beta"]
    body = {"seed": 5, "max_tokens": 6, "return_token_ids": True}
    both = post(tiny, "/v1/completions", body | {"prompt": prompts, "n": 2})[2]["choices"]
    for place, prompt in enumerate(prompts):
        alone = post(tiny, "/v1/completions", body | {"prompt": prompt})[2]["choices"][0]
        answer = both[2 * place]
        assert (answer["token_ids"], answer["prompt_token_ids"]) == (alone["token_ids"], alone["prompt_token_ids"])
        assert both[2 * place + 1]["prompt_token_ids"] == alone["prompt_token_ids"]
        assert both[2 * place + 1]["token_ids"] != alone["token_ids"]
    assert both[0]["prompt_token_ids"] != both[2]["prompt_token_ids"]
    found: dict[int, list[int]] = {}
    for event in _events(tiny, body | {"prompt": prompts, "n": 2, "stream": True}, path="/v1/completions"):
        for choice in event["choices"]:
            if "prompt_token_ids" in choice:
                assert choice["index"] not in found
                found[choice["index"]] = choice["prompt_token_ids"]
    assert found == {choice["index"]: choice["prompt_token_ids"] for choice in both}


def test_a_seed_repeats_an_answer_and_a_stream_says_the_same(tiny: Server) -> None:
    body: dict[str, Any] = {
        "messages": [USER], "seed": 5, "n": 3, "max_tokens": 20, "logprobs": True, "top_logprobs": 2,
        "return_token_ids": True, "temperature": 0.9, "top_p": 0.95,
    }  # fmt: skip
    _, _, whole = post(tiny, "/v1/chat/completions", body)
    again = post(tiny, "/v1/chat/completions", body)[2]
    assert again["choices"] == _near(whole["choices"])
    assert len({tuple(choice["token_ids"]) for choice in whole["choices"]}) == 3
    alone = post(tiny, "/v1/chat/completions", body | {"n": 1})[2]
    assert alone["choices"][0] == _near(whole["choices"][0])
    deltas: dict[int, list[Any]] = defaultdict(list)
    ids: dict[int, list[int]] = defaultdict(list)
    logprobs: dict[int, list[Any]] = defaultdict(list)
    usages = []
    for event in _events(tiny, body | {"stream": True, "stream_options": {"include_usage": True}}):
        usages.append(event["usage"])
        for choice in event["choices"]:
            deltas[choice["index"]].append(choice["delta"])
            ids[choice["index"]] += choice.get("token_ids", [])
            logprobs[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert not event["choices"] and usages[:-1] == [None] * (len(usages) - 1)
    cached = usages[-1].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 < cached < whole["usage"]["prompt_tokens"]
    assert usages[-1] == {key: value for key, value in whole["usage"].items() if key != "prompt_tokens_details"}
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    assert whole["usage"]["completion_tokens"] == sum(map(len, ids.values()))
    for choice in whole["choices"]:
        index = choice["index"]
        streamed = joined(deltas[index])
        for call in streamed.pop("tool_calls", []):
            assert choice["finish_reason"] == "length" or call in choice["message"]["tool_calls"]
        assert {k: v for k, v in choice["message"].items() if k != "tool_calls" and v} == {
            k: v for k, v in streamed.items() if v
        }
        assert ids[index] == choice["token_ids"]
        assert logprobs[index] == _near(choice["logprobs"]["content"])
        for entry in choice["logprobs"]["content"]:
            assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
            assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


def _near(value: Any) -> Any:
    """Return what equals a response up to its logprobs: the batches of two requests may differ, and so their sums."""
    if isinstance(value, dict):
        return {key: _near(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_near(each) for each in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def _events(server: Server, body: dict[str, Any], *, path: str = "/v1/chat/completions") -> Iterator[dict[str, Any]]:
    text = post(server, path, body)[2]
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        yield json.loads(line)


def _biased(tokenizer: Tokenizer) -> dict[str, float]:
    markers = (THINK_END, SECTION_BEGIN, SECTION_END, CALL_ARGUMENT, CALL_END, IM_END)
    ids = [tokenizer.special_ids[name] for name in markers] + [tokenizer.encode(text)[0] for text in ('"', "}", "{")]
    return {str(id_): 5.0 for id_ in ids}


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("required", {"look", "stop"}),
        ({"type": "function", "function": {"name": "stop"}}, {"stop"}),
        ("auto", {"look", "stop", ""}),
        ("none", {""}),
    ],
)
def test_calls_match_their_schemas_and_the_choice_of_tools(
    tiny: Server, tokenizer: Tokenizer, choice: Any, allowed: set[str]
) -> None:
    body = {
        "messages": [USER], "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "n": 8,
        "logit_bias": _biased(tokenizer), "thinking": {"type": "disabled"}, "seed": 3, "logprobs": True,
    }  # fmt: skip
    status, _, found = post(tiny, "/v1/chat/completions", body)
    assert status == 200
    ended = [c for c in found["choices"] if c["finish_reason"] != "length"]
    assert ended
    for each in ended:
        names = {call["function"]["name"] for call in each["message"].get("tool_calls", [])} or {""}
        assert names <= allowed and len(each["message"].get("tool_calls", [])) <= 1
        assert (each["finish_reason"] == "tool_calls") == (names != {""})
        for call in each["message"].get("tool_calls", []):
            arguments = json.loads(call["function"]["arguments"])
            assert arguments == {} if names == {"stop"} else isinstance(arguments["at"], int)
        assert all(entry["free_logprob"] is not None for entry in each["logprobs"]["content"])


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "none"}])
@pytest.mark.parametrize("kind", ["enabled", "disabled"])
def test_an_answer_without_tools_has_no_calls(
    tiny: Server, tokenizer: Tokenizer, choice: dict[str, str], kind: str
) -> None:
    markers = {tokenizer.special_ids[name] for name in (SECTION_BEGIN, CALL_BEGIN)}
    body = {
        "messages": [USER], "n": 8, "seed": 3, "thinking": {"type": kind},
        "logit_bias": _biased(tokenizer) | {str(marker): 50.0 for marker in markers}, "return_token_ids": True,
    }  # fmt: skip
    status, _, found = post(tiny, "/v1/chat/completions", body | choice)
    assert status == 200
    for each in found["choices"]:
        assert "tool_calls" not in each["message"] and each["finish_reason"] in ("stop", "length")
        assert each["token_ids"] and not markers & set(each["token_ids"])


def test_a_schema_that_cannot_be_matched_to_its_end_is_refused(tiny: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Such as the pattern (a{1,1000}){1,1000}, which compiles, and after some hundred tokens is too large.
    monkeypatch.setattr(GuidedConstraint, "_mask", lambda self, matcher: None)
    form = {"type": "json_schema", "json_schema": {"name": "many", "strict": True, "schema": {"type": "string"}}}
    status, _, content = post(tiny, "/v1/chat/completions", {"messages": [USER], "response_format": form})
    assert (status, content["error"]["code"]) == (400, "invalid_schema")
    assert content["error"]["message"] == "a JSON schema cannot be used: no token may follow"


def test_an_answer_matches_the_json_schema_of_the_request(tiny: Server, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"ok": {"enum": [True, False]}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
    body = {"messages": [USER], "response_format": form, "n": 8, "logit_bias": _biased(tokenizer), "seed": 1}
    found = post(tiny, "/v1/chat/completions", body)[2]
    answers = [json.loads(c["message"]["content"]) for c in found["choices"] if c["finish_reason"] == "stop"]
    assert answers and all(answer in ({"ok": True}, {"ok": False}) for answer in answers)


def test_completions_continue_texts_and_tokens(tiny: Server, tokenizer: Tokenizer) -> None:
    api = client(tiny)
    found = api.completions.create(model="tiny", prompt=["some words", "to"], n=2, max_tokens=6, seed=4, logprobs=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None and found.usage.completion_tokens <= 24
    for choice in found.choices:
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.text_offset
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
        assert logprobs.text_offset[0] == 0
    tokens = [tokenizer.bos_id, *tokenizer.encode("some words")]
    same = api.completions.create(model="tiny", prompt=tokens, n=2, max_tokens=6, seed=4, logprobs=2)
    assert [c.text for c in same.choices] == [c.text for c in found.choices[:2]]
    streamed = ["", ""]
    for chunk in api.completions.create(model="tiny", prompt=tokens, n=2, max_tokens=6, seed=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in same.choices]


def test_models_health_and_metrics_are_shown(tiny: Server) -> None:
    assert [model.id for model in client(tiny).models.list()] == ["tiny"]
    assert client(tiny).models.retrieve("tiny").id == "tiny"
    assert get(tiny, "/health")[::2] == (200, {"status": "ok"})
    assert post(tiny, "/v1/chat/completions", {"messages": [USER], "max_tokens": 2})[0] == 200
    _, _, text = get(tiny, "/metrics")
    for name in (
        "num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total",
        'request_success_total{finished_reason="length"', "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_count",
    ):  # fmt: skip
        assert f"vllm:{name}" in text
    end = time.monotonic() + 10  # the answer may arrive before the engine's next step, which takes the request off
    while 'vllm:num_requests_running{model_name="tiny"} 0.0' not in text:
        assert time.monotonic() < end
        text = get(tiny, "/metrics")[2]


def test_metrics_show_pages_preemptions_drafts_and_forced_tokens(tokenizer: Tokenizer, generating: Model) -> None:
    megabytes = 5.5 * generating.new_cache(1).nbytes / (1 << 20)

    def make() -> GenerationEngine:
        return GenerationEngine(
            generating, num_slots=8, max_tokens=128, cache_megabytes=megabytes, speculation=Speculation.auto
        )

    with serving(tokenizer, make, max_tokens=128, declare_tools=False) as server:
        body: dict[str, Any] = {"messages": [USER], "n": 8, "max_tokens": 90, "temperature": 0}
        assert post(server, "/v1/chat/completions", body)[0] == 200
        body |= {"tools": TOOLS, "tool_choice": "required", "thinking": {"type": "disabled"}, "n": 1}
        assert post(server, "/v1/chat/completions", body)[0] == 200

        def value(name: str) -> float:
            return float(get(server, "/metrics")[2].split(f'\n{name}{{model_name="tiny"}} ')[1].split("\n")[0])

        assert value("vllm:num_preemptions_total") > 0
        assert value("vllm:spec_decode_num_accepted_tokens_total") > 0
        assert value("vllm:spec_decode_num_accepted_tokens_total") < value("vllm:spec_decode_num_draft_tokens_total")
        assert 0 < value("vllm:spec_decode_num_drafts_total") <= value("vllm:spec_decode_num_draft_tokens_total")
        assert value("moetrain:forced_tokens_total") > 10
        assert 0 < value("moetrain:constraint_seconds_total") < 60
        assert 0 < value("vllm:prefix_cache_hits_total") < value("vllm:prefix_cache_queries_total")
        assert value("vllm:kv_cache_usage_perc") == 0
