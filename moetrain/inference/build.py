"""Builds the model that generates, from tensors by their names in training.

The native kernels compute it on CPUs in bfloat16; everywhere else plain torch operations do, which do not have the mode
`deterministic`. One layer is packed at a time, so that besides the result a process holds the tensors of one layer.
"""

from dataclasses import replace

import torch

from moetrain.errors import ConfigError
from moetrain.inference.forward import PlainModel
from moetrain.inference.mode import Mode
from moetrain.inference.native import NativeModel, NativeModule
from moetrain.inference.pack import Packer
from moetrain.inference.protocol import Model
from moetrain.inference.speculation import Speculation
from moetrain.inference.weights import InferenceWeights, Tensors, build_layers, build_module, build_outer
from moetrain.kernels.build import Library
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.runtime import default_device


def build_model(
    tensors: Tensors,
    *,
    config: ModelConfig,
    quant: QuantConfig,
    library: Library | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    mode: Mode = Mode.fast,
    speculation: Speculation = Speculation.off,
) -> Model:
    """Return the model for generation.

    tensors: fp32 masters, or an export's values; for routed experts also codes and scales. library: the native kernels,
    None for torch. device: where it computes; None is this machine's accelerator if it has one. speculation: unless it
    is off, the first module of multi-token prediction is built, too. Raises ConfigError for the mode `deterministic`
    without native kernels.
    """
    device = device or default_device()
    layers = build_layers(tensors, config=config, quant=quant, dtype=dtype)
    outer = build_outer(tensors, dtype=dtype)
    module = None
    if speculation is not Speculation.off:
        module = build_module(tensors, config=config, quant=quant, dtype=dtype)
    if library is None or device.type != "cpu" or dtype != torch.bfloat16:
        if mode is Mode.deterministic:
            found = "torch's kernels" if library is None and device.type == "cpu" else f"{dtype} on {device.type}"
            raise ConfigError(
                f"rollout.mode is deterministic, and generation computes with {found}: the mode needs the native "
                "kernels, in bfloat16 on a CPU. Install g++ and give kernels=auto, or give rollout.mode=fast"
            )
        moved = {name: tensor.to(device) for name, tensor in outer.items()}
        weights = InferenceWeights(
            config=config,
            dtype=dtype,
            layers=[layer.to(device) for layer in layers],
            module=module and module.to(device),
            **moved,
        )
        return PlainModel(weights)
    packer = Packer(library, library.units)
    model = NativeModel(
        config=config,
        library=library,
        units=packer.units,
        embed_VD=outer["embed_VD"],
        norm_D=outer["norm_D"],
        head=packer.dense(outer["head_VD"]),
        layers=[packer.layer(layer, config=config, mode=mode) for layer in layers],
        mode=mode,
    )
    if module is not None:
        block = replace(
            model,
            config=replace(config, num_layers=1, num_dense_layers=0, num_mtp_layers=0),
            norm_D=module.norm_D,
            layers=[packer.layer(module.layer, config=config, mode=mode)],
        )
        model.module = NativeModule(weights=module, join=packer.dense(module.join_D2), block=block)
    return model
