"""Logits of released folders: ours against those of transformers, which reads the same files with its own code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.commands.verify import HfFault
from moetrain.hf.folder import open_hf_folder
from moetrain.model.transformer import Transformer
from moetrain.verify.hf import verify_folder
from tests.hf import released

BOUND = 2e-6
"""Largest difference of float32 logits over the largest logit; only the order of sums differs."""


def ours(folder: Path, tokens_BT: Tensor) -> Tensor:
    config, tensors = open_hf_folder(folder)
    model = Transformer(config, compute_dtype=torch.float32)
    model.load_state_dict(dict(tensors))
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    with torch.no_grad():
        output = model(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT)
        return model.logits(output.hidden_BTD)


@pytest.mark.parametrize("kind", ["bf16", "moonlight", "int4", "int4 of another rule", "wrapped"])
def test_logits_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    disk = released.weights(q_lora=None if kind == "moonlight" else released.Q_LORA)
    values = released.config()
    if kind == "moonlight":
        values |= {"model_type": "deepseek_v3", "q_lora_rank": None, "rope_scaling": None}
    if kind.startswith("int4"):
        disk, _ = released.int4(disk, codes_of=released.foreign_codes if "rule" in kind else released.kimi_codes)
        values["quantization_config"] = released.EXPERT_CONFIG
    if kind == "wrapped":
        disk = {f"language_model.{name}": tensor for name, tensor in released.int4(disk)[0].items()}
        values = released.wrapped_config()
    folder = released.write(tmp_path / "hf", disk, values=values, shards=2)
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text("raise RuntimeError('this code was run')")
    row = verify_folder(folder, seed=0, num_rows=2, num_tokens=80, fault=HfFault.none)
    assert row.value < BOUND
    assert ("read by this package for both" in row.name) == (kind == "wrapped")


def test_fp8_weights_and_the_same_weights_in_bf16_have_the_same_logits(tmp_path: Path) -> None:
    """transformers refuses the matrix of 144 rows on a CPU, so the other folder has the values of the scalar rule."""
    stored, values = released.fp8(released.weights())
    config = released.config(quantization_config=released.FP8_CONFIG)
    tokens_BT = torch.randint(released.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    eights = ours(released.write(tmp_path / "fp8", stored, values=config, shards=3), tokens_BT)
    assert torch.equal(eights, ours(released.write(tmp_path / "bf16", values, values=released.config()), tokens_BT))
    plain = ours(released.write(tmp_path / "before", released.weights(), values=released.config()), tokens_BT)
    assert not torch.equal(eights, plain)


def test_a_config_that_is_read_wrongly_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = released.write(tmp_path, released.weights(), values=released.config())
    config, reader = open_hf_folder(folder)
    wrong = replace(config, routed_scaling_factor=5.0)
    monkeypatch.setattr("moetrain.verify.hf.open_hf_folder", lambda _: (wrong, reader))
    assert not verify_folder(folder, seed=0, num_rows=1, num_tokens=16, fault=HfFault.none).is_kept
