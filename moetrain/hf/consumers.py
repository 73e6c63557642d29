"""Which programs compute an exported shape as this package does, and why others do not.

`moetrain verify hf` checks transformers, `moetrain verify exports` checks a GGUF file in llama.cpp and a bf16 folder in
vLLM on a CPU. The other rules for vLLM come from its source (docs/numerics.md). Does not import torch.
"""

from collections.abc import Iterator, Mapping

from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.quant.consumers import Consumer

_SCORES = {
    Consumer.moetrain: tuple(ScoreFunction),
    Consumer.transformers: (ScoreFunction.sigmoid,),
    Consumer.vllm: (ScoreFunction.sigmoid, ScoreFunction.softmax),
    Consumer.llama_cpp: (ScoreFunction.sigmoid, ScoreFunction.softmax),
}
"""Score functions that each program computes; transformers ignores `scoring_func` and always computes sigmoid."""
PLAIN_LAYERS = "it does not load a folder in which the experts of some layers are plain"
"""Reason why transformers does not compute an export."""
_LITE_LAYERS = (26, 27)
"""Numbers of layers for which llama.cpp never reads the rank of compressed queries."""
_LITE_SHAPE = (48, 128256)
"""Number of layers and size of the vocabulary for which it does not either."""
_LLAMA_MAX_EXPERTS = 1024
_LLAMA_BETAS = (32.0, 1.0)
"""YaRN's beta_fast and beta_slow in llama.cpp, which reads neither from a file of this architecture."""


def obstacles(model: ModelConfig, consumer: Consumer) -> list[str]:
    """Return the reasons why `consumer` would not compute this shape as this package does; empty when it would."""
    found = list(_of_rope(model, consumer))
    if model.num_moe_layers:
        found += _of_router(model, consumer)
    if consumer is Consumer.llama_cpp:
        found += _of_llama(model)
    return found


def check_consumers(reasons: Mapping[Consumer, list[str]], wanted: list[Consumer]) -> None:
    """Raise ConfigError when a wanted consumer would not compute the model as trained. reasons: why, by consumer."""
    for consumer in wanted:
        if reasons[consumer]:
            able = ", ".join(other for other in Consumer if not reasons[other])
            narrow = f"set export.consumers=[{able}] to export for those only"
            cure = narrow if able else "change that setting, or give another export.format"
            raise ConfigError(
                f"export.consumers names {consumer}, which would not compute this model as it was trained "
                f"({'; '.join(reasons[consumer])}): {cure}"
            )


def _of_rope(model: ModelConfig, consumer: Consumer) -> Iterator[str]:
    yarn = model.yarn
    if yarn.factor <= 1:
        return
    if not yarn.mscale or not yarn.mscale_all_dim:
        yield "model.yarn.mscale or mscale_all_dim is 0, which config.json cannot say"
        return
    if consumer is Consumer.llama_cpp and (yarn.beta_fast, yarn.beta_slow) != _LLAMA_BETAS:
        betas = f"model.yarn.beta_fast={yarn.beta_fast:g}, beta_slow={yarn.beta_slow:g}"
        yield f"{betas}: it ignores both in the file and takes {_LLAMA_BETAS[0]:g} and {_LLAMA_BETAS[1]:g}"
    if consumer is Consumer.llama_cpp and yarn.mscale not in (1.0, yarn.mscale_all_dim):
        yield f"model.yarn.mscale={yarn.mscale:g}: it takes 1 or mscale_all_dim ({yarn.mscale_all_dim:g})"
    elif consumer is Consumer.llama_cpp and yarn.mscale == 1.0 != yarn.mscale_all_dim:
        yield f"model.yarn.mscale_all_dim={yarn.mscale_all_dim:g}: it takes mscale for the same"


def _of_llama(model: ModelConfig) -> Iterator[str]:
    is_lite = model.num_layers in _LITE_LAYERS or (model.num_layers, model.vocab_size) == _LITE_SHAPE
    if is_lite and model.q_lora_rank is not None:
        yield (
            f"model.q_lora_rank={model.q_lora_rank} with model.num_layers={model.num_layers}: it takes models of this "
            "depth for ones with uncompressed queries"
        )
    if not model.num_moe_layers:
        yield f"model.num_dense_layers={model.num_dense_layers}: it needs at least one layer with experts"
    if model.num_experts > _LLAMA_MAX_EXPERTS:
        yield f"model.num_experts={model.num_experts}: it takes up to {_LLAMA_MAX_EXPERTS}"


def _of_router(model: ModelConfig, consumer: Consumer) -> Iterator[str]:
    if model.score_function not in _SCORES[consumer]:
        computed = ", ".join(_SCORES[consumer])
        yield f"model.score_function={model.score_function}: it computes {computed}"
    if consumer is Consumer.moetrain:
        return
    if model.num_experts // model.num_groups < 2:
        yield f"model.num_groups={model.num_groups}: it needs at least 2 experts per group"
    if consumer is not Consumer.transformers and model.num_shared_experts == 0:
        yield "model.num_shared_experts=0: it needs at least 1"
    if consumer is Consumer.llama_cpp and 1 < model.num_groups == model.num_groups_per_token:
        yield f"model.num_groups_per_token={model.num_groups_per_token}: it needs fewer than model.num_groups"
