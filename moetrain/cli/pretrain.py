"""`moetrain pretrain`."""

from moetrain.commands.training import PretrainRun


def main(run: PretrainRun) -> int:
    """Run the stage; return its exit code."""
    from moetrain.run.document_stage import train  # loads torch

    return train(run)
