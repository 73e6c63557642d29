"""AdamW against torch's own."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.optim.adamw import _SLICE_ELEMENTS, adamw_update
from moetrain.runtime import torch_stream


def test_steps_equal_those_of_torch() -> None:
    stream = torch_stream(0, "test")
    reference = torch.nn.Parameter(torch.randn(50, generator=stream))
    ours = reference.detach().clone()
    exp_avg, exp_avg_sq = torch.zeros(50), torch.zeros(50)
    optimizer = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.randn(50, generator=stream)
        reference.grad = grad.clone()
        optimizer.step()
        adamw_update(
            ours,
            grad,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            step=step,
            learning_rate=0.01,
            betas=[0.9, 0.95],
            eps=1e-8,
            weight_decay=0.1,
        )
    torch.testing.assert_close(ours, reference.detach(), atol=1e-7, rtol=1e-6)


def test_a_gradient_of_zero_only_decays_the_weight() -> None:
    param = torch.full((3,), 2.0)
    adamw_update(
        param,
        torch.zeros(3),
        exp_avg=torch.zeros(3),
        exp_avg_sq=torch.zeros(3),
        step=1,
        learning_rate=0.1,
        betas=[0.9, 0.95],
        eps=1e-8,
        weight_decay=0.5,
    )
    torch.testing.assert_close(param, torch.full((3,), 2.0 * (1 - 0.05)))


def test_a_large_tensor_is_stepped_in_slices_as_each_of_them_alone() -> None:
    stream = torch_stream(0, "test")
    size = 2 * _SLICE_ELEMENTS + 1000
    tensors = torch.randn(3, size, generator=stream), torch.rand(size, generator=stream)
    param, grad, exp_avg, exp_avg_sq = *tensors[0], tensors[1]
    settings = {"step": 3, "learning_rate": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    alone = []
    for part in (slice(0, _SLICE_ELEMENTS), slice(_SLICE_ELEMENTS, 2 * _SLICE_ELEMENTS), slice(size - 1000, size)):
        p, g, m, v = (tensor[part].clone() for tensor in (param, grad, exp_avg, exp_avg_sq))
        adamw_update(p, g, exp_avg=m, exp_avg_sq=v, **settings)
        alone.append(torch.stack([p, m, v]))
    adamw_update(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **settings)
    assert torch.equal(torch.stack([param, exp_avg, exp_avg_sq]), torch.cat(alone, 1))


class _Counted(TorchDispatchMode):
    """Counts the calls of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_lerps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_lerps += func is torch.ops.aten.lerp_.Scalar
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "num_slices"), [("cpu", 3), ("meta", 1)])
def test_only_a_cpu_steps_in_slices(device: str, num_slices: int) -> None:
    param, grad, exp_avg, exp_avg_sq = torch.zeros(4, 2 * _SLICE_ELEMENTS + 1000, device=device)
    settings = {"step": 3, "learning_rate": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    with _Counted() as counted:
        adamw_update(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **settings)
    assert counted.num_lerps == num_slices
