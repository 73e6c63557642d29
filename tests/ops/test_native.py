"""The native kernels give what plain float32 operations on the same bfloat16 numbers give, rounded once to bfloat16."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional as F

from moetrain.kernels.build import Library, Units, load
from moetrain.model.rope import Rotation, rotate
from moetrain.ops import native
from moetrain.ops.combine import combine_plain
from moetrain.ops.tiled_attention import first_seen
from moetrain.optim.adamw import adamw_update
from moetrain.parallel.gradients import sum_of_squares
from tests.threads import num_threads

BF16 = torch.bfloat16
ONE_ROUNDING = 2.0**-8
"""Of a number to bfloat16, relative."""

Make = Callable[..., torch.Tensor]


# The kinds of units on the vectors of this CPU, and the short vectors that laptops have.
LIBRARIES = [("-march=native", 0), ("-march=native", 1), ("-march=haswell", 0), ("-march=x86-64", 0)]
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    LIBRARIES.append(("-march=skylake-avx512", 0))  # without instructions for bfloat16
if load().units is Units.tiles:
    LIBRARIES.append(("-march=native", Units.tiles))


@pytest.fixture(params=LIBRARIES, ids=lambda param: f"{param[0]} {Units(param[1]).name}")
def library(request: pytest.FixtureRequest) -> Library:
    return library_for(*request.param)


def library_for(flags: str, units: int) -> Library:
    """Return the library for these instruction sets, with this kind of units."""
    found = Library(load((flags,)).path)
    found.units = Units(units)
    return found


def _draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_close(
    made: Make, plain: Make, inputs: Sequence[torch.Tensor], *, roundings: float = 1.0, dtype: torch.dtype = BF16
) -> None:
    """Compare output and gradients in the largest difference over the largest number.

    `plain` gets the inputs in float64, and its numbers are rounded nowhere. `roundings`: how many of bfloat16 may lie
    between.
    """
    found_inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    plain_inputs = [tensor.detach().to(BF16).double().requires_grad_() for tensor in inputs]
    found, expected = made(*found_inputs), plain(*plain_inputs)
    assert found.dtype == dtype
    upstream = _draw(*found.shape, seed=99, dtype=dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(found_inputs, plain_inputs, strict=True))]
    for index, (one, other) in enumerate(pairs):
        assert one is not None and other is not None
        assert one.shape == other.shape
        if one.numel() == 0:
            continue
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-6)
        assert error < roundings * ONE_ROUNDING, f"number {index}: {error:.2e}"


SIZES = [(0, 8, 8), (1, 1, 1), (7, 5, 33), (70, 96, 40), (600, 64, 100), (33, 1100, 32)]


@pytest.mark.parametrize(("rows", "num_in", "num_out"), SIZES)
def test_linear(rows: int, num_in: int, num_out: int, library: Library) -> None:
    inputs = [_draw(2, rows, num_in), _draw(num_out, num_in, seed=1, dtype=torch.float32)]
    check_close(lambda x, w: native.linear(x, w, library=library), F.linear, inputs)


def test_gradients_of_weights_are_sums_that_are_not_rounded(library: Library) -> None:
    x, w = _draw(300, 48), _draw(40, 48, seed=1, dtype=torch.float32).requires_grad_()
    upstream = _draw(300, 40, seed=2)
    native.linear(x, w, library=library).backward(upstream)
    torch.testing.assert_close(w.grad, upstream.float().T @ x.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [1, 19, 64, 200])
def test_rms_norm(width: int, library: Library) -> None:
    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    inputs = [_draw(3, 300, width), _draw(width, seed=1).float()]
    check_close(lambda x, w: native.rms_norm(x, w, eps=1e-6, library=library), plain, inputs)


def test_swiglu(library: Library) -> None:
    inputs = [_draw(30, 333, scale=4), _draw(30, 333, seed=1)]
    check_close(lambda g, u: native.swiglu(g, u, library=library), lambda g, u: F.silu(g) * u, inputs)


@pytest.mark.parametrize("counts", [[5, 0, 64, 131], [0, 0, 0, 200], [200, 0, 0, 0], [63, 65, 1, 71], [0, 0, 0, 0]])
@pytest.mark.parametrize("weights", [torch.float32, BF16])
def test_experts(counts: list[int], weights: torch.dtype, library: Library) -> None:
    def plain(x_SD: torch.Tensor, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor) -> torch.Tensor:
        outputs = []
        for x_RD, gate_up_GD, down_DF in zip(x_SD.split(counts), gate_up_LGD, down_LDF, strict=True):
            gate, up = (x_RD @ gate_up_GD.T).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ down_DF.T)
        return torch.cat(outputs)

    def made(x_SD: torch.Tensor, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor) -> torch.Tensor:
        return native.expert_rows(
            x_SD, torch.tensor(counts), gate_up_LGD=gate_up_LGD, down_LDF=down_LDF, library=library
        )

    inputs = [
        _draw(sum(counts), 40),
        _draw(4, 48, 40, seed=1, scale=0.2, dtype=weights),
        _draw(4, 40, 24, seed=2, scale=0.2, dtype=weights),
    ]
    # Gate, up, hidden and their gradients are kept in bfloat16 on the way.
    check_close(made, plain, inputs, roundings=4)


def _permuted_places(tokens: int, chosen: int) -> torch.Tensor:
    return torch.randperm(tokens * chosen, generator=torch.Generator().manual_seed(3)).view(tokens, chosen)


def test_rows_are_spread_and_their_gradients_summed_in_float32(library: Library) -> None:
    places_NK = _permuted_places(50, 3)

    def plain(x_ND: torch.Tensor) -> torch.Tensor:
        rows_SD = x_ND.new_zeros(150, x_ND.shape[1])
        return rows_SD.index_copy(0, places_NK.flatten(), x_ND.repeat_interleave(3, 0))

    check_close(lambda x: native.rows_for_experts(x, places_NK, library=library), plain, [_draw(50, 37)])


def test_rows_are_combined(library: Library) -> None:
    places_NK = _permuted_places(50, 3)

    def made(rows_SD: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        return native.combine(rows_SD, places_NK, weights_NK=weights_NK, library=library)

    def plain(rows_SD: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        return combine_plain(rows_SD, places_NK.flatten(), weights_NK=weights_NK)

    check_close(made, plain, [_draw(150, 37), _draw(50, 3, seed=1).float()])


ATTENTION = [
    # tokens, heads, plain, rotary, value, lengths of documents
    (1, 1, 4, 2, 3, [1]),
    (37, 2, 16, 8, 24, [37]),
    (37, 3, 16, 42, 24, [20, 17]),
    (130, 2, 24, 64, 16, [40, 1, 89]),
    (200, 3, 16, 16, 33, [64, 64, 72]),
    (600, 1, 16, 8, 8, [600]),
]


@pytest.mark.parametrize(("tokens", "heads", "plain_width", "rotary", "value", "lengths"), ATTENTION)
def test_attention(
    tokens: int, heads: int, plain_width: int, rotary: int, value: int, lengths: list[int], library: Library
) -> None:
    segments_BT = torch.stack([torch.repeat_interleave(torch.tensor(lengths)), torch.zeros(tokens)]).long()
    angles_BT1P = _draw(2, tokens, 1, rotary // 2, seed=5, dtype=torch.float32)
    rotation = Rotation(cos=angles_BT1P.cos(), sin=angles_BT1P.sin())
    first_seen_BT = first_seen(segments_BT).int()
    index_T = torch.arange(tokens)
    seen_BTT = (index_T <= index_T[:, None]) & (index_T >= first_seen_BT[:, :, None])
    scale = 0.3

    def made(q: torch.Tensor, kv: torch.Tensor, wide_k: torch.Tensor) -> torch.Tensor:
        rows = native.Rows(
            cosine_BTP=rotation.cos.squeeze(2), sine_BTP=rotation.sin.squeeze(2), first_seen_BT=first_seen_BT
        )
        k_rotary_BTR = wide_k[..., 3:]  # as a projection that holds the latents too leaves it
        out, largest_BHT = native.latent_attention(
            q, kv, k_rotary_BTR=k_rotary_BTR, rows=rows, scale=scale, library=library
        )
        expected_BHT = _scores(q, kv, wide_k).masked_fill(~seen_BTT[:, None], -torch.inf).amax(-1)
        torch.testing.assert_close(largest_BHT, expected_BHT.float(), rtol=ONE_ROUNDING, atol=ONE_ROUNDING * 4)
        return out

    def turned(x_BTHR: torch.Tensor) -> torch.Tensor:
        first, second = x_BTHR.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation.cos.double(), rotation.sin.double()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _scores(q: torch.Tensor, kv: torch.Tensor, wide_k: torch.Tensor) -> torch.Tensor:
        q, kv, wide_k = q.double(), kv.double(), wide_k.double()
        queries = torch.cat([q[..., :plain_width], turned(q[..., plain_width:])], -1)
        rotated = turned(wide_k[:, :, None, 3:]).expand(-1, -1, heads, -1)
        keys = torch.cat([kv[..., :plain_width], rotated], -1)
        return torch.einsum("bthq,bshq->bhts", queries, keys) * scale

    def plain(q: torch.Tensor, kv: torch.Tensor, wide_k: torch.Tensor) -> torch.Tensor:
        p = _scores(q, kv, wide_k).masked_fill(~seen_BTT[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshv->bthv", p, kv[..., plain_width:])

    inputs = [
        _draw(2, tokens, heads, plain_width + rotary),
        _draw(2, tokens, heads, plain_width + value, seed=1),
        _draw(2, tokens, rotary + 3, seed=2),
    ]
    # Rotated queries and keys, probabilities and gradients of scores are bfloat16 on the way.
    check_close(made, plain, inputs, roundings=6)


def test_the_rotation_is_that_of_the_model(library: Library) -> None:
    """With one token its own value comes out, so queries and keys are seen in the largest logit."""
    angle = torch.full((1, 1, 1, 2), 0.7)
    rotation = Rotation(cos=angle.cos(), sin=angle.sin())
    q, k, value = _draw(1, 1, 1, 4), _draw(1, 1, 4, seed=1), _draw(1, 1, 1, 5, seed=2)
    rows = native.Rows(
        cosine_BTP=rotation.cos.squeeze(2),
        sine_BTP=rotation.sin.squeeze(2),
        first_seen_BT=torch.zeros(1, 1, dtype=torch.int32),
    )
    out, largest = native.latent_attention(q, value, k_rotary_BTR=k, rows=rows, scale=1.0, library=library)
    assert torch.equal(out, value)
    expected = (rotate(q, rotation).float() * rotate(k[:, :, None], rotation).float()).sum()
    torch.testing.assert_close(largest.squeeze(), expected)


def _everything(library: Library) -> list[torch.Tensor]:
    """Return outputs and gradients of all that is shared out among threads."""
    x, w, norm = _draw(700, 96).requires_grad_(), _draw(72, 96, seed=1).float().requires_grad_(), torch.ones(96)
    norm.requires_grad_()
    y = native.linear(native.rms_norm(x, norm, eps=1e-6, library=library), w, library=library)
    y.backward(_draw(700, 72, seed=2))
    gate_up, down = _draw(9, 48, 72, seed=3).float(), _draw(9, 72, 24, seed=4).float()
    weights = [gate_up.requires_grad_(), down.requires_grad_()]
    rows = y.detach().requires_grad_()
    counts = torch.tensor([100, 0, 300, 7, 93, 50, 50, 40, 60])
    z = native.expert_rows(rows, counts, gate_up_LGD=gate_up, down_LDF=down, library=library)
    z.backward(_draw(700, 72, seed=5))
    q, kv, k = (_draw(2, 70, *width).requires_grad_() for width in ((3, 24), (3, 32), (8,)))
    angles = _draw(2, 70, 4, dtype=torch.float32)
    seen = native.Rows(cosine_BTP=angles.cos(), sine_BTP=angles.sin(), first_seen_BT=torch.zeros(2, 70).int())
    out, _ = native.latent_attention(q, kv, k_rotary_BTR=k, rows=seen, scale=0.2, library=library)
    out.backward(_draw(2, 70, 3, 16, seed=6))
    leaves = [x, w, norm, rows, *weights, q, kv, k]
    squares = sum_of_squares(_draw(100_000).float(), library=library)
    return [y, z, out, squares, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def test_any_number_of_threads_gives_the_same_bits(library: Library) -> None:
    with num_threads(1):
        alone = _everything(library)
    for threads in (2, 3, 5):
        with num_threads(threads):
            assert all(torch.equal(one, other) for one, other in zip(alone, _everything(library), strict=True))


def test_what_is_no_number_is_not_lost(library: Library) -> None:
    for bad in (float("nan"), float("inf")):
        x, w = _draw(20, 64), _draw(40, 64, seed=1, dtype=torch.float32)
        x[3, 5] = bad
        y = native.linear(x, w, library=library)
        assert not y[3].isfinite().any()
        assert y[[*range(3), *range(4, 20)]].isfinite().all()
        normed = native.rms_norm(x, torch.ones(64), eps=1e-6, library=library)
        assert normed[3, 5].isnan()
        gated = native.swiglu(x, x, library=library)
        assert not gated[3, 5].isfinite()
    w[0, 0] = float("nan")
    assert native.linear(_draw(20, 64), w, library=library)[:, 0].isnan().all()


def test_a_product_with_infinity_is_infinite(library: Library) -> None:
    x = torch.ones(20, 64, dtype=BF16)
    x[3, 5], x[4, 6] = float("inf"), float("-inf")
    y = native.linear(x, torch.ones(40, 64), library=library)
    assert torch.equal(y[3].float(), torch.full((40,), float("inf")))
    assert torch.equal(y[4].float(), torch.full((40,), float("-inf")))


def test_what_is_no_number_is_not_lost_in_attention_and_experts(library: Library) -> None:
    rows = native.Rows(
        cosine_BTP=torch.ones(1, 40, 2), sine_BTP=torch.zeros(1, 40, 2), first_seen_BT=torch.zeros(1, 40).int()
    )
    q, kv, k_rotary = _draw(1, 40, 2, 12), _draw(1, 40, 2, 16), _draw(1, 40, 4)
    q[0, 20, 1, 0] = float("nan")
    out, largest = native.latent_attention(q, kv, k_rotary_BTR=k_rotary, rows=rows, scale=1.0, library=library)
    assert out[0, 20, 1].isnan().all() and largest[0, 1, 20].isnan()
    assert out[0, :20].isfinite().all() and out[0, 20, 0].isfinite().all()
    x_SD = _draw(10, 16)
    x_SD[7, 3] = float("nan")
    y_SD = native.expert_rows(
        x_SD,
        torch.tensor([5, 5]),
        gate_up_LGD=_draw(2, 8, 16, seed=1).float(),
        down_LDF=_draw(2, 16, 4, seed=2).float(),
        library=library,
    )
    assert y_SD[7].isnan().all() and y_SD[:7].isfinite().all()


@pytest.mark.parametrize("has_temperatures", [False, True])
@pytest.mark.parametrize("size", [1, 17, 300])
def test_log_probabilities(size: int, has_temperatures: bool, library: Library) -> None:
    logits_CV, targets_C = _draw(50, size, scale=5), torch.arange(50) % size
    temperatures_C = torch.linspace(0.5, 2, 50) if has_temperatures else None
    read = [torch.empty(50) for _ in range(3)]
    normalizers_C, logprobs_C, entropies_C = read
    library("logprob_rows", logits_CV, targets_C, temperatures_C, *read, 50, size)
    exact_CV = logits_CV.double().requires_grad_()
    scaled_CV = exact_CV / (1 if temperatures_C is None else temperatures_C.double()[:, None])
    log_p_CV = scaled_CV.log_softmax(-1)
    expected_C = log_p_CV.gather(1, targets_C[:, None])[:, 0]
    torch.testing.assert_close(logprobs_C.double(), expected_C, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(normalizers_C.double(), scaled_CV.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropies_C.double(), -(log_p_CV.exp() * log_p_CV).sum(-1), rtol=1e-5, atol=1e-5)
    upstream_C, found_CV = torch.linspace(-2, 2, 50), torch.empty_like(logits_CV)
    sources = (upstream_C, logits_CV, targets_C, normalizers_C, temperatures_C)
    library("logprob_rows_backward", *sources, found_CV, 50, size)
    expected_C.backward(upstream_C.double())
    torch.testing.assert_close(found_CV.double(), exact_CV.grad, rtol=ONE_ROUNDING, atol=1e-5)
    logits_CV[3, 0] = float("nan")
    library("logprob_rows", logits_CV, targets_C, temperatures_C, *read, 50, size)
    assert logprobs_C.isnan().nonzero().flatten().tolist() == [3]


def test_adamw_is_that_of_torch(library: Library) -> None:
    """With a large second beta, whose difference from one has few digits in float32."""
    numbers = {"lr": 1e-2, "betas": (0.9, 0.9999), "eps": 1e-8, "weight_decay": 0.1}
    found, expected = _draw(20_000).float(), _draw(20_000).double().requires_grad_()
    mean, square = torch.zeros_like(found), torch.zeros_like(found)
    optimizer = torch.optim.AdamW([expected], **numbers)
    for step in range(1, 4):
        grad = _draw(20_000, seed=step).float()
        adamw_update(
            found,
            grad,
            exp_avg=mean,
            exp_avg_sq=square,
            step=step,
            learning_rate=numbers["lr"],
            betas=numbers["betas"],
            eps=numbers["eps"],
            weight_decay=numbers["weight_decay"],
            library=library,
        )
        expected.grad = grad.double()
        optimizer.step()
    state = optimizer.state[expected]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(mean.double(), state["exp_avg"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [0, 1, 17, 8192, 20_001])
def test_a_sum_of_squares_is_in_float64(size: int, library: Library) -> None:
    values = _draw(size).float()
    expected = values.double().square().sum().item()
    assert sum_of_squares(values, library=None).item() == pytest.approx(expected, rel=1e-14)
    assert sum_of_squares(values, library=library).item() == pytest.approx(expected, rel=1e-14)
    if size:
        values[-1] = float("nan")
        assert sum_of_squares(values, library=library).isnan()


@pytest.mark.parametrize("value", [200.0, -200.0, 89.5, -103.0, 0.0])
def test_silu_far_from_zero(value: float, library: Library) -> None:
    x = torch.full((40,), value, dtype=BF16)
    found = native.swiglu(x, torch.ones_like(x), library=library).float()
    torch.testing.assert_close(found, F.silu(x.float()), rtol=ONE_ROUNDING, atol=1e-30)
