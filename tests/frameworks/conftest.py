"""Collects these tests only for runs that select them: the frameworks take seconds to import."""

import pytest

from tests.conftest import selects


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if selects(config.option.markexpr, "frameworks") else True


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Models of a few weights: more threads would only wait for each other."""
