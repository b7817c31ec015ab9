"""The session's worker pools."""

from collections.abc import Callable, Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """``pools(4)`` is the session's set of four workers, started when first asked for."""
    made: dict[int, Pool] = {}
    yield lambda world_size: made.setdefault(world_size, Pool(world_size))
    for pool in made.values():
        pool.stop()
