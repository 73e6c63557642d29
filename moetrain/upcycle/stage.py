"""Upcycling: turns a dense checkpoint into a sparse one with the same output, in a stage's folder for `init_from=`.

The folder gets `checkpoints/step_00000000` (weights without optimizer state), the tokenizer of the dense weights, and
`summary.json`. It is written layer by layer, so that the whole sparse model is never in memory.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint import write as checkpoint_write
from moetrain.checkpoint.origin import TOKENIZER, Origin
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.checkpoint.shape import shape_changes
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import CheckpointError
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import Piece
from moetrain.quant.config import QuantConfig
from moetrain.upcycle.config import NEW_FIELDS, UpcycleConfig, UpcyclePlan
from moetrain.upcycle.tensors import LayerChange, UpcycledTensors, layer_change

_log = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(kw_only=True)
class Upcycling:
    """A checked dense model and the sparse model made from it. changes: output change per layer with experts, by its
    index.
    """

    origin: Origin
    model: ModelConfig
    plan: UpcyclePlan
    tensors: UpcycledTensors
    changes: Mapping[int, LayerChange]


def upcycle(origin: Origin, *, model: ModelConfig, config: UpcycleConfig, plan: UpcyclePlan, seed: int) -> Upcycling:
    """Return a sparse model of shape `model` that computes the same outputs as the dense weights of `origin`.

    Raises the errors of `check_dense`.
    """
    check_dense(origin, model=model)
    tensors = UpcycledTensors(origin.tensors, model=model, plan=plan, seed=seed)
    layers = range(model.num_dense_layers, model.num_layers) if config.check_tokens else []
    changes = {
        layer: layer_change(
            origin.tensors, tensors, layer=layer, model=model, plan=plan, num_tokens=config.check_tokens
        )
        for layer in layers
    }
    return Upcycling(origin=origin, model=model, plan=plan, tensors=tensors, changes=changes)


def check_dense(origin: Origin, *, model: ModelConfig) -> None:
    """Raise CheckpointError if the weights are not dense, or if their shape does not fit `model`."""
    if origin.model.num_moe_layers:
        raise CheckpointError(
            f"{origin.path}: {origin.model.num_moe_layers} of its {origin.model.num_layers} layers already have "
            "experts; give dense weights (model.num_dense_layers = model.num_layers)"
        )
    mismatches = [line for line in shape_changes(origin.model, model) if not line.startswith(NEW_FIELDS)]
    if mismatches:
        raise CheckpointError(
            f"{origin.path}: its model does not fit ({'; '.join(mismatches)}); change these model fields to match"
        )
    _check_tensors(origin)


def check_untrained(folder: Path) -> None:
    """Raise CheckpointError if a stage's folder contains training checkpoints, which checkpoint 0 would replace."""
    if trained := [step for step in checkpoint.steps(folder / CHECKPOINTS) if step > 0]:
        raise CheckpointError(
            f"{folder / CHECKPOINTS}: contains {len(trained)} training checkpoints, the last of step {trained[-1]}, "
            "which upcycling would remove; give another run.stage or run.name"
        )


def write_upcycled(upcycling: Upcycling, folder: Path) -> Path:
    """Write the weights as checkpoint 0 of a stage's folder, with the tokenizer; return the checkpoint's path.

    Raises the errors of `check_untrained`.
    """
    check_untrained(folder)
    origin = upcycling.origin
    if origin.tokenizer is None:
        _log.warning(
            "no tokenizer beside %s: the stage that trains these weights requires data.tokenizer.path", origin.path
        )
    else:
        Tokenizer.load(origin.tokenizer).save(folder / TOKENIZER)
    identity = {
        "model": asdict(upcycling.model),
        "quant": asdict(QuantConfig()),
        "upcycle": asdict(upcycling.plan),
        "origin": origin.digest,
    }
    partial = checkpoint_write.begin(folder / CHECKPOINTS, 0)
    parts = _layers(upcycling.tensors)
    for number, names in enumerate(parts):
        pieces = [_piece(name, upcycling.tensors[name]) for name in names]
        checkpoint_write.write_part(partial, pieces, rank=number)
    return checkpoint_write.commit(
        partial,
        0,
        num_parts=len(parts),
        state={"identity": identity, "loop": {}},
        retention=checkpoint_write.Retention(newest=1),
    )


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Return the tensor names grouped by layer; each name outside of the layers is a group of its own."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        layers.setdefault(match[0] if match else name, []).append(name)
    return list(layers.values())


def _piece(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name=name, shape=tuple(tensor.shape), start=0, values_P=tensor.detach().reshape(-1))


def _check_tensors(origin: Origin) -> None:
    """Raise CheckpointError unless the tensors are exactly those of the dense model, with finite values."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(origin.model).state_dict().items()}
    if missing := sorted(shapes.keys() - origin.tensors.keys()):
        raise CheckpointError(
            f"{origin.path}: {missing[0]} is missing, but its config requires it: copy the folder again"
        )
    if left_over := sorted(origin.tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{origin.path}: {left_over[0]} is not a tensor of its model: copy the folder again")
    for name, shape in shapes.items():
        tensor = origin.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{origin.path}: {name} has shape {list(tensor.shape)}, but its config requires {list(shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{origin.path}: {name} holds numbers that are not finite")
