"""A random model on disk, in the formats that the contestants of `bench decode` read."""

from pathlib import Path

import torch

from moetrain.data.config import MIN_VOCAB_SIZE
from moetrain.data.tokenizer import train_tokenizer
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.write import export_model
from moetrain.generation_commands import BenchDecodeRun
from moetrain.model.transformer import Transformer, allocate, initialize
from moetrain.parallel.state import TensorReader

_TEXT = "the quick brown fox jumps over the lazy dog"
_FORMATS = {"int4": ExportFormat.quantized, "bf16": ExportFormat.bf16_dequantized}
"""The bf16 folder holds the same values as the INT4 folder, so that all contestants compute the same model."""


def write_weights(run: BenchDecodeRun, *, folder: Path) -> dict[str, Path]:
    """Write the model that `run` describes, with weights drawn from its seed; return the folders by format."""
    with torch.device("meta"):
        model = Transformer(run.model)
    allocate(model, torch.device("cpu"))
    initialize(model, run.run.seed)
    tokenizer = train_tokenizer([_TEXT], vocab_size=MIN_VOCAB_SIZE)
    reader = TensorReader(model.state_dict())
    folders = {}
    for name, format in _FORMATS.items():
        folders[name] = folder / name
        export_model(
            reader,
            folder=folders[name],
            model=run.model,
            quant=run.quant,
            export=ExportConfig(format=format),
            tokenizer=tokenizer,
            step=0,
            sources={"weights": f"random, seed {run.run.seed}"},
        )
    return folders
