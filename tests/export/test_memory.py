"""Reading and writing Hugging Face folders takes memory by the expert and the file, not by the model."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moetrain.data.tokenizer import Tokenizer
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.folder import write_weights
from moetrain.export.tensors import folder_tensors
from moetrain.export.write import export_model
from moetrain.hf.folder import open_hf_folder
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.state import read_into
from moetrain.quant.config import QuantConfig

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=256, num_layers=3, num_experts=64, moe_intermediate_size=512, routed_scaling_factor=1.0
)
SHARD_MEGABYTES = 4
MODEL_MEGABYTES = 190
BOUND_MEGABYTES = 80  # two shards, a chunk and an expert, and some 35 MB that torch and malloc keep
OPENED_MEGABYTES = 20  # of an export with 24 MB of codes and scales, which are read on access
_FOREIGN = "model.layers.1.mlp.experts."


def _disk_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield random weights by name on disk, bf16, each made when it is its turn."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(CONFIG).state_dict().items()}
    width, hidden = CONFIG.moe_intermediate_size, CONFIG.hidden_size
    for name, shape in shapes.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            yield name, torch.rand(shape).to(torch.bfloat16)
            continue
        kinds = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[name.rpartition(".")[2]]
        for expert in range(CONFIG.num_experts):
            for kind in kinds:
                matrix = torch.rand((hidden, width) if kind == "down" else (width, hidden)).to(torch.bfloat16)
                yield f"{name.rpartition('.')[0]}.{expert}.{kind}_proj.weight", matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large")
    (path / "config.json").write_text(json.dumps(to_hf_config(CONFIG)))
    num_bytes = write_weights(path, _disk_tensors(), shard_bytes=SHARD_MEGABYTES << 20)
    assert 2 * num_bytes > MODEL_MEGABYTES << 20  # in float32
    return path


def status(field: str) -> float:
    """Return a field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _grown(folder: Path, target: Path, tokenizer: Path, format: str) -> float:
    """Return by how many MB memory grew at most while `folder` was exported to `target`; runs in a process alone."""
    torch.set_num_threads(1)
    config, reader = open_hf_folder(folder)
    words = Tokenizer.load(tokenizer)
    folder_tensors(config)  # torch loads its meta kernels at their first use, which is none of the export's memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    export_model(
        reader,
        folder=target,
        model=config,
        quant=QuantConfig(),
        export=ExportConfig(format=ExportFormat(format), shard_megabytes=SHARD_MEGABYTES),
        tokenizer=words,
        step=0,
        sources={},
    )
    return status("VmHWM") - before


def _read(folder: Path) -> float:
    """Return by how many MB memory grew at most while the export in `folder` was opened; runs in a process alone."""
    from moetrain.run.weights import read_weights

    torch.set_num_threads(1)
    folder_tensors(CONFIG)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    assert read_weights(str(folder)).codes is not None
    return status("VmHWM") - before


def _printed(call: str, *words: object) -> float:
    """Return what a function of this file returns in a process alone; `paths` are its words."""
    program = (
        "import sys; from pathlib import Path; from tests.export import test_memory\n"
        f"paths = [*map(Path, sys.argv[1:])]; print(test_memory.{call})"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


NEEDS_GGUF = pytest.mark.skipif(find_spec("gguf") is None, reason="the optional package gguf is not installed")


@pytest.mark.parametrize("format", ["bf16", "quantized", pytest.param("gguf", marks=NEEDS_GGUF)])
def test_an_export_is_streamed_within_its_bound(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, format: str
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    grown = _printed(f"_grown(*paths, {format!r})", folder, tmp_path / "out", tmp_path / "tokenizer")
    assert 1 < grown < BOUND_MEGABYTES
    if format == "quantized":
        assert _printed("_read(*paths)", tmp_path / "out") < OPENED_MEGABYTES


def test_loading_reads_a_chunk_at_a_time_and_each_element_once(folder: Path) -> None:
    _, reader = open_hf_folder(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = reader[name]
    read: list[int] = []
    original = reader.read

    def counted(name: str, *, first: int, last: int) -> torch.Tensor:
        read.append(last - first)
        return original(name, first=first, last=last)

    reader.read = counted  # type: ignore[method-assign]
    target = torch.empty_like(whole)
    read_into(target, reader, name=name)
    assert torch.equal(target, whole)
    assert sum(read) == whole.numel() and max(read) == 1 << 22


def test_a_rank_reads_the_files_of_its_own_experts_alone(folder: Path) -> None:
    _, reader = open_hf_folder(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    size = CONFIG.hidden_size * 2 * CONFIG.moe_intermediate_size
    sources = list(reader.sources(name, first=48 * size, last=64 * size))
    assert {source.tensor.name for source in sources} == {
        f"{_FOREIGN}{expert}.{kind}_proj.weight" for expert in range(48, 64) for kind in ("gate", "up")
    }
    assert all((source.first, source.last) == (0, size // 2) for source in sources)
    assert torch.equal(reader.read(name, first=48 * size, last=64 * size).float(), reader[name][48:].reshape(-1))
