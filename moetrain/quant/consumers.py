"""The programs that an exported folder may be meant for. No torch here."""

from enum import StrEnum


class Consumer(StrEnum):
    """A program that computes with an exported folder."""

    moetrain = "moetrain"
    """This package: evaluation, generation, further training."""
    transformers = "transformers"
    """transformers' DeepseekV3ForCausalLM, with compressed-tensors where experts are packed."""
    vllm = "vllm"
    """vLLM's DeepSeek-V3 model."""
    llama_cpp = "llama_cpp"
    """llama.cpp, through its own converter to GGUF."""
