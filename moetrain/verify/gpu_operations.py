"""Operations that have a path of their own on GPUs, compared with float64 or float32 on the CPU.

Bounds of results in bfloat16 are for the norm of the error over the norm of the result. A number is rounded by at most
2^-9 of its size; a result is the last of two or three roundings, a gradient of about twice as many.

B rows, H heads, T tokens, Q query-key width, V value width, N tokens, K chosen experts, S sorted rows, D hidden,
E experts, F expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from moetrain.inference.experts import sums_by_loop
from moetrain.inference.weights import PackedInt4, packed
from moetrain.kernels.gpu import int4
from moetrain.ops.experts import expert_grouped, expert_loop
from moetrain.ops.flash_attention import FlashKernel, attend_flash, plan_runs
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import Quantized, dequantize, quantize
from moetrain.runtime import torch_stream
from moetrain.verify.table import Row

_OUTPUT, _GRADIENT = 2.0**-7, 2.0**-6
"""Bounds of an output and of a gradient in bfloat16."""
_GROUP = 32
_DOCUMENTS = ((1, 63, 200), (24, 240))
"""Tokens of the documents of each row."""
_HEADS = 4
_WIDTHS = ((192, 128), (64, 64), (100, 36))
"""Query-key and value widths per head: of Kimi K2, of a small model, and of one whose heads are padded."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm, computed on the CPU."""
    difference = found.detach().cpu().double() - expected.detach().cpu().double()
    return float(difference.norm() / expected.detach().cpu().double().norm())


def _drawn(*shape: int, name: str) -> torch.Tensor:
    """Return bfloat16 numbers from a normal distribution."""
    return torch.randn(shape, generator=torch_stream(0, f"verify/gpu/{name}")).bfloat16()


def flash_rows(device: torch.device, *, kernel: FlashKernel | None = None) -> Iterator[Row]:
    """Yield the errors of attention over packed documents, forward and backward.

    kernel: None takes torch's, which requires a GPU.
    """
    rows = [[place + 1 for place, size in enumerate(sizes) for _ in range(size)] for sizes in _DOCUMENTS]
    segments_BT = torch.tensor(rows)
    for query_width, value_width in _WIDTHS:
        shapes = {"q": query_width, "k": query_width, "v": value_width}
        drawn = [_drawn(*segments_BT.shape, _HEADS, width, name=name) for name, width in shapes.items()]
        heads = [x_BTHX.transpose(1, 2) for x_BTHX in drawn]
        grad = _drawn(len(rows), _HEADS, segments_BT.shape[1], value_width, name="gradient")
        fast = partial(_flash, segments_BT=segments_BT, kernel=kernel)
        plain = partial(_masked, segments_BT=segments_BT)
        name = f"widths {query_width} and {value_width}"
        yield from _compared(name, fast, plain, inputs=heads, grad=grad, device=device)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segments_BT: torch.Tensor, kernel: FlashKernel | None
) -> torch.Tensor:
    runs = plan_runs(segments_BT.to(q.device))
    return attend_flash(q, k, v_BHTV=v, runs=runs, scale=q.shape[-1] ** -0.5, kernel=kernel)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segments_BT: torch.Tensor) -> torch.Tensor:
    is_same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=is_same.tril(), scale=q.shape[-1] ** -0.5)


def _compared(
    name: str,
    fast: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    *,
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    device: torch.device,
) -> Iterator[Row]:
    """Yield the errors of `fast` in bfloat16 on `device` beside `plain` in float64 on the CPU: output and gradients."""
    results = []
    for function, place, dtype in ((fast, device, torch.bfloat16), (plain, torch.device("cpu"), torch.float64)):
        leaves = [x.to(place, dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append((out, torch.autograd.grad(out, leaves, grad.to(place, dtype))))
    (found, found_grads), (expected, expected_grads) = results
    yield Row(name=f"{name}, output", value=relative_error(found, expected), bound=_OUTPUT, note="relative to float64")
    worst = max(map(relative_error, found_grads, expected_grads))
    yield Row(name=f"{name}, gradients", value=worst, bound=_GRADIENT, note="relative to float64; the worst of 3")


def grouped_rows(device: torch.device) -> Iterator[Row]:
    """Yield the errors of the experts' grouped products, forward and backward."""
    for counts in ((5, 0, 64, 131), (0, 0, 0, 200), (63, 65, 1, 71)):
        num, hidden, width = len(counts), 256, 128
        inputs = [
            _drawn(sum(counts), hidden, name="rows"),
            _drawn(num, 2 * width, hidden, name="gate_up") * hidden**-0.5,
            _drawn(num, hidden, width, name="down") * width**-0.5,
        ]

        grad = _drawn(sum(counts), hidden, name="gradient")
        fast, plain = (partial(_experts, product, counts=counts) for product in (expert_grouped, expert_loop))
        yield from _compared(f"rows {counts}", fast, plain, inputs=inputs, grad=grad, device=device)


def _experts(
    product: Callable[..., torch.Tensor],
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    counts: tuple[int, ...],
) -> torch.Tensor:
    return product(x, torch.tensor(counts, device=x.device), gate_up_LGD=gate_up, down_LDF=down)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Shape of a layer of experts, and the numbers of tokens to compute it with."""

    num: int = 32
    chosen: int = 4
    hidden: int = 512
    width: int = 1024
    tokens: tuple[int, ...] = (1, 16, 700)


def int4_rows(device: torch.device, *, shape: Experts | None = None) -> Iterator[Row]:
    """Yield the errors of the Triton kernels for INT4 experts, and the bits that depend on the other rows of a batch.

    On a CPU it requires Triton's interpreter.
    """
    shape = shape or Experts()
    yield _all_products(device)
    gate_up, down = _quantized(shape)
    small = [_on(weight, device) for weight in (gate_up, down)]
    count = gate_up.codes_XOI.numel() + down.codes_XOI.numel()
    size = sum(weight.words.nbytes + weight.scales.nbytes for weight in small)
    yield Row(name="bits per weight", value=8 * size / count, bound=4.5)
    most = max(shape.tokens)
    x_ND = _drawn(most, shape.hidden, name="tokens")
    scores_NE = torch.rand(most, shape.num, generator=torch_stream(0, "verify/gpu/router"))
    weights_NK, ids_NK = scores_NE.topk(shape.chosen)

    def sums(tokens: slice, *, rows_per_tile: int | None = None) -> torch.Tensor:
        drawn = (x_ND[tokens].to(device), ids_NK[tokens].to(device))
        weights = weights_NK[tokens].to(device)
        found = int4.expert_sums(
            *drawn, weights_NK=weights, gate_up=small[0], down=small[1], rows_per_tile=rows_per_tile
        )
        return found.cpu()

    every = sums(slice(None))
    exact = sums_by_loop(x_ND.float(), ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
    yield Row(name=f"{most} tokens", value=relative_error(every, exact), bound=_OUTPUT, note="relative to float32")
    for tile in (16, 64):
        different = (sums(slice(None), rows_per_tile=tile) != every).sum()
        yield Row(name=f"numbers that differ with {tile} rows per tile", value=float(different), bound=0)
    for num in shape.tokens[:-1]:
        different = (sums(slice(num)) != every[:num]).sum()
        yield Row(name=f"numbers that differ for {num} tokens alone", value=float(different), bound=0)


def _quantized(shape: Experts) -> tuple[Quantized, Quantized]:
    weights = (
        _drawn(shape.num, 2 * shape.width, shape.hidden, name="gate_up") * shape.hidden**-0.5,
        _drawn(shape.num, shape.hidden, shape.width, name="down") * shape.width**-0.5,
    )
    gate_up, down = (quantize(weight, grid=QuantConfig().grid, group_size=_GROUP) for weight in weights)
    return gate_up, down


def _on(weight: Quantized, device: torch.device) -> int4.Codes:
    small = packed(weight)
    assert isinstance(small, PackedInt4)
    return int4.Codes(words=small.words_XOW.to(device), scales=small.scales_XOG.to(device))


def _all_products(device: torch.device) -> Row:
    """Count the codes and scales that are multiplied otherwise than in training.

    The scales of 128 outputs have all mantissas of bfloat16, and each of 16 experts has one code. The experts' hidden
    vector is 1 in input 0 and 0 elsewhere: gate is 64 there, where silu is the identity in float32, and up is 1 / 64.
    """
    scales = (torch.arange(128, dtype=torch.float32) / 128 + 1).bfloat16()
    codes = torch.arange(-8, 8, dtype=torch.int8)[:, None, None].expand(16, 128, _GROUP).contiguous()
    down = Quantized(codes_XOI=codes, scales_XOG=scales[None, :, None].expand(16, 128, 1).contiguous())
    gate_up = Quantized(
        codes_XOI=torch.zeros(16, 2 * _GROUP, 128, dtype=torch.int8),
        scales_XOG=torch.ones(16, 2 * _GROUP, 128 // _GROUP, dtype=torch.bfloat16),
    )
    gate_up.codes_XOI[:, 0, 0] = 1
    gate_up.codes_XOI[:, _GROUP, 1] = 1
    x_ND = torch.zeros(16, 128, dtype=torch.bfloat16)
    x_ND[:, 0], x_ND[:, 1] = 64, 2**-6
    found = int4.expert_sums(
        x_ND.to(device),
        torch.arange(16, device=device)[:, None],
        weights_NK=torch.ones(16, 1, device=device),
        gate_up=_on(gate_up, device),
        down=_on(down, device),
    )
    different = (found.cpu() != dequantize(down)[:, :, 0]).sum()
    return Row(name="products that differ from training", value=float(different), bound=0, note="of 16 codes x 128")
