from pathlib import Path

import pytest

from tests.report.nano_run import moved, write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A finished run to take apart."""
    return moved(finished, tmp_path, seconds=10.0)
