"""What a batch of trajectories says, as named numbers."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from moetrain.rollout.types import Ending, Trajectory


def rollout_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Return reward, lengths, errors and endings of a step's trajectories; `success/calls_n` by calls needed."""
    trajectories = [trajectory for group in groups for trajectory in group]
    count = len(trajectories)
    rewards = [trajectory.reward for trajectory in trajectories]
    by_calls: dict[int, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        by_calls[trajectory.num_calls_needed].append(trajectory.reward)
    after_error = [trajectory.reward for trajectory in trajectories if trajectory.num_transient_errors]
    endings = Counter(trajectory.ending for trajectory in trajectories)
    return {
        "reward": sum(rewards) / count,
        **{f"success/calls_{calls}": sum(values) / len(values) for calls, values in sorted(by_calls.items())},
        **({"success/after_tool_error": sum(after_error) / len(after_error)} if after_error else {}),
        "groups_with_signal": sum(len({t.reward for t in group}) > 1 for group in groups) / len(groups),
        "sampled_tokens": sum(sum(trajectory.is_sampled) for trajectory in trajectories),
        "trajectory_tokens": sum(len(trajectory.tokens) for trajectory in trajectories) / count,
        "turns": sum(trajectory.num_turns for trajectory in trajectories) / count,
        "tool_errors": sum(trajectory.num_errors for trajectory in trajectories) / count,
        **{f"ending/{ending.value}": endings[ending] / count for ending in Ending},
    }
