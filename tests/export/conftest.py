"""Masters of a tiny model, a tiny tokenizer, and a function that exports them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.write import ExportReport, export_model
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig

Exporter = Callable[..., ExportReport]


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=300,
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        routed_scaling_factor=1.5,
        initializer_range=0.1,
    )


@pytest.fixture(scope="session")
def masters(model_config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Transformer(model_config)
    initialize(model, 0)
    stream = torch.Generator().manual_seed(0)
    for _, layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(std=0.05, generator=stream)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = " ".join(f"word{i} letters and {i * 7}" for i in range(40))
    return train_tokenizer([text], vocab_size=290)


@pytest.fixture(scope="session")
def export(model_config: ModelConfig, masters: dict[str, torch.Tensor], tokenizer: Tokenizer) -> Exporter:
    """Return `export(folder, format=..., tensors=...)`."""

    def run(
        folder: Path, *, format: ExportFormat = ExportFormat.quantized, tensors: dict[str, torch.Tensor] | None = None
    ) -> ExportReport:
        return export_model(
            TensorReader(masters if tensors is None else tensors),
            folder=folder,
            model=model_config,
            quant=QuantConfig(),
            export=ExportConfig(format=format),
            tokenizer=tokenizer,
            step=7,
            sources={"checkpoint": "step_00000007"},
        )

    return run
