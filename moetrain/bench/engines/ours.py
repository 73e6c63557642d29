"""moetrain's engine as a contestant of `bench decode` and `bench rollout`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moetrain.bench.engines.protocol import EngineSettings, Episode, Prompt, length
from moetrain.export.config import ExportFormat
from moetrain.export.read import read_export
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.native import NativeModel
from moetrain.inference.protocol import Sequence as Generated
from moetrain.kernels.choice import find_for_generation
from moetrain.kernels.config import Kernels
from moetrain.quant.config import QuantConfig


class Ours:
    """Samples at temperature 1, with the logprob of each token, as rollouts do."""

    def __init__(self, weights: Path, settings: EngineSettings) -> None:
        """Read an export."""
        torch.set_num_threads(settings.threads)
        export = read_export(weights)
        library = find_for_generation(Kernels.auto)
        # An export in bf16 states how its experts were trained, and would be quantised again.
        quant = QuantConfig() if export.format is ExportFormat.bf16_dequantized else export.quant
        self._model = build_model(export.weights(), config=export.model, quant=quant, library=library)
        self.setting = f"torch on {self._model.device.type}"
        if isinstance(self._model, NativeModel):
            self.setting = f"native, {'INT4' if self._model.has_int4_experts else 'bf16'} experts"

    def choose(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Do nothing: there is one setting."""

    def begin(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Read the prompts, and sample the first token after each."""
        self._engine = GenerationEngine(self._model, num_slots=len(prompts), max_tokens=limit)
        self._sequences = [
            Generated(tokens=list(prompt), stream=place, limit=limit) for place, prompt in enumerate(prompts)
        ]
        for sequence in self._sequences:
            self._engine.add(sequence)
        while any(
            len(sequence.tokens) == len(prompt) for sequence, prompt in zip(self._sequences, prompts, strict=True)
        ):
            self._engine.step()

    def decode(self, steps: int) -> None:
        """Sample `steps` more tokens for each sequence."""
        for _ in range(steps):
            self._engine.step()

    def end(self) -> None:
        """Drop the sequences."""
        del self._engine, self._sequences

    def choose_for_replay(self, episodes: Sequence[Episode]) -> None:
        """Generate the first turns once, to warm up."""
        self.replay([episode[:1] for episode in episodes])

    def replay(self, episodes: Sequence[Episode]) -> int:
        """Generate every turn, and return the number of new tokens.

        An episode whose turn ends begins its next one while the others continue.
        """
        engine = GenerationEngine(
            self._model, num_slots=len(episodes), max_tokens=max(length(episode) for episode in episodes)
        )
        remaining, num_new = {}, 0
        for place, (first, *rest) in enumerate(episodes):
            limit = len(first.given) + first.num_new
            sequence = Generated(tokens=list(first.given), stream=place, limit=limit)
            remaining[id(sequence)] = iter(rest)
            engine.add(sequence)
        while engine.is_busy:
            for sequence in engine.step():
                turn = next(remaining[id(sequence)], None)
                if turn is None:
                    num_new += sum(sequence.is_sampled)
                    engine.cancel(sequence)
                else:
                    limit = len(sequence.tokens) + len(turn.given) + turn.num_new
                    engine.extend(sequence, list(turn.given), limit=limit)
        return num_new
