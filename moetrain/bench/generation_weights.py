"""The weights of `bench decode` and `bench rollout` on disk, in the formats that the contestants read."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from moetrain.data.tokenizer import Tokenizer
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.write import export_model
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer, allocate, initialize
from moetrain.parallel.protocol import StateReader
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.quant.consumers import Consumer


def random_weights(model: ModelConfig, *, seed: int) -> TensorReader:
    """Return random float32 weights, drawn from the seed."""
    with torch.device("meta"):
        made = Transformer(model)
    allocate(made, torch.device("cpu"))
    initialize(made, seed)
    return TensorReader(made.state_dict())


def write_weights(
    reader: StateReader,
    *,
    folder: Path,
    formats: Iterable[ExportFormat],
    model: ModelConfig,
    quant: QuantConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, str],
) -> dict[ExportFormat, Path]:
    """Write the weights in each format below `folder`; return the folders by format.

    All formats hold the same numbers, since their experts are the quantised ones, so all contestants compute the same
    model.
    """
    folders = {}
    for format in dict.fromkeys(formats):
        folders[format] = folder / format.value
        export_model(
            reader,
            folder=folders[format],
            model=model,
            quant=quant,
            export=ExportConfig(format=format, consumers=[Consumer.moetrain]),  # `contestants` asks for the others
            tokenizer=tokenizer,
            step=0,
            sources=sources,
        )
    return folders
