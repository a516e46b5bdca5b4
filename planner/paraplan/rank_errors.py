"""An exception in a rank's script is shown once, as Python would show it in a single process."""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType

from paraplan.errors import PlanError
from paraplan.launch import write_error_file


def report_errors(*, launched: bool) -> None:
    """From now on, hand the traceback of an uncaught exception to the launcher.

    Args:
        launched: by `launch`, which shows the first one. Under another launcher each rank
            shows its own.
    """
    shown = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        failed_at = time.time()
        if isinstance(error, KeyboardInterrupt):
            shown(kind, error, where)
            return
        if not (launched and write_error_file(describe(error, where), failed_at)):
            print(describe(error, where), file=sys.stderr, end="", flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: leaving the process group politely would wait for ranks that wait for this one.
        os._exit(1)

    sys.excepthook = report


def describe(error: BaseException, where: TracebackType | None) -> str:
    """The traceback; for what the user can mend, where the script was and one line with a hint."""
    if isinstance(error, PlanError):
        hint = f"\nhint: {error.hint}" if error.hint else ""
        return f"error: {error}{hint}\n"
    while where is not None and where.tb_next and _is_ours(where.tb_frame.f_code.co_filename):
        where = where.tb_next  # `plan run` and runpy, which called the script
    return "".join(traceback.format_exception(type(error), error.with_traceback(where), where))


def _is_ours(file: str) -> bool:
    return "runpy" in file or file.endswith("run_script.py")
