"""A small run as its stages write it: real configs, real summaries of hand-made trajectories, a few metrics."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.pieces import pieces_to_text
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.compose import compose, save_config
from moetrain.eval.rates import paired_difference
from moetrain.eval.summary import summarize
from moetrain.rollout.traces import trace
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.run.provenance import provenance
from moetrain.tasks.protocol import Grade

STAGES = ["pretrain", "sft", "sft_export", "sft_eval", "rl", "rl_export", "rl_eval", "verify"]
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
"""What a model may think of writing."""


def trajectory(task: int, *, success: bool, failures: int = 0, calls: int = 2) -> Trajectory:
    grade = Grade(reward=float(success), reason="right" if success else "wrong_answer")
    return Trajectory(
        task=task,
        sample=0,
        num_calls_needed=calls,
        segments=[
            Segment(
                tokens=[1, 2, 3],
                is_sampled=[False, True, True],
                logprobs=[0.0, -0.5, -0.1],
                versions=[0, 0, 0],
                temperature=1.0,
            )
        ],
        grade=grade,
        ending=Ending.answered,
        num_turns=calls + 1,
        num_calls=calls,
        num_errors=failures,
        num_transient_errors=failures,
    )


def done(seconds: float) -> dict[str, Any]:
    """Return what `moetrain run` writes when a stage is done."""
    return {"id": "0123", "made_by": "0.1.0 (source 0123456789ab)", "seconds": seconds, "inputs": []}


def conversation(answer: str) -> str:
    """Return the text of a conversation of one call; the thinking in it is hostile."""
    call = ToolCall(name="get", arguments='{"id": 7}', id=call_id("get", 0))
    messages = [
        Message(role=Role.user, content="Which colour has box 7?"),
        Message(role=Role.assistant, reasoning=f"look it up {HOSTILE}", tool_calls=[call]),
        Message(role=Role.tool, name="get", tool_call_id=call.id, content="blue"),
        Message(role=Role.assistant, reasoning="done", content=answer),
    ]
    return pieces_to_text(KIMI_K2.conversation_pieces(messages))


def write_run(root: Path, *, name: str = "nano") -> Path:
    """Write a finished run of all stages into `root/name`; return its folder."""
    folder = root / name
    for stage in STAGES:
        (folder / stage).mkdir(parents=True)
        write_json(
            folder / stage / "done.json",
            {"id": f"id of {stage}", "made_by": "0.1.0 (source 0123456789ab)", "seconds": 10.0, "inputs": []},
        )
    _write_configs(root, name)
    _write_training(folder / "pretrain", sources=["code", "english"])
    _write_training(folder / "sft", sources=["code", "dialogues"])
    _write_rl(folder / "rl")
    for stage in ("sft", "rl"):
        report = {"format": "int4", "num_bytes": 300_000, "num_bytes_bf16": 1_200_000, "num_groups": 9}
        write_json(folder / f"{stage}_export" / "summary.json", {"stage": "export", **report})
        write_json(folder / f"{stage}_export" / "model" / "moetrain.json", {"report": report, "sha256": f"of {stage}"})
    before = [trajectory(index, success=index % 2 == 0, failures=int(index % 3 == 0)) for index in range(12)]
    after = [trajectory(index, success=index != 7, failures=int(index % 3 == 0)) for index in range(12)]
    _write_evaluation(folder / "sft_eval", before, earlier=None)
    _write_evaluation(folder / "rl_eval", after, earlier=before)
    rows = [{"name": "codes that differ", "value": 0, "bound": 0, "note": "of 9", "is_kept": True}]
    write_json(folder / "verify" / "verify.json", {"export": str(folder), "masters": str(folder), "rows": rows})
    return folder


def moved(run: Path, root: Path, *, seconds: float) -> Path:
    """Copy a run to `root`, with other times, as a repeated run has; its configs still tell of the first place."""
    folder = root / run.name
    shutil.copytree(run, folder)
    for stage in STAGES:
        write_json(
            folder / stage / "done.json",
            {"id": f"id of {stage}", "made_by": "0.1.0 (source 0123456789ab)", "seconds": seconds, "inputs": []},
        )
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_configs(root: Path, name: str) -> None:
    at = root / name
    words = {
        "pretrain": ["pretrain", "model=k2_nano_test", "data=test"],
        "sft": ["sft", "model=k2_nano_test", "data=test", f"init_from={at}/pretrain"],
        "sft_export": ["export", f"init_from={at}/sft"],
        "sft_eval": ["eval", f"init_from={at}/sft_export", f"eval.masters={at}/sft"],
        "rl": ["rl", "model=k2_nano_test", "rollout.max_tokens=512", f"init_from={at}/sft/checkpoints/step_00000004"],
        "rl_export": ["export", f"init_from={at}/rl"],
        "rl_eval": [
            "eval",
            f"init_from={at}/rl_export",
            f"eval.masters={at}/rl",
            f"eval.before={at}/sft_eval",
            f"eval.codes_before={at}/sft_export",
        ],
        "verify": ["verify exports", f"init_from={at}/rl_export", f"masters={at}/rl"],
    }
    for stage, (command, *overrides) in words.items():
        config = compose(command, [f"run.folder={root}", f"run.name={name}", f"run.stage={stage}", *overrides])
        save_config(config, at / stage / "config.yaml")


def _write_training(folder: Path, *, sources: list[str]) -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "data/code/num_rows": 3.0}]
    for step in range(1, 13):
        load = {"maxvio/model.layers.1.mlp": 0.3, "maxvio/model.layers.2.mlp": 0.5, "maxvio": 0.4, "dead_experts": 0.0}
        load |= {"maxvio_micro": 0.6, "load_variation": 0.2, "bias_range": 0.1}
        line = {"step": step, "loss": 7.0 / step, "cross_entropy": 6.9 / step, "router_entropy": 1.3, "lr": 1e-3}
        lines.append({**line, "grad_norm": 1.0 / step, **load, "time/seconds": 10.0})
        if step % 6 == 0:
            lines.append({"step": step, **{f"validation/{source}": 9.0 / step for source in sources}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"nats_per_character": 0.75, "bigram_nats_per_character": 1.25, "characters": 900, "targets": 300}
    rows = dict.fromkeys(sources, row)
    summary = {
        "stage": folder.name,
        "steps": 12,
        "parameters": {"total": 5000, "routed": 3000, "active": 900, "active_with_head": 1200},
        "validation": rows,
        "digests": {"code": "0123456789abcdef", "tokenizer": "fedcba9876543210"},
        "time": {"seconds": 10.0},
    }
    write_json(folder / "summary.json", summary)


def _write_rl(folder: Path) -> None:
    lines = [
        {
            "step": step,
            "reward": 0.1 * step,
            "success/calls_2": 0.2 * step,
            "success/calls_10": 0.0,
            "success/after_tool_error": 0.1,
            "groups_with_signal": 0.5,
            "entropy": 0.3,
            "logprob_gap": float("nan"),
            "ending/answered": 1.0,
            "ending/stalled": 0.0,
            "maxvio": 0.4,
        }
        for step in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "summary.json", {"stage": "rl", "steps": 4, "sampled_tokens": 99})
    write_json(folder / "made_by.json", provenance(started=0.0))
    write_traces(folder / "traces" / "step_00000001.jsonl", [trajectory(3, success=False)])


def _write_evaluation(folder: Path, trajectories: list[Trajectory], *, earlier: list[Trajectory] | None) -> None:
    longer = [trajectory(index, success=False, calls=9) for index in range(2)]
    modes = {"sampled_t1": trajectories, "greedy": trajectories, "greedy_longer": longer}
    content: dict[str, Any] = {
        "modes": {name: summarize(of_mode) for name, of_mode in modes.items()},
        "graders": {"null_policy": 0.0, "perfect_demonstrator": 1.0, "num_tasks": 12},
        "trained_calls": [2, 8],
        "task": {"name": "database", "tools": {"find": "Return the id of the first row."}},
        "masters": {name: summarize(trajectories) for name in ("sampled_t1", "greedy")},
        "divergence": {"mean_kl": 1e-4, "max_kl": 2e-2, "top1_changed": 0.01, "num_tokens": 1000},
        "language": {"code": 0.8, "english": 0.9},
    }
    if earlier is not None:
        outcomes = [[t.grade.success for t in group] for group in (earlier, trajectories)]
        content["code_changes"] = {"code_flip_rate": 0.025, "scale_change_rate": 0.05}
        content["paired"] = {"greedy": asdict(paired_difference(outcomes[0], outcomes[1]))}
    write_json(folder / "eval.json", content)
    for name, of_mode in modes.items():
        write_traces(folder / "traces" / f"{name}.jsonl", of_mode)


def write_traces(path: Path, trajectories: list[Trajectory]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(trace(t, decode=lambda tokens, t=t: conversation("blue" if t.grade.success else "red"))) + "\n"  # type: ignore[misc]
        for t in trajectories
    ]
    path.write_text("".join(lines))
