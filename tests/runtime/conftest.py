"""Helper modules of the runtime's tests; ranks import them by name too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
