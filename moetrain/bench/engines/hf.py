"""transformers as a contestant of `bench decode` and `bench rollout`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM, GenerationConfig

from moetrain.bench.engines.protocol import EngineSettings, Episode, Prompt, fastest

_TRIED_STEPS = 3
_EXPERTS = ("eager", "batched_mm", "grouped_mm")


class Transformers:
    """transformers' DeepseekV3 in bf16 with its KV cache, with the fastest of its implementations of experts.

    The number of threads is chosen too.
    """

    setting = ""

    def __init__(self, weights: Path, settings: EngineSettings) -> None:
        """Load a bf16 export."""
        self._threads = settings.thread_counts
        self._experts = _EXPERTS[0]
        self._model: Any = DeepseekV3ForCausalLM.from_pretrained(weights, dtype=torch.bfloat16).eval()

    def _choose(self, trial: Callable[[], object]) -> None:
        """Keep the implementation of experts and the number of threads with which `trial` is fastest."""

        def trials() -> Iterator[tuple[str, Callable[[], object]]]:
            for experts, (threads, count) in product(_EXPERTS, self._threads.items()):
                self._set(experts, threads=count)
                yield f"{experts}{threads}", trial

        self.setting = fastest(trials())
        self._experts, *threads = self.setting.split(",")
        self._set(self._experts, threads=1 if threads else self._threads[""])

    def _set(self, experts: str, *, threads: int) -> None:
        self._model.set_experts_implementation(experts)
        torch.set_num_threads(threads)

    @torch.no_grad()
    def choose(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Choose by a few steps after one token of each prompt."""
        del limit  # its cache grows
        self._read([prompt[:1] for prompt in prompts])
        self.decode(1)  # warms up
        self._choose(lambda: self.decode(_TRIED_STEPS))

    @torch.no_grad()
    def begin(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Read the prompts, and take the most likely token after each."""
        del limit
        self._model.set_experts_implementation("grouped_mm")  # for the prompts, whose tokens reach every expert
        self._read(prompts)
        self._model.set_experts_implementation(self._experts)

    def _read(self, prompts: Sequence[Prompt]) -> None:
        out = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self._cache, self._tokens_B1 = out.past_key_values, out.logits.argmax(-1)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Take the most likely token `steps` times for each sequence."""
        for _ in range(steps):
            out = self._model(self._tokens_B1, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._tokens_B1 = out.logits.argmax(-1)

    def end(self) -> None:
        """Drop the cache."""
        del self._cache

    def choose_for_replay(self, episodes: Sequence[Episode]) -> None:
        """Choose the fastest setting, by the time of a few tokens of the first turn of all episodes."""
        first = [list(episode[0].given) for episode in episodes]
        self._generate(first, 1)  # warms up
        self._choose(lambda: self._generate(first, _TRIED_STEPS))

    def replay(self, episodes: Sequence[Episode]) -> int:
        """Generate turn by turn with `generate`: all episodes that have the turn are one left-padded batch.

        A batch generates as many tokens as its longest turn, and every turn reads its episodes from their beginning.
        """
        num_new, contexts = 0, [list[int]() for _ in episodes]
        for number in range(max(len(episode) for episode in episodes)):
            places = [place for place, episode in enumerate(episodes) if number < len(episode)]
            turns = [episodes[place][number] for place in places]
            for place, turn in zip(places, turns, strict=True):
                contexts[place] += turn.given
            made = self._generate([contexts[place] for place in places], max(turn.num_new for turn in turns))
            for place, turn, tokens in zip(places, turns, made, strict=True):
                contexts[place] += tokens[: turn.num_new]
                num_new += turn.num_new
        return num_new

    @torch.no_grad()
    def _generate(self, contexts: Sequence[list[int]], num_new: int) -> list[list[int]]:
        """Return `num_new` tokens after each context, sampled at temperature 1."""
        width = max(len(context) for context in contexts)
        padded_BT = torch.tensor([[0] * (width - len(context)) + context for context in contexts])
        lengths_B1 = torch.tensor([[len(context)] for context in contexts])
        mask_BT = (torch.arange(width) >= width - lengths_B1).long()
        # The folder's own config names end tokens, at which an episode would stop early.
        config = self._model.generation_config = GenerationConfig(
            max_new_tokens=num_new, do_sample=True, temperature=1.0, top_k=0, pad_token_id=0
        )
        out_BT = self._model.generate(padded_BT, attention_mask=mask_BT, generation_config=config)
        if out_BT.shape[1] != width + num_new:
            raise RuntimeError(f"transformers generated {out_BT.shape[1] - width} tokens instead of {num_new}")
        made: list[list[int]] = out_BT[:, width:].tolist()
        return made
