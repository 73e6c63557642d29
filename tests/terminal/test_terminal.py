"""What a person at a terminal reads, and what the model reads of what the person does."""

import io
import signal
from collections.abc import Callable

import pytest

from moetrain.chat.messages import Message, Role
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.inference.protocol import Sequence
from moetrain.rollout.config import RolloutConfig
from moetrain.terminal.agent import act
from moetrain.terminal.conversation import Conversation, converse
from moetrain.terminal.screen import Screen, printable
from tests.even_task import even_tokenizer
from tests.rollout.scripted import ANSWER, CALL, ScriptedGeneration, World, WorldFamily, WorldTask, script_of
from tests.serve.servers import Script


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return even_tokenizer()


class Interrupting(Script):
    """Gets Ctrl-C in some steps."""

    def __init__(self, turn: Callable[[str], Message], tokenizer: Tokenizer, *, at: set[int]) -> None:
        super().__init__(turn, tokenizer)
        self._at = at

    def step(self) -> list[Sequence]:
        if self.num_steps in self._at:
            signal.raise_signal(signal.SIGINT)
        return super().step()


def _chat(script: Script, tokenizer: Tokenizer, messages: list[str | type | None], *, max_tokens: int = 600) -> str:
    """Return what the screen shows of a chat with these messages. A type in their place is Ctrl-C."""
    screen = Screen(file=(file := io.StringIO()))
    conversation = Conversation(
        script,
        tokenizer=tokenizer,
        screen=screen,
        temperature=1.0,
        max_tokens=max_tokens,
        max_turn_tokens=200,
        seed=0,
        system="be short",
    )
    rest = iter(messages)

    def read() -> str | None:
        message = next(rest)
        if isinstance(message, type):
            raise KeyboardInterrupt
        return message

    converse(conversation, read, screen=screen)
    assert next(rest, "nothing") == "nothing"
    return file.getvalue()


def _say(text: str) -> Callable[[str], Message]:
    return lambda _: Message(role=Role.assistant, reasoning="hm", content=text)


def test_an_agent_is_shown_turn_by_turn_with_its_grade(tokenizer: Tokenizer) -> None:
    file = io.StringIO()
    task = WorldTask(make=World)
    trajectory = act(
        task,
        WorldFamily(World),
        generation=ScriptedGeneration(script_of(CALL, ANSWER), tokenizer),
        tokenizer=tokenizer,
        config=RolloutConfig(max_tokens=2000, max_turn_tokens=200),
        stream=1,
        declare_tools=False,
        screen=Screen(file=file),
    )
    assert file.getvalue() == (
        "[user] what is there?\n[thinking] look\n"
        '[call] look {"at":1}\n[result] a stone\n'
        "[thinking] done\nyes\n[note] solved: reward 1 (right); 1 calls, 0 of them errors, "
        f"{trajectory.num_sampled if trajectory else 0} tokens\n"
    )
    assert [world.is_closed for world in task.made] == [True]  # type: ignore[attr-defined]


def test_a_chat_is_one_growing_conversation(tokenizer: Tokenizer) -> None:
    script = Script(_say("fine"), tokenizer)
    shown = _chat(script, tokenizer, ["how are you?", " ", "and now?", None])
    assert shown == "[user] how are you?\n[thinking] hm\nfine\n[user] and now?\n[thinking] hm\nfine\n"
    first = (
        "<|im_system|>system<|im_middle|>be short<|im_end|><|im_user|>user<|im_middle|>how are you?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    second = "<think>hm</think>fine<|im_end|><|im_user|>user<|im_middle|>and now?<|im_end|>"
    assert script.prompts == [first, f"{first}{second}<|im_assistant|>assistant<|im_middle|>"]


def test_a_call_in_a_chat_is_answered_that_there_are_no_tools(tokenizer: Tokenizer) -> None:
    script = Script(lambda prompt: ANSWER if "Return of" in prompt else CALL, tokenizer)
    shown = _chat(script, tokenizer, ["look!", None])
    assert '[call] look {"at":1}\n[result] error: this chat has no tools' in shown and shown.endswith("yes\n")
    assert "<|im_system|>look<|im_middle|>## Return of functions.look:0\nerror: this chat" in script.prompts[1]


def test_an_interrupted_answer_is_taken_back_and_the_chat_goes_on(tokenizer: Tokenizer) -> None:
    script = Interrupting(_say("a long answer " * 5), tokenizer, at={12})
    shown = _chat(script, tokenizer, ["one", "two", None])
    assert "[note] the answer was interrupted: it and your message are taken back\n[user] two" in shown
    assert "one" not in script.prompts[1] and script.num_cancelled == 1


@pytest.mark.parametrize(
    ("at", "messages"),
    [({12, 13}, ["one"]), ({12}, ["one", KeyboardInterrupt]), (set(), [KeyboardInterrupt, KeyboardInterrupt])],
)
def test_a_second_interrupt_ends_the_chat(
    tokenizer: Tokenizer, at: set[int], messages: list[str | type | None]
) -> None:
    class Slow(Interrupting):
        def step(self) -> list[Sequence]:
            ended = super().step()
            if 13 in self._at and self.num_steps == 13:  # within the step in which the first one arrived
                signal.raise_signal(signal.SIGINT)
            return ended

    before = signal.getsignal(signal.SIGINT)
    _chat(Slow(_say("a long answer " * 5), tokenizer, at=at), tokenizer, messages)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_conversation_ends_the_chat(tokenizer: Tokenizer) -> None:
    shown = _chat(Script(_say("fine"), tokenizer), tokenizer, ["one", "two " * 30], max_tokens=150)
    assert shown.endswith("[note] the conversation has reached the largest number of tokens of the model\n")


def test_a_message_that_is_too_long_is_left_out_and_the_chat_goes_on(tokenizer: Tokenizer) -> None:
    said = _chat(Script(_say("yes"), tokenizer), tokenizer, ["x y " * 1000, "hi", None])
    assert "the message is too long: " in said and " tokens with its markers, of 599" in said
    assert said.endswith("yes\n") and "taken back" not in said


def test_a_system_message_that_is_too_long_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"system has .* tokens: the model takes 5, with the conversation"):
        _chat(Script(_say("yes"), tokenizer), tokenizer, [None], max_tokens=6)


def test_a_model_cannot_steer_the_terminal(tokenizer: Tokenizer) -> None:
    shown = _chat(Script(_say("\x1b[2Jx\x07[bold]y\x9bz\nné 北"), tokenizer), tokenizer, ["go", None])
    assert shown.endswith("\ufffd[2Jx\ufffd[bold]y\ufffdz\nné 北\n")
    assert printable("a\tb\r") == "a\tb\ufffd"
