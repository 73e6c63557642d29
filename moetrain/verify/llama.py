"""Compares a GGUF file in llama.cpp with our model on the same weights: logits, perplexity, greedy tokens, tokenizer.

llama.cpp runs in a process of its own, in the environment of the interpreter that is given. For a file of float32
tensors it computes in float32. For one with bf16 or Q4_0 tensors it rounds the inputs of products, as `llama_rounding`
does, and the absorbed products of attention at other places. `verify.consumer` derives the bounds.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from moetrain.data.tokenizer import Tokenizer
from moetrain.interpreters import ForeignProgram
from moetrain.model.transformer import Transformer
from moetrain.verify.consumer import Answer, ask, logit_rows
from moetrain.verify.table import Row

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
"""Texts that both tokenizers must encode alike. docs/exports.md lists texts that differ, which are not tested."""


def ask_llama(python: str, *, model: Path, tokens_BT: Tensor) -> Answer:
    """Run the file in llama.cpp. Raises ConfigError when its process fails, with the last line that it wrote."""
    return ask(ForeignProgram.llama, python=python, worker=_WORKER, model=model, tokens_BT=tokens_BT, texts=list(TEXTS))


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
    name = f"llama.cpp {answer.version}"
    yield from logit_rows(
        answer, name=name, model=model, rounded=None if types == {"F32"} else rounded, tokens_BT=tokens_BT
    )
    encoded = tokenizer.encode_batch(TEXTS)
    differing = [text for text, one, other in zip(TEXTS, encoded, answer.facts["texts"], strict=True) if one != other]
    note = f"of {len(TEXTS)}" + (f"; the first: {differing[0][:60]!r}" if differing else "")
    yield Row(name=f"{name}: texts with other tokens than ours", value=len(differing), bound=0, note=note)
