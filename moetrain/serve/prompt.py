"""Requests as tokens: the prompts of their sequences, and the grammar of the answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.chat.grammar import Calls, turn_grammar
from moetrain.chat.pieces import Piece, pieces_to_tokens, with_bos
from moetrain.data.tokenizer import Tokenizer
from moetrain.serve.errors import ApiError
from moetrain.serve.requests import ChatRequest, TextRequest


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The tokens of a prompt. grammar: of the answer; "" allows any. first_call: calls in the conversation.

    prefilled: the last tokens of the prompt, which belong to the model's turn. excluded: tokens that the answer must
    not have.
    """

    tokens: list[int]
    grammar: str = ""
    first_call: int = 0
    prefilled: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()


def chat_prompt(request: ChatRequest, *, tokenizer: Tokenizer, declare_tools: bool) -> Prompt:
    """Return the prompt of a conversation, up to the model's turn. Without thinking, the reasoning is empty.

    An answer without tools and without a schema has no grammar; the markers that begin calls are excluded from it.
    """
    tokenizer.check_chat()
    template, last = tokenizer.template, request.messages[-1].role
    pieces = template.conversation_pieces(request.messages, request.declaration if declare_tools else "")
    pieces += template.generation_prompt(last)
    prefilled = _tokens(template.prefill(thinks=request.thinks, after=last), tokenizer)
    grammar = ""
    excluded: tuple[int, ...] = ()
    if request.tools or request.schema is not None:
        grammar = turn_grammar(
            request.tools,
            template=template,
            special_ids=tokenizer.special_ids,
            calls=request.calls if request.tools else Calls.none,
            one_call=request.one_call,
            schema=request.schema,
            thinks=request.thinks,
        )
    else:
        markers = {template.syntax.section_begin or template.syntax.call_begin, template.syntax.call_begin}
        excluded = tuple(sorted(tokenizer.special_ids[marker] for marker in markers))
    return Prompt(
        tokens=[*_tokens(pieces, tokenizer), *prefilled],
        prefilled=tuple(prefilled),
        grammar=grammar,
        first_call=sum(len(message.tool_calls) for message in request.messages),
        excluded=excluded,
    )


def text_prompts(request: TextRequest, *, tokenizer: Tokenizer, vocab_size: int) -> list[Prompt]:
    """Return the prompts of a completion. A text gets `[BOS]` in front; token ids are taken as they are."""
    return [Prompt(tokens=_text_tokens(prompt, tokenizer, vocab_size=vocab_size)) for prompt in request.prompts]


def _text_tokens(prompt: str | list[int], tokenizer: Tokenizer, *, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        return _tokens(with_bos([Piece(text=prompt)]), tokenizer)
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ApiError(
                f"prompt has the token id {token}: the model has the ids 0 to {vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
    return list(prompt)


def _tokens(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    return pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0]
