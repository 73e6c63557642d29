"""What the server does with a checked request, apart from HTTP: admits it, runs its sequences, and builds responses."""

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from moetrain.chat.grammar import Calls
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, DataError
from moetrain.inference.grammar_check import GrammarCheck
from moetrain.inference.guided import Guide
from moetrain.inference.protocol import Sequence as TokenSequence
from moetrain.inference.sampling import Sampling
from moetrain.runtime import seed_of
from moetrain.serve.answers import Answer, ChatAnswer, TextAnswer
from moetrain.serve.config import ServeConfig
from moetrain.serve.engine_thread import EngineThread
from moetrain.serve.errors import ApiError
from moetrain.serve.job import Job, Update
from moetrain.serve.metrics import ServeMetrics
from moetrain.serve.prompt import Prompt, chat_prompt, text_prompts
from moetrain.serve.requests import ChatRequest, Choices, TextRequest
from moetrain.serve.schemas import schema_problem

_Json = dict[str, Any]
_COMPILERS = 2
"""Threads that compile schemas, apart from those that tokenise, so that requests without a schema do not wait. Each has
a process in which it tries them first."""
_MAX_COMPILE_S = 5.0
_MOST_COMPILING = 16
"""Requests whose schemas may wait for these threads."""
_STOPPED = "the server has stopped"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served. max_tokens: of a sequence. digest: identifies the weights."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_tokens: int
    digest: str
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A request whose sequences are running. unfinished: those that have not ended yet. deadline: of the event loop's
    clock.
    """

    id: str
    choices: Choices
    is_chat: bool
    created: int
    jobs: Sequence[Job]
    answers: Sequence[Answer]
    updates: "asyncio.Queue[tuple[Job, Update]]"
    unfinished: set[Job]
    deadline: float


class Service:
    """Runs requests on one engine thread. Its methods are called on one event loop."""

    def __init__(self, served: Served, *, config: ServeConfig, engine: EngineThread, metrics: ServeMetrics) -> None:
        self.served = served
        self.metrics = metrics
        self.is_draining = False
        self._config = config
        self._engine = engine
        self._num_jobs = 0
        self._runs: dict[str, Run] = {}
        self._num_compiling = 0
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="schemas")
        end_id = served.tokenizer.end_ids[0]
        self._guide = Guide(served.tokenizer, end_id=end_id)
        self._check = GrammarCheck(
            served.tokenizer, end_id=end_id, num_processes=_COMPILERS, max_seconds=_MAX_COMPILE_S
        )

    @property
    def num_jobs(self) -> int:
        """Number of sequences of the requests that run."""
        return self._num_jobs

    @property
    def status(self) -> str:
        """`ok` where new requests are answered, `stopping` after the server was told to end, else `failed`."""
        if self.is_draining:
            return "stopping"
        return "ok" if self._engine.is_alive else "failed"

    @asynccontextmanager
    async def within(self, deadline: float) -> AsyncIterator[None]:
        """Raise ApiError when the block has not ended by a time of the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):  # Python 3.11's wait_for can swallow a cancellation
                yield
        except TimeoutError:
            message = f"the request took longer than {self._config.max_request_s:g} s"
            raise ApiError(message, status=504, code="timeout") from None

    async def prepare(self, request: ChatRequest | TextRequest) -> list[Prompt]:
        """Return the prompts of a request. Raises ApiError when it is refused."""
        self._check_room(request.choices.number)
        name = request.choices.model
        if name is not None and name != self.served.name:
            message = f"the model {name[:80]!r} does not exist: this server has {self.served.name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        if isinstance(request, TextRequest):
            self._check_number(len(request.prompts) * request.choices.number)
        prompts = await asyncio.to_thread(self._prompts, request)
        if isinstance(request, ChatRequest) and any(prompt.grammar for prompt in prompts):
            await self._compile(request, prompts)
        self._check_number(len(prompts) * request.choices.number)
        for token, _ in request.choices.sampling.logit_bias:
            if token >= self.served.vocab_size:
                message = f"logit_bias has the token id {token}: the largest is {self.served.vocab_size - 1}"
                raise ApiError(message, param="logit_bias", code="invalid_value")
        for prompt in prompts:
            self._check_length(len(prompt.tokens), request)
        return prompts

    def _check_number(self, number: int) -> None:
        if number > self._config.max_choices:
            message = f"the request asks for {number} answers: at most {self._config.max_choices} are allowed"
            raise ApiError(message, param="n", code="invalid_value")

    async def _compile(self, request: ChatRequest, prompts: Sequence[Prompt]) -> None:
        if self._num_compiling >= _MOST_COMPILING:
            raise ApiError("too many schemas wait: try again later", status=503, code="busy", may_retry=True)
        self._num_compiling += 1
        work = asyncio.get_running_loop().run_in_executor(self._compilers, self._check_grammars, request, prompts)
        work.add_done_callback(self._has_compiled)  # a client that leaves does not stop the work
        await work

    def _has_compiled(self, _: object) -> None:
        self._num_compiling -= 1

    def _prompts(self, request: ChatRequest | TextRequest) -> list[Prompt]:
        tokenizer = self.served.tokenizer
        if isinstance(request, TextRequest):
            return text_prompts(request, tokenizer=tokenizer, vocab_size=self.served.vocab_size)
        if problem := schema_problem(_schemas(request)):
            raise ApiError(problem, param=_schema_param(request), code="invalid_schema")
        try:
            return [chat_prompt(request, tokenizer=tokenizer, declare_tools=self._config.declare_tools)]
        except DataError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None

    def _check_grammars(self, request: ChatRequest, prompts: Sequence[Prompt]) -> None:
        """Compile the grammars of prompts. Raises ApiError when a schema cannot be used."""
        schemas = tuple(json.dumps(schema) for schema in _schemas(request))
        try:
            for prompt in prompts:
                if problem := self._check.problem(schemas, prompt.grammar):
                    raise ConfigError(problem)
                self._guide.constraint(prompt.grammar)
        except ConfigError as error:
            message = f"a JSON schema cannot be used: {error}"
            raise ApiError(message, param=_schema_param(request), code="invalid_schema") from None

    def _check_length(self, length: int, request: ChatRequest | TextRequest) -> None:
        longest, max_tokens = self.served.max_tokens, request.choices.max_tokens
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        if length + (max_tokens or 1) > longest:
            asked = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
            message = f"the prompt has {length} tokens{asked}: together at most {longest} are allowed"
            raise ApiError(message, param=param, code="context_length_exceeded")
        if length == 0:
            raise ApiError("the prompt is empty", param="prompt", code="invalid_value")

    @contextmanager
    def run(self, request: ChatRequest | TextRequest, prompts: Sequence[Prompt], *, deadline: float) -> Iterator[Run]:
        """Run the sequences of a request; at the end, cancel those that have not ended."""
        number = len(prompts) * request.choices.number
        self._check_room(number)  # again, because others may have come while the prompt was made
        self._num_jobs += number
        run = self._start(request, prompts, deadline=deadline)
        self._runs[run.id] = run
        try:
            for job in run.jobs:
                self._engine.submit(job)
            yield run
        finally:
            del self._runs[run.id]
            self._num_jobs -= number
            for job in run.unfinished:
                self._engine.cancel(job)
                self.metrics.count_end("abort")
            self.metrics.count_stray(sum(answer.num_stray for answer in run.answers))

    def close(self) -> None:
        """End the threads and processes that compile, at the latest after what a thread compiles now."""
        self._check.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def abort(self) -> None:
        """End all running requests with an error."""
        for run in self._runs.values():
            for job in run.unfinished:
                run.updates.put_nowait((job, Update(is_ended=True, problem=_STOPPED)))

    def _check_room(self, number: int) -> None:
        if not self._engine.is_alive:
            raise ApiError("the engine has failed: restart the server", status=503, code="engine_error")
        if self.is_draining:
            raise ApiError("the server is stopping", status=503, code="stopping", may_retry=True)
        if self._num_jobs + min(number, self._config.max_choices) > self._config.num_slots + self._config.max_waiting:
            raise ApiError("the server is busy: try again later", status=503, code="busy", may_retry=True)

    def _start(self, request: ChatRequest | TextRequest, prompts: Sequence[Prompt], *, deadline: float) -> Run:
        choices = request.choices
        end_ids = frozenset(self.served.tokenizer.end_ids)
        seed = secrets.randbits(62) if choices.seed is None else choices.seed
        updates: asyncio.Queue[tuple[Job, Update]] = asyncio.Queue()
        jobs: list[Job] = []
        answers: list[Answer] = []
        for prompt in prompts:
            limit = self.served.max_tokens
            if choices.max_tokens is not None:
                limit = len(prompt.tokens) + choices.max_tokens
            for choice in range(choices.number):
                sequence = TokenSequence(
                    tokens=list(prompt.tokens),
                    stream=seed_of(seed, "serve", choice),
                    limit=limit,
                    stop_ids=end_ids,
                    sampling=_excluding(choices.sampling, prompt.excluded),
                    constraint=self._guide.constraint(prompt.grammar) if prompt.grammar else None,
                )
                jobs.append(Job(sequence=sequence, number=len(jobs), updates=updates))
                answers.append(self._answer(request, prompt, end_ids=end_ids))
        is_chat = isinstance(request, ChatRequest)
        return Run(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            choices=choices,
            is_chat=is_chat,
            created=int(time.time()),
            jobs=jobs,
            answers=answers,
            updates=updates,
            unfinished=set(jobs),
            deadline=deadline,
        )

    def _answer(self, request: ChatRequest | TextRequest, prompt: Prompt, *, end_ids: frozenset[int]) -> Answer:
        tokenizer, stops = self.served.tokenizer, request.choices.stops
        if isinstance(request, TextRequest):
            return TextAnswer(tokenizer, end_ids=end_ids, stops=stops)
        return ChatAnswer(
            tokenizer, end_ids=end_ids, stops=stops, first_call=prompt.first_call, prefilled=prompt.prefilled
        )

    async def parts(self, run: Run) -> AsyncGenerator[tuple[Job, list[_Json], bool], None]:
        """Yield (job, what it adds to its choice, whether it has ended) until all have ended. Raises ApiError."""
        while run.unfinished:
            async with self.within(run.deadline):
                job, update = await run.updates.get()
            if job not in run.unfinished:
                continue
            answer = run.answers[job.number]
            parts = answer.push(update.tokens)
            if not (update.is_ended or answer.is_done):
                yield job, parts, False
                continue
            if update.problem == _STOPPED:  # `run` cancels and counts what has not ended
                raise ApiError(_STOPPED, status=503, code="stopping")
            run.unfinished.remove(job)
            if update.problem:
                message = f"the answer could not be generated: {update.problem}"
                raise ApiError(message, status=500, code="engine_error")
            if update.is_ended and (problem := _problem(job)):  # a schema that compiles can still be too large to match
                raise ApiError(f"a JSON schema cannot be used: {problem}", code="invalid_schema")
            if not update.is_ended:
                self._engine.cancel(job)
            parts += answer.finish()
            self.metrics.count_end(answer.finish_reason)
            yield job, parts, True

    async def response(self, run: Run) -> _Json:
        """Return the whole response, when all sequences have ended."""
        async for _ in self.parts(run):
            pass
        choices = []
        for number, answer in enumerate(run.answers):
            choices.append(
                {
                    "index": number,
                    **answer.whole(),
                    "logprobs": answer.logprobs(answer.tokens) if run.choices.top_logprobs is not None else None,
                    "finish_reason": answer.finish_reason,
                    **({"token_ids": [token.id for token in answer.tokens]} if run.choices.returns_token_ids else {}),
                    **({} if run.is_chat else _prompt_ids(run, number)),
                }
            )
        body = {**self._head(run, is_chunk=False), "choices": choices, "usage": usage(run)}
        return body | (_prompt_ids(run, 0) if run.is_chat else {})

    async def chunks(self, run: Run) -> AsyncGenerator[_Json, None]:
        """Yield the chunks of a stream."""
        num_sent = [0] * len(run.jobs)
        has_begun: set[int] = set()
        async for job, parts, is_ended in self.parts(run):
            answer, number = run.answers[job.number], job.number
            if run.is_chat and number not in has_begun:
                yield self._chunk(run, number, {"delta": {"role": "assistant", "content": ""}}) | (
                    _prompt_ids(run, 0) if not has_begun else {}
                )
                has_begun.add(number)
            nothing: _Json = {"delta": {}} if run.is_chat else {"text": ""}
            if is_ended:
                parts = [*parts, nothing | {"finish_reason": answer.finish_reason}]
            for part in parts:
                new = answer.tokens[num_sent[number] :]
                num_sent[number] = len(answer.tokens)
                if run.choices.top_logprobs is not None and new:
                    part["logprobs"] = answer.logprobs(new)
                if run.choices.returns_token_ids:
                    part["token_ids"] = [token.id for token in new]
                if not run.is_chat and number not in has_begun:
                    part |= _prompt_ids(run, number)
                    has_begun.add(number)
                yield self._chunk(run, number, part)
        if run.choices.includes_usage:
            yield self._head(run, is_chunk=True) | {"choices": [], "usage": usage(run)}

    def _chunk(self, run: Run, number: int, part: _Json) -> _Json:
        choice = {"index": number, "logprobs": None, "finish_reason": None} | part
        chunk = self._head(run, is_chunk=True) | {"choices": [choice]}
        return chunk | ({"usage": None} if run.choices.includes_usage else {})

    def _head(self, run: Run, *, is_chunk: bool) -> _Json:
        kind = "text_completion" if not run.is_chat else "chat.completion.chunk" if is_chunk else "chat.completion"
        fingerprint = f"moetrain-{self.served.digest[:12]}"
        return {
            "id": run.id,
            "object": kind,
            "created": run.created,
            "model": self.served.name,
            "system_fingerprint": fingerprint,
        }


def usage(run: Run) -> _Json:
    """Return the numbers of tokens of a request. The prompt counts once, however many answers it has."""
    firsts = run.jobs[:: run.choices.number]
    num_prompt = sum(job.num_prompt for job in firsts)
    num_answer = sum(len(answer.tokens) for answer in run.answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": sum(job.sequence.num_cached for job in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.num_reasoning for answer in run.answers)},
    }


def _excluding(sampling: Sampling, tokens: Sequence[int]) -> Sampling:
    """Return the sampling without some tokens, whatever bias the request gives them."""
    if not tokens:
        return sampling
    biases = {**dict(sampling.logit_bias), **dict.fromkeys(tokens, -math.inf)}
    return replace(sampling, logit_bias=tuple(biases.items()))


def _problem(job: Job) -> str:
    """Return why the constraint of an ended job gave up, or ""."""
    constraint = job.sequence.constraint
    return "" if constraint is None else constraint.problem


def _prompt_ids(run: Run, number: int) -> _Json:
    """Return the token ids of the prompt of answer `number`, if the request asks for ids."""
    job = run.jobs[number]
    return {"prompt_token_ids": job.sequence.tokens[: job.num_prompt]} if run.choices.returns_token_ids else {}


def _schemas(request: ChatRequest) -> list[Mapping[str, Any]]:
    """Return the JSON schemas that the answer must match."""
    tools = [] if request.calls is Calls.none else [tool.parameters for tool in request.tools]
    return [*([] if request.schema is None else [request.schema]), *tools]


def _schema_param(request: ChatRequest) -> str:
    return "tools" if request.schema is None else "response_format"
