import pytest

from moetrain.data.prefetch import Prefetch
from moetrain.errors import DataError


def test_items_come_in_any_order_and_an_error_comes_with_its_item() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise DataError("item 3 is damaged")
        return number * number

    items = Prefetch(read)
    assert [items(number) for number in (0, 1, 2, 9, 4)] == [0, 1, 4, 81, 16]
    assert items(2) == 4
    with pytest.raises(DataError, match="item 3"):
        items(3)
    assert items(4) == 16
