"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.started import Starter


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    with Starter() as it:
        yield it
