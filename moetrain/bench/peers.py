"""Peers of `bench train`: transformers' DeepseekV3, alone and under DeepSpeed's AutoEP.

Each starts from moetrain's weights and uses bf16 parameters with float32 masters, fused AdamW and the same gradient
clipping. It measures transformers' attention implementations and keeps the fastest. Each row is one document, so causal
attention needs no further mask.
"""

import time
from collections.abc import Callable

import deepspeed
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetrain.bench.contestant import Contestant, Kind
from moetrain.commands.bench import BenchTrainRun
from moetrain.data.batch import TokenBatch
from moetrain.hf.shape import to_hf_config
from moetrain.model.transformer import Transformer, initialize
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup

_ATTENTION = ("sdpa", "eager")


def _transformers_model(run: BenchTrainRun, *, experts: str) -> DeepseekV3ForCausalLM:
    """Return transformers' model in float32 with moetrain's initial weights."""
    source = Transformer(run.model)
    initialize(source, run.run.seed)
    config = DeepseekV3Config(**to_hf_config(run.model))
    config._experts_implementation = experts
    config._attn_implementation = _ATTENTION[0]
    config.use_cache = False
    model = DeepseekV3ForCausalLM(config)
    model.load_state_dict(source.state_dict(), strict=True)
    return model.train()


class _PeerOnTransformers:
    """Base of the peers: chooses the attention implementation."""

    setting = ""
    model: DeepseekV3ForCausalLM

    def step(self, batch: TokenBatch) -> float:
        raise NotImplementedError

    def choose(self, batch_of: Callable[[int], TokenBatch], steps: int) -> None:
        """Time `steps` steps with each attention implementation, and keep the fastest."""
        fastest: dict[str, float] = {}
        for name in _ATTENTION:
            self.model.set_attn_implementation(name)
            self.step(batch_of(0))
            start = time.perf_counter()
            for step in range(steps):
                self.step(batch_of(step))
            fastest[name] = time.perf_counter() - start
        self.setting = min(fastest, key=lambda name: fastest[name])
        self.model.set_attn_implementation(self.setting)


class MastersAdamW:
    """Mixed-precision AdamW: gradients of bf16 parameters update float32 masters, which are cast back to bf16."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.params = list(model.parameters())
        self.masters = [param.detach().float().clone() for param in self.params]
        for param in self.params:
            param.data = param.data.to(torch.bfloat16)
        self.clip_norm = config.clip_norm
        betas = (config.betas[0], config.betas[1])
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients, update the masters, cast them to the parameters, and clear the gradients."""
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.clip_norm, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_([*self.params], self.masters)


class Transformers(_PeerOnTransformers):
    """Implements `Trainee` with transformers in a plain loop."""

    def __init__(self, run: BenchTrainRun, contestant: Contestant) -> None:
        experts = "grouped_mm" if contestant.kind is Kind.transformers_grouped_mm else "eager"
        self.model = _transformers_model(run, experts=experts)
        self.optimizer = MastersAdamW(self.model, run.optim)

    def step(self, batch: TokenBatch) -> float:
        """Take one optimizer step; return the loss."""
        loss = self.model(input_ids=batch.tokens_BT, labels=batch.tokens_BT).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class AutoEp(_PeerOnTransformers):
    """Implements `Trainee` with DeepSpeed's AutoEP: bf16, ZeRO 1, a loop over experts (its only choice on CPUs)."""

    def __init__(self, run: BenchTrainRun, contestant: Contestant) -> None:
        topology = setup(ParallelConfig(timeout_s=300))
        self.model = _transformers_model(run, experts="eager")
        optim = run.optim
        self.engine, _, _, _ = deepspeed.initialize(
            model=self.model,
            model_parameters=list(self.model.parameters()),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": run.rows // topology.world_size,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optim.clip_norm,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1, "overlap_comm": False},
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "torch_adam": True,
                        "fused": True,
                        "lr": optim.lr,
                        "betas": list(optim.betas),
                        "eps": optim.eps,
                        "weight_decay": optim.weight_decay,
                    },
                },
                "expert_parallel": {
                    "enabled": True,
                    "autoep_size": contestant.expert,
                    "preset_model": "deepseek_v3",
                    "use_grouped_mm": False,
                },
                "steps_per_print": None,
            },
        )

    def step(self, batch: TokenBatch) -> float:
        """Take one optimizer step; return the loss of this rank's rows."""
        loss = self.engine(input_ids=batch.tokens_BT, labels=batch.tokens_BT).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())
