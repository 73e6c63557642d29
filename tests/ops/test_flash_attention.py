"""What the flash kernel is handed. The kernel itself needs a GPU: here torch's own attention stands in, run by run."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from moetrain.model import attention
from moetrain.model.attention import Attention, plan_attention
from moetrain.model.rope import build_rope
from moetrain.ops.flash_attention import Runs, attend_flash, plan_runs, supports_flash
from moetrain.runtime import torch_stream
from tests.model.test_attention import SCALE, packed_segments, random_heads, slow_attention
from tests.ops.test_max_logits import small_model


def by_run(q_PHQ, k_PHQ, v_PHQ, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size):
    """Take what `varlen_attn` takes, and return what its documentation says, on a CPU."""
    assert window_size == (-1, 0)  # causal
    assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
    assert longest_q == longest_k == int(bounds_q.diff().max())
    assert q_PHQ.shape == k_PHQ.shape == v_PHQ.shape and q_PHQ.shape[-1] % 8 == 0  # the kernel takes one width
    sizes = bounds_q.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in run), is_causal=True, scale=scale).transpose(0, 1)
        for run in zip(*(torch.split(x_PHQ, sizes) for x_PHQ in (q_PHQ, k_PHQ, v_PHQ)), strict=True)
    ]
    return torch.cat(outputs)


@pytest.mark.parametrize(("num_tokens", "value_width"), [(1, 8), (70, 8), (70, 20)])
def test_flash_attention_equals_a_loop_over_queries_forward_and_backward(num_tokens: int, value_width: int) -> None:
    segments_BT = packed_segments(num_tokens)
    q, k, _ = random_heads(num_tokens, torch.float64)
    values = torch.randn(4, 2, num_tokens, value_width, generator=torch_stream(0, "values"), dtype=torch.float64)
    heads = q, k, v = q, k, values.requires_grad_()
    reference = slow_attention(q, k, v, segments_BT)
    upstream = torch.randn(reference.shape, generator=torch_stream(0, "upstream"), dtype=torch.float64)
    out = attend_flash(q, k, v_BHTV=v, runs=plan_runs(segments_BT), scale=SCALE, kernel=by_run)
    torch.testing.assert_close(out, reference)
    expected = torch.autograd.grad(reference, heads, upstream)
    torch.testing.assert_close(torch.autograd.grad(out, heads, upstream), expected)


def test_runs_of_two_rows_do_not_touch() -> None:
    runs = plan_runs(torch.tensor([[1, 1, 2, 0], [0, 3, 3, 3]]))
    assert runs.bounds.tolist() == [0, 2, 3, 4, 5, 8]
    assert runs.longest == 3


def test_a_layer_on_the_flash_path_gives_what_it_gives_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    segments_BT = packed_segments(40)
    layer = Attention(small_model())
    for name, parameter in layer.named_parameters():
        parameter.data.normal_(std=0.3, generator=torch_stream(0, name))
    x_BTD = torch.randn(4, 40, 32, generator=torch_stream(0, "x"))
    rotation = build_rope(small_model(), 40).at(torch.arange(40).expand(4, 40))
    masks = [plan_attention(segments_BT, torch.float32, width=12, library=None)]
    monkeypatch.setattr(attention, "supports_flash", lambda *where, width: True)
    monkeypatch.setattr(attention, "attend_flash", partial(attend_flash, kernel=by_run))
    masks.append(plan_attention(segments_BT, torch.float32, width=12, library=None))
    assert isinstance(masks[1], Runs)
    (tiled, of_tiles), (flash, of_flash) = (
        layer(x_BTD, rotation=rotation, mask=mask, measured_BT=segments_BT > 0) for mask in masks
    )
    torch.testing.assert_close(flash, tiled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(of_flash, of_tiles, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "width", "taken"),
    [
        ("cuda", (9, 0), torch.bfloat16, 192, True),
        ("cuda", (8, 0), torch.bfloat16, 100, True),
        ("cuda", (7, 5), torch.bfloat16, 192, False),
        ("cuda", (9, 0), torch.float32, 192, False),
        ("cuda", (9, 0), torch.bfloat16, 320, False),
        ("cpu", (9, 0), torch.bfloat16, 192, False),
    ],
)
def test_the_kernel_is_chosen_by_device_dtype_and_width(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert supports_flash(torch.device(device), dtype, width=width) is taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_itself_gives_what_stands_in_for_it_here() -> None:
    bounds = plan_runs(packed_segments(70)).bounds.cuda()
    heads = [torch.randn(280, 2, 64, generator=torch_stream(0, name)).cuda().bfloat16() for name in "qkv"]
    taken = (*heads, bounds, bounds, 70, 70)
    out = varlen_attn(*taken, scale=SCALE, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, by_run(*taken, scale=SCALE, window_size=(-1, 0)), atol=2e-2, rtol=2e-2)
