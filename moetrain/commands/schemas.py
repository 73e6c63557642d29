"""All commands by name. `moetrain.compose` fills their configs from YAML and the command line."""

from moetrain.commands.bench import (
    BenchBalanceRun,
    BenchCheckpointRun,
    BenchDataRun,
    BenchOptimizersRun,
    BenchServeRun,
    BenchTrainRun,
)
from moetrain.commands.bench_generation import BenchDecodeRun, BenchDraftsRun, BenchRolloutRun
from moetrain.commands.data import DataRun, PrepareRun
from moetrain.commands.recipe import RecipeRun, ReportRun
from moetrain.commands.training import PretrainRun, RlRun, SftRun
from moetrain.commands.verify import (
    VerifyEndpointRun,
    VerifyExportsRun,
    VerifyFaultsRun,
    VerifyGpuRun,
    VerifyHfRun,
    VerifyLayoutsRun,
    VerifyRolloutRun,
    VerifyServeRun,
)
from moetrain.commands.weights import ChatRun, EvalRun, ExportRun, GenerateRun, ServeRun, UpcycleRun

SCHEMAS: dict[str, type] = {
    "run": RecipeRun,
    "pretrain": PretrainRun,
    "data": DataRun,
    "prepare": PrepareRun,
    "upcycle": UpcycleRun,
    "sft": SftRun,
    "rl": RlRun,
    "export": ExportRun,
    "eval": EvalRun,
    "report": ReportRun,
    "verify exports": VerifyExportsRun,
    "verify hf": VerifyHfRun,
    "verify rollout": VerifyRolloutRun,
    "verify endpoint": VerifyEndpointRun,
    "verify serve": VerifyServeRun,
    "verify faults": VerifyFaultsRun,
    "verify layouts": VerifyLayoutsRun,
    "verify gpu": VerifyGpuRun,
    "bench balance": BenchBalanceRun,
    "bench optimizers": BenchOptimizersRun,
    "bench train": BenchTrainRun,
    "bench data": BenchDataRun,
    "bench checkpoint": BenchCheckpointRun,
    "bench serve": BenchServeRun,
    "bench decode": BenchDecodeRun,
    "bench rollout": BenchRolloutRun,
    "bench drafts": BenchDraftsRun,
    "generate": GenerateRun,
    "chat": ChatRun,
    "serve": ServeRun,
}
"""Root schema of each command. `configs/<command>.yaml` is its primary config."""
