"""Measured runs: reads their rows.

The columns are described in docs/accuracy.md. A row that cannot be predicted is not dropped
silently: `Unusable` says why.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from paraplan.errors import InputError

NEEDED = ("id", "gpu", "n_gpus", "layers", "hidden", "heads", "seq_len", "global_batch")
HEADLINE_MFU = 10.0
"""Percent; below it a run is pathological (thousands of tiny messages over a slow fabric)."""


class Unusable(Exception):
    """Why a row is not predicted, in a few words that many rows share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run; fields as in the file's columns, blanks empty.

    Attributes:
        file: name of the file without its ending.
        cells: column -> text.
    """

    file: str
    cells: dict[str, str]

    def text(self, name: str) -> str:
        """A column's text, lower case, empty where it is not published."""
        return (self.cells.get(name) or "").strip().lower()

    def number(self, name: str) -> float | None:
        """A column as a finite number; None where it is not published.

        Raises:
            InputError: the text is no number.
        """
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{self.file}: {name} of {self.cells.get('id')} is {text!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A column as a whole number of at least 1.

        Raises:
            Unusable: not published and no default, or not a positive whole number.
        """
        value = self.number(name)
        if value is None:
            if default is None:
                raise Unusable(f"{name} not published")
            return default
        if value != int(value) or value < 1:
            raise Unusable(f"{name} is not a positive whole number")
        return int(value)

    @property
    def seconds(self) -> float | None:
        """Measured seconds of a step."""
        return self.number("measured_iter_time_s")

    @property
    def out_of_memory(self) -> bool | None:
        """Whether the run surely did not fit (True), ran (False), or nobody knows (None)."""
        if self.text("oom") in ("1", "1.0", "true", "yes"):
            return True
        ran = self.seconds is not None or self.number("peak_mem_gib") is not None
        return False if ran else None

    @property
    def headline(self) -> bool:
        """Whether the row counts in the headline figures."""
        mfu = self.number("mfu")
        return self.text("quality") in ("", "a", "b") and (mfu is None or mfu >= HEADLINE_MFU)

    @property
    def layout(self) -> tuple[str, ...]:
        """What may differ between the rows of a sweep."""
        names = ("precision", "tp", "pp", "vp", "cp", "ep", "zero_or_fsdp", "sequence_parallel")
        return tuple(self.text(n) for n in (*names, "recompute", "attn_impl", "micro_batch"))

    @property
    def sweep(self) -> tuple[str, ...]:
        """Rows with the same sweep differ only in their layout."""
        names = ("source", "model", "seq_len", "gpu", "n_gpus", "global_batch")
        return (self.file, *(self.text(name) for name in names))


def read_rows(path: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        InputError: no readable CSV file, or columns that are needed are missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} lacks the columns {', '.join(missing)}",
                    hint="docs/accuracy.md describes them",
                )
            return [Row(path.stem, {k: v or "" for k, v in row.items() if k}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from None
