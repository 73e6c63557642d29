"""Config of the server: address, key and limits. Does not import torch."""

import ipaddress
import os
from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.inference.speculation import Speculation
from moetrain.kernels.config import Kernels
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges
from moetrain.runtime import MAX_PORT

KEY_VARIABLE = "MOETRAIN_API_KEY"
"""Environment variable with the key, for when `serve.api_key` is null."""


@dataclass(kw_only=True)
class ServeConfig:
    """Address, key and limits of the server.

    A request beyond a limit is refused or ended; other requests are not affected.
    """

    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own requires a key."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must have as `Authorization: Bearer KEY`. null takes the environment variable MOETRAIN_API_KEY,
    which keeps the key out of files; without both, no key is required."""
    model_name: str | None = None
    """Name of the model in requests; null takes the name of the folder of the weights."""
    num_slots: int = 32
    """Largest number of sequences that are decoded together."""
    cache_megabytes: int | None = None
    """Largest size of the cache of latents in MiB; null takes what all sequences need, at most half of the free memory.
    Sequences that do not fit are prefilled again later."""
    kernels: Kernels = Kernels.auto
    """Kernels that generate on a CPU, as rollout.kernels."""
    speculation: Speculation = Speculation.auto
    """auto: where few sequences are decoded, tokens that a sequence repeats are drafted and verified in one step, as
    rollout.speculation."""
    max_waiting: int = 128
    """Largest number of further sequences that wait for a slot; a request beyond them gets status 503."""
    max_tokens: int | None = None
    """Largest number of tokens of a sequence, prompt and answer; null takes model.max_position_embeddings."""
    max_choices: int = 16
    """Largest number of sequences of one request: prompts times n."""
    max_body_bytes: int = 4_194_304
    """Largest size of a request's body."""
    max_body_s: float = 30.0
    """Seconds in which the body of a request must arrive."""
    max_request_s: float = 600.0
    """Seconds after which a request is ended with an error, its time in the queue included."""
    max_drain_s: float = 60.0
    """Seconds that running requests have to finish after SIGTERM or Ctrl-C. A second signal stops at once."""
    declare_tools: bool = True
    """Write the tools of a request into its prompt. false is for models that learned their tools from demonstrations
    without declarations (task.declare_tools=false); calls are still limited to the tools and schemas of the request."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {
            COUNT: ("num_slots", "max_tokens", "max_choices", "max_body_bytes", "cache_megabytes"),
            NOT_NEGATIVE: ("max_waiting", "port"),
            POSITIVE: ("max_body_s", "max_request_s", "max_drain_s"),
        }
        check_ranges(self, prefix="serve.", ranges=ranges)
        if self.port > MAX_PORT:
            raise ConfigError(f"serve.port is {self.port}: give a port from 0 to {MAX_PORT}")
        if self.max_choices > self.num_slots + self.max_waiting:
            raise ConfigError(
                f"serve.max_choices is {self.max_choices}: give at most num_slots + max_waiting, "
                f"{self.num_slots + self.max_waiting}"
            )
        if self.api_key is not None and not _is_key(self.api_key):
            raise ConfigError("serve.api_key is not a valid key: give visible ASCII characters, or null for none")
        if not self.host:
            raise ConfigError("serve.host is '': give an address such as 127.0.0.1")
        if self.model_name == "":
            raise ConfigError("serve.model_name is '': give a name, or null for that of the folder of the weights")

    @property
    def key(self) -> str | None:
        """The key that requests must have; None when no key is required. An empty variable gives no key."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE) or None

    def check_exposure(self) -> None:
        """Raise ConfigError for an invalid key, and if other machines can reach the server without a key."""
        if self.key is not None and not _is_key(self.key):
            raise ConfigError(f"{KEY_VARIABLE} is not a valid key: give visible ASCII characters, or leave it out")
        try:
            is_own = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_own = self.host == "localhost"
        if not is_own and self.key is None:
            raise ConfigError(
                f"serve.host is {self.host}, which other machines can reach, and no key is set: set {KEY_VARIABLE}, or "
                "give serve.host=127.0.0.1"
            )


def _is_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()
