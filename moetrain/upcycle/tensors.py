"""The tensors of a sparse model, computed one at a time from a dense model; and the output change per layer.

Why the output does not change: the router gives the K chosen experts weights with a constant sum s. Copies all return
the dense output, so the result is s times that output, whatever is chosen. With shards, the G shards of a copy share
one router row and so one score, and the K / G best copies are chosen whole; each shard then has a total weight of
s / G. In both cases the down projections contain the factor G / s.

K chosen experts, E experts, G shards, C copies, F units per expert, D hidden, N tokens, U units of the dense layer.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moetrain.model.config import ModelConfig
from moetrain.model.moe import Experts, LocalDispatcher
from moetrain.model.router import Router
from moetrain.model.transformer import Transformer
from moetrain.runtime import torch_stream
from moetrain.upcycle.config import UpcyclePlan

_OF_MLP = re.compile(r"(?P<layer>model\.layers\.(?P<number>\d+)\.mlp)\.(?P<part>.+)")


class UpcycledTensors(Mapping[str, torch.Tensor]):
    """The float32 tensors of the sparse model by name, each computed on access."""

    def __init__(self, dense: Mapping[str, torch.Tensor], *, model: ModelConfig, plan: UpcyclePlan, seed: int) -> None:
        """Compute the tensors of `model` from those of a dense model; `seed` is the seed of the new routers."""
        self._dense = dense
        self._model = model
        self._plan = plan
        self._seed = seed
        with torch.device("meta"):
            self._shapes = {name: tensor.shape for name, tensor in Transformer(model).state_dict().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        match = _OF_MLP.fullmatch(name)
        if match is None or int(match["number"]) < self._model.num_dense_layers:
            return self._dense[name].float()
        tensor = self._of_experts(match["layer"], match["part"], name=name)
        assert tensor.shape == self._shapes[name], f"{name}: {list(tensor.shape)}"
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._shapes)

    def _of_experts(self, layer: str, part: str, *, name: str) -> torch.Tensor:
        plan, shape = self._plan, self._shapes[name]
        if part == "gate.e_score_correction_bias":
            return torch.zeros(shape)
        if part == "gate.weight":
            rows_CD = torch.empty(plan.num_copies, shape[1])
            rows_CD.normal_(std=plan.router_std, generator=torch_stream(self._seed, name))
            return rows_CD.repeat_interleave(plan.num_shards, dim=0)
        if part.startswith("shared_experts."):
            return self._of_shared(layer, part.removeprefix("shared_experts."), name=name)
        if part == "experts.gate_up_proj":
            gate_GFD, up_GFD = self._shards(layer, "gate"), self._shards(layer, "up")
            return torch.cat([gate_GFD, up_GFD], dim=1).repeat(plan.num_copies, 1, 1)
        down_DU = self._dense[f"{layer}.down_proj.weight"].float()[:, plan.num_shared_units :]
        shards_GDF = torch.stack(down_DU.chunk(plan.num_shards, dim=1))
        return (shards_GDF * plan.down_scale).repeat(plan.num_copies, 1, 1)

    def _shards(self, layer: str, kind: str) -> torch.Tensor:
        """Return the rows of the routed units as shards [G, F, D]."""
        routed_UD = self._dense[f"{layer}.{kind}_proj.weight"].float()[self._plan.num_shared_units :]
        return torch.stack(routed_UD.chunk(self._plan.num_shards))

    def _of_shared(self, layer: str, matrix: str, *, name: str) -> torch.Tensor:
        num_units = self._plan.num_shared_units
        if num_units:
            whole = self._dense[f"{layer}.{matrix}"].float()
            return (whole[:, :num_units] if matrix.startswith("down") else whole[:num_units]).clone()
        if matrix.startswith("down"):
            return torch.zeros(self._shapes[name])
        std = self._model.initializer_range
        return torch.empty(self._shapes[name]).normal_(std=std, generator=torch_stream(self._seed, name))


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Difference between a layer with experts and its dense original, on random tokens.

    relative: largest output difference relative to the largest output, over tokens whose choice consists of whole
    copies. num_cut: number of tokens for which only some shards of a copy were chosen, because copies tied.
    """

    relative: float
    num_cut: int


@torch.no_grad()
def layer_change(
    dense: Mapping[str, torch.Tensor],
    sparse: Mapping[str, torch.Tensor],
    *,
    layer: int,
    model: ModelConfig,
    plan: UpcyclePlan,
    num_tokens: int,
) -> LayerChange:
    """Return the output change of block `layer` in float32, on random tokens scaled by the layer's norm weight."""
    prefix = f"model.layers.{layer}."
    x_ND = torch.empty(num_tokens, model.hidden_size).normal_(generator=torch_stream(0, "upcycle/check", layer))
    x_ND = x_ND * dense[f"{prefix}post_attention_layernorm.weight"].float()
    expected_ND = _feed_forward(x_ND, dense, prefix=f"{prefix}mlp")
    router = Router(model)
    router.load_state_dict({name: sparse[f"{prefix}mlp.gate.{name}"] for name in router.state_dict()})
    experts = Experts(model, num_local=model.num_experts, compute_dtype=torch.float32)
    experts.load_state_dict({name: sparse[f"{prefix}mlp.experts.{name}"] for name in experts.state_dict()})
    routing = router(x_ND)
    routed_ND = LocalDispatcher()(x_ND, routing.expert_ids_NK, routing.weights_NK, experts)
    found_ND = routed_ND
    if model.num_shared_experts:
        found_ND = found_ND + _feed_forward(x_ND, sparse, prefix=f"{prefix}mlp.shared_experts")
    copies_NK = routing.expert_ids_NK // plan.num_shards
    counts_NC = torch.zeros(num_tokens, plan.num_copies, dtype=torch.int64)
    counts_NC.scatter_add_(1, copies_NK, torch.ones_like(copies_NK))
    whole_N = ((counts_NC == 0) | (counts_NC == plan.num_shards)).all(dim=1)
    difference_ND = (found_ND - expected_ND).abs()[whole_N]
    largest = float(difference_ND.max()) if len(difference_ND) else 0.0
    return LayerChange(relative=largest / float(expected_ND.abs().max()), num_cut=int((~whole_N).sum()))


def _feed_forward(x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], *, prefix: str) -> torch.Tensor:
    gate_UD, up_UD, down_DU = (tensors[f"{prefix}.{kind}_proj.weight"].float() for kind in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x_ND, gate_UD)) * F.linear(x_ND, up_UD), down_DU)
