"""AdamW against torch's own."""

import torch

from moetrain.optim.adamw import adamw_update
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
