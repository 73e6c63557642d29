"""vLLM on a CPU as a contestant of `bench decode` and `bench rollout`, with its engine in this process.

It runs in vLLM's environment, so it imports only that and the standard library. The controller sets its environment
variables (`bench.contestants`), which it reads when it is imported.
"""

from collections.abc import Sequence
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from moetrain.bench.engines.protocol import EngineSettings, Episode, Prompt

_EAGER = "eager"
_WARM_STEPS = 3


class Vllm:
    """vLLM's model in bf16, sampled at temperature 1; mode: eager or torch.compile."""

    def __init__(self, weights: Path, settings: EngineSettings) -> None:
        """Load a bf16 export. Prompts of earlier calls never count: `begin` and `replay` empty the prefix cache."""
        self.setting = ""
        self._llm = LLM(
            str(weights),
            dtype="bfloat16",
            enforce_eager=settings.mode == _EAGER,
            max_model_len=settings.max_tokens,
            max_num_seqs=settings.max_sequences,
            enable_prefix_caching=True,
            disable_log_stats=True,
            hf_overrides=settings.overrides,
            seed=0,
        )
        self._engine = self._llm.llm_engine
        self._num_requests = 0

    def choose(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Generate a few tokens, since the first ones of a shape are slower."""
        self.begin(prompts, limit=limit)
        self.decode(_WARM_STEPS)
        self.end()

    def begin(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Read the prompts, and sample the first token after each."""
        self._forget()
        self._requests = [self._add(prompt, limit - len(prompt), RequestOutputKind.DELTA) for prompt in prompts]
        self._made = dict.fromkeys(self._requests, 0)
        self._step_until(1)

    def decode(self, steps: int) -> None:
        """Sample `steps` more tokens for each sequence."""
        self._step_until(min(self._made.values()) + steps)

    def _step_until(self, num_tokens: int) -> None:
        """Step until each sequence has `num_tokens` new tokens."""
        while min(self._made.values()) < num_tokens:
            for output in self._engine.step():
                self._made[output.request_id] += len(output.outputs[0].token_ids)

    def end(self) -> None:
        """Drop the sequences."""
        self._engine.abort_request(self._requests)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def choose_for_replay(self, episodes: Sequence[Episode]) -> None:
        """Generate the episodes once, since the first tokens of a shape are slower."""
        self.replay(episodes)

    def replay(self, episodes: Sequence[Episode]) -> int:
        """Generate every turn as a request of its own, whose beginning the prefix cache holds."""
        self._forget()
        running: dict[str, tuple[int, list[int]]] = {}
        turns = [iter(episode) for episode in episodes]

        def begin(place: int, context: list[int]) -> None:
            turn = next(turns[place], None)
            if turn is not None:
                context = [*context, *turn.given]
                request = self._add(context, turn.num_new, RequestOutputKind.FINAL_ONLY)
                running[request] = (place, context)

        for place in range(len(episodes)):
            begin(place, [])
        num_new = 0
        while running:
            for output in self._engine.step():
                if output.finished:
                    place, context = running.pop(output.request_id)
                    made = output.outputs[0].token_ids
                    num_new += len(made)
                    begin(place, [*context, *made])
        return num_new

    def _forget(self) -> None:
        """Empty the prefix cache."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def _add(self, tokens: Sequence[int], num_new: int, kind: RequestOutputKind) -> str:
        """Add a request of exactly `num_new` tokens; return its name."""
        self._num_requests += 1
        name = str(self._num_requests)
        sampling = SamplingParams(
            temperature=1.0, max_tokens=num_new, ignore_eos=True, detokenize=False, output_kind=kind
        )
        self._engine.add_request(name, {"prompt_token_ids": list(tokens)}, sampling)
        return name
