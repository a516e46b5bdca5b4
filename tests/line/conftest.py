"""Helper modules of these tests can be imported by name; the package must be installed."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """torch finds the line through the installed package's metadata, not through the files."""
    found = [point.value for point in entry_points(group="torch.backends")]
    assert "paraplan.torch_option:install" in found, "install it anew: pip install --no-deps -e ."
