"""`moetrain generate`."""

import sys

from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import Piece, pieces_to_tokens, with_bos
from moetrain.chat.template import ChatTemplate
from moetrain.commands.weights import GenerateRun
from moetrain.errors import ConfigError


def main(run: GenerateRun) -> int:
    """Print the model's continuation of the prompt, or its answer with `chat=true`; return the exit code."""
    weights = run.require_weights()
    if not run.prompt:
        raise ConfigError("prompt is empty: give prompt='...', or prompt=- to read standard input")
    text = _standard_input() if run.prompt == "-" else run.prompt
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.inference.engine import GenerationEngine
    from moetrain.inference.protocol import Sequence
    from moetrain.inference.sampling import Sampling
    from moetrain.inference.speculation import Speculation
    from moetrain.kernels.choice import find_for_generation
    from moetrain.kernels.config import Kernels
    from moetrain.run.weights import generation_model, read_weights, tokenizer_of
    from moetrain.runtime import seed_of

    origin = read_weights(weights)
    tokenizer = tokenizer_of(origin)
    if run.chat:
        tokenizer.check_chat()
    pieces = chat_pieces(text, template=tokenizer.template) if run.chat else with_bos([Piece(text=text)])
    prompt = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0]
    if len(prompt) + run.max_new_tokens > (longest := origin.model.max_position_embeddings):
        raise ConfigError(
            f"max_new_tokens is {run.max_new_tokens}, and the prompt has {len(prompt)} tokens: together at most "
            f"model.max_position_embeddings={longest}"
        )
    library = find_for_generation(Kernels.auto)
    model = generation_model(origin, library=library, speculation=Speculation.auto)
    engine = GenerationEngine(
        model, num_slots=1, max_tokens=len(prompt) + run.max_new_tokens, speculation=Speculation.auto
    )
    stream = seed_of(run.run.seed, "generate")
    sequence = Sequence(
        tokens=list(prompt),
        stream=stream,
        sampling=Sampling(temperature=run.temperature),
        limit=len(prompt) + run.max_new_tokens,
        stop_ids=frozenset(tokenizer.end_ids),
    )
    engine.add(sequence)
    while engine.is_busy:
        engine.step()
    print(tokenizer.decode(sequence.tokens[len(prompt) :]))
    return 0


def chat_pieces(text: str, *, template: ChatTemplate) -> list[Piece]:
    """Return the pieces of a user message and the start of the reply."""
    message = Message(role=Role.user, content=text)
    return [*template.conversation_pieces([message]), *template.generation_prompt(message.role)]


def _standard_input() -> str:
    """Return the text on standard input without its final newline. Raises `ConfigError` if it is empty or not UTF-8."""
    if sys.stdin is None:  # it was closed when the process started
        raise ConfigError("prompt=-: standard input is closed: give the prompt there, as in prompt=- < prompt.txt")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt=-: standard input is not UTF-8 at byte {error.start}: convert it") from None
    if not text.removesuffix("\n"):
        raise ConfigError("prompt=-: standard input is empty: give the prompt there, as in prompt=- < prompt.txt")
    return text.removesuffix("\n")
