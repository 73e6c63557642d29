"""Released folders of every kind as `init_from` of the commands, and INT4 that leaves as it came."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moetrain.checkpoint.masters import MastersReader
from moetrain.cli.main import main
from moetrain.commands.verify import HfFault
from moetrain.compose import compose
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import ConfigError
from moetrain.export.config import ExportConfig
from moetrain.export.write import export_model
from moetrain.hf.folder import open_hf_folder
from moetrain.inference.rows import Chunk, Rows
from moetrain.parallel.state import read_into
from moetrain.quant.grids import dequantize
from moetrain.run.inputs import check_weights
from moetrain.run.weights import generation_model, read_weights, tokenizer_of, training_weights
from moetrain.verify.hf import verify_folder
from tests.hf import released

TEXT = " ".join(f"word{i} letters and {i * 7}" for i in range(40))
KINDS = ["bf16", "moonlight", "predicting", "int4", "int4_predicting", "wrapped"]
"""Kinds that are trained: `predicting` is FP8 with a layer of multi-token prediction."""
PACKED = ["int4", "foreign", "wrapped", "int4_predicting"]
DATA = (
    *("data=test", "data.seq_len=64", "~data.sources.english", "~data.sources.dialogues"),
    *("data.sources.maths.kind=maths", "data.sources.maths.num_documents=40"),
)
SMALL = (
    *DATA,
    *("train.rows_per_step=2", "train.rows_per_micro_batch=2", "train.steps=1", "train.compute_dtype=float32"),
    *("train.kernels=torch", "parallel.engine=torch", "run.wandb.mode=disabled"),
)


def make(folder: Path, kind: str) -> Path:
    """Write a folder of one kind, with a tokenizer."""
    disk, values = released.weights(q_lora=None if kind == "moonlight" else released.Q_LORA), released.config()
    if kind in ("predicting", "int4_predicting"):
        disk |= released.prediction_layer(disk)
    if kind in ("int4", "wrapped", "foreign", "int4_predicting"):
        disk, _ = released.int4(disk, codes_of=released.foreign_codes if kind == "foreign" else released.kimi_codes)
        modules = int(kind == "int4_predicting")
        values = released.config(quantization_config=released.EXPERT_CONFIG, num_nextn_predict_layers=modules)
    if kind == "wrapped":
        disk = {f"language_model.{name}": tensor for name, tensor in disk.items()}
        disk["vision_tower.norm.weight"] = torch.zeros(4)
        values = released.wrapped_config()
    if kind in ("fp8", "predicting"):
        disk, _ = released.fp8(disk)
        modules = int(kind == "predicting")
        values = released.config(quantization_config=released.FP8_CONFIG, num_nextn_predict_layers=modules)
    if kind == "moonlight":
        values = released.config(model_type="deepseek_v3", q_lora_rank=None, rope_scaling=None)
    train_tokenizer([TEXT], vocab_size=290).save(released.write(folder, disk, values=values, shards=2))
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    path = tmp_path_factory.mktemp("released")
    return lambda kind: path / kind if (path / kind).is_dir() else make(path / kind, kind)


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the language model's tensors of a folder by name, without a wrapper's prefix; shapes as int64."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {
        name.removeprefix("language_model."): tensor.long() if name.endswith("_shape") else tensor
        for name, tensor in tensors.items()
        if not name.startswith("vision_tower")
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left and left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_exported_and_generated_with(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"run.folder={tmp_path}", "run.name=x"]
    stage = "sft" if kind in ("predicting", "int4") else "pretrain"
    assert main([stage, f"init_from={folder_of(kind)}", *SMALL, *place]) == 0
    summary = json.loads((tmp_path / "x" / stage / "summary.json").read_text())
    assert summary["steps"] == 1
    if kind not in PACKED:
        assert main(["export", f"init_from={folder_of(kind)}", "export.format=bf16", *place]) == 0
        assert open_hf_folder(tmp_path / "x" / "export" / "model")[0] == open_hf_folder(folder_of(kind))[0]
    if kind == "bf16":
        capsys.readouterr()
        words = ["prompt='word1 letters'", "max_new_tokens=2", "temperature=0"]
        assert main(["generate", f"init_from={folder_of(kind)}", *words]) == 0
        said = capsys.readouterr().out
        assert main(["generate", f"init_from={tmp_path}/x/export", *words]) == 0
        assert capsys.readouterr().out == said


@pytest.mark.parametrize("kind", PACKED)
def test_an_export_of_int4_experts_has_their_codes_and_scales_and_all_other_tensors(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    place = [f"run.folder={tmp_path}", "run.name=x", f"init_from={folder_of(kind)}"]
    assert main(["export", *place]) == 0
    assert_same(stored(tmp_path / "x" / "export" / "model"), stored(folder_of(kind)))
    record = json.loads((tmp_path / "x" / "export" / "model" / "moetrain.json").read_text())
    assert record["grid"]["name"] == ("fitted" if kind == "foreign" else "kimi7")
    assert record["report"]["num_changed_groups"] == 0


@pytest.mark.parametrize("dither", ["true", "false"])
@pytest.mark.parametrize(("kind", "grid"), [("int4", "kimi7"), ("foreign", "fitted")])
def test_masters_that_took_no_step_are_exported_to_the_same_codes_and_scales(
    kind: str, grid: str, dither: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [f"init_from={folder_of(kind)}", f"quant.grid={grid}", f"dither_masters={dither}", *DATA]
    run = compose("sft", words)
    origin = training_weights(run)
    masters = {name: torch.empty(shape) for name, shape in origin.reader.shapes().items()}
    for name, target in masters.items():
        read_into(target, origin.reader, name=name)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(masters[name], origin.tensors[name]) == (dither == "false")
    assert torch.equal(masters["lm_head.weight"], origin.tensors["lm_head.weight"])
    export_model(
        origin.reader, folder=tmp_path / "out", model=origin.model, quant=run.quant, export=ExportConfig(),
        tokenizer=tokenizer_of(origin), step=0, sources={},
    )  # fmt: skip
    assert_same(stored(tmp_path / "out"), stored(folder_of(kind)))


def test_masters_do_not_depend_on_the_ranges_that_are_read(folder_of: Callable[[str], Path]) -> None:
    reader = training_weights(compose("sft", [f"init_from={folder_of('int4')}", "dither_masters=true", *DATA])).reader
    name = "model.layers.1.mlp.experts.gate_up_proj"
    size = torch.Size(reader.shapes()[name]).numel()
    whole = reader.read(name, first=0, last=size)
    parts = [reader.read(name, first=first, last=min(first + 7001, size)) for first in range(0, size, 7001)]
    assert torch.equal(torch.cat(parts), whole)
    assert reader.read(name, first=5, last=5).numel() == 0


def test_codes_are_generated_with_as_they_are_stored(folder_of: Callable[[str], Path]) -> None:
    origin = read_weights(str(folder_of("foreign")))
    assert origin.codes is not None
    model: Any = generation_model(origin, library=None)
    for index, layer in enumerate(model.weights.layers[1:], start=1):
        stored = origin.codes.codes(f"model.layers.{index}.mlp.experts.down_proj", first=0, last=released.EXPERTS)
        assert int(stored.codes_XOI.min()) == -8
        assert torch.equal(layer.experts[1].codes_XOI, stored.codes_XOI)
        assert torch.equal(layer.experts[1].scales_XOG, stored.scales_XOG)
    rows = Rows.of([Chunk(tokens=[1, 2, 3], start=0, pages=range(1))], device=torch.device("cpu"))
    logits = model.logits(model.forward(rows, model.new_cache(1)))
    for layer in model.weights.layers[1:]:
        layer.experts = tuple(dequantize(weight) for weight in layer.experts)
    assert torch.equal(model.logits(model.forward(rows, model.new_cache(1))), logits)


def test_quantising_twice_is_said_and_counted(
    folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    def start(kind: str, *words: str) -> str:
        caplog.clear()
        caplog.set_level("INFO")
        origin = training_weights(compose("sft", [f"init_from={folder_of(kind)}", *DATA, *words]))
        for name in read_weights(str(folder_of("int4"))).codes.packed_experts():  # type: ignore[union-attr]
            read_into(torch.empty(origin.reader.shapes()[name]), origin.reader, name=name)
        if isinstance(origin.reader, MastersReader):
            origin.reader.report()
        return caplog.text

    num_groups = 2 * released.EXPERTS * 3 * released.WIDTH * released.HIDDEN // released.GROUP
    assert "the weights are FP8, and training quantises experts on quant.grid=kimi7: they are" in start("fp8")
    assert f"{num_groups} groups of experts keep their codes and scales" in start("int4")
    assert f"of {num_groups} groups of experts are quantised a second time, because quant." in start("foreign")
    assert f"{num_groups} groups of experts keep their codes" in start("foreign", "quant.grid=fitted")
    said = start("int4", "quant.group_size=16")
    assert "the experts are int4 in groups of 32, and training takes quant.format=int4, quant.group_size=16" in said
    assert "the experts are int4; quant.enabled=false trains them unquantised" in start("int4", "quant.enabled=false")


def test_masters_that_are_there_are_not_spread(folder_of: Callable[[str], Path]) -> None:
    run = compose("sft", [f"init_from={folder_of('bf16')}", "dither_masters=true", *DATA])
    with pytest.raises(ConfigError, match=r"^dither_masters is true, and .* holds no experts as codes"):
        check_weights(run)


@pytest.mark.parametrize("words", [["quant.enabled=false"], ["quant.group_size=16"]])
def test_masters_that_are_not_quantised_to_their_codes_are_not_spread(
    words: list[str], folder_of: Callable[[str], Path]
) -> None:
    run = compose("sft", [f"init_from={folder_of('int4')}", "dither_masters=true", *DATA, *words])
    with pytest.raises(ConfigError, match=r"^dither_masters is true, and training does not quantise the experts of"):
        check_weights(run)


def test_experts_that_are_plain_in_some_layers_leave_an_export_as_they_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plain = {name: tensor for name, tensor in released.weights().items() if ".layers.2.mlp.experts." in name}
    packed, _ = released.int4(released.weights())
    disk = {name: tensor for name, tensor in packed.items() if ".layers.2.mlp.experts." not in name} | plain
    config = released.config(quantization_config=released.EXPERT_CONFIG)
    folder = released.write(tmp_path / "in", disk, values=config)
    train_tokenizer([TEXT], vocab_size=290).save(folder)
    assert main(["export", f"init_from={folder}", f"run.folder={tmp_path}", "run.name=x"]) == 0
    assert_same(stored(tmp_path / "x" / "export" / "model"), stored(folder))
    assert open_hf_folder(tmp_path / "x" / "export" / "model")[1].packed_experts().keys() == {
        f"model.layers.1.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")
    }
    assert "transformers does not compute this export as it was trained: it does not load a folder in" in caplog.text
    row = verify_folder(folder, seed=0, num_rows=1, num_tokens=16, fault=HfFault.none)
    assert row.is_kept and "read by this package for both" in row.name
    given = ["export", f"init_from={folder}", f"run.folder={tmp_path}", "run.name=y", "export.consumers=[transformers]"]
    assert main(given) == 2
    said = "2 of 4 tensors of routed experts are plain, and training quantises them"
    assert said not in caplog.text
    training_weights(compose("sft", [f"init_from={folder}", *DATA]))
    assert said in caplog.text


@pytest.mark.parametrize("plain", ["down_proj", ".experts.0."])
def test_experts_that_are_packed_in_part_are_refused(
    plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, _ = released.int4(released.weights())
    is_plain = {name: "mlp.experts." in name and plain in name for name in (packed | released.weights())}
    disk = {name: tensor for name, tensor in packed.items() if not is_plain[name]}
    disk |= {name: tensor for name, tensor in released.weights().items() if is_plain[name]}
    ignored = [*released.EXPERT_CONFIG["ignore"], f"re:.*{re.escape(plain)}.*"]
    config = released.config(quantization_config={**released.EXPERT_CONFIG, "ignore": ignored})
    folder = released.write(tmp_path / "in", disk, values=config)
    train_tokenizer([TEXT], vocab_size=290).save(folder)
    assert main(["export", f"init_from={folder}", f"run.folder={tmp_path}", "run.name=x"]) == 2
    assert "matrices of model.layers.1.mlp.experts are packed: the experts of a layer" in capsys.readouterr().err


def test_an_export_of_codes_that_no_grid_gives_equals_its_masters(tmp_path: Path) -> None:
    disk, _ = released.int4(released.weights())
    module = "model.layers.1.mlp.experts.1.gate_proj"
    disk[f"{module}.weight_packed"][0, :4] = 0x88888888 - (1 << 32)  # a group of zeros
    disk[f"{module}.weight_scale"][0, 0] = 2.0**-7
    folder = released.write(tmp_path / "in", disk, values=released.config(quantization_config=released.EXPERT_CONFIG))
    train_tokenizer([TEXT], vocab_size=290).save(folder)
    place = [f"run.folder={tmp_path}", "run.name=x"]
    assert main(["export", f"init_from={folder}", *place]) == 0
    assert main(["verify", "exports", f"init_from={tmp_path}/x/export", f"masters={folder}", *place]) == 0
