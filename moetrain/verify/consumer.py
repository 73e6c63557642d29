"""What the comparisons with programs in other environments have in common: their processes, and the rows of logits.

A consumer computes the logits of rows of tokens, and continues a prompt with the most likely tokens. The bounds:

* A consumer that computes in float32 differs by the order of sums alone. A product over K inputs has a relative error
  of about sqrt(K) * 2^-24; with K up to 2^12 and some hundred products per token the logits differ by less than
  `FLOAT32_BOUND`. The divergence is below the square of that, and a log-probability changes by less than twice that.
* Another one also rounds the inputs of products. A second model of ours computes with these roundings. How that differs
  from our model without them, on the same tokens, is the noise to expect. The consumer may have up to `NOISE_MARGIN`
  times its amplitude, since it rounds some products at other places. A divergence is proportional to the square of the
  amplitude.

B rows, T tokens, V vocabulary.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.files import write_json
from moetrain.interpreters import ForeignProgram
from moetrain.model.transformer import Transformer
from moetrain.verify.table import Row

FLOAT32_BOUND = 1e-3
"""Bound on the difference of logits for a consumer that computes in float32."""
NOISE_MARGIN = 2.0
"""Amplitude of a consumer's noise over that of our model with rounded inputs."""
NUM_NEW_TOKENS = 32
PROMPT_TOKENS = 8
_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Rows of a comparison, and the consumers that were not run, with the reason."""

    rows: list[Row]
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a consumer computed. logits_BTV: after each token, or after each but the last. facts: what else it wrote."""

    version: str
    logits_BTV: Tensor
    greedy: list[int]
    facts: Mapping[str, Any]


def ask(
    program: ForeignProgram,
    *,
    python: str,
    worker: Path,
    model: Path,
    tokens_BT: Tensor,
    env: Mapping[str, str] | None = None,
    **request: Any,
) -> Answer:
    """Run a model in a consumer's process. Raises ConfigError when that fails, with the last line that it wrote.

    worker: script that takes a file with the request and a folder for logits.npy and answer.json. env: its environment;
    None takes that of this process.
    """
    num_tokens = tokens_BT.shape[1]
    content = {
        "model": str(model),
        "context": max(num_tokens, PROMPT_TOKENS + NUM_NEW_TOKENS) + 1,
        "threads": torch.get_num_threads(),
        "rows": tokens_BT.tolist(),
        "prompt": tokens_BT[0, :PROMPT_TOKENS].tolist(),
        "new_tokens": NUM_NEW_TOKENS,
        **request,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "request.json", content)
        command = [python, "-I", str(worker), str(folder / "request.json"), str(folder)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{program.field} is {python}: it cannot run {program.value} ({error})") from error
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise ConfigError(
                f"{program.field} is {python}: {program.value} ended with {ended.returncode} ({said}): give the "
                "interpreter of an environment that launch/peers.sh made"
            )
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        logits_BTV = torch.from_numpy(np.load(folder / "logits.npy"))
    return Answer(version=answer.pop("version"), logits_BTV=logits_BTV, greedy=answer.pop("greedy"), facts=answer)


def logit_rows(
    answer: Answer, *, name: str, model: Transformer, rounded: Transformer | None, tokens_BT: Tensor
) -> Iterator[Row]:
    """Yield the rows of logits, perplexity and greedy tokens.

    name: of the consumer. `model` computes in float32, and `rounded` with inputs of products rounded as the consumer
    rounds them; None for a consumer that computes in float32.
    """
    num_rows = answer.logits_BTV.shape[1]
    ours_BTV = logits_of(model, tokens_BT)[:, :num_rows]
    rounded_BTV = ours_BTV if rounded is None else logits_of(rounded, tokens_BT)[:, :num_rows]
    difference, noise = (float((other - ours_BTV).abs().max()) for other in (answer.logits_BTV, rounded_BTV))
    logit_bound = FLOAT32_BOUND if rounded is None else NOISE_MARGIN * noise
    yield Row(name=f"{name}: largest difference of logits", value=difference, bound=logit_bound)
    divergences, expected = (_divergences(ours_BTV, other) for other in (answer.logits_BTV, rounded_BTV))
    yield Row(
        name=f"{name}: median divergence of next tokens",
        value=float(divergences.median()),
        bound=FLOAT32_BOUND**2 if rounded is None else NOISE_MARGIN**2 * float(expected.median()),
        note=f"mean {divergences.mean():.2e}; mean of our model with the roundings {expected.mean():.2e}",
    )
    ours, theirs, rough = (_surprise(logits, tokens_BT) for logits in (ours_BTV, answer.logits_BTV, rounded_BTV))
    yield Row(
        name=f"{name}: difference of log perplexity",
        value=abs(float(theirs.mean() - ours.mean())),
        bound=2 * FLOAT32_BOUND if rounded is None else NOISE_MARGIN * float((rough - ours).abs().mean()),
        note=f"perplexity {theirs.mean().exp():.4f}, ours {ours.mean().exp():.4f}",
    )
    prompt_T = tokens_BT[0, :PROMPT_TOKENS]
    gap_bound = 0.0 if rounded is None else 2 * logit_bound
    yield _greedy_row(answer, name=name, model=model, prompt_T=prompt_T, bound=gap_bound)


def _greedy_row(answer: Answer, *, name: str, model: Transformer, prompt_T: Tensor, bound: float) -> Row:
    """Return how far below our largest logit the consumer's greedy tokens are, along its own continuation.

    0 means that every token is ours too; two tokens can change places when their logits differ by less than the noise.
    """
    continued_T = torch.cat([prompt_T, torch.tensor(answer.greedy)])
    logits_TV = logits_of(model, continued_T[None])[0, len(prompt_T) - 1 : -1]
    chosen_T = logits_TV.gather(1, continued_T[len(prompt_T) :, None])[:, 0]
    gaps_T = logits_TV.amax(1) - chosen_T
    return Row(
        name=f"{name}: largest gap of a greedy token to our best",
        value=float(gaps_T.max()),
        bound=bound,
        note=f"{int((gaps_T == 0).sum())} of {len(gaps_T)} tokens are ours",
    )


def _divergences(ours_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of `other_BTV` from `ours_BTV` for each token [B, T].

    Their median is bounded, since a token that noise sends to another expert has a large one and rules the mean.
    """
    ours, other = ours_BTV.double().log_softmax(-1), other_BTV.double().log_softmax(-1)
    return (ours.exp() * (ours - other)).sum(-1)


def _surprise(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the negative log-probability of each token after the first [B, T - 1]."""
    logprobs_BTV = logits_BTV[:, : tokens_BT.shape[1] - 1].double().log_softmax(-1)
    return -logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]


@torch.no_grad()
def logits_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return the float32 logits of rows that are one document each [B, T, V]."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    output = model(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT)
    return model.logits(output.hidden_BTD).float()
