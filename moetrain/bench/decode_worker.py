"""Worker of `bench decode`: `python -m moetrain.bench.decode_worker PROGRAM WEIGHTS THREADS`.

Its commands are JSON objects: `begin` draws prompts and samples the first token after each, `decode` samples more
tokens for each sequence, `end` drops the sequences. It answers with the seconds that the command took.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from moetrain.bench.process import commands

_TRIED_STEPS = 3


class Decoder(Protocol):
    """A program that generates. setting: what it chose by measurement."""

    setting: str

    def begin(self, prompts: Sequence[Sequence[int]], *, limit: int) -> None:
        """Read the prompts, and sample the first token after each. limit: largest length of a sequence in tokens."""

    def decode(self, steps: int) -> None:
        """Sample `steps` more tokens for each sequence."""

    def end(self) -> None:
        """Drop the sequences and their caches."""


class Ours:
    """moetrain's engine."""

    setting = ""

    def __init__(self, weights: Path) -> None:
        """Read an export."""
        from moetrain.export.read import read_export
        from moetrain.inference.build import build_model
        from moetrain.kernels.choice import find_for_generation
        from moetrain.kernels.config import Kernels
        from moetrain.quant.config import QuantConfig

        export = read_export(weights)
        library = find_for_generation(Kernels.auto)
        quant = export.quant or QuantConfig()
        self.model = build_model(export.weights(), config=export.model, quant=quant, library=library)
        self.setting = "native kernels" if library else "torch kernels"
        self.vocab_size = export.model.vocab_size

    def begin(self, prompts: Sequence[Sequence[int]], *, limit: int) -> None:
        """Read the prompts, and sample the first token after each."""
        from moetrain.inference.engine import GenerationEngine
        from moetrain.inference.protocol import Sequence as Generated

        self.engine = GenerationEngine(self.model, num_slots=len(prompts), max_tokens=limit)
        self.sequences = [
            Generated(tokens=list(prompt), stream=place, limit=limit) for place, prompt in enumerate(prompts)
        ]
        for sequence in self.sequences:
            self.engine.add(sequence)
        while any(
            len(sequence.tokens) == len(prompt) for sequence, prompt in zip(self.sequences, prompts, strict=True)
        ):
            self.engine.step()

    def decode(self, steps: int) -> None:
        """Sample `steps` more tokens for each sequence."""
        for _ in range(steps):
            self.engine.step()

    def end(self) -> None:
        """Drop the sequences."""
        del self.engine, self.sequences


class Transformers:
    """transformers' DeepseekV3 with its KV cache and greedy sampling, in the fastest of its settings."""

    setting = ""

    def __init__(self, weights: Path) -> None:
        """Load a bf16 export."""
        from transformers import DeepseekV3ForCausalLM

        self.model = DeepseekV3ForCausalLM.from_pretrained(weights, dtype=torch.bfloat16).eval()
        self.vocab_size = self.model.config.vocab_size

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]], *, limit: int) -> None:
        """Choose the fastest setting by a few steps each, read the prompts, and sample the first token after each."""
        del limit  # its cache grows
        seconds = {}
        for experts in ("eager", "batched_mm", "grouped_mm"):
            self.model.set_experts_implementation(experts)
            self._read([prompt[:1] for prompt in prompts])
            self.decode(1)
            start = time.perf_counter()
            self.decode(_TRIED_STEPS)
            seconds[experts] = time.perf_counter() - start
        self.setting = min(seconds, key=lambda name: seconds[name])
        self.model.set_experts_implementation("grouped_mm")  # for the prompts, whose tokens reach every expert
        self._read(prompts)
        self.model.set_experts_implementation(self.setting)

    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self.cache, self.tokens_B1 = out.past_key_values, out.logits.argmax(-1)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Take the most likely token `steps` times for each sequence."""
        for _ in range(steps):
            out = self.model(self.tokens_B1, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.tokens_B1 = out.logits.argmax(-1)

    def end(self) -> None:
        """Drop the cache."""
        del self.cache


def prompts_of(batch: int, context: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random prompts, the same in every program, that share no prefix."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[list[int]] = torch.randint(vocab_size, (batch, context), generator=generator).tolist()
    return tokens


def main() -> None:
    """Answer the commands on standard input until it ends."""
    program, weights, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    decoder: Ours | Transformers | None = None
    for line, answers in commands():
        command = json.loads(line)
        decoder = decoder or (Ours(weights) if program == "moetrain" else Transformers(weights))
        if command["do"] == "begin":
            prompts = prompts_of(
                command["batch"], command["context"], vocab_size=decoder.vocab_size, seed=command["seed"]
            )
        start = time.perf_counter()
        if command["do"] == "begin":
            decoder.begin(prompts, limit=command["limit"])
        elif command["do"] == "decode":
            decoder.decode(command["steps"])
        else:
            decoder.end()
        answer = {"seconds": time.perf_counter() - start, "setting": decoder.setting}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
