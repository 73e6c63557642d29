"""The digest of released weights, of which each rank reads a share."""

from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint.origin import read_origin, shared_digest
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
from tests.distributed import run_ranks
from tests.hf import released


def _shared(*, folder: Path) -> dict[str, Any]:
    origin = read_origin(folder)
    topology = setup(ParallelConfig(timeout_s=60))
    opened: list[str] = []
    plain = Path.open

    def counted(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            opened.append(self.name)
        return plain(self, mode, *args, **kwargs)

    Path.open = counted  # type: ignore[method-assign, assignment]
    try:
        return {"digest": shared_digest(origin, topology), "opened": opened}
    finally:
        Path.open = plain  # type: ignore[method-assign]


@pytest.mark.parametrize("shards", [1, 4])
def test_each_file_is_read_by_one_rank_and_the_digest_does_not_depend_on_the_ranks(shards: int, tmp_path: Path) -> None:
    folder = released.write(tmp_path / "x", released.weights(), values=released.config(), shards=shards)
    origin = read_origin(folder)
    alone = origin.digest
    ranks = run_ranks(_shared, 2, folder=folder)
    assert {rank["digest"] for rank in ranks} == {alone}
    opened = [name for rank in ranks for name in rank["opened"]]
    assert sorted(opened) == sorted(path.name for path in origin.hashed_files)
    assert abs(len(ranks[0]["opened"]) - len(ranks[1]["opened"])) <= 1
    assert run_ranks(_shared, 1, folder=folder)[0]["digest"] == alone
