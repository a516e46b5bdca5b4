"""What device and cluster profiles share: figures with their source, and how files are read."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from paraplan.errors import InputError
from paraplan.files import read_small_file

Basis = Literal["measured", "published", "datasheet", "modelled"]
"""measured: by us, on the device; published: measured and published by others;
datasheet: the maker's figure; modelled: derived or assumed, the source says from what."""

SMALLEST = 1e-15  # a rate or a latency below it would make products of figures overflow
LARGEST = 1e30  # no quantity of a profile comes near; keeps products of figures finite


class Frozen(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(Frozen):
    """One number of a profile and what it rests on; its unit is in the field's name."""

    value: Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False, strict=True)]
    basis: Basis
    source: Annotated[str, Field(min_length=3)]

    def scaled(self, factor: float, why: str) -> Figure:
        """The figure times ``factor``, marked as modelled."""
        return Figure(value=self.value * factor, basis="modelled", source=f"{self.source}; {why}")


def _positive(figure: Figure) -> Figure:
    if figure.value < SMALLEST:
        raise ValueError(f"value is {figure.value:g}; it must be above {SMALLEST:g}")
    return figure


def _fraction(figure: Figure) -> Figure:
    if not SMALLEST <= figure.value <= 1:
        raise ValueError(f"value is {figure.value:g}; a fraction above 0 and at most 1 is wanted")
    return figure


def _share(figure: Figure) -> Figure:
    if figure.value > 1:
        raise ValueError(f"value is {figure.value:g}; a share of at most 1 is wanted")
    return figure


def _whole(figure: Figure) -> Figure:
    if figure.value < 1 or figure.value != int(figure.value):
        raise ValueError(f"value is {figure.value:g}; a whole number of at least 1 is wanted")
    return figure


Positive = Annotated[Figure, AfterValidator(_positive)]
"""A figure above zero."""

Fraction = Annotated[Figure, AfterValidator(_fraction)]
"""A figure in (0, 1], such as an efficiency."""

Share = Annotated[Figure, AfterValidator(_share)]
"""A figure in [0, 1], such as a loss."""

Whole = Annotated[Figure, AfterValidator(_whole)]
"""A count of at least one."""


def content_sha256(model: BaseModel) -> str:
    """SHA-256 of a model's content, independent of the file's layout and comments."""
    data = model.model_dump(mode="json", exclude_none=True)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@cache
def shipped_names(folder: Literal["devices", "clusters"]) -> tuple[str, ...]:
    """Names of the profiles that ship, sorted."""
    entries = resources.files("paraplan_profiles").joinpath(folder).iterdir()
    return tuple(sorted(e.name[:-5] for e in entries if e.name.endswith(".toml")))


def read_profile(
    name_or_path: str | os.PathLike[str],
    folder: Literal["devices", "clusters"],
    aliases: dict[str, str],
) -> tuple[dict[str, Any], str]:
    """The parsed content of a profile and the name to use in messages.

    A name of a shipped profile is looked up there; anything with a folder separator or a
    ``.toml`` or ``.json`` ending is a file.

    Raises:
        InputError: no such profile, unreadable, or not TOML or JSON.
    """
    text = os.fspath(name_or_path)
    what = f"{folder[:-1]} profile"
    if "/" in text or os.sep in text or text.endswith((".toml", ".json")):
        return _parse(read_small_file(text, what), text), text
    name = aliases.get(text.lower(), text.lower())
    names = shipped_names(folder)
    if name not in names:
        raise InputError(f"unknown {folder[:-1]} {text!r}", hint=_hint(text, [*names, *aliases]))
    content = resources.files("paraplan_profiles").joinpath(folder, f"{name}.toml").read_bytes()
    return _parse(content, f"{name}.toml"), f"{name}.toml"


def _hint(text: str, names: Iterable[str]) -> str:
    known = sorted(names)
    close = get_close_matches(text.lower(), known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}, or a file"


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
        is_json = Path(name).suffix == ".json"
        data: Any = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # both parsers' errors are ValueErrors
        kind = "JSON" if Path(name).suffix == ".json" else "TOML"
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: not {kind}: {reason}") from None
    if not isinstance(data, dict):
        raise InputError(f"{name}: not a profile: an object is expected")
    return data
