"""Head, log-softmax and target log-probability in one pass over chunks, so that all logits never exist at once.

C rows of one chunk, N rows, D hidden size, V vocabulary. Products run in the dtype of the hidden states, log-softmax in
float32.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable

_CHUNK_ELEMENTS = 1 << 20  # logits per chunk: 4 MB in float32, about the size of the cache
_NATIVE_CHUNK_ELEMENTS = 1 << 22  # larger, because every chunk packs the head's weight again
_KEPT_ELEMENTS = 1 << 25  # maximum logits per micro-batch to keep for the backward pass: 64 MB in bf16


def chunked_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    targets_N: torch.Tensor,
    library: Library | None,
    temperatures_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 log-probabilities of the targets [N], and the entropies [N], which have no gradient.

    temperatures_N: divisor of the logits of each row, float32 above 0; None means 1 everywhere.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, temperatures_N, library
    )
    return found


class Read(NamedTuple):
    """Values per row of logits, float32: log of the sum of exp, log-probability of the target, entropy."""

    normalizers_C: torch.Tensor
    logprobs_C: torch.Tensor
    entropies_C: torch.Tensor


def read_logits(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, *, temperatures_C: torch.Tensor | None = None
) -> Read:
    """Return normaliser, target log-probability and entropy per row, with torch's operations.

    The logits are first divided by the temperatures, if given.
    """
    scaled_CV = logits_CV.float() if temperatures_C is None else logits_CV.float() / temperatures_C[:, None]
    terms_CV, sum_C, normalizers_C = exponentials(scaled_CV)
    entropies_C = normalizers_C - terms_CV.mul_(scaled_CV).sum(dim=-1) / sum_C
    return Read(normalizers_C, scaled_CV.gather(1, targets_C[:, None])[:, 0] - normalizers_C, entropies_C)


def read_natively(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, *, temperatures_C: torch.Tensor | None, library: Library
) -> Read:
    """Return the same from bfloat16 logits with the native kernels."""
    read = Read(*(logits_CV.new_empty(len(logits_CV), dtype=torch.float32) for _ in range(3)))
    sources = (logits_CV.contiguous(), targets_C.contiguous(), temperatures_C)
    library("logprob_rows", *sources, *read, *logits_CV.shape)
    return read


def exponentials(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return exp(logit - row maximum) [C, V], its sum [C], and the log of the sum of exp(logit) [C], float32.

    Training and sampling both compute log-probabilities with this function, so equal logits give equal bits.
    """
    largest_C = logits_CV.amax(dim=-1)
    terms_CV = (logits_CV - largest_C[:, None]).exp_()
    sum_C = row_sums(terms_CV)
    return terms_CV, sum_C, largest_C + sum_C.log()


def row_sums(terms_CV: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row [C], with the same bits for any number of rows and threads."""
    if len(terms_CV) != 1:
        return terms_CV.sum(dim=-1)
    # torch divides the only sum of a call among threads, which rounds it otherwise: so there are two.
    return terms_CV.expand(2, -1).sum(dim=-1)[:1]


class _Chunk(NamedTuple):
    """The values of a chunk that the backward pass reads."""

    hidden_CD: torch.Tensor
    logits_CV: torch.Tensor
    targets_C: torch.Tensor
    normalizers_C: torch.Tensor
    temperatures_C: torch.Tensor | None


class _Head(Protocol):
    """The operations of the head, in chunks of `chunk_elements` logits."""

    chunk_elements: int

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Return the logits [C, V] in the dtype of the hidden states."""

    def read(self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *, temperatures_C: torch.Tensor | None) -> Read:
        """Return normaliser, target log-probability and entropy per row; see `read_logits`."""

    def backward(self, grad_C: torch.Tensor, chunk: _Chunk, *, grad_VD: torch.Tensor) -> torch.Tensor:
        """Add the weight's gradient to `grad_VD` (float32), and return the gradient of the hidden states.

        d logprob / d logits = (onehot(target) - p) / temperature.
        """


class _TorchHead:
    chunk_elements = _CHUNK_ELEMENTS

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> None:
        self.cast_VD = weight_VD.to(hidden_ND.dtype)

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        return hidden_CD @ self.cast_VD.T

    def read(self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *, temperatures_C: torch.Tensor | None) -> Read:
        return read_logits(logits_CV, targets_C, temperatures_C=temperatures_C)

    def backward(self, grad_C: torch.Tensor, chunk: _Chunk, *, grad_VD: torch.Tensor) -> torch.Tensor:
        hidden_CD, logits_CV, targets_C, normalizers_C, temperatures_C = chunk
        scaled_CV = logits_CV.float()
        if temperatures_C is not None:
            scaled_CV, grad_C = scaled_CV / temperatures_C[:, None], grad_C / temperatures_C
        grad_CV = (scaled_CV - normalizers_C[:, None]).exp_()
        grad_CV.mul_(-grad_C[:, None]).scatter_add_(1, targets_C[:, None], grad_C[:, None])
        cast_CV = grad_CV.to(hidden_CD.dtype)
        grad_VD += cast_CV.T @ hidden_CD
        return cast_CV @ self.cast_VD


class _NativeHead:
    chunk_elements = _NATIVE_CHUNK_ELEMENTS

    def __init__(self, weight_VD: torch.Tensor, library: Library) -> None:
        self.weight_VD = weight_VD.contiguous()
        self.library = library

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        logits_CV = hidden_CD.new_empty(len(hidden_CD), len(self.weight_VD))
        sizes = (*logits_CV.shape, hidden_CD.shape[1])
        self.library("linear", self.library.units, hidden_CD.contiguous(), self.weight_VD, logits_CV, *sizes)
        return logits_CV

    def read(self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *, temperatures_C: torch.Tensor | None) -> Read:
        return read_natively(logits_CV, targets_C, temperatures_C=temperatures_C, library=self.library)

    def backward(self, grad_C: torch.Tensor, chunk: _Chunk, *, grad_VD: torch.Tensor) -> torch.Tensor:
        library = self.library
        hidden_CD, logits_CV, targets_C, normalizers_C = (tensor.contiguous() for tensor in chunk[:4])
        grad_CV, grad_hidden_CD = torch.empty_like(logits_CV), torch.empty_like(hidden_CD)
        sources = (grad_C.contiguous(), logits_CV, targets_C, normalizers_C, chunk.temperatures_C)
        library("logprob_rows_backward", *sources, grad_CV, *logits_CV.shape)
        sizes = (*logits_CV.shape, hidden_CD.shape[1])
        library("linear_grad_w", library.units, grad_CV, hidden_CD, grad_VD, *sizes, 1)
        library("linear_grad_x", library.units, grad_CV, self.weight_VD, grad_hidden_CD, *sizes)
        return grad_hidden_CD


def _head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, *, library: Library | None) -> _Head:
    native_library = usable(library, hidden_ND)
    return _NativeHead(weight_VD, native_library) if native_library else _TorchHead(hidden_ND, weight_VD)


class _ChunkedLogprobs(torch.autograd.Function):
    """The backward pass recomputes the logits, unless the micro-batch has so few that they were kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        temperatures_N: torch.Tensor | None,
        library: Library | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _head(hidden_ND, weight_VD, library=library)
        logits_shape = (len(targets_N), len(weight_VD))
        keeps = ctx.needs_input_grad[0] and len(targets_N) * len(weight_VD) <= _KEPT_ELEMENTS
        whole = Read(*(hidden_ND.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3)))
        stored_logits = []
        for chunk in _chunks(*logits_shape, elements=head.chunk_elements):
            logits_CV = head.logits(hidden_ND[chunk])
            if keeps:
                stored_logits.append(logits_CV)
            read = head.read(logits_CV, targets_N[chunk], temperatures_C=_part(temperatures_N, chunk))
            for column_N, column_C in zip(whole, read, strict=True):
                column_N[chunk] = column_C
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, whole.normalizers_C, temperatures_N, *stored_logits)
        ctx.library = library
        ctx.mark_non_differentiable(whole.entropies_C)
        return whole.logprobs_C, whole.entropies_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_ND, weight_VD, targets_N, normalizers_N, temperatures_N, *stored_logits = ctx.saved_tensors
        head = _head(hidden_ND, weight_VD, library=ctx.library)
        grad_hidden_ND, grad_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        chunks = _chunks(len(targets_N), len(weight_VD), elements=head.chunk_elements)
        for index, rows in enumerate(chunks):
            hidden_CD = hidden_ND[rows]
            logits_CV = stored_logits[index] if stored_logits else head.logits(hidden_CD)
            temperatures_C = _part(temperatures_N, rows)
            chunk = _Chunk(hidden_CD, logits_CV, targets_N[rows], normalizers_N[rows], temperatures_C)
            grad_hidden_ND[rows] = head.backward(grads[0][rows], chunk, grad_VD=grad_VD)
        return grad_hidden_ND, grad_VD.to(weight_VD.dtype), None, None, None


def _part(temperatures_N: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if temperatures_N is None else temperatures_N[rows].contiguous()


def _chunks(num_rows: int, vocab_size: int, *, elements: int) -> list[slice]:
    """Return slices of rows whose logits have about `elements` elements."""
    size = max(64, elements // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
