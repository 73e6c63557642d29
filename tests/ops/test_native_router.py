"""The router by the native kernels: torch's scores and gradients, and the same bits for a token in any company."""

import pytest
import torch

from moetrain.kernels.build import Library, Units, load
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.router import Router, Routing
from tests.ops.test_native import LIBRARIES, library_for


@pytest.fixture(params=LIBRARIES, ids=lambda param: f"{param[0]} {Units(param[1]).name}")
def library(request: pytest.FixtureRequest) -> Library:
    return library_for(*request.param)


def _router(function: ScoreFunction, *, groups: int, normalises: bool) -> Router:
    fields = {"hidden_size": 72, "num_experts": 18, "num_experts_per_token": 3}  # a rest in both axes
    router = Router(
        ModelConfig(
            **fields,  # type: ignore[arg-type]
            score_function=function,
            num_groups=groups,
            num_groups_per_token=1,
            normalize_weights=normalises,
            routed_scaling_factor=1.7,
        )
    )
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.3, generator=generator)
    router.e_score_correction_bias.normal_(std=0.1, generator=generator)
    return router


def _gradients(router: Router, x_ND: torch.Tensor) -> tuple[Routing, torch.Tensor, torch.Tensor]:
    """Return the routing, and the gradients of x and of the weight of a loss that reads everything."""
    x_ND = x_ND.clone().requires_grad_()
    router.weight.grad = None
    routing = router(x_ND)
    loss = (routing.weights_NK * torch.arange(1.0, 4.0)).sum()
    loss = loss + (routing.scores_NE * torch.linspace(-1, 1, 18)).sum() + 0.1 * routing.logits_NE.square().sum()
    loss.backward()
    assert x_ND.grad is not None and router.weight.grad is not None
    return routing, x_ND.grad, router.weight.grad


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("function", list(ScoreFunction))
def test_scores_choice_and_gradients_are_those_of_torch(
    function: ScoreFunction, groups: int, normalises: bool, library: Library
) -> None:
    router = _router(function, groups=groups, normalises=normalises)
    x_ND = torch.randn(40, 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, *gradients = _gradients(router, x_ND)
    router.library = library
    found, *found_gradients = _gradients(router, x_ND)
    assert torch.equal(found.expert_ids_NK, expected.expert_ids_NK)
    for name in ("logits_NE", "scores_NE", "weights_NK"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    for one, other in zip(found_gradients, gradients, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= 2**-7 * other.abs().max()


@pytest.mark.parametrize("function", list(ScoreFunction))
def test_the_routing_of_a_token_does_not_depend_on_other_tokens(function: ScoreFunction, library: Library) -> None:
    router = _router(function, groups=3, normalises=True)
    router.library = library
    x_ND = torch.randn(33, 72, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = router(x_ND)
    for part in (slice(0, 1), slice(5, 12), slice(32, 33)):
        for found, of_whole in zip(router(x_ND[part]), whole, strict=True):
            assert torch.equal(found, of_whole[part])


def test_equal_scores_go_to_the_smaller_number() -> None:
    router = _router(ScoreFunction.sigmoid, groups=1, normalises=True)
    router.library = load()
    router.weight.data.zero_()
    router.e_score_correction_bias.zero_()
    assert router(torch.ones(2, 72).bfloat16()).expert_ids_NK.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("function", list(ScoreFunction))
def test_extreme_logits_have_finite_gradients(function: ScoreFunction) -> None:
    router = _router(function, groups=1, normalises=True)
    router.library = load()
    router.weight.data.fill_(-3.0)
    router.weight.data[:3] = 3.0
    x_ND = torch.ones(4, 72).bfloat16()  # logits of -216 and 216
    routing, *gradients = _gradients(router, x_ND)
    assert torch.isfinite(routing.scores_NE).all() and all(torch.isfinite(each).all() for each in gradients)
