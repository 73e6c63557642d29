"""The programs that can read an exported folder. Imports no torch."""

from enum import StrEnum


class Consumer(StrEnum):
    """A program that runs the model of an exported folder."""

    moetrain = "moetrain"
    """This package: evaluation, generation, further training."""
    transformers = "transformers"
    """transformers' DeepseekV3ForCausalLM, with compressed-tensors where experts are packed."""
    vllm = "vllm"
    """vLLM's DeepSeek-V3 model."""
    llama_cpp = "llama_cpp"
    """llama.cpp, from the GGUF file that `export.format=gguf` writes."""
