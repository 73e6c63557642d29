"""`moetrain rl`."""

from moetrain.config import RlRun
from moetrain.errors import ConfigError


def main(run: RlRun) -> int:
    """Run the stage; return its exit code."""
    weights = run.continue_from or run.init_from
    if weights is None:
        raise ConfigError("init_from is null: RL begins with weights that solve some tasks, give those of an SFT stage")
    from moetrain.run.rl_stage import learn  # brings torch in, so only now

    return learn(run, weights=weights)
