"""The tree of pages: what sequences share, what they copy, and that every page returns."""

import random

import pytest

from moetrain.inference.pages import Page, PageTree
from moetrain.inference.rows import PAGE


def _read(tree: PageTree, tokens: list[int]) -> tuple[list[Page], int]:
    chain, matched = tree.match(tokens)
    assert tree.reserve(chain, len(tokens) - matched)
    tree.commit(chain, tokens[matched:])
    return chain, matched


def test_full_pages_are_shared_and_the_rest_is_copied() -> None:
    copies: list[tuple[int, int]] = []
    tree = PageTree(10, copy=lambda source, target: copies.append((source, target)))
    tokens = list(range(PAGE + 10))
    first, matched = _read(tree, tokens)
    assert matched == 0 and len(first) == 2
    second, matched = tree.match([*tokens, 7])
    assert matched == PAGE + 10 and second[0] is first[0] and second[1] is not first[1]
    assert copies == [(first[1].index, second[1].index)]
    other, matched = tree.match([*tokens[: PAGE + 3], 99, 98])
    assert matched == PAGE + 3 and other[1].tokens == tokens[PAGE : PAGE + 3]
    assert tree.num_used == 4
    for chain in (first, second, other):
        tree.release(chain)
    assert tree.num_used == 0
    again, matched = tree.match(tokens)
    assert matched == PAGE + 10 and len(copies) == 2, "an unused page with just these tokens needs no copy"
    tree.release(again)


def test_the_oldest_unused_pages_make_room_and_used_ones_stay() -> None:
    tree = PageTree(3, copy=lambda source, target: None)
    old, _ = _read(tree, [1] * PAGE)
    used, _ = _read(tree, [2] * PAGE)
    tree.release(old)
    new, _ = _read(tree, [3] * (2 * PAGE))
    assert tree.num_used == 3 and tree.match([1] * PAGE)[1] == 0
    chain, matched = tree.match([4])
    assert matched == 0 and not tree.reserve(chain, 1) and chain == []
    assert used[0].tokens == [2] * PAGE
    tree.release(new)
    tree.release(used)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_come_and_go_lose_no_page_and_read_only_their_own_tokens(seed: int) -> None:
    chosen = random.Random(seed)
    content: dict[int, list[int]] = {}

    def copy(source: int, target: int) -> None:
        content[target] = list(content[source])

    tree = PageTree(12, copy=copy)
    live: list[tuple[list[Page], list[int]]] = []
    for _ in range(400):
        if live and (chosen.random() < 0.5 or len(live) == 3):
            chain, tokens = live.pop(chosen.randrange(len(live)))
            held = [token for page in chain for token in content[page.index][: len(page.tokens)]]
            assert held == tokens
            tree.release(chain)
            continue
        tokens = [chosen.randrange(2)] * chosen.randrange(1, 130) + [chosen.randrange(3) for _ in range(30)]
        chain, matched = tree.match(tokens)
        if not tree.reserve(chain, len(tokens) - matched):
            tree.release(chain)
            continue
        tree.reserve(chain, len(tokens) - matched + chosen.randrange(100))  # for drafts, which turn out wrong
        tree.commit(chain, tokens[matched:])
        assert all(page.tokens for page in chain)
        for page in chain:
            content[page.index] = list(page.tokens)
        live.append((chain, tokens))
    for chain, _ in live:
        tree.release(chain)
    assert tree.num_used == 0
    whole, _ = _read(tree, list(range(12 * PAGE)))
    assert len({page.index for page in whole}) == 12
    tree.release(whole)
    tree.clear()
