"""Imports what moetrain imports, so that its bytecode is written once and every later process starts faster."""

import importlib
import pkgutil

import moetrain

LATER = [
    *("datasets", "compressed_tensors", "transformers.models.deepseek_v3.modeling_deepseek_v3"),
    *("wandb.sdk.launch.inputs.internal", "deepspeed.runtime.zero.muon.muon_optimizer"),
]
"""What these libraries, or moetrain, import when they are first used."""

OPTIONAL = {"llama_cpp", "triton", "vllm"}
"""Libraries without which some modules cannot be imported."""

for module in pkgutil.walk_packages(moetrain.__path__, "moetrain."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
for name in LATER:
    importlib.import_module(name)
