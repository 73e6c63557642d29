"""Multi-token prediction, against a slow reference that follows the paper token by token."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moetrain.data.batch import TokenBatch
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.model.flops import flops_per_token, num_parameters
from moetrain.model.mtp import Mtp
from moetrain.model.transformer import MtpBlock, Transformer, initialize
from moetrain.train.loss import GlobalCounts, language_model_objective, mtp_term, token_logprobs
from tests.train.toy import toy_batch, toy_model

WEIGHT = 0.7


def _config(num_mtp_layers: int) -> ModelConfig:
    return replace(toy_model(BalanceConfig(sequence_loss=0.0)), num_mtp_layers=num_mtp_layers, initializer_range=0.2)


def _model(num_mtp_layers: int = 2) -> Transformer:
    model = Transformer(_config(num_mtp_layers), compute_dtype=torch.float32)
    initialize(model, 3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def _counts(batch: TokenBatch) -> GlobalCounts:
    weight = float(batch.target_weights().double().sum())
    return GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=weight)


def _norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _reference(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    """Return the loss of eq. 24 and 25, one document after the other, with the block of a module as it is.

    A document of T tokens t_1 .. t_T: h_i of module 0 is what the head reads of the model at position i; module k joins
    h_i of module k - 1 and the embedding of t_(i + k) for i = 1 .. T - k, and predicts t_(i + k + 1).
    """
    total = torch.zeros(())
    weights_BT = batch.columns["weight"]
    eps, config = model.config.rms_norm_eps, model.config
    for row in range(len(batch.tokens_BT)):
        for segment in (1, 2):
            at = (batch.segments_BT[row] == segment).nonzero()[:, 0]
            tokens_T, mask_T, weights_T = batch.tokens_BT[row, at], batch.loss_mask_BT[row, at], weights_BT[row, at]
            ones = torch.ones(1, len(at), dtype=torch.int64)
            previous = model(tokens_T[None], segments_BT=ones, positions_BT=torch.arange(len(at))[None]).hidden_BTD
            for k in range(1, config.num_mtp_layers + 1):
                block = model.model.layers[config.num_layers + k - 1]
                assert isinstance(block, MtpBlock)
                count = len(at) - k
                embedded = model.model.embed_tokens.weight[tokens_T[k:]]
                joined = torch.cat(
                    [_norm(embedded, block.enorm.weight, eps), _norm(previous[0, :count], block.hnorm.weight, eps)], -1
                )
                x_1TD = F.linear(joined, block.eh_proj.weight)[None]
                previous = _norm(_block(model, block, x_1TD), block.shared_head.norm.weight, eps)
                logprobs_TV = F.linear(previous[0], model.lm_head.weight).log_softmax(-1)
                for i in range(count - 1):
                    if mask_T[i + k + 1]:
                        total = total - weights_T[i + k + 1] * logprobs_TV[i, tokens_T[i + k + 1]]
    return WEIGHT / config.num_mtp_layers * total / _counts(batch).target_weight


def _block(model: Transformer, block: MtpBlock, x_1TD: torch.Tensor) -> torch.Tensor:
    """Return the block's output for one document, by a model that has this block alone and the input as embedding."""
    config = replace(model.config, num_layers=1, num_dense_layers=0, num_mtp_layers=0, vocab_size=x_1TD.shape[1])
    alone = Transformer(config, compute_dtype=torch.float32)
    alone.model.layers[0] = block
    alone.model.norm = torch.nn.Identity()  # type: ignore[assignment]
    del alone.model.embed_tokens.weight
    alone.model.embed_tokens.weight = x_1TD[0]  # type: ignore[assignment]
    tokens = torch.arange(x_1TD.shape[1])[None]
    return alone(tokens, segments_BT=torch.ones_like(tokens), positions_BT=tokens).hidden_BTD


@pytest.mark.parametrize("num_mtp_layers", [1, 2])
def test_loss_and_gradients_are_those_of_the_paper(num_mtp_layers: int) -> None:
    model, batch = _model(num_mtp_layers), toy_batch(1)
    without = language_model_objective(_counts(batch), balance=model.config.balance, mtp_weight=1e-30)
    plain = without(model, batch).loss
    (plain + _reference(model, batch)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    result = language_model_objective(_counts(batch), balance=model.config.balance, mtp_weight=WEIGHT)(model, batch)
    result.loss.backward()
    torch.testing.assert_close(result.loss, plain + _reference(model, batch))
    torch.testing.assert_close(result.metrics["mtp_cross_entropy"], (_reference(model, batch) / WEIGHT).detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_models_own_outputs_do_not_depend_on_the_modules() -> None:
    batch = toy_batch(0)
    outputs = []
    for number in (0, 2):
        model = _model(number)
        outputs.append(
            model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, mtp=Mtp.joint)
        )
    assert torch.equal(outputs[0].hidden_BTD, outputs[1].hidden_BTD)
    assert len(outputs[1].mtp.hidden_BTD) == 2
    assert len(outputs[1].counts_LE) == len(outputs[0].counts_LE) + 2


def test_detached_modules_leave_the_rest_of_the_model_alone() -> None:
    model, batch = _model(), toy_batch(0)
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, mtp=Mtp.detached)
    predicted = token_logprobs(model, output.hidden_BTD, batch=batch, mtp=output.mtp)
    term = mtp_term(predicted, weight=1.0, weights_N=batch.target_weights(), divisor=1.0)
    assert isinstance(term.loss, torch.Tensor)
    term.loss.backward()
    modules = tuple(f"model.layers.{model.config.num_layers + index}." for index in range(2))
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has_gradient == name.startswith(modules), name


def test_tokens_without_a_later_token_in_their_document_are_not_routed() -> None:
    model, batch = _model(2), toy_batch(0)
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, mtp=Mtp.joint)
    tokens_L = output.counts_LE.sum(-1) // model.config.num_experts_per_token
    num_documents = 2 * len(batch.tokens_BT)
    assert tokens_L.tolist()[-3:] == [batch.num_tokens - k * num_documents for k in range(3)]


def test_parameters_and_flops_are_counted() -> None:
    config = _config(2)
    model = Transformer(config)
    counts = num_parameters(config)
    modules = tuple(f"model.layers.{config.num_layers + index}." for index in range(2))
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.mtp == sum(p.numel() for name, p in model.named_parameters() if name.startswith(modules))
    plain = replace(config, num_mtp_layers=0)
    assert counts.active == num_parameters(plain).active
    more = flops_per_token(config, 64) - flops_per_token(plain, 64)
    head, attention = (
        config.vocab_size * config.hidden_size,
        config.num_heads * (config.qk_head_dim + config.v_head_dim),
    )
    assert more == 6 * (counts.active_mtp + 2 * head) + 2 * 3 * attention * 2 * 32
