"""Folders and names of Hugging Face, both ways."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetrain.checkpoint.origin import read_origin
from moetrain.errors import CheckpointError
from moetrain.hf.folder import open_hf_folder
from moetrain.hf.names import fused_tensors, hf_disk_tensors
from moetrain.hf.shape import from_hf_config, to_hf_config
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.transformer import Transformer, initialize

TINY = ModelConfig(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, q_lora_rank=8, kv_lora_rank=8, num_experts=4,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=24, moe_intermediate_size=8,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 1}


def make() -> Transformer:
    model = Transformer(TINY, compute_dtype=torch.float32)
    initialize(model, 3)
    model.moe_layers()[0][1].gate.e_score_correction_bias.uniform_()
    return model


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, q_lora_rank=None, yarn=YarnConfig(factor=32, beta_fast=32.0)), replace(TINY, num_groups=2)],
)
def test_config_survives_the_way_through_config_json(config: ModelConfig) -> None:
    written = json.loads(json.dumps(to_hf_config(config)))
    assert written["topk_method"] == "noaux_tc" and written["scoring_func"] == "sigmoid" and written["norm_topk_prob"]
    expected = replace(config, routed_scaling_factor=routed_scaling_factor(config))
    assert from_hf_config(written) == expected
    assert from_hf_config(DeepseekV3Config(**written).to_dict()) == expected


def test_rope_parameters_that_say_the_same_are_read() -> None:
    values = {**to_hf_config(TINY), "rope_scaling": {"type": "default"}, "rope_theta": int(TINY.rope_theta)}
    assert from_hf_config(values).rope_theta == TINY.rope_theta
    values = {**values, "rope_parameters": None, "rope_scaling": {**YARN, "attention_factor": None, "truncate": True}}
    assert from_hf_config(values).yarn == YarnConfig(factor=4.0, original_max_position=64, beta_fast=32.0)
    assert from_hf_config({**values, "rope_scaling": None, "rope_theta": None}).rope_theta == 10000.0


def test_config_of_the_fourth_transformers_is_read() -> None:
    values = to_hf_config(TINY)
    del values["rope_parameters"]
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
               "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    config = from_hf_config({**values, "rope_theta": 10000, "rope_scaling": scaling})
    assert (config.rope_theta, config.yarn.factor, config.yarn.beta_fast) == (10000.0, 40.0, 32.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"scoring_func": "linear"}, "scoring_func is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x': give an object with rope_type"),
        ({"rope_scaling": YARN}, r"rope_scaling and rope_parameters differ \({'rope_type': 'yarn', "),
        ({"rope_theta": 5}, "rope_theta is 5 and, in rope_parameters, 50000.0: remove one of them"),
        ({"rope_theta": math.nan}, "rope_theta is nan and, in rope_parameters, 50000.0"),
        ({"rope_parameters": {**YARN, "type": "default"}}, "rope_type is 'yarn' and type 'default': remove one"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.3}}, r"has attention_factor \(1.3\) with rope_type yarn"),
        ({"rope_parameters": {**YARN, "truncate": False}}, r"has truncate \(False\) with rope_type yarn, which is not"),
        ({"rope_parameters": {"factor": 4}}, r"rope_parameters has factor \(4\) without rope_type, which is not read"),
        ({"rope_parameters": {"full_attention": YARN}}, r"has full_attention \(.*\) without rope_type"),
        (
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 64.5}},
            "original_max_position_embeddings is 64.5: give a whole number",
        ),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x': give a number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True: give a number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: give at most 1024"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1: give true or false"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor is null: give a number"),
        ({"model_type": "llama"}, "architecture of model_type llama is not supported"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x': give a number"),
        ({"hidden_size": "abc"}, r"^config\.json: hidden_size is 'abc': give a number"),
        ({"num_hidden_layers": [1]}, r"num_hidden_layers is \[1\]: give a number"),
        ({"hidden_size": 16.5}, r"config\.json: hidden_size is 16\.5: give a whole number"),
        ({"hidden_size": None}, "hidden_size is null: give a number"),
        ({"hidden_size": 0}, r"config\.json: model\.hidden_size is 0: give at least 1"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_hf_config({**to_hf_config(TINY), **change})


def test_a_config_that_is_no_object_is_refused_and_one_without_a_base_takes_the_default() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json holds a list: give an object"):
        from_hf_config([])  # type: ignore[arg-type]
    values = {**to_hf_config(TINY), "rope_parameters": {"rope_type": "default"}}
    assert from_hf_config(values).rope_theta == 10000.0  # transformers' own


def test_experts_go_to_disk_one_by_one_and_come_back() -> None:
    state = make().state_dict()
    disk = dict(hf_disk_tensors(state))
    prefix = "model.layers.1.mlp.experts"
    fused = state[f"{prefix}.gate_up_proj"]
    assert torch.equal(disk[f"{prefix}.2.gate_proj.weight"], fused[2, :8])
    assert torch.equal(disk[f"{prefix}.2.up_proj.weight"], fused[2, 8:])
    assert f"{prefix}.gate_up_proj" not in disk
    assert_same(fused_tensors(disk), state)


def test_a_missing_expert_matrix_is_named() -> None:
    disk = dict(hf_disk_tensors(make().state_dict()))
    del disk["model.layers.1.mlp.experts.1.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight is missing"):
        fused_tensors(disk)


def test_our_folder_loads_in_transformers_and_its_folder_loads_here(tmp_path: Path) -> None:
    state = make().state_dict()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    disk = {name: tensor.contiguous() for name, tensor in hf_disk_tensors(state)}
    save_file(disk, ours / "model.safetensors", metadata={"format": "pt"})
    model = DeepseekV3ForCausalLM.from_pretrained(ours, dtype=torch.float32)
    assert_same(model.state_dict(), state)
    model.save_pretrained(theirs)
    for folder in (ours, theirs):
        config, tensors = open_hf_folder(folder)
        assert config == replace(TINY, routed_scaling_factor=routed_scaling_factor(TINY))
        assert_same(tensors, state)


def test_folders_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        open_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        open_hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        open_hf_folder(tmp_path)


def two_files(folder: Path, *, names: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Write the weights to the first file and zeros under the same names to the second; no index."""
    state = make().state_dict()
    disk = {name: tensor.contiguous() for name, tensor in hf_disk_tensors(state)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    save_file(disk, folder / names[0])
    save_file({name: torch.zeros_like(tensor) for name, tensor in disk.items()}, folder / names[1])
    return state


def test_an_old_weight_file_beside_the_only_one_is_not_read(tmp_path: Path) -> None:
    state = two_files(tmp_path / "hf", names=("model.safetensors", "pytorch_model_old.safetensors"))
    assert_same(dict(open_hf_folder(tmp_path / "hf")[1]), state)
    before = read_origin(tmp_path / "hf").digest
    (tmp_path / "hf" / "pytorch_model_old.safetensors").unlink()
    assert read_origin(tmp_path / "hf").digest == before


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    two_files(tmp_path / "hf", names=("weights.safetensors", "weights_old.safetensors"))
    with pytest.raises(CheckpointError, match=r"is in two files, weights\.safetensors and weights_old"):
        open_hf_folder(tmp_path / "hf")
    index = {name: "weights.safetensors" for name, _ in hf_disk_tensors(make().state_dict())}
    index["lm_head.weight"] = "weights_old.safetensors"
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"is in two files"):
        open_hf_folder(tmp_path / "hf")


def test_an_index_must_agree_with_the_files(tmp_path: Path) -> None:
    two_files(tmp_path / "hf", names=("a.safetensors", "b.safetensors"))
    index = {name: "a.safetensors" for name, _ in hf_disk_tensors(make().state_dict())}
    path = tmp_path / "hf" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index | {"model.norm.weight": "c.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"c\.safetensors: the file is missing, and .*index\.json names it"):
        open_hf_folder(tmp_path / "hf")
    path.write_text(json.dumps({"weight_map": index | {"model.extra.weight": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: model\.extra\.weight is missing"):
        open_hf_folder(tmp_path / "hf")
    path.write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    with pytest.raises(CheckpointError, match="has no weight_map from names of tensors to names of files"):
        open_hf_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "architecture Qwen3MoeForCausalLM is"),
        ({"architectures": None, "model_type": "deepseek_v2"}, "architecture of model_type deepseek_v2 is not"),
        ({"architectures": "LlamaForCausalLM"}, "architecture LlamaForCausalLM is not supported; moetrain reads Deep"),
    ],
)
def test_another_architecture_is_refused_by_its_name(names: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_hf_config({"num_attention_heads": 4, "num_key_value_heads": 2, **names})
    assert from_hf_config({**to_hf_config(TINY), "model_type": "kimi_k2"}).num_heads == TINY.num_heads


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_a_dtype_that_means_quantised_are_refused_without_a_config_of_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    disk = {name: tensor.contiguous() for name, tensor in hf_disk_tensors(make().state_dict())}
    disk["lm_head.weight"] = disk["lm_head.weight"].to(dtype)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    save_file(disk, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"lm_head\.weight has dtype (I8|F8_E4M3), which is not read here .* no quantization_config",
    ):
        open_hf_folder(tmp_path)


def test_a_config_file_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(CheckpointError, match=r"config\.json: holds a int: give a JSON object"):
        open_hf_folder(tmp_path)
