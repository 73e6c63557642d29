"""Attention paths against a reference that loops over queries."""

import pytest
import torch

from moetrain.model import attention
from moetrain.model.attention import FusedMask, attend_fused, plan_attention
from moetrain.ops.tiled_attention import TILE, attend_tiled, plan_tiles
from tests.threads import num_threads

SCALE = 0.3


def packed_segments(num_tokens: int) -> torch.Tensor:
    """Rows of one document, of three, of many short ones with padding at the end, and of padding only."""
    rows = torch.zeros(4, num_tokens, dtype=torch.int64)
    rows[0] = 1
    rows[1] = 1 + torch.arange(num_tokens) * 3 // num_tokens
    rows[2] = 1 + torch.arange(num_tokens) // 7
    rows[2, -num_tokens // 4 :] = 0
    return rows


def slow_attention(q, k, v, segments_BT):
    out = torch.zeros_like(v)
    for row in range(q.shape[0]):
        for query in range(q.shape[2]):
            seen = (segments_BT[row, : query + 1] == segments_BT[row, query]).nonzero()[:, 0]
            weights = (SCALE * torch.einsum("hq,htq->ht", q[row, :, query], k[row, :, seen])).softmax(-1)
            out[row, :, query] = torch.einsum("ht,htv->hv", weights, v[row, :, seen])
    return out


def random_heads(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    shapes = [(4, 2, num_tokens, 12), (4, 2, num_tokens, 12), (4, 2, num_tokens, 8)]
    return [torch.randn(shape, generator=stream, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("num_tokens", [1, 70, TILE, 2 * TILE + 20])
def test_tiled_and_fused_attention_equal_a_loop_over_queries_forward_and_backward(num_tokens: int) -> None:
    segments_BT = packed_segments(num_tokens)
    heads = random_heads(num_tokens, torch.float64)
    q, k, v = heads
    reference = slow_attention(q, k, v, segments_BT)
    upstream = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(reference, heads, upstream)

    tiled, _ = attend_tiled(q, k, v_BHTV=v, tiles=plan_tiles(segments_BT, torch.float64), scale=SCALE)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    fused = attend_fused(
        q, k, v_BHTV=v, mask=FusedMask(seen_B1TT=same.tril()[:, None], segments_BT=segments_BT), scale=SCALE
    )
    for out in (tiled, fused):
        torch.testing.assert_close(out, reference)
        # The tiles add up gradients of keys and values in float32.
        torch.testing.assert_close(torch.autograd.grad(out, heads, upstream), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_that_share_the_heads_give_the_bits_of_one(threads: int) -> None:
    segments_BT = packed_segments(2 * TILE + 20)
    heads = random_heads(segments_BT.shape[1], torch.bfloat16)
    grad = torch.randn(heads[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)

    def outputs() -> list[torch.Tensor]:
        q, k, v = (tensor.detach().clone().requires_grad_() for tensor in heads)
        tiles = plan_tiles(segments_BT, torch.bfloat16)
        out, largest = attend_tiled(q, k, v_BHTV=v, tiles=tiles, scale=SCALE, measured_BT=segments_BT > 0)
        assert largest is not None
        return [out.detach(), largest, *torch.autograd.grad(out, [q, k, v], grad)]

    with num_threads(1):
        alone = outputs()
    with num_threads(threads):
        shared = outputs()
    assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))


def test_long_rows_take_the_fused_kernel_and_short_rows_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    segments_BT = packed_segments(40)
    assert isinstance(plan_attention(segments_BT, torch.float32, width=12, library=None), list)
    monkeypatch.setattr(attention, "TILED_MAX_TOKENS", 32)
    mask = plan_attention(segments_BT, torch.float32, width=12, library=None)
    assert isinstance(mask, FusedMask)
    q, k, v = random_heads(40, torch.float32)
    tiled, _ = attend_tiled(q, k, v_BHTV=v, tiles=plan_tiles(segments_BT, torch.float32), scale=SCALE)
    torch.testing.assert_close(attend_fused(q, k, v_BHTV=v, mask=mask, scale=SCALE), tiled, atol=1e-6, rtol=1e-5)


def test_rows_on_another_device_than_the_cpu_take_the_fused_kernel() -> None:
    mask = plan_attention(torch.ones(2, 40, dtype=torch.int64, device="meta"), torch.bfloat16, width=12, library=None)
    assert isinstance(mask, FusedMask)
    assert mask.seen_B1TT.shape == (2, 1, 40, 40)


def test_a_tile_leaves_out_keys_of_documents_that_ended_before_it() -> None:
    segments_BT = torch.ones(2, 4 * TILE, dtype=torch.int64)
    segments_BT[:, 2 * TILE + 3 :] = 2
    assert [tile.first_key for tile in plan_tiles(segments_BT, torch.float32)] == [0, 0, 0, 2 * TILE]
