"""Compares a GGUF file in llama.cpp with our model on the same weights: logits, perplexity, greedy tokens, tokenizer.

llama.cpp runs in a process of its own, in the environment of the interpreter that is given.

What llama.cpp computes otherwise, and the bounds that follow:

* A file of float32 tensors: the order of sums alone. A product over K inputs has a relative error of about sqrt(K) *
  2^-24; with K up to 2^12 and some hundred products per token the logits differ by less than `FLOAT32_BOUND`. The
  divergence is below the square of that, and a log-probability changes by less than twice that.
* A file with bf16 or Q4_0 tensors: it also rounds the inputs of products. `llama_rounding` computes our model with
  these roundings. How that differs from our model without them, on the same tokens, is the noise to expect. llama.cpp
  may have up to `NOISE_MARGIN` times its amplitude, since it rounds the absorbed products of attention at other places.
  A divergence is proportional to the square of the amplitude.

B rows, T tokens, V vocabulary.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.files import write_json
from moetrain.model.transformer import Transformer
from moetrain.verify.table import Row

FLOAT32_BOUND = 1e-3
"""Bound on the difference of logits for a file of float32 tensors."""
NOISE_MARGIN = 2.0
"""Amplitude of llama.cpp's noise over that of our model with rounded inputs."""
NUM_NEW_TOKENS = 32
_PROMPT_TOKENS = 8
_TIMEOUT_S = 3600
_WORKER = Path(__file__).with_name("llama_worker.py")

TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "SELECT name, SUM(price * 12) FROM orders WHERE id = 'k3f' AND x >= 40.5 GROUP BY name;",
    '{"name": "lookup", "arguments": {"key": "k3f", "limit": 25, "flags": [true, null]}}',
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}\n\n\nclass A:\n\tpass\n",
    "1234567890 3.14159 1e-7 0xff 12,345",
    "  leading,  double   and trailing spaces  \n\n\n  \t\ttabs \r\n lines\n",
    "I don't think it's they'll, we've, you're, I'm, he'd.",
    "Zażółć gęślą jaźń; größer, café, naïve, Привет мир, 你好世界, こんにちは, 👩‍🚀🎉",
    "[BOS][EOS]<|im_end|><|im_user|>user<|im_middle|><think></think>",
    "a=b==c!=d<=e>=f&&g||h->i::j...k(l)[m]{n}#o@p$q%r^s~t`u`",
)
"""Texts that both tokenizers must encode alike. Known to differ, and left out: docs/exports.md."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What llama.cpp computed."""

    version: str
    logits_BTV: Tensor
    texts: list[list[int]]
    greedy: list[int]


def interpreter(given: str | None) -> str | None:
    """Return the interpreter that runs llama.cpp: the given one, this one where it is installed, or None."""
    if given is not None:
        return given
    return sys.executable if find_spec("llama_cpp") is not None else None


def ask_llama(python: str, *, model: Path, tokens_BT: Tensor) -> Answer:
    """Run the file in llama.cpp. Raises ConfigError when its process fails, with the last line that it wrote."""
    num_tokens = tokens_BT.shape[1]
    request = {
        "model": str(model),
        "context": max(num_tokens, _PROMPT_TOKENS + NUM_NEW_TOKENS) + 1,
        "threads": torch.get_num_threads(),
        "rows": tokens_BT.tolist(),
        "prompt": tokens_BT[0, :_PROMPT_TOKENS].tolist(),
        "new_tokens": NUM_NEW_TOKENS,
        "texts": list(TEXTS),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "request.json", request)
        command = [python, "-I", str(_WORKER), str(folder / "request.json"), str(folder)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"llama_python is {python}: it cannot run llama.cpp ({error})") from error
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise ConfigError(
                f"llama_python is {python}: llama.cpp ended with {ended.returncode} ({said}): give the interpreter of "
                "an environment that launch/peers.sh made"
            )
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        logits_BTV = torch.from_numpy(np.load(folder / "logits.npy"))
    return Answer(logits_BTV=logits_BTV, **answer)


def llama_rows(
    answer: Answer,
    *,
    model: Transformer,
    rounded: Transformer,
    tokens_BT: Tensor,
    tokenizer: Tokenizer,
    types: set[str],
) -> Iterator[Row]:
    """Yield the rows. `model` computes in float32, and `rounded` with inputs of products rounded as in llama.cpp.

    types: the types of the file's tensors.
    """
    ours_BTV, rounded_BTV = logits_of(model, tokens_BT), logits_of(rounded, tokens_BT)
    is_float32 = types == {"F32"}
    name = f"llama.cpp {answer.version}: "
    difference, noise = (float((other - ours_BTV).abs().max()) for other in (answer.logits_BTV, rounded_BTV))
    logit_bound = FLOAT32_BOUND if is_float32 else NOISE_MARGIN * noise
    yield Row(name=f"{name}largest difference of logits", value=difference, bound=logit_bound)
    divergences, expected = (_divergences(ours_BTV, other) for other in (answer.logits_BTV, rounded_BTV))
    yield Row(
        name=f"{name}median divergence of next tokens",
        value=float(divergences.median()),
        bound=FLOAT32_BOUND**2 if is_float32 else NOISE_MARGIN**2 * float(expected.median()),
        note=f"mean {divergences.mean():.2e}; mean of our model with the roundings {expected.mean():.2e}",
    )
    ours, theirs, rough = (_surprise(logits, tokens_BT) for logits in (ours_BTV, answer.logits_BTV, rounded_BTV))
    yield Row(
        name=f"{name}difference of log perplexity",
        value=abs(float(theirs.mean() - ours.mean())),
        bound=2 * FLOAT32_BOUND if is_float32 else NOISE_MARGIN * float((rough - ours).abs().mean()),
        note=f"perplexity {theirs.mean().exp():.4f}, ours {ours.mean().exp():.4f}",
    )
    prompt_T = tokens_BT[0, :_PROMPT_TOKENS]
    gap_bound = 0.0 if is_float32 else 2 * logit_bound
    yield _greedy_row(answer, name=name, model=model, prompt_T=prompt_T, bound=gap_bound)
    encoded = tokenizer.encode_batch(TEXTS)
    differing = [text for text, one, other in zip(TEXTS, encoded, answer.texts, strict=True) if one != other]
    note = f"of {len(TEXTS)}" + (f"; the first: {differing[0][:60]!r}" if differing else "")
    yield Row(name=f"{name}texts with other tokens than ours", value=len(differing), bound=0, note=note)


def _greedy_row(answer: Answer, *, name: str, model: Transformer, prompt_T: Tensor, bound: float) -> Row:
    """Return how far below our largest logit llama.cpp's greedy tokens are, along its own continuation.

    0 means that every token is ours too; two tokens can change places when their logits differ by less than the noise.
    """
    continued_T = torch.cat([prompt_T, torch.tensor(answer.greedy)])
    logits_TV = logits_of(model, continued_T[None])[0, len(prompt_T) - 1 : -1]
    chosen_T = logits_TV.gather(1, continued_T[len(prompt_T) :, None])[:, 0]
    gaps_T = logits_TV.amax(1) - chosen_T
    return Row(
        name=f"{name}largest gap of a greedy token to our best",
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
    logprobs_BTV = logits_BTV[:, :-1].double().log_softmax(-1)
    return -logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]


@torch.no_grad()
def logits_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return the float32 logits of rows that are one document each [B, T, V]."""
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    output = model(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT)
    return model.logits(output.hidden_BTD).float()
