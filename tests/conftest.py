"""Process groups that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.process_group import ProcessGroup


@pytest.fixture(scope="session")
def ranks_1() -> Iterator[ProcessGroup]:
    group = ProcessGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="session")
def ranks_2() -> Iterator[ProcessGroup]:
    group = ProcessGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def ranks_4() -> Iterator[ProcessGroup]:
    group = ProcessGroup(4)
    yield group
    group.close()


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> ProcessGroup:
    """One rank, then two."""
    group: ProcessGroup = request.getfixturevalue(f"ranks_{request.param}")
    return group


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["1 rank", "2 ranks"])
def run_ranks(request: pytest.FixtureRequest) -> ProcessGroup:
    """Two ranks, for whole runs, which take seconds; one rank is in the second tier of tests."""
    group: ProcessGroup = request.getfixturevalue(f"ranks_{request.param}")
    return group
