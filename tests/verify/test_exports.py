"""The export's promises hold against transformers, and planted faults are found."""

from pathlib import Path

import pytest
import torch

from moetrain.commands.verify import ExportFault
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import BoundError, ConfigError
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.write import export_model
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.verify.exports import verify_exports
from moetrain.verify.table import check_rows

Tensors = dict[str, torch.Tensor]


def shape(*, q_lora_rank: int | None = 24, yarn: YarnConfig | None = None) -> ModelConfig:
    """Return a tiny model."""
    return ModelConfig(
        vocab_size=300,
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        initializer_range=0.1,
        yarn=yarn or YarnConfig(),
    )


def write_export(
    folder: Path,
    config: ModelConfig,
    *,
    format: ExportFormat = ExportFormat.quantized,
    quant: QuantConfig | None = None,
) -> Tensors:
    """Export a random model and return its masters."""
    model = Transformer(config)
    initialize(model, 1)
    stream = torch.Generator().manual_seed(1)
    for _, layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(std=0.05, generator=stream)
    masters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    export_model(
        TensorReader(masters),
        folder=folder,
        model=config,
        quant=quant or QuantConfig(),
        export=ExportConfig(format=format),
        tokenizer=train_tokenizer(["letters and other words " * 3], vocab_size=280),
        step=1,
        sources={},
    )
    return masters


@pytest.mark.parametrize(
    "config",
    [shape(), shape(q_lora_rank=None, yarn=YarnConfig(factor=4, original_max_position=32))],
    ids=["q_lora", "no_q_lora_yarn"],
)
def test_every_promise_is_kept(tmp_path: Path, config: ModelConfig) -> None:
    masters = write_export(tmp_path / "int4", config)
    rows = verify_exports(tmp_path / "int4", masters=masters)
    assert len(rows) == 7
    check_rows(rows)


@pytest.mark.parametrize(
    ("fault", "missed"),
    [
        (ExportFault.code, {"codes that differ from the masters'", "INT4 file against dequantised weights"}),
        (ExportFault.scale, {"scales that differ from the masters'", "INT4 file against dequantised weights"}),
        (ExportFault.norm, {"our fp32 logits against transformers'"}),
    ],
)
def test_a_planted_fault_misses_the_bounds_that_it_touches(
    tmp_path: Path, fault: ExportFault, missed: set[str]
) -> None:
    masters = write_export(tmp_path / "int4", shape())
    rows = verify_exports(tmp_path / "int4", masters=masters, fault=fault)
    assert {row.name.split(": ")[-1] for row in rows if not row.is_kept} == missed
    with pytest.raises(BoundError) as error:
        check_rows(rows)
    assert all(name in str(error.value) for name in missed)
    check_rows(verify_exports(tmp_path / "int4", masters=masters))  # the export itself was left alone


def test_masters_of_another_step_miss_the_bounds(tmp_path: Path) -> None:
    masters = write_export(tmp_path / "int4", shape())
    moved = {name: tensor * 1.05 if tensor.ndim == 3 else tensor for name, tensor in masters.items()}
    rows = verify_exports(tmp_path / "int4", masters=moved)
    assert not rows[1].is_kept
    assert not rows[3].is_kept


def test_an_export_without_codes_is_refused(tmp_path: Path) -> None:
    masters = write_export(tmp_path / "bf16", shape(), format=ExportFormat.bf16)
    with pytest.raises(ConfigError, match=r"format bf16: give an export with export\.format=quantized"):
        verify_exports(tmp_path / "bf16", masters=masters)
