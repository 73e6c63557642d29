"""The default data: code and English text of the running Python's standard library, which every machine has.

Nothing is downloaded or shipped with the package. The text differs between Python versions, so every result contains
the digest of the documents. Code and English of one file share a key, so that both are for training or both are held
out. Otherwise docstrings held out as English would be trained on as code.
"""

import ast
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moetrain.files import cached_json, sha256_of_json

_LEFT_OUT = frozenset(
    {
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "turtledemo", "lib2to3"),
        *("encodings", "pydoc_data", "__pycache__"),
    }
)
"""Folders with tests, third-party packages, examples or character tables, which are not read."""
_BUILD_PREFIXES = ("config-", "_sysconfigdata")
"""Prefixes of files and folders that differ between builds of one Python version, which are not read."""
_TOPICS = "pydoc_data/topics.py"
"""The language reference as `help()` shows it: a dict of plain English."""
_MIN_PARAGRAPH = 40
"""Fewest characters of a paragraph; shorter ones are labels."""
_MIN_LETTERS = 0.6
"""Smallest share of letters and spaces in a paragraph; below it are tables, interactive sessions and banners."""
_MAX_WORD = 20
"""Largest mean number of characters per word in a paragraph; above it are lists of names."""


_OWN_SOURCE = Path(__file__).read_text(encoding="utf-8")
"""The source of this module when it was imported: what is cached depends on it."""
_BLOCKS = ("body", "handlers", "orelse", "finalbody")
"""Fields of a statement that hold statements."""


@cache
def stdlib_code() -> dict[str, str]:
    """Return the text of each .py file by its path in the library, sorted; empty and non-UTF-8 files are left out."""
    root = _root()
    texts = {path: _read(root / path) for path in sorted(_paths(root))}
    return {path: text for path, text in texts.items() if text.strip()}


@cache
def stdlib_english() -> dict[str, str]:
    """Return the docstrings and long comments of each file as paragraphs, and the topics of `help()`.

    A paragraph that occurs in several files is left out, because it could be held out in one and trained on in another.
    Parsing the files takes 2 s, so the result is kept in the cache folder.
    """
    sources = [_OWN_SOURCE, stdlib_code(), _read(_root() / _TOPICS)]
    return cached_json(f"stdlib-english-{sha256_of_json(sources)[:16]}.json", _english)


def _english() -> dict[str, str]:
    by_file = {path: list(dict.fromkeys(_paragraphs(text))) for path, text in stdlib_code().items()}
    num_files = Counter(paragraph for paragraphs in by_file.values() for paragraph in paragraphs)
    documents = {}
    for path, paragraphs in by_file.items():
        own = [paragraph for paragraph in paragraphs if num_files[paragraph] == 1]
        if own:
            documents[path] = "\n\n".join(own) + "\n"
    return documents | _topics()


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _paths(root: Path) -> Iterator[str]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _LEFT_OUT and not name.startswith(_BUILD_PREFIXES)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_BUILD_PREFIXES):
                yield Path(folder, name).relative_to(root).as_posix()


def _read(path: Path) -> str:
    """Return the text of a file; empty if a distribution left it out, or it is in another encoding."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _topics() -> dict[str, str]:
    text = _read(_root() / _TOPICS)
    if not text:
        return {}
    last = ast.parse(text).body[-1]
    topics = ast.literal_eval(last.value) if isinstance(last, ast.Assign) else {}
    return {f"{_TOPICS}/{name}": text for name, text in sorted(topics.items())}


def _paragraphs(text: str) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a template, or a file for another version
        return
    for node in _definitions(tree):
        yield from _english_parts(ast.get_docstring(node, clean=True) or "")
    for comment in _comments(text):
        yield from _english_parts(comment)


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield all nodes that can have a docstring, in source order; only statements with a block are visited."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        fields = vars(node)
        stack += reversed([child for block in _BLOCKS for child in fields.get(block, ()) if "body" in vars(child)])


def _comments(text: str) -> Iterator[str]:
    """Yield runs of whole-line comments, without the `#`."""
    run: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            run.append(stripped.lstrip("#").removeprefix(" "))
        elif run:
            yield "\n".join(run)
            run = []


def _english_parts(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that read as English."""
    for paragraph in text.split("\n\n"):
        stripped = paragraph.strip()
        if len(stripped) < _MIN_PARAGRAPH or ">>>" in stripped:
            continue
        letters = sum(map(str.isalpha, stripped)) + stripped.count(" ")
        if letters >= _MIN_LETTERS * len(stripped) and len(stripped) <= _MAX_WORD * len(stripped.split()):
            yield stripped
