"""`moetrain sft`."""

from moetrain.commands.training import SftRun


def main(run: SftRun) -> int:
    """Run the stage; return its exit code."""
    from moetrain.run.document_stage import train  # loads torch

    return train(run)
