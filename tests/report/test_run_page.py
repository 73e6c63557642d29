import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from moetrain.report.run_page import run_page
from moetrain.report.stages import read_run

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that closes another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> str:
    return run_page(read_run(folder, []), num_trajectories=2)


def test_the_page_shows_every_part_of_a_run(finished: Path) -> None:
    text = Page(page_of(finished)).text
    for said in (
        "Held-out success, greedy",
        "pretrain: validation, by source",
        "rl: reward",
        "rl: success by tool calls needed",
        "pretrain: MaxVio by layer",
        "pretrain: load variation, mean of layers",
        "pretrain: range of the balance bias, mean of layers",
        "INT4 beside the bf16 masters",
        "Exported size",
        "codes that differ",
        "The same task, before and after",
        "config of rl_eval",
        "5,000 parameters, 1,200 active per token",
        "0123456789abcdef",
        "1:20 in all stages",
        "Task family database",
        "Return the id of the first row.",
        "1970-01-01 00:00 UTC",
        "99",
        "GiB",
        "How trajectories ended",
    ):
        assert said in text
    assert "Left out" not in text


def test_why_trajectories_ended_is_not_folded_and_wide_tables_say_that_they_scroll(finished: Path) -> None:
    text = page_of(finished)
    before = text[: text.index("How trajectories ended")]
    assert before.count("<details") == before.count("</details>")
    assert '<div class="scroll many"><table>' in text and "scroll sideways" in text


def test_the_page_fetches_nothing_and_runs_nothing(finished: Path) -> None:
    text = page_of(finished)
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert not {name for name in page.attributes if name.startswith("on") or name in ("src", "srcset")}
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_one_trajectory_that_went_right_and_one_that_went_wrong_can_be_read(finished: Path) -> None:
    text = Page(page_of(finished)).text
    assert "right after rl, sampled T=1: task" in text
    assert "wrong after rl, sampled T=1: task 7" in text
    assert "look it up <script>" in text


def test_what_is_missing_is_left_out_and_said(own: Path) -> None:
    for path in own.iterdir():
        if path.name not in ("pretrain", "sft"):
            shutil.rmtree(path)
    (own / "sft" / "summary.json").unlink()
    text = Page(page_of(own)).text
    assert "What it can do (no evaluation has finished)" in text
    assert "Reinforcement learning (no RL stage has begun)" in text
    assert "Not finished yet: sft" in text
    assert "sft: training loss" in text


def test_a_run_that_only_begun_has_a_page(own: Path) -> None:
    for path in own.iterdir():
        for item in path.iterdir():
            if item.name != "config.yaml":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert "Not finished yet: pretrain" in Page(page_of(own)).text
