"""The contract suite over a backend of somebody else's: `pytest tests/contract --hicache-backend NAME`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hicache")
    group.addoption(
        "--hicache-backend", metavar="NAME", help="run over this backend alone: an entry point or module:Class"
    )
    group.addoption(
        "--hicache-options", metavar="JSON", default="{}",
        help="its options; {path} in a text becomes a folder of the test's own. "
        "`capacity`, in bytes, is set where it has such an option",
    )  # fmt: skip
