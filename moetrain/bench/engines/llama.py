"""llama.cpp as a contestant of `bench decode` and `bench rollout`, through its own batches of several sequences.

It runs in the environment of llama-cpp-python, so it imports only that, numpy and the standard library.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import llama_cpp
import numpy as np

from moetrain.bench.engines.protocol import EngineSettings, Episode, Prompt, fastest, length

_TRIED_STEPS = 3
_BATCH = 2048  # the package's default: the most tokens of one call
_MARGIN = 256  # llama.cpp rounds the cells of a sequence up to this
_FLASH = {
    "flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "no flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class LlamaCpp:
    """A GGUF file in llama.cpp, which takes the most likely token.

    It uses flash attention, and more than one thread, where that is faster.
    """

    setting = ""

    def __init__(self, weights: Path, settings: EngineSettings) -> None:
        """Load a GGUF file."""
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(weights / "model.gguf").encode(), parameters)
        if self._model is None:
            raise RuntimeError(f"{weights}: llama.cpp cannot load the file")
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._thread_counts = settings.thread_counts
        self._threads = settings.threads
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._flash = next(iter(_FLASH))

    def choose(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Choose by a few steps after the first prompt."""

        def trials() -> Iterator[tuple[str, Callable[[], object]]]:
            self._threads = self._thread_counts[""]
            for flash in _FLASH:
                self._flash = flash
                self.begin(prompts[:1], limit=limit)
                for name, threads in self._thread_counts.items():
                    llama_cpp.llama_set_n_threads(self._context, threads, threads)
                    yield f"{flash}{name}", lambda: self.decode(_TRIED_STEPS)
                self.end()

        self._keep(fastest(trials()))

    def _keep(self, setting: str) -> None:
        """Use a setting from now on."""
        self.setting = setting
        self._flash, *threads = setting.split(",")
        self._threads = 1 if threads else self._thread_counts[""]

    def begin(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Read the prompts, and take the most likely token after each."""
        self._open(len(prompts), limit=limit)
        self._next = self._feed({place: list(prompt) for place, prompt in enumerate(prompts)})

    def decode(self, steps: int) -> None:
        """Take the most likely token `steps` times for each sequence."""
        for _ in range(steps):
            self._next = self._feed({place: [token] for place, token in self._next.items()})

    def end(self) -> None:
        """Drop the context."""
        llama_cpp.llama_free(self._context)

    def choose_for_replay(self, episodes: Sequence[Episode]) -> None:
        """Choose by the first turns of all episodes."""
        first = [episode[:1] for episode in episodes]

        def trials() -> Iterator[tuple[str, Callable[[], object]]]:
            for flash, (name, threads) in product(_FLASH, self._thread_counts.items()):
                self._flash, self._threads = flash, threads
                yield f"{flash}{name}", lambda: self.replay(first)

        self._keep(fastest(trials()))

    def replay(self, episodes: Sequence[Episode]) -> int:
        """Generate every turn, and return the number of new tokens.

        An episode whose turn ends begins its next one while the others continue.
        """
        self._open(len(episodes), limit=max(length(episode) for episode in episodes))
        turns = {place: iter(episode) for place, episode in enumerate(episodes)}
        missing: dict[int, int] = {}
        pending: dict[int, list[int]] = {}
        for place in range(len(episodes)):
            first = next(turns[place])
            pending[place], missing[place] = list(first.given), first.num_new
        num_new = 0
        while pending:
            made = self._feed(pending)
            num_new += len(made)
            pending = {}
            for place, token in made.items():
                missing[place] -= 1
                tokens = [token]
                if not missing[place]:
                    turn = next(turns[place], None)
                    if turn is None:
                        continue
                    tokens += turn.given
                    missing[place] = turn.num_new
                pending[place] = tokens
        self.end()
        return num_new

    def _open(self, num_sequences: int, *, limit: int) -> None:
        """Make a context with room for `limit` tokens of each sequence."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_sequences * (limit + _MARGIN)
        parameters.n_seq_max = num_sequences
        parameters.n_batch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = _FLASH[self._flash]
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if self._context is None:
            raise RuntimeError(f"llama.cpp cannot allocate a context for {num_sequences} sequences of {limit} tokens")
        self._lengths = [0] * num_sequences

    def _feed(self, pending: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """Feed tokens to sequences, by their number; return the most likely token after the last of each."""
        made: dict[int, int] = {}
        ends: list[int] = []
        batch, size = self._batch, 0
        for place, tokens in pending.items():
            for number, token in enumerate(tokens, 1):
                if size == _BATCH:
                    self._run(size, ends, made)
                    ends, size = [], 0
                is_last = number == len(tokens)
                batch.token[size] = token
                batch.pos[size] = self._lengths[place]
                batch.n_seq_id[size] = 1
                batch.seq_id[size][0] = place
                batch.logits[size] = is_last
                self._lengths[place] += 1
                size += 1
                if is_last:
                    ends.append(place)
        self._run(size, ends, made)
        return made

    def _run(self, size: int, ends: Sequence[int], made: dict[int, int]) -> None:
        """Compute the first `size` tokens of the batch; store the most likely token after the last of each sequence."""
        self._batch.n_tokens = size
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {size} tokens")
        if not ends:
            return
        first = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits_BV = np.ctypeslib.as_array(first, (len(ends), self._num_tokens))
        made.update(zip(ends, logits_BV.argmax(1).tolist(), strict=True))
