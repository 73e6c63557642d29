"""Compares our float32 logits of random tokens with those of transformers on the same weights.

Either for a matrix of tiny random models, in both layouts of experts (fused in memory; one by one through files), or
for one folder of weights. Shape letters: B rows, T tokens, V vocabulary.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.commands.verify import HfFault
from moetrain.errors import ConfigError, described
from moetrain.export.folder import CONFIG_FILE, write_weights
from moetrain.export.tensors import folder_tensors
from moetrain.files import write_json
from moetrain.hf.consumers import obstacles
from moetrain.hf.files import INDEX_FILE, SINGLE_FILE, read_object
from moetrain.hf.folder import open_hf_folder
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import text_config, to_hf_config
from moetrain.model.config import ModelConfig, ScoreFunction, YarnConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader, WithoutMtp, read_into
from moetrain.quant.consumers import Consumer
from moetrain.runtime import torch_stream
from moetrain.verify.table import Row

BOUND = 1e-5
"""Bound on the largest difference of logits, divided by max(1, largest logit). It allows for another order of
summation."""
YARNS = ((32.0, 1.0), (40.0, 32.0), (64.0, 1.0))
"""(factor, beta_fast) of YaRN in Kimi K2, DeepSeek-V3 and Kimi K2 Thinking."""
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"score_function": function} for function in ScoreFunction),
    {"normalize_weights": False, "routed_scaling_factor": 1.0},
    {"normalize_weights": False, "num_groups": 4, "num_groups_per_token": 1},
    {"num_groups": 2, "num_groups_per_token": 2, "routed_scaling_factor": None},
    {"num_groups": 16, "num_groups_per_token": 8},
    *({"num_shared_experts": number} for number in (0, 2)),
    *({"num_dense_layers": number} for number in (0, 2)),
    {"num_experts_per_token": 1},
    {"num_mtp_layers": 2},
)
"""Changes to `_TINY`: every score function, several group settings, and numbers of shared experts, dense layers and
modules of multi-token prediction, which transformers leaves out."""
_TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=16,
    num_experts_per_token=4,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
)
_SHARD_BYTES = 100_000  # small enough that even the tiny models are split into several files
_BIAS_STD, _GAIN_STD = 0.05, 0.1  # noise on biases and norm gains, whose initial values are 0 and 1
_NORM_FAULT = 1.001
_LONGEST_REASON = 300  # characters


class ExpertLayout(StrEnum):
    """How weights are passed to transformers."""

    fused = "fused"
    """In memory, with the experts of a layer in one tensor."""
    single = "single"
    """Through files with one tensor per expert matrix: we write a folder that transformers reads, and the reverse."""


def verify_matrix(*, seed: int, num_rows: int, num_tokens: int, fault: HfFault) -> Iterator[Row]:
    """Yield one row per tiny model, over query compression, YaRN, groups, router settings and expert layouts.

    For a shape that transformers does not support, the row contains the reasons for which exports refuse it.
    """
    for q_lora_rank, (factor, beta_fast), groups, layout in product((None, 24), YARNS, (1, 8), ExpertLayout):
        yarn = YarnConfig(factor=factor, beta_fast=beta_fast)
        chosen: dict[str, Any] = {"num_groups": groups, "num_groups_per_token": max(1, groups // 2)}
        config = replace(_TINY, q_lora_rank=q_lora_rank, yarn=yarn, **chosen)
        name = f"q_lora {q_lora_rank}, YaRN {factor:g}, beta_fast {beta_fast:g}, groups {groups}, experts {layout}"
        tokens_BT = _tokens(config, seed=seed, shape=(num_rows, num_tokens))
        yield _tiny_row(name, config, layout=layout, tokens_BT=tokens_BT, seed=seed, fault=fault)
    for changes in VARIANTS:
        config = replace(_TINY, **changes)
        name = ", ".join(f"{field} {value}" for field, value in changes.items())
        reasons = obstacles(config, Consumer.transformers)
        if reasons:
            yield Row(name=f"{name}: export allowed", value=0, bound=0, note=f"refused: {'; '.join(reasons)}")
            continue
        tokens_BT = _tokens(config, seed=seed, shape=(num_rows, num_tokens))
        yield _tiny_row(name, config, layout=ExpertLayout.single, tokens_BT=tokens_BT, seed=seed, fault=fault)


def _tiny_row(
    name: str, config: ModelConfig, *, layout: ExpertLayout, tokens_BT: Tensor, seed: int, fault: HfFault
) -> Row:
    weights = _weights(config, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        if layout is ExpertLayout.fused:
            theirs = _stock_model(config)
            theirs.load_state_dict(weights)
            read, returned = config, dict(weights)
        else:
            theirs = _through_folder(Path(temporary) / "ours", config=config, weights=weights)
            theirs.save_pretrained(Path(temporary) / "theirs", max_shard_size=_SHARD_BYTES)
            read, folder = open_hf_folder(Path(temporary) / "theirs")
            folder_tensors(read).check_shapes(folder)
            returned = dict(folder)
    ours = Transformer(read, compute_dtype=torch.float32)
    # Of layers without shared experts, transformers has matrices of size 0.
    ours.load_state_dict({name: tensor for name, tensor in returned.items() if tensor.numel()})
    return _row(name, ours=ours, theirs=theirs.eval(), tokens_BT=tokens_BT, fault=fault)


def verify_folder(path: Path, *, seed: int, num_rows: int, num_tokens: int, fault: HfFault) -> Row:
    """Return the row of a Hugging Face folder. Both models are in memory in float32.

    transformers reads plain weights and packed experts itself. It reads neither FP8 blocks with a shorter last block on
    a CPU, nor experts that are packed in some layers only, nor the language model of a model with an image encoder
    alone, nor several files without an index, and it computes with other packed matrices in bf16; there it computes
    with the values that this package reads. No code of the folder is run. Raises `ConfigError` for a shape
    that transformers does not support.
    """
    config, reader = open_hf_folder(path)
    if reasons := obstacles(config, Consumer.transformers):
        raise ConfigError(f"init_from is {path}: transformers does not compute this model ({'; '.join(reasons)})")
    folder_tensors(config).check_shapes(reader)
    ours = Transformer(config, compute_dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            read_into(tensor, reader, name=name)
    reads_itself = reader.is_plain_or_packed and any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    theirs = _of_folder(path) if reads_itself else _stock_model(config)
    if not reads_itself:
        theirs.load_state_dict(_without_mtp(ours.state_dict(), config))
    tokens_BT = _tokens(config, seed=seed, shape=(num_rows, num_tokens))
    name = str(path) if reads_itself else f"{path}, read by this package for both"
    return _row(name, ours=ours, theirs=theirs.eval(), tokens_BT=tokens_BT, fault=fault)


def _without_mtp(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    reader = WithoutMtp(TensorReader(weights), config, kept=0)
    return {name: weights[name] for name in reader.shapes()}


def _of_folder(path: Path) -> Any:
    """Return transformers' model of a folder, read with its own classes whatever model_type config.json has."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values = read_object(path / CONFIG_FILE)
    stated = {**text_config(values), "model_type": DeepseekV3Config.model_type}
    theirs = DeepseekV3Config.from_dict(stated)
    try:
        model = DeepseekV3ForCausalLM.from_pretrained(path, config=theirs, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # it raises what its conversions raise
        reason = " ".join(described(error).split())[:_LONGEST_REASON]
        raise ConfigError(f"init_from is {path}: transformers does not load it ({reason})") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # unpacked experts have the dtype of their scales
    return model


@torch.no_grad()
def _weights(config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    model = Transformer(config)
    initialize(model, seed)
    stream = torch_stream(seed, "verify.hf.vectors")
    for _, layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(std=_BIAS_STD, generator=stream)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(_GAIN_STD * torch.randn(parameter.shape, generator=stream))
    return model.state_dict()


def _tokens(config: ModelConfig, *, seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch_stream(seed, "verify.hf"))


def _stock_model(config: ModelConfig) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # takes seconds to import

    return DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config)))


def _through_folder(folder: Path, *, config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir()
    write_json(folder / CONFIG_FILE, to_hf_config(config))
    write_weights(folder, hf_disk_tensors(weights), shard_bytes=_SHARD_BYTES)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def _row(name: str, *, ours: Transformer, theirs: Any, tokens_BT: Tensor, fault: HfFault) -> Row:
    if fault is HfFault.norm:
        ours.model.norm.weight.mul_(_NORM_FAULT)
    elif fault is HfFault.expert:
        for parameter in ours.moe_layers()[0][1].experts.parameters():
            parameter[:2] = parameter[:2].flip(0)
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    output = ours(tokens_BT, segments_BT=torch.ones_like(tokens_BT), positions_BT=positions_BT)
    ours_BTV = ours.logits(output.hidden_BTD)
    theirs_BTV: Tensor = theirs(tokens_BT).logits
    largest, difference = float(theirs_BTV.abs().max()), float((ours_BTV - theirs_BTV).abs().max())
    note = f"largest difference {difference:.2e}, largest logit {largest:.2f}"
    return Row(name=name, value=difference / max(1.0, largest), bound=BOUND, note=note)
