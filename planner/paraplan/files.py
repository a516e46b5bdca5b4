"""Files that users name: read within bounds, written whole or not at all, refused in one line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paraplan.errors import InputError

MAX_FILE_BYTES = 64 * 2**20


def read_small_file(path: str | os.PathLike[str], what: str) -> bytes:
    """The bytes of a regular file of at most ``MAX_FILE_BYTES``.

    Raises:
        InputError: missing, unreadable, not a file, or too large.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise InputError(f"{path}: not a regular {what} file")
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {size} bytes is too large for a {what} file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot read the {what} file: {reason}") from None


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then a rename.

    Raises:
        InputError: the place cannot be written.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None


def describe_validation_error(error: ValidationError) -> str:
    """The first problem in one line: where it is, what stands there, what is wanted."""
    first = error.errors(include_url=False)[0]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in first["loc"]
    ).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known field"
    if first["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place} is {shortened(first['input'])}: {message}"


def shortened(value: Any) -> str:
    """A value as an error message shows it."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
