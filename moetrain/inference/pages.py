"""Pages of the cache, and which tokens they hold, so that sequences with a common beginning share it.

A page holds PAGE consecutive positions of one chain of tokens. Chains form a tree: a page is identified by its own
tokens and all tokens before them. Full pages are shared by all sequences that begin with their chain; a page that is
not full has one owner, and others copy it. Pages that no sequence uses keep their tokens until their memory is needed,
the oldest first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moetrain.inference.rows import PAGE


@dataclass(eq=False)
class Page:
    """A page of the tree. index: its place in the cache. users: number of sequences whose chain contains it."""

    index: int
    parent: "Page | None" = None
    tokens: list[int] = field(default_factory=list)
    children: "list[Page]" = field(default_factory=list)
    users: int = 0


class PageTree:
    """The pages of a cache of `num_pages`, for one version of the weights.

    copy: copies the content of one page of the cache to another, by their indices. A sequence holds a chain: `match`
    begins it, `reserve` adds pages to it, `commit` notes the tokens that were written to them, `release` ends it.
    """

    def __init__(self, num_pages: int, *, copy: Callable[[int, int], None]) -> None:
        self.num_pages = num_pages
        self.num_used = 0
        """Number of pages that some sequence uses."""
        self._copy = copy
        self._free: list[int] = []
        self._root = Page(index=-1)
        self._unused: OrderedDict[int, Page] = OrderedDict()  # by index; the page to be evicted first comes first
        self.clear()

    def clear(self) -> None:
        """Forget all tokens. No sequence may use a page."""
        assert self.num_used == 0
        self._free = list(range(self.num_pages))[::-1]
        self._root = Page(index=-1)
        self._unused.clear()

    def match(self, tokens: Sequence[int]) -> tuple[list[Page], int]:
        """Take the pages that hold a beginning of `tokens`; return the chain and the number of tokens that it holds."""
        chain: list[Page] = []
        page, num_matched = self._root, 0
        while num_matched < len(tokens):
            best, length = _longest(page.children, tokens[num_matched : num_matched + PAGE])
            if best is None:
                break
            self._use(best)
            if length < PAGE and (best.users > 1 or length < len(best.tokens)):
                copied = self._copied(best, length)
                self._drop(best)
                if copied is None:
                    break
                best = copied
            chain.append(best)
            num_matched += length
            page = best
            if length < PAGE:
                break
        return chain, num_matched

    def reserve(self, chain: list[Page], count: int) -> bool:
        """Lengthen a chain so that `count` more tokens have room; return False, without a change, if there is none."""
        room = 0
        for page in reversed(chain):
            room += PAGE - len(page.tokens)
            if page.tokens:
                break
        taken: list[Page] = []
        for _ in range(-(-max(count - room, 0) // PAGE)):
            index = self._take_index()
            if index is None:
                self._free += [page.index for page in taken]
                return False
            taken.append(Page(index=index))
        for page in taken:
            self._use(page)
        chain += taken
        return True

    def commit(self, chain: list[Page], tokens: Sequence[int]) -> None:
        """Note tokens that were written to the reserved room of a chain, and free the pages that hold none of them.

        What else was written there is overwritten before it is read.
        """
        at = next((place for place in reversed(range(len(chain))) if chain[place].tokens), 0)
        placed = 0
        while placed < len(tokens):
            page = chain[at]
            if not page.tokens:
                page.parent = chain[at - 1] if at else self._root
                page.parent.children.append(page)
            now = tokens[placed : placed + PAGE - len(page.tokens)]
            page.tokens += now
            placed += len(now)
            at += 1
        while chain and not chain[-1].tokens:
            page = chain.pop()
            page.users -= 1
            self.num_used -= 1
            self._free.append(page.index)

    def release(self, chain: list[Page]) -> None:
        """Stop using a chain, which becomes empty. Its pages keep their tokens while there is memory."""
        for page in reversed(chain):
            self._drop(page)
        chain.clear()

    def _use(self, page: Page) -> None:
        page.users += 1
        self.num_used += page.users == 1
        self._unused.pop(page.index, None)

    def _drop(self, page: Page) -> None:
        page.users -= 1
        if page.users == 0:
            self.num_used -= 1
            self._unused[page.index] = page

    def _copied(self, page: Page, length: int) -> Page | None:
        """Return a new page, used once, with the first `length` tokens of another; None if there is no memory."""
        index = self._take_index()
        if index is None:
            return None
        self._copy(page.index, index)
        copied = Page(index=index, parent=page.parent, tokens=page.tokens[:length])
        assert page.parent is not None
        page.parent.children.append(copied)
        self._use(copied)
        return copied

    def _take_index(self) -> int | None:
        """Return a place in the cache: a free one, or that of the page that has been unused for the longest time."""
        if self._free:
            return self._free.pop()
        oldest = next((page for page in self._unused.values() if not page.children), None)
        if oldest is None:
            return None
        del self._unused[oldest.index]
        if oldest.parent is not None:
            oldest.parent.children.remove(oldest)
        return oldest.index


def _longest(pages: Sequence[Page], tokens: Sequence[int]) -> tuple[Page | None, int]:
    """Return the page with the longest common beginning with `tokens`, and its length; None where it is 0."""
    best, longest = None, 0
    for page in pages:
        length = common_length(page.tokens, tokens)
        if length > longest:
            best, longest = page, length
    return best, longest


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
