"""The plain layers against torch's own."""

import torch
from torch.nn import functional as F

from moetrain.model.layers import FeedForward, RMSNorm


def test_the_norm_equals_torchs_forward_and_backward() -> None:
    stream = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-3)
    torch.nn.init.uniform_(norm.weight, -1, 1, generator=stream)
    x_BTD = torch.randn(3, 5, 24, generator=stream).requires_grad_()
    upstream = torch.randn(3, 5, 24, generator=stream)
    expected = F.rms_norm(x_BTD, (24,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x_BTD), expected)
    ours = torch.autograd.grad(norm(x_BTD), [x_BTD, norm.weight], upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, [x_BTD, norm.weight], upstream))


def test_the_norm_of_bf16_is_rounded_once() -> None:
    norm = RMSNorm(256, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x_ND = torch.randn(7, 256).bfloat16()
    expected = F.rms_norm(x_ND.double(), (256,), norm.weight.double(), 1e-6).bfloat16()
    assert (norm(x_ND) != expected).float().mean() < 0.01  # fp32 arithmetic decides ties now and then


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(6, 10)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_ND = torch.randn(4, 6)
    gate, up = x_ND @ layer.gate_proj.weight.T, x_ND @ layer.up_proj.weight.T
    torch.testing.assert_close(layer(x_ND), (gate * gate.sigmoid() * up) @ layer.down_proj.weight.T)
