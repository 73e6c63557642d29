"""20 losses of toy runs on `text.jsonl`: equal to the last digit on the kind of machine they were recorded on.

`python -m tests.golden.test_losses` records them again, after a change that is meant to change them.
"""

import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.kernels.config import Kernels
from moetrain.log import JsonlMetrics, read_metrics
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig, ScheduleConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.train.config import ComputeDtype, DocumentTrainConfig
from moetrain.train.stages import Sections, train_stage

HERE = Path(__file__).parent
RECORD = HERE / "losses.json"
RELATIVE_BOUND = {ComputeDtype.float32: 1e-4, ComputeDtype.bfloat16: 2e-2}
"""How far a loss may be from the record on a machine of another kind: other kernels round in another order."""
_VOCAB_SIZE = 256 + len(KIMI_K2.special_tokens) + 64


def machine_kind() -> str:
    """Return what decides which kernels run: processor family, its vector instructions, and the version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    vendor = next(iter(sorted(words & {"AuthenticAMD", "GenuineIntel"})), "unknown")
    bf16 = "+".join(sorted(words & {"avx512_bf16", "amx_bf16"})) or "no bf16"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {vendor} {capability} {bf16} torch {torch.__version__}"


def golden_losses(dtype: ComputeDtype) -> list[float]:
    """Return the losses of the toy run: pretraining in float32; in bfloat16 with INT4 experts, as in SFT."""
    sections = Sections(
        model=ModelConfig(
            vocab_size=_VOCAB_SIZE,
            hidden_size=64,
            num_layers=3,
            num_heads=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=8,
        ),
        data=DataConfig(
            seq_len=128,
            sources={"text": SourceConfig(kind=SourceKind.jsonl, path=str(HERE / "text.jsonl"))},
            tokenizer=TokenizerConfig(vocab_size=_VOCAB_SIZE),
            validation_fraction=0.1,
        ),
        optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(warmup_steps=4)),
        train=DocumentTrainConfig(
            steps=20, rows_per_step=4, rows_per_micro_batch=2, compute_dtype=dtype, kernels=Kernels.torch
        ),
        parallel=ParallelConfig(engine=EngineName.torch),
        quant=QuantConfig(enabled=dtype is ComputeDtype.bfloat16),
        seed=1,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = JsonlMetrics(folder / "metrics.jsonl")
        train_stage(sections, folder=folder, metrics=metrics)
        metrics.close()
        return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("dtype", list(RELATIVE_BOUND))
def test_losses_are_those_on_record(dtype: ComputeDtype) -> None:
    record = json.loads(RECORD.read_text())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = golden_losses(dtype)
    finally:
        torch.set_num_threads(num_threads)
    if record["machine"] == machine_kind():
        assert found == record["losses"][dtype]
    assert found == pytest.approx(record["losses"][dtype], rel=RELATIVE_BOUND[dtype])
    assert found[-1] < 0.8 * found[0]


def record() -> None:
    """Write the losses of this machine to the record."""
    torch.set_num_threads(1)
    losses = {dtype.value: golden_losses(dtype) for dtype in RELATIVE_BOUND}
    RECORD.write_text(json.dumps({"machine": machine_kind(), "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    record()
