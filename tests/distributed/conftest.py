"""The session's worker pools."""

import pytest
from pool import pools_by_size

pools = pytest.fixture(pools_by_size, scope="session", name="pools")
