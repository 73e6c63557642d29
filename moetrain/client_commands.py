"""Configs of `chat`, and of the clients of an endpoint: `verify endpoint`, `verify serve` and `bench serve`.

Imports no torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.config import StageRun
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, TEMPERATURE, check_ranges
from moetrain.tasks.config import TaskConfig


class EndpointFault(StrEnum):
    """Fault to inject into what the endpoint answers.

    calls: calls are taken for answers. arguments: the JSON of their arguments is broken.
    """

    none = "none"
    calls = "calls"
    arguments = "arguments"


@dataclass(kw_only=True)
class ChatRun(StageRun):
    """Chat with a model at a terminal. Thinking, calls and results are shown as they happen.

    Each line of standard input is a message. Ctrl-C ends a turn, a second one ends the chat. With task=NAME or
    task_index=N the model acts as an agent in the environment of a task, and its grade is shown.
    """

    system: str = ""
    """System message at the beginning; empty for none."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    max_turn_tokens: int = 512
    """Largest number of tokens of a turn."""
    task_index: int | None = None
    """Number of a held-out task to act in, from 0; null is a chat. A command line with task= takes the first."""
    num_calls: int | None = None
    """Number of tool calls that the task requires; null is the family's choice."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Family and settings of the task."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {
            COUNT: ("max_turn_tokens", "num_calls"),
            TEMPERATURE: ("temperature",),
            NOT_NEGATIVE: ("task_index",),
        }
        check_ranges(self, prefix="", ranges=ranges)
        if self.num_calls is not None and self.task_index is None:
            raise ConfigError(f"num_calls is {self.num_calls} without task_index: give the number of the task")
        if self.system and self.task_index is not None:
            raise ConfigError("system is given with task_index: the task has its own prompt; leave one of them out")


@dataclass(kw_only=True)
class VerifyEndpointRun(StageRun):
    """Compare an OpenAI-compatible endpoint with another one: agreement on tool calls, and whether calls match schemas.

    MOETRAIN_API_KEY and MOETRAIN_API_KEY_OTHER are the keys of the two. A comparison of an endpoint with itself shows
    how much sampling alone changes.
    """

    url: str = ""
    """Base URL of the endpoint to verify, such as http://127.0.0.1:8000/v1."""
    other: str = ""
    """Base URL of the endpoint to compare with."""
    model: str | None = None
    """Model of the endpoint; null takes the first that it names."""
    other_model: str | None = None
    """Model of the other endpoint; null takes the first that it names."""
    requests: str | None = None
    """JSONL file with the body of a chat completion in each line; null takes the first turns of held-out tasks."""
    num_requests: int = 100
    """Largest number of requests to each endpoint."""
    num_clients: int = 8
    """Requests that run at the same time."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = 256
    """Largest number of tokens of an answer."""
    min_f1: float = 0.73
    """Bound on the F1 score of finishing with tool calls; 0.73 is Moonshot's for Kimi K2 Thinking."""
    min_schema_accuracy: float = 1.0
    """Bound on the share of responses with calls whose arguments all match their schemas."""
    same_prompts: bool = False
    """Also require equal numbers of prompt tokens, where both endpoints serve the same model."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks from which requests are made."""
    fault: EndpointFault = EndpointFault.none
    """Fault to inject, which the command must then detect."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {
            COUNT: ("num_requests", "num_clients", "max_tokens"),
            SHARE: ("min_f1", "min_schema_accuracy"),
            TEMPERATURE: ("temperature",),
        }
        check_ranges(self, prefix="", ranges=ranges)


@dataclass(kw_only=True)
class BenchServeRun(StageRun):
    """Measure latencies and throughput of an OpenAI-compatible endpoint under load from concurrent clients.

    With init_from, a server of these weights is started for the measurement. MOETRAIN_API_KEY is the key of url.
    """

    url: str | None = None
    """Base URL of a running endpoint, such as http://127.0.0.1:8000/v1; null starts a server of init_from."""
    model: str | None = None
    """Model to ask for; null takes the first that the endpoint names."""
    clients: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Numbers of clients that send requests at the same time, one after the other. Each has its own row."""
    seconds: float = 10.0
    """Seconds per number of clients, during which new requests are sent."""
    prompt_words: int = 100
    """Words of the user's message."""
    max_tokens: int = 64
    """Largest number of tokens of an answer."""
    with_tools: bool = False
    """Give a tool and require a call of it, so that every token is constrained."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {COUNT: ("clients", "prompt_words", "max_tokens"), POSITIVE: ("seconds",)}
        check_ranges(self, prefix="", ranges=ranges)
        if not self.clients:
            raise ConfigError("clients is empty: give at least one number")


class ServeFault(StrEnum):
    """Fault to inject into what clients see. lost_end: the last event of each stream is dropped."""

    none = "none"
    lost_end = "lost_end"


@dataclass(kw_only=True)
class VerifyServeRun(StageRun):
    """Check that `moetrain serve` loses no request, page or event under load, bad clients and a kill.

    Clients send requests of every kind, leave, read slowly, and send malformed requests; in the middle the server is
    killed with SIGKILL and started again. MOETRAIN_API_KEY is its key.
    """

    minutes: float = 5.0
    """Duration of the load."""
    clients: int = 64
    """Number of clients that send requests at the same time; the server decodes half as many sequences together."""
    prompt_words: int = 30
    """Words of the user's message."""
    max_tokens: int = 32
    """Largest number of tokens of an answer."""
    limit_s: float = 120.0
    """Seconds without a byte after which a request counts as lost."""
    overrides: list[str] = field(default_factory=list)
    """Further words for the command line of `moetrain serve`, such as serve.cache_megabytes=8."""
    fault: ServeFault = ServeFault.none
    """Fault to inject, which the command must then detect."""

    def __post_init__(self) -> None:
        """Check ranges, and that the overrides leave what the command sets itself."""
        check_ranges(
            self, prefix="", ranges={COUNT: ("clients", "prompt_words", "max_tokens"), POSITIVE: ("minutes", "limit_s")}
        )
        for word in self.overrides:
            if word.startswith(("init_from=", "serve.port=", "serve.model_name=", "serve.host=", "serve.api_key=")):
                raise ConfigError(f"overrides has {word!r}: verify serve sets this itself; leave it out")
