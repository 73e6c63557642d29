"""The forward pass of generation by the native kernels: all layers of a step in one call.

Every matrix is packed once (`inference/pack.py`). A row's result depends on its own tokens only, bit for bit, and not
on the other rows or the number of threads. In the mode `deterministic` it is also the result of training: the cache
holds the keys and values of each head instead of latents, and attention adds in the order of training.

D hidden, N rows, M rows of logits, V vocabulary; the cache has L layers, P pages, S positions of a page, C numbers.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from moetrain.inference.forward import longer
from moetrain.inference.mode import Mode
from moetrain.inference.pack import GROUP, padded
from moetrain.inference.rows import PAGE, Rows
from moetrain.kernels.build import Library, Units
from moetrain.kernels.memory import Memory
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.rope import build_rope
from moetrain.model.router import KERNEL_NUMBERS


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

    def new_cache(self, num_pages: int) -> torch.Tensor:
        """Return an empty cache: of latents and rotary keys, or of the keys and values of each head."""
        config = self.config
        if self.mode is Mode.deterministic:
            widths = sum(-(-width // GROUP) * GROUP for width in (config.qk_head_dim, config.v_head_dim))
            shape = (config.num_layers, num_pages, config.num_heads, PAGE * widths)
        else:
            shape = (config.num_layers, num_pages, PAGE, config.kv_lora_rank + config.qk_rope_head_dim)
        return Memory().zeros(*shape, dtype=torch.bfloat16)

    @property
    def logprob_library(self) -> Library | None:
        """The kernels that compute logprobs as training does, in the mode `deterministic`."""
        return self.library if self.mode is Mode.deterministic else None

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states [N, D] after the last norm."""
        self._rope = longer(self._rope, self.config, num_positions=rows.tables_SW.shape[1] * PAGE)
        x_ND = F.embedding(rows.tokens_N, self.embed_VD)
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
        rows_MK = padded(hidden_MD.contiguous())
        out = torch.empty(len(hidden_MD), self.config.vocab_size, dtype=torch.bfloat16)
        self.library("packed_linear", self.units, rows_MK, self.head, out, *out.shape, rows_MK.shape[1])
        return out.float()
