"""Traced models on disk: a second ``plan`` imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from paraplan.errors import InputError
from paraplan.files import write_atomically
from paraplan.graph import FORMAT, ModelGraph
from paraplan.models import ModelSource


def model_graph(
    source: ModelSource,
    *,
    sequence_length: int,
    compute_dtype: Literal["bfloat16", "float32"],
    tensor_degrees: Sequence[int] = (1, 2, 4, 8),
    cache_dir: Path | None = None,
) -> ModelGraph:
    """The model's graph: from the cache if it is there, else traced and put there.

    A model that is given as ``module:callable`` is traced each time, since nothing here can
    tell when its code changes.

    Args:
        cache_dir: instead of `default_cache_dir`.

    Raises:
        InputError: the model cannot be built or traced.
    """
    degrees = tuple(sorted({1, *tensor_degrees}))
    path = None
    key = trace_key(source, sequence_length, compute_dtype, degrees)
    if key is not None:
        path = (cache_dir or default_cache_dir()) / "graphs" / f"{source.name[:60]}-{key}.json"
        cached = _read(path)
        if cached is not None:
            return cached
    from paraplan.trace import trace_model

    graph = trace_model(
        source,
        sequence_length=sequence_length,
        compute_dtype=compute_dtype,
        tensor_degrees=degrees,
    )
    if path is not None:
        _write(path, graph)
    return graph


def default_cache_dir() -> Path:
    """``$PARAPLAN_CACHE``, else ``paraplan`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("PARAPLAN_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "paraplan"


def trace_key(
    source: ModelSource,
    sequence_length: int,
    compute_dtype: str,
    tensor_degrees: Sequence[int],
) -> str | None:
    """Changes with everything that the graph depends on; None for a model that runs own code."""
    if source.kind != "config" or source.trust_remote_code:
        return None
    parts = [
        FORMAT,
        source_digest("trace*.py"),
        source.name,
        source.config_sha256,
        sequence_length,
        compute_dtype,
        tuple(sorted({1, *tensor_degrees})),
        version("torch"),
        version("transformers"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@cache
def source_digest(pattern: str) -> str:
    """Hash of this package's own source files of a name, such as ``trace*.py``."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> ModelGraph | None:
    """The cached graph, or None if it is not there or not whole."""
    try:
        return ModelGraph.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None


def _write(path: Path, graph: ModelGraph) -> None:
    """Put the graph into the cache; a place that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, graph.model_dump_json(exclude_defaults=True))
    except (OSError, InputError):
        return
