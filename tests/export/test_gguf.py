"""A GGUF file holds the codes bit for bit, llama.cpp's metadata and the tokenizer; what it cannot hold is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.checkpoint.read import read_json
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.export import config as export_config
from moetrain.export.config import ExportConfig, ExportFormat, GgufDtype
from moetrain.export.folder import write_record
from moetrain.export.gguf_file import GGUF_FILE, read_gguf
from moetrain.export.read import read_export
from moetrain.export.write import ExportReport, export_model
from moetrain.hf.consumers import obstacles
from moetrain.model.config import ModelConfig, ScoreFunction, YarnConfig
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import FormatName, GridName, QuantConfig
from moetrain.quant.consumers import Consumer
from moetrain.quant.grids import dequantize, quantize
from moetrain.run.weights import read_weights
from moetrain.stage_files import EXPORT_RECORD
from tests.allocations import peak_bytes

gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")

Tensors = dict[str, torch.Tensor]
QUANTISED = QuantConfig(enabled=True)


def write(
    folder: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    masters: Tensors,
    quant: QuantConfig = QUANTISED,
    dtype: GgufDtype = GgufDtype.bf16,
    consumers: list[Consumer] | None = None,
) -> ExportReport:
    return export_model(
        TensorReader(masters),
        folder=folder,
        model=model,
        quant=quant,
        export=ExportConfig(format=ExportFormat.gguf, gguf_dtype=dtype, consumers=consumers),
        tokenizer=tokenizer,
        step=7,
        sources={},
    )


def test_codes_scales_and_every_other_tensor_come_back(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    report = write(tmp_path / "out", model_config, tokenizer, masters=masters)
    export = read_export(tmp_path / "out")
    assert (export.format, export.step, export.quant.enabled) == (ExportFormat.gguf, 7, True)
    for name, master in masters.items():
        if ".mlp.experts." in name:
            expected = quantize(master, grid=GridName.kimi7, group_size=32)
            assert torch.equal(export.experts[name].codes_XOI, expected.codes_XOI), name
            assert torch.equal(export.experts[name].scales_XOG, expected.scales_XOG), name
        else:
            is_small = master.ndim == 1 or name.endswith("mlp.gate.weight")
            stored = master if is_small else master.bfloat16()
            assert torch.equal(export.dense[name].to(stored.dtype), stored), name
    assert report.num_bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).tensors)


def test_the_library_of_the_format_dequantises_the_experts_to_the_weights_of_training(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "out", model_config, tokenizer, masters=masters)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).tensors}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up, down = (
            dequantize(quantize(masters[f"{prefix}.{kind}"], grid=GridName.kimi7, group_size=32))
            for kind in ("gate_up_proj", "down_proj")
        )
        for kind, expected in zip(("gate", "up", "down"), (*gate_up.chunk(2, 1), down), strict=True):
            tensor = tensors[f"blk.{layer}.ffn_{kind}_exps.weight"]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert tensor.tensor_type.name == "Q4_0"
            assert torch.equal(values.view(expected.shape).bfloat16(), expected), (layer, kind)


@pytest.mark.parametrize("dtype", list(GgufDtype))
def test_a_model_without_quantisation_keeps_its_experts(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer, dtype: GgufDtype
) -> None:
    model = replace(model_config, rms_norm_eps=1e-6)
    write(tmp_path / "out", model, tokenizer, masters=masters, quant=QuantConfig(), dtype=dtype)
    export = read_export(tmp_path / "out")
    assert not export.experts and not export.quant.enabled
    for name, master in masters.items():
        keeps = dtype is GgufDtype.float32 or master.ndim == 1 or name.endswith("mlp.gate.weight")
        assert torch.equal(export.dense[name].float(), master if keeps else master.bfloat16().float()), name


def test_the_experts_of_a_file_are_dequantised_by_ranges(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "out", model_config, tokenizer, masters=masters)
    whole, origin = read_export(tmp_path / "out").weights(), read_weights(str(tmp_path / "out"))
    assert origin.codes is not None and origin.reader.shapes() == {name: tuple(w.shape) for name, w in whole.items()}
    for name, tensor in whole.items():
        assert torch.equal(origin.tensors[name], tensor)
        for first, last in ((0, tensor.numel()), (1, 2), (tensor.numel() // 3, tensor.numel() - 1)):
            assert torch.equal(origin.reader.read(name, first=first, last=last), tensor.reshape(-1)[first:last])
    name = next(iter(origin.codes.packed_experts()))
    assert peak_bytes(lambda: origin.reader.read(name, first=0, last=1)) < whole[name].nbytes


def test_a_gguf_made_from_an_int4_export_has_the_same_codes(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    export_model(
        TensorReader(masters), folder=tmp_path / "int4", model=model_config, quant=QUANTISED, export=ExportConfig(),
        tokenizer=tokenizer, step=7, sources={},
    )  # fmt: skip
    int4 = read_export(tmp_path / "int4")
    write(tmp_path / "out", model_config, tokenizer, masters=int4.weights(), quant=int4.quant)
    for name, quantized in read_export(tmp_path / "out").experts.items():
        assert torch.equal(quantized.codes_XOI, int4.experts[name].codes_XOI)
        assert torch.equal(quantized.scales_XOG, int4.experts[name].scales_XOG)


def test_the_norms_of_the_latents_get_their_own_epsilon_by_a_scale_of_the_rows_before_them(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    assert model_config.rms_norm_eps == 1e-5
    write(tmp_path / "out", model_config, tokenizer, masters=masters)
    stored = read_gguf(tmp_path / "out" / GGUF_FILE)[1]["blk.0.attn_kv_a_mqa.weight"]
    weight = masters["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].bfloat16().float()
    x_TD = 1e-2 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert isinstance(stored, torch.Tensor)
    ours, theirs = x_TD @ weight.T, x_TD @ stored.T
    ours_TC, theirs_TC = ours[:, :16], theirs[:, :16]
    torch.testing.assert_close(
        torch.rms_norm(theirs_TC, (16,), eps=1e-5), torch.rms_norm(ours_TC, (16,), eps=1e-6), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(ours[:, 16:], theirs[:, 16:])


def test_the_metadata_describes_shape_tokenizer_and_template(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    yarn = YarnConfig(factor=4, original_max_position=32, beta_fast=32, mscale=0.7, mscale_all_dim=0.7)
    write(tmp_path / "out", replace(model_config, yarn=yarn), tokenizer, masters=masters)
    metadata: dict[str, Any] = read_gguf(tmp_path / "out" / GGUF_FILE)[0]
    expected = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 3,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 24,
        "deepseek2.attention.key_length": 24,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.key_length_mla": 16,
        "deepseek2.attention.value_length_mla": 8,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_scale": 1.5,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.yarn_log_multiplier": pytest.approx(0.07),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": KIMI_K2.jinja,
    }
    assert {key: metadata[key] for key in expected} == expected
    content = tokenizer.content()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model_config.vocab_size
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert all(tokens[id_] == token and types[id_] == 1 for token, id_ in content["model"]["vocab"].items())
    assert all(types[added["id"]] == 3 and tokens[added["id"]] == added["content"] for added in content["added_tokens"])
    assert types[tokenizer.vocab_size :] == [5] * (model_config.vocab_size - tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 26}, "q_lora_rank=24 with model.num_layers=26"),
        ({"num_layers": 48, "vocab_size": 128256}, "q_lora_rank=24 with model.num_layers=48"),
        ({"num_dense_layers": 3}, "num_dense_layers=3"),
        ({"num_shared_experts": 0}, "num_shared_experts=0"),
        ({"score_function": ScoreFunction.sqrt_softplus}, "score_function=sqrt_softplus"),
        ({"num_groups": 4}, "num_groups=4"),
        ({"num_groups": 2, "num_groups_per_token": 2}, "num_groups_per_token=2"),
        ({"num_experts": 1026}, "num_experts=1026"),
        ({"yarn": YarnConfig(factor=4, beta_fast=32, mscale=0.5, mscale_all_dim=0.7)}, "mscale=0.5"),
        ({"yarn": YarnConfig(factor=4, beta_fast=32, mscale=1.0, mscale_all_dim=0.7)}, "mscale_all_dim=0.7"),
        ({"yarn": YarnConfig(factor=4)}, "beta_fast=1, beta_slow=1: it ignores both"),
        ({"yarn": YarnConfig(factor=4, beta_fast=32, beta_slow=2)}, "beta_fast=32, beta_slow=2: it ignores both"),
    ],
)
def test_a_shape_that_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, model_config: ModelConfig, tokenizer: Tokenizer, changes: dict[str, Any], said: str
) -> None:
    model = replace(model_config, **{"num_experts_per_token": 1, **changes})
    with pytest.raises(ConfigError, match=rf"export\.consumers names llama_cpp.*{said}"):
        write(tmp_path / "out", model, tokenizer, masters={})
    assert not (tmp_path / "out").exists()


def test_uncompressed_queries_are_taken_at_every_depth(model_config: ModelConfig) -> None:
    for num_layers in (3, 26, 27, 48):
        assert not obstacles(replace(model_config, q_lora_rank=None, num_layers=num_layers), Consumer.llama_cpp)


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        (QuantConfig(enabled=True, group_size=16), r"group_size=16: its Q4_0 blocks take 32"),
        (QuantConfig(enabled=True, format=FormatName.mxfp4, grid=GridName.mx), "format=mxfp4: Q4_0 blocks hold int4"),
    ],
)
def test_codes_that_q4_0_cannot_hold_are_refused(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer, quant: QuantConfig, said: str
) -> None:
    for consumers in (None, [Consumer.moetrain]):  # the file cannot hold them, whoever reads it
        with pytest.raises(ConfigError, match=f"{said}.*: change that setting, or give another export.format"):
            write(tmp_path / "out", model_config, tokenizer, masters=masters, quant=quant, consumers=consumers)


def test_a_scale_beyond_float16_and_rows_that_are_no_multiple_of_32_are_refused_and_leave_nothing(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=rf"{name}\[0\]: a scale is not a float16 number"):
        write(tmp_path / "out", model_config, tokenizer, masters=masters | {name: masters[name] * 1e8})
    narrow = replace(model_config, moe_intermediate_size=40)
    shapes = {key: tuple(tensor.shape) for key, tensor in masters.items()}
    for key, shape in shapes.items():
        if "experts." in key:
            shapes[key] = tuple({32: 40, 64: 80 if key.endswith("gate_up_proj") and at == 1 else 64}.get(size, size)
                                for at, size in enumerate(shape))  # fmt: skip
    with pytest.raises(ConfigError, match="must divide the 40 inputs"):
        write(tmp_path / "out", narrow, tokenizer, masters={key: torch.zeros(shape) for key, shape in shapes.items()})
    assert list(tmp_path.iterdir()) == []


def test_another_program_that_must_read_the_file_is_refused(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"names vllm.*export\.format=gguf: it reads safetensors"):
        write(tmp_path / "out", model_config, tokenizer, masters=masters, consumers=[Consumer.vllm])
    with pytest.raises(ConfigError, match=r"names llama_cpp.*export\.format=bf16: it reads GGUF only"):
        export_model(
            TensorReader(masters), folder=tmp_path / "out", model=model_config, quant=QUANTISED,
            export=ExportConfig(format=ExportFormat.bf16, consumers=[Consumer.llama_cpp]), tokenizer=tokenizer,
            step=1, sources={},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda inner: setattr(inner, "normalizer", normalizers.NFC()), "it normalises text"),
        (lambda inner: setattr(inner, "pre_tokenizer", pre_tokenizers.Whitespace()), "does not end in ByteLevel"),
        (
            lambda inner: setattr(
                inner,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex("x+"), behavior="isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
            ),
            r"it splits text as .*x\+",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer, change: Any, said: str
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    inner = HFTokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    change(inner)
    with pytest.raises(ConfigError, match=f"tokenizer is unknown to llama.cpp: .*{said}"):
        write(tmp_path / "out", model_config, Tokenizer(inner), masters=masters)


def test_a_damaged_file_is_named(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "out", model_config, tokenizer, masters=masters)
    path = tmp_path / "out" / GGUF_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.gguf: the file has changed"):
        read_export(tmp_path / "out")
    for damaged in (content[: len(content) // 2], b"GGUX" + content[4:]):
        path.write_bytes(damaged)
        record = {key: value for key, value in _record(tmp_path / "out").items() if key not in ("files", "sha256")}
        (tmp_path / "out" / EXPORT_RECORD).unlink()
        write_record(tmp_path / "out", record)
        with pytest.raises(CheckpointError, match=r"model\.gguf: cannot be read as GGUF"):
            read_export(tmp_path / "out")


def _record(folder: Path) -> dict[str, Any]:
    return read_json(folder / EXPORT_RECORD)


def test_without_the_package_the_export_is_refused_before_it_writes(
    tmp_path: Path, model_config: ModelConfig, masters: Tensors, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"requires the package gguf, .*pip install 'moetrain\[gguf\]'"):
        write(tmp_path / "out", model_config, tokenizer, masters=masters)
    assert not (tmp_path / "out").exists()
