"""`moetrain rl`."""

from moetrain.config import RlRun
from moetrain.errors import ConfigError


def main(run: RlRun) -> int:
    """Run the stage; return its exit code."""
    if run.continue_from is None and run.init_from is None:
        raise ConfigError("init_from is null: RL starts from weights that solve some tasks; give those of an SFT stage")
    from moetrain.run.rl_stage import learn  # loads torch

    return learn(run)
