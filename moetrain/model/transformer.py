"""The transformer: packed rows of tokens to hidden states, and hidden states to logits. One device, no ranks, no loss.

State-dict names and shapes match those of transformers v5's DeepseekV3ForCausalLM in memory. B rows, T tokens, N
tokens, D hidden, V vocabulary, L layers with routed experts, E experts, A attention layers (all blocks), H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moetrain.kernels.build import Library
from moetrain.model.attention import Attention, Mask, MaxLogits, plan_attention
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.kernel_module import KernelModule, set_kernels
from moetrain.model.layers import FeedForward, Linear, RMSNorm
from moetrain.model.moe import Dispatcher, Documents, LocalDispatcher, MoE, RouterStatistics
from moetrain.model.mtp import Mtp, MtpHidden, SharedHead, shifted, shifted_segments
from moetrain.model.rope import RopeTable, Rotation, build_rope
from moetrain.runtime import torch_stream

ReadOut = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]
"""Computes tensors from hidden states [N, D] and the head's weight [V, D]."""


@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """Hidden states after the last norm, and router statistics; the statistics exclude padding (segment 0).

    `counts_LE` int64: tokens that chose each expert. `balance_loss`: float32 scalar, summed over layers and documents,
    each document weighted by its tokens. `entropy_L`: float32, detached, mean entropy of the router scores in nats.
    `score_sums_LE`: float32, normalised scores summed over tokens. `z_loss`: float32 scalar, summed over layers and
    tokens; 0 if its weight is 0. `required_LEB` int32: see `balance.required_biases`; has no bins (B = 0) unless the
    bias rule is quantile and gradients are enabled. `max_logits_AH`: float32, detached, largest attention logit
    (softmax input, including its scale) per layer and head over all tokens without padding; None if not measured.
    `mtp`: modules of multi-token prediction, if they were computed; their statistics follow those of the layers.
    """

    hidden_BTD: torch.Tensor
    counts_LE: torch.Tensor
    balance_loss: torch.Tensor
    entropy_L: torch.Tensor
    score_sums_LE: torch.Tensor
    z_loss: torch.Tensor
    required_LEB: torch.Tensor
    max_logits_AH: torch.Tensor | None = None
    mtp: MtpHidden = field(default_factory=MtpHidden)


@dataclass(frozen=True, kw_only=True)
class BlockStatistics:
    """Statistics of one block: its router's, if it has experts, and its largest logits [H], if they are measured."""

    router: RouterStatistics | None
    max_logits_H: torch.Tensor | None


class Block(nn.Module):
    """Attention, then a dense feed-forward layer or experts; each reads the normed residual stream and adds to it."""

    def __init__(self, config: ModelConfig, mlp: FeedForward | MoE) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        *,
        rotation: Rotation,
        mask: Mask,
        documents: Documents,
        measured_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, BlockStatistics]:
        """Return the residual stream after this block, and the block's statistics. `measured_BT`: see
        `Attention.forward`.
        """
        attended_BTD, max_logits_H = self.self_attn(
            self.input_layernorm(x_BTD), rotation=rotation, mask=mask, measured_BT=measured_BT
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, router = self.mlp(normed_BTD, documents)
            return x_BTD + y_BTD, BlockStatistics(router=router, max_logits_H=max_logits_H)
        return x_BTD + self.mlp(normed_BTD), BlockStatistics(router=None, max_logits_H=max_logits_H)


class MtpBlock(Block):
    """A module of multi-token prediction: joins hidden states and embeddings, then computes a block with experts.

    Its parameters have the names of the releases of DeepSeek-V3, without copies of embedding and head.
    """

    def __init__(self, config: ModelConfig, mlp: MoE) -> None:
        super().__init__(config, mlp)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, eps=eps)
        self.hnorm = RMSNorm(width, eps=eps)
        self.eh_proj = Linear(2 * width, width)
        self.shared_head = SharedHead(width, eps=eps)

    def join(self, embedded_BTD: torch.Tensor, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the block's input (arXiv 2412.19437, eq. 21; the released weights have the embedding first)."""
        joined: torch.Tensor = self.eh_proj(torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1))
        return joined


class Embedding(nn.Module):
    """One row of fp32 weights per token id."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=torch.float32))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the rows of the tokens, float32."""
        return F.embedding(tokens_BT, self.weight)


class Head(Linear):
    """The output projection from hidden states to logits, with fp32 weights."""

    def forward(self, hidden_ND: torch.Tensor, read_out: ReadOut | None = None) -> Any:
        """Return logits [N, V] in the dtype of the hidden states, or `read_out(hidden, weight)` if `read_out` is given.

        A loss that never materialises all logits reads the weight through this call, because ZeRO 3 gathers the whole
        weight only inside the call.
        """
        return super().forward(hidden_ND) if read_out is None else read_out(hidden_ND, self.weight)


class Decoder(nn.Module):
    """Embedding, blocks, modules of multi-token prediction and last norm: what transformers calls `model`."""

    def __init__(
        self, config: ModelConfig, *, compute_dtype: torch.dtype, dispatcher: Dispatcher, expert_slice: slice
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            mlp: FeedForward | MoE
            if index < config.num_dense_layers:
                mlp = FeedForward(config.hidden_size, config.intermediate_size)
            else:
                mlp = MoE(config, compute_dtype=compute_dtype, dispatcher=dispatcher, expert_slice=expert_slice)
            self.layers.append(Block(config, mlp))
        for _ in range(config.num_mtp_layers):
            mlp = MoE(config, compute_dtype=compute_dtype, dispatcher=dispatcher, expert_slice=expert_slice)
            self.layers.append(MtpBlock(config, mlp))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(KernelModule):
    """A model of the DeepSeek-V3 / Kimi K2 shape. Its fp32 master parameters are not initialised here: see
    `initialize`.

    Matrix products run in `compute_dtype`, with the native kernels of `library` where they support it.
    `expert_slice`: the routed experts on this rank, by default all; if not all, `dispatcher` must reach the others.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        library: Library | None = None,
        dispatcher: Dispatcher | None = None,
        expert_slice: slice | None = None,
    ) -> None:
        super().__init__()
        routed_scaling_factor(config)  # raises for a shape without a derived factor now instead of in the first step
        self.config = config
        self.compute_dtype = compute_dtype
        self.expert_slice = expert_slice or slice(0, config.num_experts)
        self.model = Decoder(
            config,
            compute_dtype=compute_dtype,
            dispatcher=dispatcher or LocalDispatcher(),
            expert_slice=self.expert_slice,
        )
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self._rope: RopeTable | None = None
        set_kernels(self, library)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        segments_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        max_logits: MaxLogits = MaxLogits.unmeasured,
        mtp: Mtp = Mtp.off,
    ) -> ForwardOutput:
        """Return hidden states of packed rows, given ids, segments (0 is padding) and positions in each document, all
        int64. `mtp`: what to do with the modules of multi-token prediction, if the model has any.
        """
        embedded_BTD = self.model.embed_tokens(tokens_BT).to(self.compute_dtype)
        rotation = self._rotation(positions_BT)
        widest = max(self.config.qk_head_dim, self.config.v_head_dim)
        mask = plan_attention(segments_BT, self.compute_dtype, width=widest, library=self.library)
        documents = Documents.of(segments_BT)
        measured_BT = segments_BT > 0 if max_logits is MaxLogits.measured else None
        statistics: list[BlockStatistics] = []
        x_BTD = embedded_BTD
        num_layers = self.config.num_layers
        for block in self.model.layers[:num_layers]:
            x_BTD, reported = block(x_BTD, rotation=rotation, mask=mask, documents=documents, measured_BT=measured_BT)
            statistics.append(reported)
        hidden_BTD = previous_BTD = self.model.norm(x_BTD)
        if mtp is Mtp.detached:
            previous_BTD, embedded_BTD = previous_BTD.detach(), embedded_BTD.detach()
        read: list[torch.Tensor] = []
        for distance, block in enumerate([] if mtp is Mtp.off else self.model.layers[num_layers:], start=1):
            assert isinstance(block, MtpBlock)
            segments_BT = shifted_segments(segments_BT, 1)
            documents = Documents.of(segments_BT)
            measured_BT = segments_BT > 0 if max_logits is MaxLogits.measured else None
            x_BTD = block.join(shifted(embedded_BTD, distance), previous_BTD)
            x_BTD, reported = block(x_BTD, rotation=rotation, mask=mask, documents=documents, measured_BT=measured_BT)
            statistics.append(reported)
            previous_BTD = block.shared_head(x_BTD)
            read.append(previous_BTD)
        output = _output(hidden_BTD, statistics, num_experts=self.config.num_experts)
        return replace(output, mtp=MtpHidden(hidden_BTD=tuple(read), is_detached=mtp is Mtp.detached))

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [N, V]; the product runs in the dtype of the hidden states."""
        logits: torch.Tensor = self.lm_head(hidden_ND).float()
        return logits

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Return name and module of each MoE layer, in order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, MoE)]

    def attention_layers(self) -> list[tuple[str, Attention]]:
        """Return name and module of the attention of each block, in order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Attention)]

    def _rotation(self, positions_BT: torch.Tensor) -> Rotation:
        """Return the rotation at these positions, from a table that grows to the longest row so far.

        The table is not part of the state dict.
        """
        num_positions = max(positions_BT.shape[1], int(positions_BT.max()) + 1)
        if self._rope is None or len(self._rope.cos_SP) < num_positions:
            self._rope = build_rope(self.config, num_positions)
        if self._rope.cos_SP.device != positions_BT.device:
            self._rope = self._rope.to(positions_BT.device)
        return self._rope.at(positions_BT)


def _output(hidden_BTD: torch.Tensor, blocks: list[BlockStatistics], *, num_experts: int) -> ForwardOutput:
    device = hidden_BTD.device
    measured = [block.max_logits_H for block in blocks if block.max_logits_H is not None]
    max_logits_AH = torch.stack(measured) if measured else None
    statistics = [block.router for block in blocks if block.router is not None]
    if not statistics:
        return ForwardOutput(
            hidden_BTD=hidden_BTD,
            counts_LE=torch.zeros(0, num_experts, dtype=torch.int64, device=device),
            balance_loss=torch.zeros((), device=device),
            entropy_L=torch.zeros(0, device=device),
            score_sums_LE=torch.zeros(0, num_experts, device=device),
            z_loss=torch.zeros((), device=device),
            required_LEB=torch.zeros(0, num_experts, 0, dtype=torch.int32, device=device),
            max_logits_AH=max_logits_AH,
        )
    return ForwardOutput(
        hidden_BTD=hidden_BTD,
        counts_LE=torch.stack([layer.counts_E for layer in statistics]),
        balance_loss=torch.stack([layer.balance_loss for layer in statistics]).sum(),
        entropy_L=torch.stack([layer.entropy for layer in statistics]),
        score_sums_LE=torch.stack([layer.score_sums_E for layer in statistics]),
        z_loss=torch.stack([layer.z_loss for layer in statistics]).sum(),
        required_LEB=torch.stack([layer.required_EB for layer in statistics]),
        max_logits_AH=max_logits_AH,
    )


def allocate(model: Transformer, device: torch.device) -> None:
    """Move a model from the meta device to memory of `device` without values; `initialize` sets them.

    As `nn.Module.to_empty`, which imports torch's compiler for meta tensors: seconds of every start.
    """
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Set each parameter as `initialize_parameter` does, and each buffer (a balance bias) to zero."""
    for name, _ in model.named_parameters():
        initialize_parameter(model, name, seed=seed)
    for _, buffer in model.named_buffers():
        buffer.zero_()


@torch.no_grad()
def initialize_parameter(model: Transformer, name: str, *, seed: int) -> None:
    """Set the parameter `name` of `model` to values drawn from (seed, name, global expert id), equal in every layout.

    Norm gains are 1, matrices Gaussian with the config's standard deviation. Values are drawn on the CPU, so that every
    device starts with the same.
    """
    parameter = model.get_parameter(name)
    if parameter.ndim == 1:
        parameter.fill_(1.0)
    elif parameter.ndim == 2:
        _draw(parameter, torch_stream(seed, name), std=model.config.initializer_range)
    else:
        first_expert = model.expert_slice.indices(model.config.num_experts)[0]
        for local, weight in enumerate(parameter):
            _draw(weight, torch_stream(seed, name, first_expert + local), std=model.config.initializer_range)


def _draw(weight: torch.Tensor, generator: torch.Generator, *, std: float) -> None:
    if weight.device.type == "cpu":
        weight.normal_(std=std, generator=generator)
    else:
        weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=generator))
