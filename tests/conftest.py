"""The order of the test files: the longest first, so that no process waits for another one at the end."""

import pytest

LONGEST = (
    "tests/run/test_run.py",
    "tests/run/test_whole_recipe.py",
    "tests/verify/test_faults.py",
    "tests/docs/test_guides.py",
    "tests/rl/test_collection.py",
    "tests/verify/test_layouts.py",
    "tests/parallel/test_watchdog.py",
    "tests/cli/test_main.py",
    "tests/parallel/test_two_hosts.py",
    "tests/run/test_chain.py",
    "tests/docs/test_pages.py",
    "tests/cli/test_launchers.py",
    "tests/parallel/test_layouts.py",
    "tests/verify/test_rollout.py",
    "tests/test_compose.py",
    "tests/test_wheel.py",
    "tests/rollout/test_sync.py",
    "tests/run/test_begun.py",
    "tests/run/test_inputs.py",
    "tests/run/test_marathon_recipe.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front; `launch/test.sh` keeps this order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))
