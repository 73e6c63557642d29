"""A GGUF export is compared with its masters and, where llama.cpp is installed, with what that computes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain import interpreters
from moetrain.commands.verify import ExportFault
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import BoundError, ConfigError
from moetrain.export.config import ExportConfig, ExportFormat, GgufDtype
from moetrain.export.read import read_export
from moetrain.export.write import export_model
from moetrain.model.config import ModelConfig, ScoreFunction, YarnConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.verify.consumer import logits_of
from moetrain.verify.gguf import verify_gguf
from moetrain.verify.llama_rounding import round_inputs, round_q8_0
from moetrain.verify.table import check_rows
from tests.peers import LLAMA_PYTHON, needs_llama

pytest.importorskip("gguf", reason="the optional package gguf is not installed")

YARN = YarnConfig(factor=4, original_max_position=32, beta_fast=32, mscale=0.7, mscale_all_dim=0.7)
TEXT = "letters and other words, {'a': 12} SELECT x FROM t WHERE y = 'k3f';\n    return [1, 2]\n" * 3

Tensors = dict[str, torch.Tensor]


def shape(*, q_lora_rank: int | None = 32) -> ModelConfig:
    return ModelConfig(
        vocab_size=320,
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_token=2,
        initializer_range=0.08,
    )


def write(
    folder: Path, config: ModelConfig, *, quant: QuantConfig | None = None, dtype: GgufDtype = GgufDtype.bf16
) -> Tensors:
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
        quant=quant or QuantConfig(enabled=True),
        export=ExportConfig(format=ExportFormat.gguf, gguf_dtype=dtype),
        tokenizer=train_tokenizer([TEXT], vocab_size=300),
        step=1,
        sources={},
    )
    return masters


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_LLAMA_PYTHON", raising=False)
    monkeypatch.setattr(interpreters, "find_spec", lambda name: None)


@pytest.mark.parametrize("dtype", list(GgufDtype))
@pytest.mark.parametrize("is_quantised", [True, False])
def test_the_file_keeps_its_promises_and_llama_cpp_is_named_as_skipped(
    tmp_path: Path, no_llama: None, dtype: GgufDtype, is_quantised: bool
) -> None:
    masters = write(tmp_path / "out", shape(), quant=QuantConfig(enabled=is_quantised), dtype=dtype)
    verified = verify_gguf(tmp_path / "out", masters=masters)
    check_rows(verified.rows)
    assert len(verified.rows) == (4 if is_quantised else 2)
    assert len(verified.skipped) == 1
    assert "llama-cpp-python is not installed; run launch/peers.sh llama" in verified.skipped[0]


@pytest.mark.parametrize(
    ("fault", "missed"),
    [
        (ExportFault.code, "codes that differ from the masters'"),
        (ExportFault.scale, "scales that differ from the masters'"),
    ],
)
def test_a_planted_fault_in_the_file_is_found(tmp_path: Path, no_llama: None, fault: ExportFault, missed: str) -> None:
    masters = write(tmp_path / "out", shape())
    rows = verify_gguf(tmp_path / "out", masters=masters, fault=fault).rows
    assert [row.name for row in rows if not row.is_kept] == [missed]
    with pytest.raises(BoundError, match=missed):
        check_rows(rows)
    check_rows(verify_gguf(tmp_path / "out", masters=masters).rows)


def test_masters_of_another_step_are_found(tmp_path: Path, no_llama: None) -> None:
    masters = write(tmp_path / "out", shape())
    rows = verify_gguf(tmp_path / "out", masters={name: 1.05 * tensor for name, tensor in masters.items()}).rows
    assert {row.name for row in rows if not row.is_kept} == {
        "scales that differ from the masters'",
        "codes that differ from the masters'",
        "other tensors that differ",
    }


def test_an_interpreter_without_llama_cpp_is_refused(tmp_path: Path) -> None:
    masters = write(tmp_path / "out", shape())
    for python in ("/no/such/python", sys.executable):
        if python == LLAMA_PYTHON:
            continue
        with pytest.raises(ConfigError, match=f"llama_python is {python}: "):
            verify_gguf(tmp_path / "out", masters=masters, llama_python=python)


@needs_llama
@pytest.mark.parametrize(
    "config",
    [
        shape(),
        shape(q_lora_rank=None),
        replace(shape(), rms_norm_eps=1e-6, num_groups=2, num_groups_per_token=1, num_shared_experts=2),
        replace(shape(), yarn=YARN),
        replace(shape(), score_function=ScoreFunction.softmax, routed_scaling_factor=1.0),
        replace(shape(), normalize_weights=False, routed_scaling_factor=1.0, num_dense_layers=2),
    ],
    ids=["scaled_latents", "no_q_lora", "groups", "yarn", "softmax", "unnormalised"],
)
def test_llama_cpp_computes_what_we_compute(tmp_path: Path, config: ModelConfig) -> None:
    masters = write(tmp_path / "out", config, quant=QuantConfig(), dtype=GgufDtype.float32)
    verified = verify_gguf(tmp_path / "out", masters=masters, llama_python=LLAMA_PYTHON)
    assert verified.skipped == [] and len(verified.rows) == 7
    check_rows(verified.rows)


@needs_llama
def test_a_quantised_file_runs_in_llama_cpp_and_a_fault_of_ours_is_found(tmp_path: Path) -> None:
    masters = write(tmp_path / "out", shape())
    check_rows(verify_gguf(tmp_path / "out", masters=masters, llama_python=LLAMA_PYTHON).rows)
    masters = write(tmp_path / "out", shape(), quant=QuantConfig(), dtype=GgufDtype.float32)
    rows = verify_gguf(tmp_path / "out", masters=masters, llama_python=LLAMA_PYTHON, fault=ExportFault.norm).rows
    assert any("largest difference of logits" in row.name for row in rows if not row.is_kept)


def test_inputs_of_experts_are_rounded_to_127_steps_of_the_largest_of_32() -> None:
    x = torch.tensor([[1.0, -0.5, 1 / 127 * 0.4, 1 / 127 * 0.6] + [0.0] * 28 + [0.0] * 32])
    step = float(torch.tensor(1 / 127).half())
    expected = [127 * step, -64 * step, 0.0, step]
    rounded = round_q8_0(x)
    torch.testing.assert_close(rounded[0, :4], torch.tensor(expected), rtol=1e-6, atol=0)
    assert not rounded[0, 4:].any()
    gaussian = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    errors = (round_q8_0(gaussian) - gaussian).square().mean().sqrt()
    largest = gaussian.view(-1, 32).abs().amax(1).square().mean().sqrt()
    torch.testing.assert_close(errors, largest / 127 / 12**0.5, rtol=0.02, atol=0)


def test_rounding_with_float32_tensors_changes_nothing_and_with_blocks_something(tmp_path: Path) -> None:
    tokens_BT = torch.arange(40).view(2, 20) * 7 % 300
    for quant, changes in ((QuantConfig(), False), (QuantConfig(enabled=True), True)):
        write(tmp_path / "out", shape(), quant=quant, dtype=GgufDtype.float32)
        export = read_export(tmp_path / "out")
        plain, rounded = (Transformer(export.model, compute_dtype=torch.float32) for _ in range(2))
        for model in (plain, rounded):
            model.load_state_dict(export.weights())
        before = logits_of(plain, tokens_BT)
        after = logits_of(round_inputs(rounded, export), tokens_BT)
        assert (float((before - after).abs().max()) > 1e-4) is changes
