"""The ordinary checkpoint of transformers: written shard by shard, read slice by slice.

No rank ever holds the whole model: writing gathers one tensor at a time, reading takes from the
safetensors files only what this rank keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paraplan.errors import InputError
from paraplan.files import write_atomically
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.state import Entry, Source, check_shape, fill

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
    """Give the written files their names, and an index if there are several.

    What an earlier model left there goes first: transformers would prefer it.
    """
    for old in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        old.unlink(missing_ok=True)
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet; calling it reads it whole.

    Attributes:
        path: the file.
        name: its key there.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        """The whole tensor."""
        whole: torch.Tensor = self.slices()[tuple(slice(0, size) for size in self.shape)]
        return whole

    def slices(self) -> Any:
        """What reads only the part that it is indexed by."""
        from safetensors import safe_open

        opened: Any = safe_open(self.path, framework="pt")
        return opened.get_slice(self.name) if self.shape else opened.get_tensor(self.name)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """What a safetensors file holds.

    Raises:
        InputError: it cannot be read as one.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is not a safetensors file: other files can run code",
            hint="convert it once with save_pretrained",
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = []
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                shape = tuple(file.get_slice(name).get_shape())
                empty = file.get_slice(name)[:0] if shape else file.get_tensor(name)
                found.append(StoredTensor(path, name, shape, empty.dtype))
            return found
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None


def _stored_in(folder: Path) -> dict[str, StoredTensor]:
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        files = sorted(set(index["weight_map"].values()))
    elif (folder / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        pickled = next(folder.glob("*.bin"), None)
        why = "" if pickled is None else f" ({pickled.name} could run code and is not read)"
        raise InputError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}{why}")
    return {stored.name: stored for file in files for stored in stored_tensors(folder / file)}


def read_safetensors(
    folder: Path, entries: Sequence[Entry], aliases: Mapping[str, str], ranks: Ranks
) -> None:
    """Read this rank's shards.

    Args:
        aliases: key -> key of the tied tensor that may be stored in its place.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    where = _stored_in(folder)
    sources: dict[str, Source] = {}
    for entry in entries:
        same = {entry.path, aliases.get(entry.path, entry.path)}
        same |= {key for key, first in aliases.items() if first in same}
        stored = next((where[key] for key in sorted(same) if key in where), None)
        if stored is None:
            raise InputError(
                f"{folder}: no tensor {entry.path!r} in the checkpoint",
                hint="from_pretrained inside parameters_on_meta initialises what is missing, and "
                "renames and merges tensors as transformers does",
            )
        check_shape(entry, stored.shape)
        sources[entry.path] = Source(stored.slices, stored.dtype)
    fill(entries, sources, ranks)
