"""What holds for every test."""

from collections.abc import Iterator

import pytest

from moetrain.kernels.choice import using


@pytest.fixture(autouse=True)
def torchs_kernels_again() -> Iterator[None]:
    """A stage that a test runs in this process takes the kernels of its config; the next test begins with torch's."""
    with using(None):
        yield
