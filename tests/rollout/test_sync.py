"""Weight sync: the bits of a whole gathered model, streamed tensor by tensor over ranks."""

from dataclasses import fields

import pytest
import torch

from moetrain.errors import RolloutError
from moetrain.inference.build import build_model
from moetrain.inference.forward import PlainModel
from moetrain.inference.protocol import Model
from moetrain.parallel.config import EngineName
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import Quantized
from moetrain.rollout import sync
from moetrain.rollout.sync import StreamedTensors, sync_weights
from tests.distributed import run_ranks
from tests.parallel.nano import build, model_config, train

_QUANT = QuantConfig(enabled=True, group_size=8)


def _flat(model: Model) -> dict[str, torch.Tensor]:
    assert isinstance(model, PlainModel)
    weights = model.weights
    tensors = {name: vars(weights)[name] for name in ("embed_VD", "norm_D", "head_VD")}
    for index, layer in enumerate(weights.layers):
        for field in fields(layer):
            value = vars(layer)[field.name]
            for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
                name = f"{index}.{field.name}.{place}"
                if isinstance(part, Quantized):
                    tensors |= {f"{name}.codes": part.codes_XOI, f"{name}.scales": part.scales_XOG}
                elif part is not None:
                    tensors[name] = part
    return tensors


def _synced(engine_name: EngineName, *, quantize: bool, **layout: int) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the weights that were streamed, and whether they are those of the gathered state."""
    quant = _QUANT if quantize else QuantConfig()
    engine = build(engine_name, **layout)
    train(engine, range(1))
    streamed = _flat(sync_weights(engine, config=model_config(), quant=quant))
    state = engine.gather_state(with_optimizer=False)
    if state is None:
        return streamed, True
    device = engine.topology.device
    whole = _flat(build_model(state, config=model_config(), quant=quant, library=None, device=device))
    return streamed, streamed.keys() == whole.keys() and all(torch.equal(streamed[n], whole[n]) for n in whole)


@pytest.mark.parametrize("layout", [{"zero": 1}, {"zero": 3, "expert": 2}])
@pytest.mark.parametrize("quantize", [False, True])
def test_streamed_weights_have_the_bits_of_the_gathered_model_on_every_rank(
    quantize: bool, layout: dict[str, int]
) -> None:
    (first, is_whole), (second, _) = run_ranks(
        _synced, 2, engine_name=EngineName.deepspeed, quantize=quantize, **layout
    )
    assert is_whole
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_streams_its_own_weights() -> None:
    _, is_whole = _synced(EngineName.torch, quantize=True)
    assert is_whole


def _held(quantize: bool) -> tuple[int, int]:
    """Return the most elements that existed at once beside what was yielded, and those of the largest tensor."""
    engine = build(EngineName.deepspeed, zero=1)
    tensors = StreamedTensors(engine, quant=_QUANT if quantize else QuantConfig(), dtype=torch.bfloat16)
    largest = max(torch.Size(shape).numel() for shape in tensors._shapes.values())
    most = 0
    made = torch.empty

    def counted(*size: object, **named: object) -> torch.Tensor:
        nonlocal most
        tensor = made(*size, **named)  # type: ignore[call-overload]
        most = max(most, tensor.numel())
        return tensor  # type: ignore[no-any-return]

    sync.torch.empty = counted  # type: ignore[assignment]
    for name in tensors:
        tensors[name]
    return most, largest


@pytest.mark.parametrize("quantize", [False, True])
def test_no_more_than_one_tensor_exists_at_once(quantize: bool) -> None:
    for most, largest in run_ranks(_held, 2, quantize=quantize):
        assert 0 < most <= largest


def _differing() -> str:
    engine = build(EngineName.deepspeed, zero=1)
    tensors = StreamedTensors(engine, quant=QuantConfig(), dtype=torch.bfloat16)
    for name in tensors:
        tensors[name]
    if not engine.topology.is_main:
        tensors._note(torch.ones(1))
    try:
        tensors.check()
    except RolloutError as error:
        return str(error)
    return ""


def test_ranks_that_received_other_bytes_are_found() -> None:
    assert all("the ranks received different weights" in said for said in run_ranks(_differing, 2))
