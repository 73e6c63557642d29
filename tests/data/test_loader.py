import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.data.config import Overlong
from moetrain.data.loader import Loader, Mix, Mixture
from moetrain.data.packing import PackedRows, TokenizedDocument, pack
from moetrain.errors import DataError


def rows_of(length: int, *, number: int, first: int) -> PackedRows:
    """Rows of 16 tokens with one document of `length` each; token 1 of a document tells which it is."""
    documents = [
        TokenizedDocument(tokens=[0, first + index, *[9] * (length - 2)], loss_mask=[True] * length, source="x")
        for index in range(number)
    ]
    return pack(documents, seq_len=16, overlong=Overlong.split, bos_id=0)


def loader_of(seed: int = 0, **weights: float) -> Loader:
    rows = {"a": rows_of(16, number=20, first=100), "b": rows_of(10, number=7, first=200)}
    return Loader(rows, mixes=mixes(weights or {"a": 2.0, "b": 1.0}), seed=seed, pad_id=1)


def mixes(*weights: dict[str, float], rows: int = 0) -> list[Mix]:
    """Mixes of `rows` rows each."""
    return [Mix(first_row=number * rows, weights=each) for number, each in enumerate(weights)]


def columns(batch: TokenBatch) -> list[torch.Tensor]:
    return [value for name, value in vars(batch).items() if name != "columns"]


def names(loader: Loader, num_rows: int) -> list[int]:
    return [int(loader.batch(step, 1).tokens_BT[0, 1]) for step in range(num_rows)]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, two = loader_of(), loader_of()
    for step in (5, 0, 3, 11):
        for left, right in zip(columns(one.batch(step, 4)), columns(two.batch(step, 4)), strict=True):
            assert torch.equal(left, right)
    assert names(loader_of(seed=1), 20) != names(one, 20)


def test_the_rows_of_a_run_do_not_depend_on_how_steps_cut_them() -> None:
    loader = loader_of()
    by_four = torch.cat([loader.batch(step, 4).tokens_BT for step in range(6)])
    by_six = torch.cat([loader.batch(step, 6).tokens_BT for step in range(4)])
    assert torch.equal(by_four, by_six)


def test_a_pass_reads_every_row_once_and_the_next_in_another_order() -> None:
    loader = Loader({"a": rows_of(16, number=20, first=100)}, mixes=mixes({"a": 1.0}), seed=0, pad_id=1)
    order = names(loader, 60)
    passes = [order[begin : begin + 20] for begin in (0, 20, 40)]
    assert all(sorted(one) == list(range(100, 120)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_shares_of_tokens_follow_the_weights() -> None:
    loader = loader_of(a=3.0, b=1.0)
    tokens = {"a": 0, "b": 0}
    for step in range(1000):
        batch = loader.batch(step, 1)
        tokens["a" if batch.tokens_BT[0, 1] < 200 else "b"] += batch.num_tokens
        if step > 50:
            share = tokens["a"] / sum(tokens.values())
            assert abs(share - 0.75) * sum(tokens.values()) <= 2 * 16  # never further than two rows


def test_the_mixture_numbers_the_rows_of_each_source_without_gaps() -> None:
    mixture = Mixture({"a": 0.61, "b": 0.07, "c": 0.0, "d": 0.32})
    seen = dict.fromkeys("abcd", 0)
    for index in range(3000):
        name, before = mixture.place(index)
        assert before == seen[name]
        seen[name] += 1
        for other, share in zip("abcd", (0.61, 0.07, 0.0, 0.32), strict=True):
            assert abs(seen[other] - share * (index + 1)) < 4
    assert mixture.place(10**12)[1] > 10**9


def test_passes_are_told() -> None:
    loader = loader_of()
    places = [loader.place(index) for index in range(90)]
    told = loader.epochs(90)
    for name, size in (("a", 20), ("b", 7)):
        assert told[name] == sum(place.source == name for place in places) / size
    assert loader.epochs(0) == {"a": 0.0, "b": 0.0}


def test_a_source_of_weight_zero_is_not_read() -> None:
    assert set(loader_of(a=1.0, b=0.0).rows) == {"a"}
    assert max(names(loader_of(a=1.0, b=0.0), 30)) < 200


def test_a_source_without_rows_is_refused() -> None:
    empty = pack([], seq_len=16, overlong=Overlong.split, bos_id=0)
    with pytest.raises(DataError, match=r"data.sources.a has no rows"):
        Loader({"a": empty}, mixes=mixes({"a": 1.0}), seed=0, pad_id=1)
    with pytest.raises(DataError, match="no source with a positive weight"):
        Loader({"a": empty}, mixes=mixes({"a": 0.0}), seed=0, pad_id=1)


def changing_loader() -> Loader:
    rows = {"a": rows_of(16, number=20, first=100), "b": rows_of(10, number=7, first=200)}
    return Loader(
        rows, mixes=mixes({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 1.0}, rows=33), seed=3, pad_id=1
    )


def test_each_mix_has_its_own_shares_exactly() -> None:
    loader = changing_loader()
    places = [loader.place(index) for index in range(99)]
    share = 3.0 / 10 / (1.0 / 16 + 3.0 / 10)  # rows of b hold 10 tokens, those of a 16
    for mix, expected in enumerate((0.0, share, 1.0)):
        own = places[33 * mix : 33 * (mix + 1)]
        assert abs(sum(place.source == "b" for place in own) - expected * 33) < 1
        assert [loader.mix_at(index) for index in range(33 * mix, 33 * (mix + 1))] == [mix] * 33
        told = loader.mix_rows(99)[mix]
        assert told == {name: sum(place.source == name for place in own) for name in "ab"}
    assert loader.epochs(50) == {
        name: sum(p.source == name for p in places[:50]) / n for name, n in (("a", 20), ("b", 7))
    }


def test_passes_over_a_source_go_on_through_the_mixes() -> None:
    loader = changing_loader()
    places = [loader.place(index) for index in range(99)]
    for name, size in (("a", 20), ("b", 7)):
        read = [(place.epoch, place.row) for place in places if place.source == name]
        assert [epoch for epoch, _ in read] == [number // size for number in range(len(read))]
        assert sorted(row for _, row in read[:size]) == list(range(size))


def test_rows_before_a_change_are_those_of_a_run_without_it_and_batches_may_span_it() -> None:
    loader, plain = changing_loader(), loader_of(seed=3, a=1.0, b=0.0)
    assert [loader.place(index) for index in range(33)] == [plain.place(index) for index in range(33)]
    whole = loader.rows_between(20, 50).tokens_BT
    assert torch.equal(whole, torch.cat([loader.rows_between(20, 37).tokens_BT, loader.rows_between(37, 50).tokens_BT]))
