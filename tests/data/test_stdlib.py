from pathlib import Path

import pytest

from moetrain.data import stdlib
from moetrain.data.stdlib import stdlib_code, stdlib_english


def test_the_standard_library_is_read_in_order_and_without_tests() -> None:
    code = stdlib_code()
    assert list(code) == sorted(code)
    assert "argparse.py" in code and "json/decoder.py" in code
    assert not any("test" in path.split("/")[:-1] or "site-packages" in path for path in code)
    assert sum(map(len, code.values())) > 5_000_000


def test_english_has_no_paragraph_twice() -> None:
    english = stdlib_english()
    from_code = [text for path, text in english.items() if path in stdlib_code()]
    paragraphs = [paragraph for text in from_code for paragraph in text.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 200]
    assert len(long) > 500
    assert len(set(long)) == len(long)
    assert not any(">>>" in paragraph for paragraph in paragraphs)


def test_english_is_parsed_once_and_then_read_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parsed = stdlib._english()
    for make in (lambda: parsed, lambda: pytest.fail("it was parsed again")):
        monkeypatch.setattr(stdlib, "_english", make)
        stdlib_english.cache_clear()
        assert list(stdlib_english().items()) == list(parsed.items())
