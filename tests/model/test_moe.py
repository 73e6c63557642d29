"""The Mixture-of-Experts layer against loops over tokens and documents."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moetrain.model.config import ModelConfig
from moetrain.model.moe import Documents, Experts, LocalDispatcher, MoE, sequence_balance_loss

CONFIG = ModelConfig(hidden_size=16, num_experts=6, num_experts_per_token=2, moe_intermediate_size=8)


def make(config: ModelConfig = CONFIG) -> MoE:
    layer = MoE(config, compute_dtype=torch.float32, dispatcher=LocalDispatcher(), expert_slice=slice(0, 6))
    stream = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=stream)
    return layer


def expert(experts: Experts, index: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[index] @ x).chunk(2)
    return experts.down_proj[index] @ (F.silu(gate) * up)


def test_the_layer_equals_a_loop_over_tokens_forward_and_backward() -> None:
    layer = make()
    x_BTD = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1))
    y_BTD, _ = layer(x_BTD, Documents.of(torch.ones(2, 50, dtype=torch.int64)))
    routing = layer.gate(x_BTD.flatten(0, 1))
    expected = layer.shared_experts(x_BTD.flatten(0, 1)).clone()
    for token, x in enumerate(x_BTD.flatten(0, 1)):
        for index, weight in zip(routing.expert_ids_NK[token], routing.weights_NK[token], strict=True):
            expected[token] = expected[token] + weight * expert(layer.experts, int(index), x)
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(y_BTD.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_experts_without_tokens_have_a_zero_gradient() -> None:
    layer = make()
    with torch.no_grad():
        layer.gate.e_score_correction_bias[:4] = -10.0
    y_BTD, statistics = layer(torch.randn(1, 9, 16), Documents.of(torch.ones(1, 9, dtype=torch.int64)))
    assert statistics.counts_E.tolist() == [0, 0, 0, 0, 9, 9]
    y_BTD.sum().backward()
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert weight.grad is not None
        assert weight.grad[:4].abs().max() == 0
        assert weight.grad[4:].abs().amin(dim=(1, 2)).max() > 0


def test_experts_take_no_rows_at_all_and_still_have_a_gradient() -> None:
    experts = make().experts
    y_SD = experts.compute(torch.zeros(0, 16), torch.zeros(6, dtype=torch.int64))
    assert y_SD.shape == (0, 16)
    y_SD.sum().backward()
    assert experts.gate_up_proj.grad is not None and experts.gate_up_proj.grad.abs().max() == 0


def test_the_balance_loss_equals_a_loop_over_documents() -> None:
    segments_BT = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    stream = torch.Generator().manual_seed(0)
    scores_NE = torch.rand(18, 6, generator=stream)
    normalized_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
    expert_ids_NK = scores_NE.topk(2).indices
    expected = 0.0
    for row, segment in ((0, 1), (0, 2), (1, 1), (1, 2)):
        tokens = [row * 6 + t for t in range(6) if segments_BT[row, t] == segment]
        for index in range(6):
            chosen = sum(index in expert_ids_NK[token] for token in tokens)
            share = 6 / (2 * len(tokens)) * chosen
            mean_score = sum(normalized_NE[token, index].item() for token in tokens) / len(tokens)
            expected += len(tokens) * share * mean_score
    got = sequence_balance_loss(normalized_NE, expert_ids_NK, documents=Documents.of(segments_BT))
    torch.testing.assert_close(got.item(), expected, rtol=1e-5, atol=0)


def test_an_even_router_has_a_balance_loss_of_one_a_token() -> None:
    expert_ids_NK = torch.tensor([[0, 1], [2, 3], [4, 5]])
    loss = sequence_balance_loss(
        torch.full((3, 6), 1 / 6), expert_ids_NK, documents=Documents.of(torch.ones(1, 3, dtype=torch.int64))
    )
    torch.testing.assert_close(loss.item(), 3.0)


def test_padding_is_left_out_of_the_statistics() -> None:
    layer = make()
    x_BTD = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    segments_BT = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0]])
    _, padded = layer(x_BTD, Documents.of(segments_BT))
    _, cut = layer(x_BTD[:, :5], Documents.of(segments_BT[:, :5]))
    assert padded.counts_E.tolist() == cut.counts_E.tolist()
    assert padded.counts_E.sum() == 5 * 2
    torch.testing.assert_close(padded.balance_loss, cut.balance_loss)
    torch.testing.assert_close(padded.entropy, cut.entropy)


def test_wider_shared_experts_are_one_wide_feed_forward_layer() -> None:
    layer = make(replace(CONFIG, num_shared_experts=3))
    assert layer.shared_experts.gate_proj.weight.shape == (24, 16)


def test_the_gate_chooses_what_its_weight_says() -> None:
    layer = make()
    x_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3] = 10 * x_ND[0]
        layer.gate.weight[5] = 5 * x_ND[0]
    assert sorted(layer.gate(x_ND[:1]).expert_ids_NK[0].tolist()) == [3, 5]


class CountingDispatcher(LocalDispatcher):
    """Counts the tokens that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens: list[int] = []

    def __call__(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        self.num_tokens.append(len(x_ND))
        return super().__call__(x_ND, expert_ids_NK, weights_NK, experts)


@pytest.mark.parametrize("num_padding", [0, 3, 8])
def test_padding_reaches_no_expert_and_changes_no_token(num_padding: int) -> None:
    """All of it has one embedding, so it would all go to the same experts."""
    layer = make()
    layer.dispatcher = dispatcher = CountingDispatcher()
    x_BTD = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept = 8 - num_padding
    segments_BT = torch.tensor([[1] * kept + [0] * num_padding])
    y_BTD, statistics = layer(x_BTD, Documents.of(segments_BT))
    assert dispatcher.num_tokens == [kept]
    assert int(statistics.counts_E.sum()) == 2 * kept
    (grad_BTD,) = torch.autograd.grad(y_BTD[:, :kept].sum(), x_BTD)
    assert not grad_BTD[:, kept:].any()
    if kept:
        alone_BTD, _ = layer(x_BTD[:, :kept], Documents.of(segments_BT[:, :kept]))
        torch.testing.assert_close(y_BTD[:, :kept], alone_BTD)
    torch.testing.assert_close(y_BTD[:, kept:], layer.shared_experts(x_BTD)[:, kept:])
