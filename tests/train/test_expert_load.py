"""Metrics of expert load."""

import pytest
import torch

from moetrain.parallel.topology import Topology
from moetrain.train.expert_load import load_metrics, micro_violations


def test_load_metrics_are_those_of_a_hand_count() -> None:
    counts_LE = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])
    biases_LE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-0.5, 0.25, 0.0, 0.0]])
    values = load_metrics(counts_LE, biases_LE=biases_LE, micro_violation_L=torch.tensor([1.0, 3.0]), names=["a", "b"])
    assert values == {
        "maxvio/a": 0.0,
        "maxvio/b": 3.0,
        "maxvio": 1.5,
        "maxvio_micro/a": 1.0,
        "maxvio_micro/b": 3.0,
        "maxvio_micro": 2.0,
        "load_variation/a": 0.0,
        "load_variation/b": pytest.approx(3**0.5),  # deviations 12, -4, -4, -4 from a mean of 4
        "load_variation": pytest.approx(3**0.5 / 2),
        "bias_range/a": 0.0,
        "bias_range/b": 0.75,
        "bias_range": 0.375,
        "dead_experts/a": 0.0,
        "dead_experts/b": 3.0,
        "dead_experts": 3.0,
    }


def test_maxvio_of_micro_batches_is_their_mean_and_those_without_tokens_are_left_out() -> None:
    counts_MLE = torch.tensor([[[2, 2]], [[4, 0]], [[0, 0]]])
    assert micro_violations(counts_MLE, topology=Topology(device=torch.device("cpu"))).tolist() == [0.5]


def test_a_model_without_experts_has_no_load() -> None:
    none_LE = torch.zeros(0, 4)
    assert load_metrics(none_LE, biases_LE=none_LE, micro_violation_L=torch.zeros(0), names=[]) == {}
