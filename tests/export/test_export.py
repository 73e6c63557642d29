"""What an export holds, read back by us: the trainer's numbers, and errors that say what and where."""

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import CheckpointError, ConfigError, SaveError
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.folder import open_weights, read_record, write_record
from moetrain.export.read import is_export, read_export
from moetrain.export.tensors import folder_tensors
from moetrain.export.write import ExportReport, export_model
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.transformer import Transformer
from moetrain.parallel.state import TensorReader
from moetrain.quant.apply import apply
from moetrain.quant.config import FormatName, GridName, QuantConfig
from moetrain.quant.consumers import Consumer
from moetrain.quant.grids import quantize

Exporter = Callable[..., ExportReport]
Tensors = dict[str, torch.Tensor]


def _hidden(config: ModelConfig, tensors: Tensors, *, quant: QuantConfig) -> torch.Tensor:
    model = Transformer(config)
    model.load_state_dict(tensors)
    apply([layer.experts for _, layer in model.moe_layers()], quant)
    tokens_BT = torch.arange(40).view(2, 20) * 7 % 290
    positions_BT = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        return model(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT).hidden_BTD


def test_codes_and_scales_in_the_file_are_those_of_the_masters(
    tmp_path: Path, export: Exporter, masters: Tensors
) -> None:
    export(tmp_path / "int4")
    read = read_export(tmp_path / "int4")
    assert set(read.experts) == {name for name in masters if ".mlp.experts." in name}
    for name, quantized in read.experts.items():
        expected = quantize(masters[name], grid=GridName.kimi7, group_size=32)
        assert torch.equal(quantized.codes_XOI, expected.codes_XOI)
        assert torch.equal(quantized.scales_XOG, expected.scales_XOG)


def test_a_model_loaded_from_the_file_computes_bit_for_bit_what_the_trainer_computes(
    tmp_path: Path, export: Exporter, masters: Tensors, model_config: ModelConfig
) -> None:
    trained = _hidden(model_config, masters, quant=QuantConfig(enabled=True))
    assert not torch.equal(trained, _hidden(model_config, masters, quant=QuantConfig()))
    export(tmp_path / "int4")
    read = read_export(tmp_path / "int4")
    assert torch.equal(_hidden(read.model, read.weights(), quant=QuantConfig()), trained)
    assert torch.equal(
        _hidden(read.model, read.weights(), quant=read.quant), trained
    )  # the grid re-quantises to itself


def test_every_format_has_the_same_tensors_and_dequantised_is_what_int4_stands_for(
    tmp_path: Path, export: Exporter, masters: Tensors
) -> None:
    kinds = (ExportFormat.quantized, ExportFormat.bf16, ExportFormat.bf16_dequantized)
    for kind in kinds:
        export(tmp_path / kind, format=kind)
    int4, bf16, dequantized = (read_export(tmp_path / kind).weights() for kind in kinds)
    assert set(int4) == set(bf16) == set(dequantized) == set(masters)
    assert all(torch.equal(int4[name], dequantized[name]) for name in int4)
    differing = {name for name in int4 if not torch.equal(int4[name], bf16[name])}
    assert differing == {name for name in masters if ".mlp.experts." in name}
    assert all(torch.equal(bf16[name], masters[name].bfloat16()) for name in differing)


def test_routers_norms_and_biases_are_stored_in_fp32_and_the_rest_in_bf16(tmp_path: Path, export: Exporter) -> None:
    export(tmp_path / "int4")
    files = open_weights(tmp_path / "int4")
    for name in files:
        is_small = name.endswith(("norm.weight", ".mlp.gate.weight", "e_score_correction_bias"))
        expected = {"packed": torch.int32, "shape": torch.int32}.get(name.rsplit("_", 1)[-1])
        assert files[name].dtype == (expected or (torch.float32 if is_small else torch.bfloat16)), name


def test_the_report_counts_bytes_groups_and_zero_groups(tmp_path: Path, export: Exporter, masters: Tensors) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = masters | {name: masters[name].clone()}
    tensors[name][0, :3] = 0
    report = export(tmp_path / "int4", tensors=tensors)
    num_expert = sum(tensor.numel() for key, tensor in masters.items() if ".mlp.experts." in key)
    assert report.num_quantized == num_expert
    assert report.num_groups == num_expert // 32
    assert report.num_zero_groups == 3
    shape_bytes = 8 * 2 * 4 * 3
    assert report.num_bytes_bf16 - report.num_bytes == num_expert * (16 - 4.5) / 8 - shape_bytes
    assert sum(read.numel() for read in read_export(tmp_path / "int4").weights().values()) == sum(
        tensor.numel() for tensor in masters.values()
    )


def test_the_quantization_config_is_legal_and_ignores_exactly_the_linear_layers_that_are_not_packed(
    tmp_path: Path, export: Exporter, model_config: ModelConfig
) -> None:
    export(tmp_path / "int4")
    config = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == "pack-quantized"
    files = open_weights(tmp_path / "int4")
    packed = {name.removesuffix(".weight_packed") for name in files if name.endswith("_packed")}
    plain = {name.removesuffix(".weight") for name in files if name.endswith(".weight") and files[name].ndim == 2}
    assert set(parsed.ignore or []) == plain - {"model.embed_tokens"}
    assert len(packed) == 2 * 4 * 3
    assert not packed & set(parsed.ignore or [])
    assert not any(name.startswith("re:") for name in parsed.ignore or [])
    assert len(folder_tensors(model_config).experts) == 4


def test_tokenizer_and_chat_template_travel_with_the_weights(
    tmp_path: Path, export: Exporter, tokenizer: Tokenizer
) -> None:
    export(tmp_path / "int4")
    assert Tokenizer.load(tmp_path / "int4").digest == tokenizer.digest
    assert (tmp_path / "int4" / "chat_template.jinja").is_file()
    record = read_export(tmp_path / "int4").record
    assert record["tokenizer"] == tokenizer.digest
    assert record["step"] == 7
    assert record["sources"] == {"checkpoint": "step_00000007"}


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "config.json", "tokenizer.json", "moetrain.json"])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, export: Exporter, name: str) -> None:
    export(tmp_path / "int4")
    path = tmp_path / "int4" / name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_export(tmp_path / "int4")


def test_an_export_replaces_an_equal_one_and_keeps_another(tmp_path: Path, export: Exporter) -> None:
    export(tmp_path / "out", format=ExportFormat.bf16)
    export(tmp_path / "out")
    export(tmp_path / "out")
    assert read_export(tmp_path / "out").format is ExportFormat.quantized
    assert read_export(tmp_path / "out.previous").format is ExportFormat.bf16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.previous"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    assert not is_export(mine)
    with pytest.raises(CheckpointError, match=r"mine: exists and has no moetrain\.json"):
        export(mine)
    assert (mine / "thesis.txt").is_file()


def test_weights_that_do_not_fit_are_refused_and_leave_nothing(
    tmp_path: Path, export: Exporter, masters: Tensors
) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    lacking = {key: tensor for key, tensor in masters.items() if key != name}
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        export(tmp_path / "a", tensors=lacking)
    with pytest.raises(CheckpointError, match=r"has shape \[2, 64, 32\], but this model requires \[4, 64, 32\]"):
        export(tmp_path / "a", tensors=masters | {name: masters[name][:2]})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers that are not finite"):
        export(tmp_path / "a", tensors=masters | {"model.norm.weight": torch.full((64,), torch.nan)})
    with pytest.raises(CheckpointError, match="extra is not a tensor of this model"):
        export(tmp_path / "a", tensors=masters | {"extra": torch.zeros(1)})
    export(tmp_path / "a", tensors=masters | {"optimizer/step": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("function", [ScoreFunction.softmax, ScoreFunction.sqrt_softplus])
def test_a_shape_that_a_consumer_computes_otherwise_needs_an_explicit_choice(
    tmp_path: Path, masters: Tensors, model_config: ModelConfig, tokenizer: Tokenizer, function: ScoreFunction
) -> None:
    model = replace(model_config, score_function=function)

    def export_for(consumers: list[Consumer]) -> None:
        export_model(
            TensorReader(masters), folder=tmp_path / "out", model=model, quant=QuantConfig(),
            export=ExportConfig(consumers=consumers), tokenizer=tokenizer, step=1, sources={},
        )  # fmt: skip

    message = rf"export\.consumers names transformers.*score_function={function}.*set export\.consumers=\[moetrain"
    with pytest.raises(ConfigError, match=message):
        export_for(ExportConfig().consumers)
    assert not (tmp_path / "out").exists()
    export_for([Consumer.moetrain])
    read = read_export(tmp_path / "out")
    assert read.model.score_function is function
    reasons = read.record["consumers"]
    assert reasons["moetrain"] == [] and reasons["transformers"] != []
    assert (reasons["vllm"] == []) is (function is ScoreFunction.softmax)


def test_the_record_says_who_reads_the_export_as_trained(tmp_path: Path, export: Exporter) -> None:
    export(tmp_path / "out")
    reasons = read_export(tmp_path / "out").record["consumers"]
    assert reasons.pop(Consumer.llama_cpp) == ["export.format=quantized: it reads GGUF only"]
    assert reasons == {consumer: [] for consumer in Consumer if consumer is not Consumer.llama_cpp}


def test_an_export_for_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"export\.consumers is empty"):
        ExportConfig(consumers=[])


def test_an_export_of_an_older_version_which_names_no_format_is_int4(tmp_path: Path, export: Exporter) -> None:
    export(tmp_path / "out")
    record = read_record(tmp_path / "out")
    del record["grid"]["format"]
    (tmp_path / "out" / "moetrain.json").unlink()
    write_record(tmp_path / "out", record)
    read = read_export(tmp_path / "out")
    assert (read.quant.format, read.format) == (FormatName.int4, ExportFormat.quantized)


def test_an_export_of_an_unknown_grid_or_format_is_refused(tmp_path: Path, export: Exporter) -> None:
    export(tmp_path / "out")
    record = read_record(tmp_path / "out")
    for changes in ({"grid": {**record["grid"], "name": "kimi9"}}, {"report": {"format": "int3"}}):
        (tmp_path / "out" / "moetrain.json").unlink()
        write_record(tmp_path / "out", record | changes)
        with pytest.raises(CheckpointError, match=r"moetrain\.json: .*(kimi9|int3).*export again"):
            read_export(tmp_path / "out")


@pytest.mark.parametrize("format", [ExportFormat.quantized, ExportFormat.gguf])
def test_a_file_that_finds_no_room_is_one_error_and_leaves_nothing(
    format: ExportFormat, tmp_path: Path, export: Exporter
) -> None:
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with pytest.raises(SaveError, match=r"not written: .*; make room, and run the same command again"):
            export(tmp_path / "x", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert not list(tmp_path.iterdir())
