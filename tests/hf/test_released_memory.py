"""A rank that reads its share of a released folder takes memory for this share and one chunk, not for the model."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from moetrain.compose import compose
from moetrain.parallel.state import read_into
from moetrain.run.weights import training_weights
from tests.export.test_memory import status
from tests.hf import released

EXPERTS, HIDDEN, WIDTH, NUM_RANKS = 64, 256, 512, 8
MODEL_MEGABYTES = 2 * EXPERTS * 3 * HIDDEN * WIDTH * 4 >> 20
BOUND_MEGABYTES = 75
"""Two chunks of 16 MB, an expert with its quotients, and some 35 MB that torch and malloc keep."""


def _random_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-7, 8, weight.shape)
    codes[:, :: released.GROUP] = 7
    return codes, torch.full((weight.shape[0], weight.shape[1] // released.GROUP), 0.01).bfloat16()


def _folder(path: Path) -> Path:
    config = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS}
    plain = {name: tensor for name, tensor in released.weights(hidden=HIDDEN).items() if not released.is_expert(name)}
    for layer in (1, 2):
        at = f"model.layers.{layer}.mlp"
        shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
        plain |= {f"{at}.shared_experts.{kind}.weight": torch.zeros(shape).bfloat16() for kind, shape in shapes.items()}
        plain[f"{at}.gate.weight"] = torch.zeros(EXPERTS, HIDDEN).bfloat16()
        plain[f"{at}.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
        for expert in range(EXPERTS):
            for kind, shape in shapes.items():
                plain[f"{at}.experts.{expert}.{kind}.weight"] = torch.empty(shape, device="meta")
    disk, _ = released.int4(plain, codes_of=_random_codes, with_values=False)
    values = released.config(quantization_config=released.EXPERT_CONFIG, **config)
    return released.write(path, disk, values=values, shards=4)


def grown(folder: Path) -> float:
    """Return by how many MB memory grew beyond the share of one of 8 ranks while it was read; in a process alone."""
    torch.set_num_threads(1)
    reader = training_weights(compose("sft", [f"init_from={folder}", "dither_masters=true", "data.seq_len=256"])).reader
    share = {
        name: torch.ones(shape[0] // NUM_RANKS, *shape[1:]) if len(shape) == 3 else torch.ones(shape)
        for name, shape in reader.shapes().items()
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    for name, target in share.items():
        first = 3 * target.numel() if target.dim() == 3 else 0
        read_into(target, reader, name=name, first=first)
    return status("VmHWM") - before


def test_a_share_of_packed_experts_is_read_in_the_memory_of_the_share(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from tests.hf import test_released_memory as m\n"
    program += "print(m.grown(Path(sys.argv[1])))"
    words = [sys.executable, "-c", program, str(_folder(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 < float(done.stdout.split()[-1]) < BOUND_MEGABYTES < MODEL_MEGABYTES / 2
