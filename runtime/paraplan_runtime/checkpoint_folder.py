"""The folder of checkpoints: which is the latest, whether it is whole, which to delete.

latest                  names the newest whole checkpoint; replaced atomically, last of all
step-40/training.json   what is not a tensor, and how large each file was written
step-40/*.safetensors   each rank's shards
.step-50/               being written
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paraplan.errors import InputError
from paraplan.files import write_atomically

LATEST = "latest"
TRAINING_FILE = "training.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?\Z")


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write into; what crashed saves left is removed."""
    for old in folder.glob(".step-*"):
        shutil.rmtree(old, ignore_errors=True)
    unfinished = unfinished_folder(folder, step)
    unfinished.mkdir(parents=True)
    return unfinished


def unfinished_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written."""
    return folder / f".step-{step}"


def publish(folder: Path, step: int, described: Mapping[str, Any], keep: int | None) -> None:
    """Make a written checkpoint the latest, and delete all but the ``keep`` newest.

    A crash at any point leaves ``latest`` naming a whole one.
    """
    unfinished = unfinished_folder(folder, step)
    files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
    whole = {"format": FORMAT, **described, "files": files}
    write_atomically(unfinished / TRAINING_FILE, json.dumps(whole, indent=1))
    final, again = folder / f"step-{step}", 0
    while final.exists():  # a run that went back and came here once more
        again += 1
        final = folder / f"step-{step}-{again}"
    unfinished.rename(final)
    _flush(folder)
    write_atomically(folder / LATEST, final.name)
    _flush(folder)
    if keep is not None:
        for old in _checkpoints(folder)[:-keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Let renamed files survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found, key=lambda item: item[1].stat().st_mtime_ns)]


def find_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest checkpoint and what ``training.json`` says; None if there is none.

    Raises:
        InputError: it is not whole.
    """
    marker = folder / LATEST
    if not marker.is_file():
        return None
    name = marker.read_text(errors="replace").strip()
    if not _NAME.match(name):
        raise InputError(f"{marker} names {name[:40]!r}, which is no checkpoint")
    source = folder / name
    try:
        described = json.loads((source / TRAINING_FILE).read_text())
        files = dict(described["files"])
        newer = described["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(source, f"{TRAINING_FILE}: {type(error).__name__}: {error}") from None
    if newer:
        raise InputError(
            f"{source} has format {described['format']}, this version reads up to {FORMAT}"
        )
    for file, size in files.items():
        path = source / file
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise _damaged(source, f"{file} {state}, {size} were written")
    return source, described


def _damaged(source: Path, why: str) -> InputError:
    others = [path.name for path in _checkpoints(source.parent) if path != source]
    hint = "start anew in another folder"
    if others:
        hint = f"write {others[-1]!r} into {source.parent / LATEST} to resume from that one"
    return InputError(f"{source}: the checkpoint is damaged: {why}", hint=hint)
