"""The largest attention logit of each head: whatever kernel attends, packing and padding included."""

import pytest
import torch

from moetrain.model import attention
from moetrain.model.attention import Attention, MaxLogits, plan_attention
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.model.rope import build_rope
from moetrain.model.transformer import Transformer, initialize
from moetrain.ops import max_logits
from moetrain.ops.tiled_attention import TILE, attend_tiled, plan_tiles
from moetrain.runtime import torch_stream
from tests.model.test_attention import SCALE, packed_segments, random_heads


def slow_max_logits(q: torch.Tensor, k: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
    """Loop over queries that are tokens and the keys that each sees."""
    largest = torch.full((q.shape[1],), float("-inf"), dtype=q.dtype)
    for row in range(q.shape[0]):
        for query in segments_BT[row].nonzero()[:, 0].tolist():
            seen = (segments_BT[row, : query + 1] == segments_BT[row, query]).nonzero()[:, 0]
            logits = SCALE * torch.einsum("hq,htq->ht", q[row, :, query], k[row, :, seen])
            largest = torch.maximum(largest, logits.amax(1))
    return largest


def loud_padding(k: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
    """Return keys that would give the largest logits of all, were padding counted or other documents seen."""
    return torch.where((segments_BT == 0)[:, None, :, None], 100.0, k.detach())


@pytest.mark.parametrize("num_tokens", [1, 70, TILE, 2 * TILE + 20])
def test_tiles_and_blocks_give_the_maximum_of_a_loop_over_queries(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(max_logits, "_KEYS", 96)
    segments_BT = packed_segments(num_tokens)
    q, k, v = random_heads(num_tokens, torch.float64)
    k = loud_padding(k, segments_BT)
    measured_BT = segments_BT > 0
    expected = slow_max_logits(q, k, segments_BT).float()
    tiles = plan_tiles(segments_BT, torch.float64)
    _, of_tiles = attend_tiled(q, k, v_BHTV=v, tiles=tiles, scale=SCALE, measured_BT=measured_BT)
    of_blocks = max_logits.max_logits(q, k, segments_BT=segments_BT, measured_BT=measured_BT, scale=SCALE)
    torch.testing.assert_close(of_tiles, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_blocks, expected, rtol=1e-6, atol=0)


def test_measuring_changes_neither_outputs_nor_gradients() -> None:
    segments_BT = packed_segments(TILE + 20)
    heads = random_heads(TILE + 20, torch.float32)
    q, k, v = heads
    tiles = plan_tiles(segments_BT, torch.float32)
    plain, nothing = attend_tiled(q, k, v_BHTV=v, tiles=tiles, scale=SCALE)
    measured, largest = attend_tiled(q, k, v_BHTV=v, tiles=tiles, scale=SCALE, measured_BT=segments_BT > 0)
    assert nothing is None
    assert largest is not None and not largest.requires_grad
    assert torch.equal(plain, measured)
    upstream = torch.randn(plain.shape, generator=torch_stream(0, "upstream"))
    for ours, theirs in zip(
        torch.autograd.grad(measured, heads, upstream), torch.autograd.grad(plain, heads, upstream), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_batch_of_padding_alone_has_no_largest_logit() -> None:
    segments_BT = torch.zeros(4, 40, dtype=torch.int64)
    q, k, v = random_heads(40, torch.float32)
    tiles = plan_tiles(segments_BT, torch.float32)
    _, largest = attend_tiled(q, k, v_BHTV=v, tiles=tiles, scale=SCALE, measured_BT=segments_BT > 0)
    assert largest is not None
    assert largest.tolist() == [float("-inf")] * 2


def small_model(*, factor: float = 1.0) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        q_lora_rank=12,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_experts=4,
        initializer_range=0.3,
        yarn=YarnConfig(factor=factor),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_reports_the_same_on_both_paths_and_nothing_when_it_is_not_asked(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(small_model(), compute_dtype=dtype)
    initialize(model, seed=3)
    segments_BT = packed_segments(70)
    tokens_BT = torch.randint(0, 50, segments_BT.shape, generator=torch_stream(0, "tokens"))
    columns = {"segments_BT": segments_BT, "positions_BT": torch.arange(70).expand(4, 70)}
    assert model(tokens_BT, **columns).max_logits_AH is None
    tiled = model(tokens_BT, **columns, max_logits=MaxLogits.measured).max_logits_AH
    monkeypatch.setattr(attention, "TILED_MAX_TOKENS", 8)
    fused = model(tokens_BT, **columns, max_logits=MaxLogits.measured).max_logits_AH
    assert tiled.shape == (2, 2)
    assert tiled.dtype == torch.float32
    rounding = 1e-5 if dtype == torch.float32 else 2**-6  # a layer's inputs are rounded on the way
    torch.testing.assert_close(fused, tiled, rtol=rounding, atol=0)


def test_yarns_scale_is_part_of_the_logit() -> None:
    """K2's factor 32 multiplies the softmax scale by 1.8133; everything else is the same here."""
    segments_BT = packed_segments(20)
    x_BTD = torch.randn(4, 20, 32, generator=torch_stream(0, "x"))
    positions_BT = torch.arange(20).expand(4, 20)
    rotation = build_rope(small_model(), 20).at(positions_BT)
    largest = []
    for factor in (1.0, 32.0):
        layer = Attention(small_model(factor=factor))
        for name, parameter in layer.named_parameters():
            parameter.data.normal_(std=0.3, generator=torch_stream(0, name))
        mask = plan_attention(segments_BT, torch.float32, width=12, library=None)
        _, max_logits_H = layer(x_BTD, rotation=rotation, mask=mask, measured_BT=segments_BT > 0)
        largest.append(max_logits_H)
    torch.testing.assert_close(largest[1], 1.8133 * largest[0], rtol=1e-4, atol=0)
