"""Worker process of `verify layouts`: `python -m moetrain.verify.layout_worker CONFIG.yaml LAYOUTS.json FOLDER`.

One process per rank. Trains all layouts of one world size in turn; rank 0 prints one JSON line per layout.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moetrain.commands.verify import LayoutFault, LayoutScenario
from moetrain.compose import load_config
from moetrain.model.config import Recompute
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName
from moetrain.verify.layout_cases import Layout, Order, make_engine, take_steps


def read_layout(fields: Mapping[str, Any]) -> Layout:
    """Return the layout described by `fields`, read from JSON."""
    named = {
        "optimizer": OptimizerName(fields["optimizer"]),
        "scenario": LayoutScenario(fields["scenario"]),
        "recompute": Recompute(fields["recompute"]),
    }
    return Layout(**{**fields, **named})


def weight_gap(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return the largest difference of two states, where each tensor is scaled by its largest element."""
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        for name, tensor in expected.items()
    )


def main() -> None:
    """Train the layouts that the command-line arguments name."""
    config, layouts, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    run = load_config("verify layouts", config)
    for fields in json.loads(layouts.read_text()):
        layout = read_layout(fields)
        engine = make_engine(run, layout, engine=EngineName.deepspeed)
        trace = take_steps(run, engine, layout=layout, order=Order.whole, fault=LayoutFault(run.fault))
        state = engine.gather_state(with_optimizer=False)
        if state is not None:
            expected = load_file(folder / f"{layout.reference}.safetensors")
            answer = {**asdict(trace), "weights": weight_gap(state, expected)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
