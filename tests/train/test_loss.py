"""Log-probabilities and the language-model objective, against slow references and against other packings."""

from dataclasses import replace

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.kernels.build import load
from moetrain.model.config import BalanceConfig
from moetrain.model.kernel_module import set_kernels
from moetrain.model.transformer import Transformer, initialize
from moetrain.ops import logprobs
from moetrain.parallel.protocol import ObjectiveResult
from moetrain.train.loss import GlobalCounts, language_model_objective, token_logprobs
from moetrain.train.rows import padded, rank_rows, split_rows
from tests.train.toy import one_document_per_row, toy_batch, toy_model


def _model(*, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(toy_model(), compute_dtype=compute_dtype)
    initialize(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # far from uniform
    return model


def _hidden(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    return model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT).hidden_BTD


def _naive_logprobs(
    model: Transformer, hidden_BTD: torch.Tensor, batch: TokenBatch, *, temperature: float = 1.0
) -> torch.Tensor:
    logprobs_BTV = torch.log_softmax(model.logits(hidden_BTD.flatten(0, 1)) / temperature, dim=-1).unflatten(
        0, batch.tokens_BT.shape
    )
    picked = [logprobs_BTV[b, t - 1, batch.tokens_BT[b, t]] for b, t in batch.loss_mask_BT.nonzero().tolist()]
    return torch.stack(picked)


def _counts(batch: TokenBatch) -> GlobalCounts:
    weight = float(batch.target_weights().double().sum())
    return GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=weight)


def _gradients(model: Transformer, batches: list[TokenBatch], counts: GlobalCounts) -> dict[str, torch.Tensor]:
    model.zero_grad()
    objective = language_model_objective(counts, balance=BalanceConfig(sequence_loss=0.1))
    results: list[ObjectiveResult] = []
    for batch in batches:
        results.append(objective(model, batch))
        results[-1].loss.backward()
    total = {"loss": torch.stack([result.loss.detach() for result in results]).sum()}
    return total | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("temperature", [None, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 20])
def test_logprobs_and_their_gradients_are_those_of_a_plain_log_softmax(
    chunk_elements: int, temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs._TorchHead, "chunk_elements", chunk_elements)
    model, batch = _model(), toy_batch(0, rows=8)
    hidden_BTD = _hidden(model, batch).detach().requires_grad_()
    head = model.lm_head.weight
    upstream_N = torch.randn(batch.num_targets)
    naive_N = _naive_logprobs(model, hidden_BTD, batch, temperature=temperature or 1.0)
    temperatures_N = None if temperature is None else torch.full((batch.num_targets,), temperature)
    expected = torch.autograd.grad((naive_N * upstream_N).sum(), (hidden_BTD, head))
    found_N = token_logprobs(model, hidden_BTD, batch=batch, temperatures_N=temperatures_N).logprobs_N
    found = torch.autograd.grad((found_N * upstream_N).sum(), (hidden_BTD, head))
    torch.testing.assert_close(found_N, naive_N)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_temperatures", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 22])
@pytest.mark.parametrize("kept_elements", [0, 1 << 25])
def test_native_logprobs_and_gradients_are_those_of_torch_but_for_rounding(
    chunk_elements: int, kept_elements: int, has_temperatures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs._NativeHead, "chunk_elements", chunk_elements)
    monkeypatch.setattr(logprobs, "_KEPT_ELEMENTS", kept_elements)
    model, batch = _model(compute_dtype=torch.bfloat16), toy_batch(0, rows=8)
    hidden_BTD = _hidden(model, batch).detach().requires_grad_()
    head, upstream_N = model.lm_head.weight, torch.randn(batch.num_targets)
    temperatures_N = torch.linspace(0.5, 2, batch.num_targets) if has_temperatures else None
    results = []
    for library in (None, load()):
        set_kernels(model, library)
        read = token_logprobs(model, hidden_BTD, batch=batch, temperatures_N=temperatures_N)
        gradients = torch.autograd.grad((read.logprobs_N * upstream_N).sum(), (hidden_BTD, head))
        results.append([read.logprobs_N, read.entropies_N, *(gradient.float() for gradient in gradients)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_bf16_logits_are_those_of_the_model_and_the_softmax_is_in_float32() -> None:
    model, batch = _model(compute_dtype=torch.bfloat16), toy_batch(0)
    hidden_BTD = _hidden(model, batch)
    found_N = token_logprobs(model, hidden_BTD, batch=batch).logprobs_N
    assert hidden_BTD.dtype == torch.bfloat16
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N, _naive_logprobs(model, hidden_BTD, batch), rtol=1e-5, atol=1e-5)


def test_entropies_are_those_of_the_predicting_distributions() -> None:
    model, batch = _model(), toy_batch(1)
    hidden_BTD = _hidden(model, batch)
    rows, columns = batch.loss_mask_BT.nonzero(as_tuple=True)
    expected_N = torch.distributions.Categorical(logits=model.logits(hidden_BTD[rows, columns - 1])).entropy()
    torch.testing.assert_close(token_logprobs(model, hidden_BTD, batch=batch).entropies_N, expected_N)


def test_the_objective_is_the_weighted_mean_over_predicted_tokens_plus_the_balance_loss() -> None:
    model, batch = _model(), toy_batch(2)
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    weights_N = batch.target_weights()
    mean = -(weights_N * _naive_logprobs(model, output.hidden_BTD, batch)).sum() / weights_N.sum()
    expected = mean + 0.1 * output.balance_loss / (batch.segments_BT > 0).sum()
    result = language_model_objective(_counts(batch), balance=BalanceConfig(sequence_loss=0.1))(model, batch)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.metrics["cross_entropy"], mean)


def test_loss_and_gradients_do_not_depend_on_micro_batches() -> None:
    model, batch = _model(), toy_batch(3)
    whole = _gradients(model, [batch], _counts(batch))
    assert_same(_gradients(model, split_rows(batch, rows=1), _counts(batch)), whole)
    assert_same(_gradients(model, split_rows(batch, rows=3), _counts(batch)), whole)


def test_loss_and_gradients_do_not_depend_on_how_documents_are_packed() -> None:
    model, batch = _model(), toy_batch(4)
    alone = one_document_per_row(batch)
    assert alone.num_tokens == batch.num_tokens
    assert_same(_gradients(model, [alone], _counts(batch)), _gradients(model, [batch], _counts(batch)))


def test_rows_of_padding_change_nothing() -> None:
    model, batch = _model(), toy_batch(5)
    split = [rank_rows(batch, rank=rank, world_size=3) for rank in range(3)]
    assert {len(part.tokens_BT) for part in split} == {2}
    whole = _gradients(model, [batch], _counts(batch))
    assert_same(_gradients(model, split, _counts(batch)), whole)
    assert_same(_gradients(model, [padded(batch, 7)], _counts(batch)), whole)


def test_a_batch_without_targets_has_loss_and_gradients_of_zero() -> None:
    model, batch = _model(), toy_batch(6)
    empty = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    objective = language_model_objective(
        GlobalCounts(tokens=1, targets=1, target_weight=1.0), balance=BalanceConfig(sequence_loss=0.0)
    )
    result = objective(model, empty)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
