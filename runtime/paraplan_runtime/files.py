"""The ordinary checkpoint of transformers: written shard by shard, read slice by slice.

No rank ever holds the whole model: writing gathers one tensor at a time, reading takes from the
safetensors files only what this rank keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paraplan.errors import InputError
from paraplan.plan_file import write_atomically
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.state import Entry, check_shape, regions

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""transformers' own default is 50 GB; smaller files keep rank 0's memory small."""


def write_safetensors(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_shard_size: int
) -> None:
    """Write whole tensors, as they come, into files of at most ``max_shard_size`` bytes.

    All ranks iterate, because gathering is a collective; rank 0 writes.
    """
    from safetensors.torch import save_file

    writes = dist.get_rank() == 0
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f".part-{len(files)}", metadata={"format": "pt"})
            files.append(list(shard))
            shard.clear()

    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors:
        if not writes:
            continue
        held = sum(value.nbytes for value in shard.values())
        if held + tensor.nbytes > max_shard_size:
            flush()
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        total += tensor.nbytes
    if writes:
        flush()
        _publish(folder, files, total)
    dist.barrier()


def _publish(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the written files their names, and an index if there are several."""
    if len(files) == 1:
        (folder / ".part-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f".part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True))


def _weight_map(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        return {name: folder / file for name, file in index["weight_map"].items()}
    if (folder / SINGLE_FILE).is_file():
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
    raise InputError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")


@torch.no_grad()
def read_safetensors(
    folder: Path, entries: Sequence[Entry], aliases: Mapping[str, str], ranks: Ranks
) -> None:
    """Read this rank's shards.

    Args:
        aliases: key -> key of the tied tensor that may be stored in its place.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    from safetensors import safe_open

    where = _weight_map(folder)
    opened: dict[Path, Any] = {}
    for entry in entries:
        same = {entry.path, aliases.get(entry.path, entry.path)}
        same |= {key for key, first in aliases.items() if first in same}
        name = next((key for key in sorted(same) if key in where), None)
        if name is None:
            raise InputError(f"{folder}: no tensor {entry.path!r} in the checkpoint")
        path = where[name]
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")
        stored = opened[path].get_slice(name)
        check_shape(entry, tuple(stored.get_shape()))
        for index, view in regions(entry, ranks):
            if view.numel():
                view.copy_(stored[index] if index else opened[path].get_tensor(name))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build a model without its parameters' memory; its buffers are computed as usual.

    ``with parameters_on_meta(): model = ...``, then ``parallelize`` and ``load_pretrained``.
    Each parameter leaves the host as soon as it is registered.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
