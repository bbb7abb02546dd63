"""`make golden` writes the curves anew: `pytest tests/golden --write-golden`.

pytest reads this option from here only where the folder is named on the command line; elsewhere it is absent, and
the curves are compared.
"""

from __future__ import annotations

import pytest
from helpers_runs import Forks, forks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the golden curves instead of comparing")


@pytest.fixture(scope="session")
def rlhf() -> Forks:
    """The command line, without the wait for imports."""
    return forks()


@pytest.fixture(scope="session")
def writes(request: pytest.FixtureRequest) -> bool:
    """Whether the curves are to be written anew."""
    return bool(request.config.getoption("--write-golden", default=False))
