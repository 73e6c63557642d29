"""What the segments of a long conversation contain."""

import pytest

from moetrain.chat.context import HIDDEN_RESULT, NOTE_PREFIX, NOTE_REQUEST, Context, ContextKind, ContextPolicy
from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import Piece, pieces_to_text
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.errors import ConfigError

QUESTION = Message(role=Role.user, content="count to ten")


class Words:
    """Numbers pieces, and turns the numbers back into text."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def tokenize(self, pieces: list[Piece]) -> list[int]:
        start = len(self.words)
        self.words += [piece.text for piece in pieces]
        return list(range(start, len(self.words)))

    def text(self, tokens: list[int]) -> str:
        return "".join(self.words[token] for token in tokens)


def _context(words: Words, **policy: object) -> Context:
    return Context(
        ContextPolicy(**policy),  # type: ignore[arg-type]
        [QUESTION],
        template=KIMI_K2,
        stream=3,
        tokenize=words.tokenize,  # type: ignore[arg-type]
    )


def _add(context: Context, words: Words, number: int) -> None:
    turn = words.tokenize([Piece(text=f"turn {number}.")])
    context.add(turn, [Message(role=Role.tool, content=f"result {number}")], num_calls=1)


def test_the_first_segment_begins_with_the_task_alone() -> None:
    words = Words()
    prompt = pieces_to_text([*KIMI_K2.conversation_pieces([QUESTION]), *KIMI_K2.generation_prompt()])
    assert words.text(_context(words, kind=ContextKind.notes).opening) == prompt


def test_under_full_no_segment_ends() -> None:
    words = Words()
    context = _context(words, max_calls=1)
    for number in range(20):
        _add(context, words, number)
    assert not context.is_full and not context.can_end and context.next_call == 20


def test_a_note_replaces_everything_but_the_task_and_calls_are_numbered_anew() -> None:
    words = Words()
    context = _context(words, kind=ContextKind.notes, min_calls=2, max_calls=2)
    _add(context, words, 0)
    assert not context.is_full
    _add(context, words, 1)
    assert context.is_full and context.asks_for_note and context.next_call == 2
    request = words.text(context.note_request)
    assert "result 1" in request and NOTE_REQUEST in request and "result 0" not in request
    context.begin_next("at 2")
    opening = words.text(context.opening)
    assert (
        opening.startswith(pieces_to_text(KIMI_K2.conversation_pieces([QUESTION]))) and NOTE_PREFIX + "at 2" in opening
    )
    assert "turn" not in opening and "result" not in opening
    assert context.next_call == 0 and context.num_segments == 2 and not context.is_full
    for number in (2, 3):
        _add(context, words, number)
    context.begin_next("at 4")
    assert "at 2" not in words.text(context.opening)


def test_hidden_results_become_a_placeholder_and_turns_stay_as_they_were() -> None:
    words = Words()
    context = _context(words, kind=ContextKind.hide_results, min_calls=3, max_calls=3, keep=1)
    for number in range(3):
        _add(context, words, number)
    assert context.is_full and not context.asks_for_note
    context.begin_next()
    opening = words.text(context.opening)
    assert all(f"turn {number}." in opening for number in range(3)) and opening.count(HIDDEN_RESULT) == 2
    assert "result 2" in opening and "result 1" not in opening and context.next_call == 3


@pytest.mark.parametrize(("keep", "kept"), [(1, [2]), (2, [1, 2]), (9, [0, 1, 2])])
def test_discarding_keeps_the_last_turns(keep: int, kept: list[int]) -> None:
    words = Words()
    context = _context(words, kind=ContextKind.discard, min_calls=3, max_calls=3, keep=keep)
    for number in range(3):
        _add(context, words, number)
    context.begin_next()
    opening = words.text(context.opening)
    assert [number for number in range(3) if f"turn {number}." in opening] == kept
    assert [number for number in range(3) if f"result {number}" in opening] == kept


def test_the_length_of_a_segment_is_drawn_between_its_bounds() -> None:
    lengths = set()
    for stream in range(40):
        words = Words()
        context = Context(
            ContextPolicy(kind=ContextKind.discard, min_calls=2, max_calls=4),
            [],
            template=KIMI_K2,
            stream=stream,
            tokenize=words.tokenize,  # type: ignore[arg-type]
        )
        while not context.is_full:
            _add(context, words, 0)
        lengths.add(context.next_call)
    assert lengths == {2, 3, 4}


def test_a_policy_whose_bounds_cross_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.context\.min_calls is 9: give at most .*max_calls \(8\)"):
        ContextPolicy(min_calls=9)


def test_under_discard_no_two_calls_of_a_context_have_the_same_number() -> None:
    words = Words()
    context = _context(words, kind=ContextKind.discard, min_calls=2, max_calls=2, keep=2)
    for _ in range(3):
        numbers = [context.next_call]
        _add(context, words, numbers[-1])
        numbers.append(context.next_call)
        _add(context, words, numbers[-1])
        context.begin_next()
    assert numbers == [4, 5] and [f"turn {number}." in words.text(context.opening) for number in (3, 4, 5)] == [
        False,
        True,
        True,
    ]


def test_discard_leaves_out_more_turns_where_the_context_would_be_too_long() -> None:
    words = Words()
    context = _context(words, kind=ContextKind.discard, min_calls=3, max_calls=3, keep=3)
    for number in range(3):
        _add(context, words, number)
    longest = len(context.opening) + 1
    context.begin_next(max_tokens=longest)
    assert "turn 2." in words.text(context.opening) and "turn 1." not in words.text(context.opening)


def test_results_that_the_model_has_not_read_are_never_hidden() -> None:
    words = Words()
    context = _context(words, kind=ContextKind.hide_results, min_calls=4, max_calls=4, keep=2)
    _add(context, words, 0)
    given = [Message(role=Role.tool, content=f"new {number}") for number in range(3)]
    context.add(words.tokenize([Piece(text="turn 1.")]), given, num_calls=3)
    context.begin_next()
    opening = words.text(context.opening)
    assert all(f"new {number}" in opening for number in range(3)) and "result 0" not in opening
