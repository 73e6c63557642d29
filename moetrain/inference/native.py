"""The forward pass of generation by the native kernels: all layers of a step in one call.

Every matrix is packed once (`inference/pack.py`). A row's result depends on its own tokens only, bit for bit, and not
on the other rows or the number of threads. In the mode `deterministic` it is also the result of training: the cache
holds the keys and values of each head instead of latents, and attention adds in the order of training.

D hidden, N rows, M rows of logits, V vocabulary; the cache has L layers, P pages, S positions of a page, C numbers.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from moetrain.inference.forward import joined, longer
from moetrain.inference.mode import Mode
from moetrain.inference.pack import GROUP, padded
from moetrain.inference.rows import PAGE, Rows
from moetrain.inference.weights import ModuleWeights
from moetrain.kernels.build import Library, Units
from moetrain.kernels.memory import Memory
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.rope import build_rope
from moetrain.model.router import KERNEL_NUMBERS


@dataclass(frozen=True, kw_only=True)
class NativeModule:
    """The first module of multi-token prediction. join: its packed matrix [D, 2D]. block: a model of its block."""

    weights: ModuleWeights
    join: torch.Tensor
    block: "NativeModel"


@dataclass(kw_only=True)
class NativeModel:
    """Implements `inference.protocol.Model` on a CPU in bfloat16."""

    config: ModelConfig
    library: Library
    embed_VD: torch.Tensor
    norm_D: torch.Tensor
    head: torch.Tensor
    layers: list[list[torch.Tensor | int | None]]
    units: Units
    """Units of all products; those for which the matrices are packed."""
    module: "NativeModule | None" = None
    """Makes drafts; None for none."""
    mode: Mode = Mode.fast
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Lay the tables out that every call passes."""
        config, pointers = self.config, []
        for layer in self.layers:
            pointers += [item.data_ptr() if isinstance(item, torch.Tensor) else item or 0 for item in layer]
        self._table = torch.tensor(pointers, dtype=torch.int64)
        shape = [config.num_layers, config.hidden_size, config.num_heads, config.qk_nope_head_dim]
        shape += [config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank, config.q_lora_rank or 0]
        shape += [config.num_experts, config.num_experts_per_token, config.num_groups, config.num_groups_per_token]
        shape += [KERNEL_NUMBERS[config.score_function], int(config.normalize_weights)]
        shape += [int(self.mode is Mode.deterministic)]
        self._shape = torch.tensor(shape, dtype=torch.int64)
        factors = [config.rms_norm_eps, LATENT_NORM_EPS, config.softmax_scale, routed_scaling_factor(config)]
        self._factors = torch.tensor(factors, dtype=torch.float32)
        self._rope = build_rope(config, 1)

    @property
    def has_int4_experts(self) -> bool:
        """Whether routed experts are multiplied from their INT4 codes."""
        return any(layer[-1] for layer in self.layers)

    def new_cache(self, num_pages: int) -> torch.Tensor:
        """Return an empty cache: of latents and rotary keys; in deterministic mode, of the keys and values of heads."""
        config, num_layers = self.config, self.config.num_layers + self.can_draft
        if self.mode is Mode.deterministic:
            widths = sum(-(-width // GROUP) * GROUP for width in (config.qk_head_dim, config.v_head_dim))
            shape = (num_layers, num_pages, config.num_heads, PAGE * widths)
        else:
            shape = (num_layers, num_pages, PAGE, config.kv_lora_rank + config.qk_rope_head_dim)
        return Memory().zeros(*shape, dtype=torch.bfloat16)

    @property
    def can_draft(self) -> bool:
        """Whether it has a module of multi-token prediction."""
        return self.module is not None

    @property
    def logprob_library(self) -> Library | None:
        """The kernels that compute logprobs as training does, in the mode `deterministic`."""
        return self.library if self.mode is Mode.deterministic else None

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states [N, D] after the last norm."""
        return self._blocks(F.embedding(rows.tokens_N, self.embed_VD), rows, cache_LPSC)

    def draft(self, hidden_ND: torch.Tensor, next_rows: Rows, *, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the module, [N, D]; see `inference.protocol.Model`."""
        assert self.module is not None, "the model can draft"
        embedded_ND = F.embedding(next_rows.tokens_N, self.embed_VD)
        pair_N2 = joined(self.module.weights, embedded_ND, hidden_ND=hidden_ND, eps=self.config.rms_norm_eps)
        x_ND = self._product(pair_N2, self.module.join, num_outputs=self.config.hidden_size)
        return self.module.block._blocks(x_ND, next_rows, cache_LPSC[self.config.num_layers :])

    def _blocks(self, x_ND: torch.Tensor, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return the rows after all blocks and the last norm."""
        self._rope = longer(self._rope, self.config, num_positions=rows.tables_SW.shape[1] * PAGE)
        out_ND = torch.empty_like(x_ND)
        self.library(
            "decode_rows",
            self.units,
            self._shape,
            self._factors,
            self._table,
            self.norm_D,
            rows.sequences_N.int(),
            rows.positions_N.int(),
            rows.tables_SW.int(),
            self._rope.cos_SP,
            self._rope.sin_SP,
            cache_LPSC,
            x_ND,
            out_ND,
            len(x_ND),
            rows.tables_SW.shape[1],
            cache_LPSC.shape[1],
        )
        return out_ND

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [M, V]."""
        return self._product(hidden_MD, self.head, num_outputs=self.config.vocab_size).float()

    def _product(self, x_MK: torch.Tensor, packed: torch.Tensor, *, num_outputs: int) -> torch.Tensor:
        """Return x times a packed matrix of `num_outputs` rows, in bfloat16."""
        rows_MK = padded(x_MK.contiguous())
        out = torch.empty(len(x_MK), num_outputs, dtype=torch.bfloat16)
        self.library("packed_linear", self.units, rows_MK, packed, out, *out.shape, rows_MK.shape[1])
        return out
