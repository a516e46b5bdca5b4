"""README shows what its first command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_commands_output_is_real(tmp_path: Path) -> None:
    """Line by line, but for the seconds that the solver took."""
    found = re.search(r"&& plan (.*)\n```\n\n```\n(.*?)\n```\n", README.read_text(), re.DOTALL)
    assert found is not None
    arguments, shown = found[1].split(), found[2]
    env = os.environ | {"COLUMNS": "80", "PARAPLAN_CACHE": str(tmp_path / "cache")}
    made = subprocess.run(
        [sys.executable, "-m", "paraplan.cli", *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert _comparable(made.stdout) == _comparable(shown)


def _comparable(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return [re.sub(r"solved, [\d.]+ m?s", "solved, some time", line) for line in lines]
