"""A task that a random model can solve by chance: stop at once, with an answer of even length. And a model for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.chat.messages import Message, Role
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.chat.tool_schema import ToolSpec
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import ToolError
from moetrain.export.config import ExportConfig
from moetrain.export.write import export_model
from moetrain.model.config import BalanceConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.tasks.protocol import Grade, InlineTask, Observation, Split
from tests.train.toy import toy_model

_VOCAB = 256 + len(KIMI_K2.special_tokens) + 4
MODEL = replace(
    toy_model(BalanceConfig()), vocab_size=_VOCAB, num_layers=2, intermediate_size=32, max_position_embeddings=128
)


class EvenEnvironment:
    def call(self, name: str, arguments: str) -> Observation:
        raise ToolError(f"no tool {name}: {arguments}")

    def grade(self, answer: str) -> Grade:
        return Grade(reward=float(len(answer) % 2 == 0), reason="even")

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, kw_only=True)
class EvenTask(InlineTask):
    index: int

    @property
    def num_calls(self) -> int:
        return 1

    @property
    def prompt(self) -> list[Message]:
        return [Message(role=Role.user, content=str(self.index))]

    def environment(self, stream: int) -> EvenEnvironment:
        return EvenEnvironment()


class EvenFamily:
    @property
    def tools(self) -> Sequence[ToolSpec]:
        return ()

    def task(self, split: Split, index: int) -> EvenTask:
        return EvenTask(index=index)


def even_export(folder: Path, *, context: Mapping[str, Any] | None = None) -> Path:
    """Write an export with random weights to `folder`, and return it."""
    model = Transformer(MODEL)
    initialize(model, 0)
    export_model(
        TensorReader({name: tensor.detach() for name, tensor in model.state_dict().items()}),
        folder=folder,
        model=MODEL,
        quant=QuantConfig(),
        export=ExportConfig(),
        tokenizer=even_tokenizer(),
        step=1,
        sources={"weights": "0"},
        context=context,
    )
    return folder


def even_tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to train a tokenizer on " * 3] * 3, vocab_size=_VOCAB)
