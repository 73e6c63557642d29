"""What a person sees of a model's turn: thinking, calls, results and answers, as they are written.

On a terminal the parts have colours; elsewhere they are plain text, with a label in front of all but the answer.
"""

from collections.abc import Iterable
from typing import IO

from rich.console import Console
from rich.text import Text

from moetrain.serve.turn import Arguments, CallBegin, CallEnd, Content, Event, Reasoning

_STYLES = {"thinking": "dim italic", "call": "cyan", "result": "green", "note": "yellow", "answer": "", "user": "bold"}
_KEPT_CONTROLS = "\n\t"


class Screen:
    """Writes the parts of a conversation one after the other."""

    def __init__(self, *, file: IO[str] | None = None) -> None:
        """Write to `file`; None is standard output."""
        self._console = Console(file=file, highlight=False, soft_wrap=True)
        self._part = ""
        self._is_line_open = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person sees the output at once."""
        return self._console.is_terminal

    def show(self, events: Iterable[Event]) -> None:
        """Write what a turn adds."""
        for event in events:
            if isinstance(event, Reasoning):
                self._write("thinking", event.text)
            elif isinstance(event, Content):
                self._write("answer", event.text)
            elif isinstance(event, CallBegin):
                self.end_part()
                self._write("call", f"{event.name} ")
            elif isinstance(event, Arguments):
                self._write("call", event.text)
            elif isinstance(event, CallEnd):
                self.end_part()

    def say(self, part: str, text: str) -> None:
        """Write a whole part: user, result or note."""
        self.end_part()
        self._write(part, text)
        self.end_part()

    def end_part(self) -> None:
        """End the line, so that the next part begins on its own."""
        if self._is_line_open:
            self._console.print()
        self._part, self._is_line_open = "", False

    def _write(self, part: str, text: str) -> None:
        if part != self._part:
            self.end_part()
            self._part = part
            if part != "answer":
                self._print(f"[{part}] ", part)
        self._print(printable(text), part)

    def _print(self, text: str, part: str) -> None:
        if text:
            self._console.print(Text(text, style=_STYLES[part]), end="")
            self._is_line_open = not text.endswith("\n")
            self._console.file.flush()


def printable(text: str) -> str:
    """Return `text` with control characters replaced, because a model could steer the terminal with them."""
    return "".join(c if c in _KEPT_CONTROLS or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)
