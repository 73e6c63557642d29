"""Straight-through gradient, the cache, and switching quantisation on."""

from dataclasses import dataclass

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.quant.apply import apply
from moetrain.quant.config import GridName, QuantConfig
from moetrain.quant.fake_quant import FakeQuantizer, Keep
from moetrain.quant.grids import dequantize, quantize


@dataclass
class _Experts:
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    fake_quant: FakeQuantizer | None = None


def _master() -> torch.nn.Parameter:
    return torch.nn.Parameter(0.02 * torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)))


def _quantizer() -> FakeQuantizer:
    return FakeQuantizer(grid=GridName.kimi7, group_size=32)


def test_forward_is_the_dequantised_weight_and_float32_holds_the_same_numbers() -> None:
    master, quantizer = _master(), _quantizer()
    expected = dequantize(quantize(master, grid=GridName.kimi7, group_size=32))
    assert torch.equal(quantizer(master, torch.bfloat16), expected)
    assert torch.equal(quantizer(master, torch.float32), expected.float())
    assert not torch.equal(expected.float(), master)


def test_gradient_reaches_the_fp32_master_unchanged() -> None:
    master, quantizer = _master(), _quantizer()
    upstream = torch.randn(2, 8, 64)
    quantizer(master, torch.float32).backward(upstream)
    assert master.grad is not None
    assert torch.equal(master.grad, upstream)
    master.grad = None
    quantizer(master, torch.bfloat16).backward(upstream.bfloat16())
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad, upstream.bfloat16().float())


def test_gradients_of_two_uses_of_one_weight_add_up() -> None:
    master, quantizer = _master(), _quantizer()
    (quantizer(master, torch.float32).sum() + 2 * quantizer(master, torch.float32).sum()).backward()
    assert master.grad is not None
    assert torch.equal(master.grad, torch.full_like(master, 3.0))


def test_weights_are_made_once_until_invalidated_even_when_torch_does_not_see_the_change() -> None:
    master, quantizer = _master(), _quantizer()
    before = quantizer(master, torch.bfloat16)
    assert quantizer(master, torch.bfloat16).data_ptr() == before.data_ptr()
    master.data.mul_(2)  # as an optimizer that writes through .data
    assert torch.equal(quantizer(master, torch.bfloat16), before)
    quantizer.invalidate()
    assert torch.equal(quantizer(master, torch.bfloat16), 2 * before)


def test_weights_made_for_one_call_are_not_kept() -> None:
    master = _master()
    quantizer = FakeQuantizer(grid=GridName.kimi7, group_size=32, keep=Keep.call)
    before = quantizer(master, torch.bfloat16)
    master.data.mul_(2)
    assert torch.equal(quantizer(master, torch.bfloat16), 2 * before)


def test_a_change_that_torch_records_is_noticed_without_invalidate() -> None:
    master, quantizer = _master(), _quantizer()
    before = quantizer(master, torch.bfloat16)
    with torch.no_grad():
        master.mul_(2)
    assert torch.equal(quantizer(master, torch.bfloat16), 2 * before)


def test_two_matrices_of_one_module_do_not_share_what_was_made() -> None:
    quantizer, first = _quantizer(), _master()
    second = torch.nn.Parameter(-first.detach())
    assert torch.equal(quantizer(first, torch.bfloat16), -quantizer(second, torch.bfloat16))


def test_apply_attaches_one_quantiser_a_module_and_removes_it_when_off() -> None:
    modules = [_Experts(torch.zeros(2, 8, 64), torch.zeros(2, 64, 32)) for _ in range(2)]
    attached = apply(modules, QuantConfig(enabled=True))
    assert [module.fake_quant for module in modules] == attached
    assert attached[0] is not attached[1]
    assert apply(modules, QuantConfig(enabled=False)) == []
    assert all(module.fake_quant is None for module in modules)


def test_apply_refuses_a_model_without_experts_and_groups_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="no routed experts"):
        apply([], QuantConfig(enabled=True))
    module = _Experts(torch.zeros(2, 8, 64), torch.zeros(2, 64, 48))
    with pytest.raises(ConfigError, match="48 inputs"):
        apply([module], QuantConfig(enabled=True))
    assert module.fake_quant is None
