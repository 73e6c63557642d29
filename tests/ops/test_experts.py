"""The ways in which experts are computed and combined give the same numbers."""

from collections.abc import Callable

import pytest
import torch

from moetrain.ops.combine import combine, combine_plain
from moetrain.ops.experts import expert_grouped, expert_loop, expert_manual_backward, expert_rows
from tests.threads import num_threads

Products = Callable[..., torch.Tensor]
COUNTS = [[5, 0, 64, 131], [0, 0, 0, 200], [200, 0, 0, 0], [63, 65, 1, 71]]


def gradients(products: Products, counts: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return output and gradients of rows and weights."""
    stream = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=stream).to(dtype)

    x_SD, gate_up_LGD, down_LDF = draw(200, 32), draw(4, 48, 32) * 0.2, draw(4, 32, 24) * 0.2
    inputs = [tensor.requires_grad_() for tensor in (x_SD, gate_up_LGD, down_LDF)]
    y_SD = products(x_SD, torch.tensor(counts), gate_up_LGD=gate_up_LGD, down_LDF=down_LDF)
    return [y_SD.detach(), *torch.autograd.grad(y_SD, inputs, draw(200, 32))]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_out_experts_equal_the_loop_bit_for_bit(counts: list[int], dtype: torch.dtype) -> None:
    loop, written_out = gradients(expert_loop, counts, dtype), gradients(expert_manual_backward, counts, dtype)
    for expected, found in zip(loop, written_out, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("counts", [*COUNTS, [1, 0, 136, 63], [136, 1, 0, 63]])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_share_the_experts_give_the_bits_of_one(counts: list[int], threads: int) -> None:
    """Also where the padding of an expert reaches over the rows of another thread."""
    with num_threads(1):
        alone = gradients(expert_manual_backward, counts, torch.bfloat16)
    with num_threads(threads):
        shared = gradients(expert_manual_backward, counts, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))


@pytest.mark.parametrize("counts", COUNTS)
def test_the_grouped_products_of_gpus_equal_the_loop_but_for_rounding(counts: list[int]) -> None:
    loop, grouped = (gradients(products, counts, torch.bfloat16) for products in (expert_loop, expert_grouped))
    for expected, found in zip(loop, grouped, strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < 1e-2  # bf16 has 8 bits


def test_experts_equal_the_formula() -> None:
    x_SD = torch.randn(6, 8, dtype=torch.float64)
    gate_up_LGD, down_LDF = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    y_SD = expert_rows(x_SD, torch.tensor([2, 4]), gate_up_LGD=gate_up_LGD, down_LDF=down_LDF, library=None)
    for row, expert in enumerate([0, 0, 1, 1, 1, 1]):
        gate, up = gate_up_LGD[expert, :3] @ x_SD[row], gate_up_LGD[expert, 3:] @ x_SD[row]
        torch.testing.assert_close(y_SD[row], down_LDF[expert] @ (gate / (1 + torch.exp(-gate)) * up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combining_in_slices_equals_combining_at_once_bit_for_bit(dtype: torch.dtype) -> None:
    stream = torch.Generator().manual_seed(0)
    y_SD = torch.randn(3000 * 4, 64, generator=stream).to(dtype).requires_grad_()
    weights_NK = torch.rand(3000, 4, generator=stream).requires_grad_()
    order_S = torch.randperm(3000 * 4, generator=stream)
    grad_ND = torch.randn(3000, 64, generator=stream).to(dtype)
    plain_ND = combine_plain(y_SD, order_S.argsort(), weights_NK=weights_NK)
    sliced_ND = combine(y_SD, order_S, weights_NK=weights_NK, library=None)
    assert torch.equal(sliced_ND, plain_ND)
    expected = torch.autograd.grad(plain_ND, [y_SD, weights_NK], grad_ND)
    found = torch.autograd.grad(sliced_ND, [y_SD, weights_NK], grad_ND)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
