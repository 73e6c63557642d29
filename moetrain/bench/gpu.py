"""What the benchmarks do otherwise on a machine with a GPU."""

from collections.abc import Sequence

import torch

from moetrain.errors import ConfigError


def check_peers(device: torch.device, peers: Sequence[str]) -> None:
    """Raise ConfigError if moetrain computes on a GPU and its peers would compute on the CPU."""
    if device.type != "cpu" and peers:
        raise ConfigError(
            f"peers is [{', '.join(peers)}]: they compute on the CPU, and moetrain on this machine's GPU; give peers=[]"
        )
