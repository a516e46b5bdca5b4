"""What `plan run` starts on each device: the line, then the script as ``python`` would run it."""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run ``[-m] SCRIPT ARGUMENTS`` of the command line."""
    from paraplan.one_line import enable_advanced_parallelization

    arguments = sys.argv[1:]
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    enable_advanced_parallelization()
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    # ``python SCRIPT`` looks for modules beside the script, not in the current folder.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
