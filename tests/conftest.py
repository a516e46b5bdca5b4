"""The mark of slow tests, for all folders."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "matrix: every model under every layout; slow tests (an hour)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the full matrix out unless it is asked for with ``-m matrix``."""
    if "matrix" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="the full matrix runs with -m matrix")
    for item in items:
        if "matrix" in item.keywords:
            item.add_marker(skip)
