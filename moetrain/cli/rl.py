"""`moetrain rl`."""

from moetrain.commands.training import RlRun


def main(run: RlRun) -> int:
    """Run the stage; return its exit code."""
    if run.continue_from is None:
        run.require_weights()
    from moetrain.run.rl_stage import learn  # loads torch

    return learn(run)
