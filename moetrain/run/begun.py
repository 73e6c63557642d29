"""The config of a stage that has begun: its `model.vocab_size` is that of its checkpoints.

It is smaller than the configured one if the tokenizer that was trained in the stage shrank the model.
"""

from dataclasses import replace

from moetrain.checkpoint.shape import stored_shape
from moetrain.commands.training import DocumentRun


def as_begun(run: DocumentRun) -> DocumentRun:
    """Return the config with the `model.vocab_size` of the checkpoints in the stage's folder, if it may shrink.

    Without checkpoints the config is returned as it is: its `model.vocab_size` is the most that the model will have.
    """
    if not run.data.tokenizer.shrink_model or (stored := stored_shape(str(run.run.path))) is None:
        return run
    tokenizer = replace(run.data.tokenizer, shrink_model=False)
    return replace(
        run,
        model=replace(run.model, vocab_size=stored.vocab_size),
        data=replace(run.data, tokenizer=tokenizer),
    )
