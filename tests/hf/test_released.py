"""Folders as models are released, each kind written by `released` and read to the values that its writer states."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.checkpoint.shape import stored_shape
from moetrain.errors import CheckpointError
from moetrain.hf.folder import open_hf_folder
from moetrain.hf.names import fused_tensors
from moetrain.hf.quantization import Fp8Blocks, quantization_of
from moetrain.hf.shape import from_hf_config
from moetrain.run.weights import read_weights
from tests.hf import released
from tests.hf.released import Disk


def assert_read(folder: Path, values: Mapping[str, Tensor]) -> None:
    """Check that a folder is read to `values` (by name on disk), whole and in small ranges."""
    _, tensors = open_hf_folder(folder)
    expected = fused_tensors(values)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor.float()), name
        step = max(1, tensor.numel() // 3 + 1)  # ranges that begin and end within rows, blocks and experts
        parts = [
            tensors.read(name, first=f, last=min(f + step, tensor.numel())) for f in range(0, tensor.numel(), step)
        ]
        assert torch.equal(torch.cat(parts).float(), tensor.float().flatten()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_plain_weights_are_read_as_they_are(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    disk = {name: tensor.to(dtype) for name, tensor in released.weights().items()}
    assert_read(released.write(tmp_path / "hf", disk, values=released.config(), shards=shards), disk)
    assert_read(released.write(tmp_path / "no", disk, values=released.config(), shards=shards, index=False), disk)


def test_fp8_blocks_equal_a_scalar_reference_with_edges_and_scales_in_other_files(tmp_path: Path) -> None:
    stored, values = released.fp8(released.weights())
    config = released.config(quantization_config=released.FP8_CONFIG)
    folder = released.write(tmp_path, stored, values=config, shards=3)
    assert_read(folder, values)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 144 x 160 in blocks of 128
    eights, scales = stored[name].float(), stored[f"{name}_scale_inv"]
    assert scales.shape == (2, 2) and len(set(scales.flatten().tolist())) == 4
    for row, column in ((0, 0), (127, 127), (127, 128), (128, 127), (143, 159)):
        product = eights[row, column] * scales[row // 128, column // 128]
        assert open_hf_folder(folder)[1][name][row, column] == product.bfloat16()


def test_fp8_with_scales_of_a_byte_is_read(tmp_path: Path) -> None:
    stored, values = released.fp8(released.weights(), power_of_two=True)
    assert stored["model.layers.0.self_attn.o_proj.weight_scale_inv"].dtype is torch.float8_e8m0fnu
    config = released.config(quantization_config={**released.FP8_CONFIG, "scale_fmt": "ue8m0"})
    assert_read(released.write(tmp_path, stored, values=config, shards=2), values)


@pytest.mark.parametrize("shape_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("codes_of", [released.kimi_codes, released.foreign_codes])
def test_packed_experts_are_read_to_code_times_scale(codes_of: Any, shape_dtype: torch.dtype, tmp_path: Path) -> None:
    stored, values = released.int4(released.weights(), codes_of=codes_of, shape_dtype=shape_dtype)
    config = released.config(quantization_config=released.EXPERT_CONFIG)
    folder = released.write(tmp_path, stored, values=config, shards=2)
    assert_read(folder, values)
    tensors = open_hf_folder(folder)[1]
    assert len(tensors.packed_experts()) == 4
    codes, scales = codes_of(released.weights()["model.layers.2.mlp.experts.1.up_proj.weight"])
    read = tensors.codes("model.layers.2.mlp.experts.gate_up_proj", first=1, last=3)
    assert torch.equal(read.codes_XOI[0, released.WIDTH :], codes)
    assert torch.equal(read.scales_XOG[0, released.WIDTH :], scales)


def test_a_model_with_an_image_encoder_is_read_without_it_and_the_rest_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, values = released.int4(released.weights())
    disk = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    disk |= {"vision_tower.encoder.blocks.0.wo.weight": torch.zeros(2, 2), "vision_tower.norm.weight": torch.zeros(2)}
    disk |= {"mm_projector.linear_1.weight": torch.zeros(2, 2, dtype=torch.int8)}  # its dtype does not matter
    disk["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder = released.write(tmp_path, disk, values=released.wrapped_config())
    (folder / "pytorch_model_old.bin").write_bytes(b"not read")
    with caplog.at_level("INFO"):
        assert_read(folder, values)
    line = "not used: mm_projector: 1 tensors, rotary frequencies: 1 tensors, vision_tower: 2 tensors"
    assert f"{folder}: {line}" in caplog.text
    assert f"{folder}: files not used: pytorch_model_old.bin\n" in caplog.text


@pytest.mark.parametrize("stated", [0, 1])
def test_a_prediction_layer_is_read_if_config_json_states_it(
    stated: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = released.weights()
    stored, values = released.fp8(plain)
    extra, of_extra = released.fp8(released.prediction_layer(plain))
    config = released.config(
        model_type="deepseek_v3", num_nextn_predict_layers=stated, quantization_config=released.FP8_CONFIG
    )
    folder = released.write(tmp_path, stored | extra, values=config, shards=2)
    read = {name: value for name, value in of_extra.items() if name not in released.prediction_copies()}
    with caplog.at_level("INFO"):
        assert_read(folder, values | (read if stated else {}))
    assert open_hf_folder(folder)[0].num_mtp_layers == stated
    unused = f"layers beyond 2 (multi-token prediction): {len(extra)} tensors"
    assert ("not used: copies of embedding and head: 2 tensors" if stated else unused) in caplog.text


@pytest.mark.parametrize("index", [True, False])
def test_a_prediction_layer_that_is_stated_and_not_there_is_no_error(index: bool, tmp_path: Path) -> None:
    """Programs that do not compute it save a folder without it and keep the number in config.json."""
    disk, config = released.weights(), released.config(num_nextn_predict_layers=1)
    folder = released.write(tmp_path / "x", disk, values=config, shards=2 if index else 1, index=index)
    assert_read(folder, disk)
    assert open_hf_folder(folder)[0].num_mtp_layers == 0
    shape = stored_shape(str(folder))
    assert shape is not None and shape.num_mtp_layers == 0


@pytest.mark.parametrize("name", ["hnorm", "eh_proj"])
def test_a_damaged_prediction_layer_is_refused(name: str, tmp_path: Path) -> None:
    plain = released.weights()
    disk = plain | released.prediction_layer(plain)
    del disk[f"model.layers.{released.LAYERS}.{name}.weight"]
    folder = released.write(tmp_path, disk, values=released.config(num_nextn_predict_layers=1))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{released.LAYERS}\.{name}\.weight is missing"):
        read_weights(str(folder))


def test_fewer_prediction_layers_than_stated_and_other_copies_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = released.weights()
    disk = plain | released.prediction_layer(plain)
    copy = released.prediction_copies()[1]
    disk[copy] = disk[copy] + 1
    folder = released.write(tmp_path, disk, values=released.config(num_nextn_predict_layers=2))
    with caplog.at_level("INFO"):
        assert open_hf_folder(folder)[0].num_mtp_layers == 1
    assert f"{folder}: config.json states 2 modules of multi-token prediction, and the folder holds 1" in caplog.text
    assert f"{copy} differs from lm_head.weight, which the module uses instead" in caplog.text
    assert "embed_tokens" not in caplog.text
    caplog.clear()
    wrapped = {f"language_model.{name}": tensor for name, tensor in disk.items()}
    values = released.wrapped_config(num_nextn_predict_layers=1)
    open_hf_folder(released.write(tmp_path / "wrapped", wrapped, values=values))
    assert f"{copy} differs from lm_head.weight" in caplog.text
    caplog.clear()
    open_hf_folder(released.write(tmp_path / "unread", disk, values=released.config()))
    assert "differs" not in caplog.text


def test_moonlight_has_no_compressed_queries_and_fused_experts_are_read_too(tmp_path: Path) -> None:
    values = released.config(model_type="deepseek_v3", q_lora_rank=None, rope_scaling=None)
    disk = released.weights(q_lora=None)
    assert_read(released.write(tmp_path / "single", disk, values=values), disk)
    assert open_hf_folder(tmp_path / "single")[0].q_lora_rank is None
    fused = fused_tensors(disk)
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    assert_read(released.write(tmp_path / "fused", fused, values=values), disk)


def test_both_forms_of_the_config_give_one_shape() -> None:
    yarn = released.config()["rope_scaling"]
    newer = released.config(dtype="bfloat16", rope_scaling=None)
    newer["rope_parameters"] = {**yarn, "rope_type": "yarn", "rope_theta": 50000.0}
    for name in ("torch_dtype", "rope_theta", "topk_method", "scoring_func", "auto_map"):
        del newer[name]
    expected = from_hf_config(released.config())
    assert expected.yarn.factor == 4.0 and expected.rope_theta == 50000.0
    for values in (newer, released.config(model_type="deepseek_v3"), released.wrapped_config()):
        assert from_hf_config(values) == expected


def _without(disk: Disk, name: str) -> Disk:
    return {other: tensor for other, tensor in disk.items() if other != name}


GATE = "model.layers.1.mlp.experts.1.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _without(d, f"{GATE}.weight_scale"), rf"{GATE}\.weight_scale is missing: a packed matrix requires"),
        (lambda d: _without(_without(_without(d, f"{GATE}.weight_scale"), f"{GATE}.weight_packed"),
                            f"{GATE}.weight_shape"), rf"{GATE}\.weight is missing"),
        (lambda d: d | {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(1, dtype=torch.int32)},
         r"model\.layers\.0\.mlp\.up_proj\.weight_scale is missing"),
        (lambda d: d | {f"{GATE}.weight": torch.zeros(64, 160)}, rf"{GATE}\.weight is there twice, plain and packed"),
        (lambda d: d | {f"{GATE}.weight_scale": torch.ones(64, 5).to(torch.float8_e4m3fn)},
         rf"{GATE}\.weight_scale has dtype F8_E4M3: BF16, F16, F32, F64 are read"),
        (lambda d: d | {f"{GATE}.weight_scale": torch.ones(64, 5, dtype=torch.int32)},
         rf"{GATE}\.weight_scale has dtype I32: BF16, F16, F32, F64 are read"),
        (lambda d: d | {f"{GATE}.weight_packed": torch.zeros(128, 20, dtype=torch.int32)},
         rf"{GATE}: weight_packed and weight_scale have different numbers of rows"),
        (lambda d: d | {f"{GATE}.weight_packed": torch.zeros(64, 19, dtype=torch.int32)},
         rf"{GATE}: a row has 152 codes and 5 scales, but config.json states group_size 32"),
        (lambda d: d | {"lm_head.weight": torch.zeros(300, 160, dtype=torch.float8_e5m2)},
         r"lm_head\.weight has dtype F8_E5M2, which is not read here"),
    ],
)  # fmt: skip
def test_what_is_missing_or_unknown_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    stored, _ = released.int4(released.weights())
    config = released.config(quantization_config=released.EXPERT_CONFIG)
    folder = released.write(tmp_path, change(stored), values=config)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*: {message}"):
        open_hf_folder(folder)


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_shape", torch.tensor([64, 160, 64]), r"weight_shape has shape \[3\]: it holds two numbers"),
        ("weight_shape", torch.tensor([64, 128]), r"weight_shape is \[64, 128\], but the scales are those of"),
        ("weight_scale", torch.full((64, 5), torch.nan).bfloat16(), "weight_scale holds numbers that are not finite"),
        ("weight_scale", torch.full((64, 5), 3e38).bfloat16(), "weight_scale holds numbers that are not finite"),
        ("weight_scale", torch.full((64, 5), 0.0123), "weight_scale is torch.float32 and bf16 cannot hold"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_when_read(
    suffix: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    stored, _ = released.int4(released.weights())
    config = released.config(quantization_config=released.EXPERT_CONFIG)
    folder = released.write(tmp_path, stored | {f"{GATE}.{suffix}": tensor}, values=config)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: .*{message}"):
        open_hf_folder(folder)[1]["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, name: d | {f"{name}_scale_inv": torch.ones(1, 2)}, r"has shape \[1, 2\]: .* requires \[2, 2\]"),
        (lambda d, name: _without(d, f"{name}_scale_inv"), "has dtype F8_E4M3, which is not read here"),
        (lambda d, name: _without(d, name), "is missing, and its scales .* are there"),
        (lambda d, name: d | {name: torch.zeros(144, 160)}, "has dtype F32 and a scale: only F8_E4M3 is read with one"),
        (lambda d, name: d | {f"{name}_scale_inv": torch.ones(2, 2).half()}, "has dtype F16"),
    ],
)
def test_fp8_that_lacks_a_part_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    stored, _ = released.fp8(released.weights(layers=1))
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    config = released.config(quantization_config=released.FP8_CONFIG)
    with pytest.raises(CheckpointError, match=message):
        open_hf_folder(released.write(tmp_path, change(stored, name), values=config))


def _packed(**changes: Any) -> dict[str, Any]:
    return {**released.EXPERT_CONFIG, **changes}


def _weights(**changes: Any) -> dict[str, Any]:
    group = released.EXPERT_CONFIG["config_groups"]["group_0"]
    return _packed(config_groups={"group_0": {**group, "weights": {**group["weights"], **changes}}})


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq': fp8 .* and compressed-tensors are read"),
        ({**released.FP8_CONFIG, "weight_block_size": None}, "weight_block_size is None: only scales of blocks"),
        ({**released.FP8_CONFIG, "fmt": "e5m2"}, "fmt is 'e5m2': only e4m3"),
        (_packed(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized': pack-quantized, mxfp4"),
        (_packed(format=["pack-quantized"]), r"format is \['pack-quantized'\]: pack-quantized, mxfp4"),
        (_packed(config_groups={}), "config_groups is {}: give exactly one group"),
        (_packed(ignore=["re:("]), r"ignore: 're:\(' is no regular expression"),
        (_packed(ignore="lm_head"), "ignore is 'lm_head': give a list"),
        (_packed(ignore=["re:.*experts.*"]), "is packed, but quantization_config.ignore"),
        (_packed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (_weights(num_bits=8), "num_bits of the weights is 8: only 4 is read"),
        (_weights(symmetric=False), "symmetric of the weights is False: only True"),
        (_weights(strategy="channel"), "strategy of the weights is 'channel': only 'group'"),
        (_weights(actorder="group"), "actorder is 'group': columns in another order"),
        (_weights(group_size=None), "group_size is None: give a whole number"),
        (_weights(group_size=16), "a row has 64 codes and 2 scales, but config.json states group_size 16"),
        (_weights(group_size=12), "group_size is 12: quant.format=int4 takes a multiple of 8"),
        ("int4", "quantization_config is 'int4': give an object"),
    ],
)
def test_quantisation_that_is_not_read_is_refused_by_its_name(quantization: Any, message: str, tmp_path: Path) -> None:
    stored, _ = released.int4(released.weights(layers=2))
    config = released.config(num_hidden_layers=2, quantization_config=quantization)
    with pytest.raises(CheckpointError, match=message):
        open_hf_folder(released.write(tmp_path, stored, values=config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "kimi_k25", "text_config": None}, "text_config is None: a model of model_type kimi_k25 has"),
        ({**released.wrapped_config(), "text_config": {"architectures": ["Qwen3ForCausalLM"]}}, "Qwen3ForCausalLM"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "architecture of model_type llava is not"),
    ],
)
def test_a_wrapper_without_a_language_model_that_is_computed_here_is_refused(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_hf_config(values)


def test_the_wrapper_of_a_later_release_is_read() -> None:
    wrapped = released.wrapped_config()
    later = {**wrapped, "model_type": "kimi_k26", "architectures": ["KimiK26ForConditionalGeneration"]}
    assert from_hf_config(later) == from_hf_config(wrapped)


@pytest.mark.parametrize(
    ("end", "dtype", "said"),
    [
        (".o_proj.weight", torch.float16, "weights are stored in F16; an export rounds them to bf16"),
        (".o_proj.weight", torch.float32, "weights are stored in F32; an export rounds them to bf16"),
        (".gate.weight", torch.float32, ""),
    ],
)
def test_weights_that_an_export_rounds_are_named(
    end: str, dtype: torch.dtype, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = released.weights()
    disk = {name: tensor.to(dtype if name.endswith(end) else torch.bfloat16) for name, tensor in weights.items()}
    with caplog.at_level(logging.INFO):
        open_hf_folder(released.write(tmp_path, disk, values=released.config()))
    assert (said in caplog.text) if said else ("rounds them" not in caplog.text)


def test_two_statements_of_the_quantisation_must_agree() -> None:
    wrapped = released.wrapped_config()
    stated = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    wrapped["text_config"]["quantization_config"] = stated
    assert quantization_of({**wrapped, "quantization_config": dict(stated)}) == Fp8Blocks(block=(128, 128))
    with pytest.raises(CheckpointError, match="quantization_config differs at the top and in text_config"):
        quantization_of({**wrapped, "quantization_config": {**stated, "weight_block_size": [64, 64]}})


def test_a_file_of_weights_beside_an_index_that_does_not_name_it_is_refused(tmp_path: Path) -> None:
    folder = released.write(tmp_path, released.weights(), values=released.config(), shards=2)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not one of the files that"):
        open_hf_folder(folder)


def test_files_in_a_folder_that_the_index_names_are_read(tmp_path: Path) -> None:
    disk = released.weights()
    folder = released.write(tmp_path, disk, values=released.config(), shards=2)
    (folder / "parts").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "parts" / file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-0', '"parts/model-0'))
    assert_read(folder, disk)
