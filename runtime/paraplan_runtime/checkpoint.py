"""Training state on disk, through ``torch.distributed.checkpoint``: any plan resumes any other's.

Each rank writes its own shards as safetensors, and rank 0 ``training.json`` with what is not a
tensor. (torch's own default keeps its index in a pickle, which can run code when it is read.)
A checkpoint is written beside its final name and renamed when whole; only then does the file
``latest`` name it. A crash in the middle of a save leaves the one before.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from paraplan.errors import InputError
from paraplan_runtime.checkpoint_folder import begin, find_latest, publish, unfinished_folder
from paraplan_runtime.checkpoint_tensors import (
    file_numbers,
    make_optimizer_state,
    model_tensors,
    on_host,
    optimizer_tensors,
)
from paraplan_runtime.model import ParallelModel


@dataclass(frozen=True)
class Restored:
    """What ``load`` found beside the tensors.

    Attributes:
        step: the step that the checkpoint was saved at.
        extra: what the script stored (its position in the data, for instance).
    """

    step: int
    extra: dict[str, Any]


class Checkpointer:
    """Saves and loads training state in one folder.

    Args:
        folder: shared by all ranks.
        model: what ``parallelize`` returned.
        optimizer: over ``model.parameters()``.
        scheduler: with a ``state_dict`` of plain numbers, or None.
        scaler: a ``torch.amp.GradScaler``, or None.
        keep: how many checkpoints to keep; None keeps all.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ParallelModel,
        optimizer: Any,
        scheduler: Any = None,
        *,
        scaler: Any = None,
        keep: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise InputError(f"keep({keep}) must be at least 1")
        self._folder = Path(folder)
        self._model = model
        self._optimizer = optimizer
        self._stateful = {"scheduler": scheduler, "scaler": scaler}
        self._keep = keep
        self._pending: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Saving runs beside training: its messages need a group of their own.
        self._group = dist.new_group(backend="gloo")

    def save(
        self, step: int, extra: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> None:
        """Save the state; all ranks call it together.

        The tensors are copied before this returns. They are written in the background, and the
        checkpoint becomes the latest as soon as every rank has written; a failure is raised by
        the next ``save`` or ``wait``.

        Args:
            step: names the checkpoint.
            extra: plain data of the script, stored as JSON.
        """
        self.wait()
        described = self._describe(step, extra or {})
        if dist.get_rank() == 0:
            begin(self._folder, step)
        dist.barrier(group=self._group)
        tensors = model_tensors(self._model) | optimizer_tensors(self._model, self._optimizer)
        tensors |= self._random_tensors()
        numbers = file_numbers(tensors, self._group)
        # As dcp.async_save does; its own copying fails on DTensors that are views (torch 2.13).
        staged = {name: on_host(tensor) for name, tensor in tensors.items()}
        self._pending = self._writer.submit(self._write, step, staged, numbers, described)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is the latest checkpoint; all ranks call it together."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.result()

    def _write(
        self,
        step: int,
        staged: dict[str, Any],
        numbers: dict[str, int],
        described: Mapping[str, Any],
    ) -> None:
        target = unfinished_folder(self._folder, step)
        writer = HuggingFaceStorageWriter(
            str(target), fqn_to_index_mapping=numbers, save_distributed=True
        )
        # Returns when every rank has written, or raises on every rank.
        write_tensors(staged, storage_writer=writer, process_group=self._group)
        if dist.get_rank() == 0:
            publish(self._folder, step, described, self._keep)
        dist.barrier(group=self._group)

    def _describe(self, step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        """What is not a tensor; collective."""
        described = {
            "step": step,
            "extra": dict(extra),
            "groups": self._groups(),
            "values": self._plain_states(),
            "layout": self._model.plan.layout.model_dump(mode="json"),
            "loss_scale": self._model.loss_scale,
            "random": _host_random(),
        }
        for name, stateful in self._stateful.items():
            described[name] = None if stateful is None else stateful.state_dict()
        try:
            json.dumps(described)
        except (TypeError, ValueError) as error:
            raise InputError(f"checkpoint: {error}: only plain data can be stored") from None
        return described

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the names of the whole model's parameters; collective."""
        names = {id(parameter.value): parameter.name for parameter in self._model.own}
        groups = []
        for group in self._optimizer.param_groups:
            mine = [names[id(parameter)] for parameter in group["params"]]
            everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine, group=self._group)
            options = {key: _plain(value) for key, value in group.items() if key != "params"}
            union = dict.fromkeys(name for rank in everyone for name in rank)
            groups.append({"options": options, "names": list(union)})
        return groups

    def _plain_states(self) -> dict[str, dict[str, Any]]:
        """States of the optimizer that are no tensors, by parameter; collective."""
        mine: dict[str, dict[str, Any]] = {}
        for parameter in self._model.own:
            state = self._optimizer.state.get(parameter.value, {})
            plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
            if plain:
                mine[parameter.name] = plain
        everyone: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine, group=self._group)
        return {name: state for rank in everyone for name, state in rank.items()}

    def _random_tensors(self) -> dict[str, torch.Tensor]:
        rank, (host, device) = dist.get_rank(), self._model.random_state.state
        found = {"random.host": torch.get_rng_state(), f"random.model.{rank}": host}
        if device is not None:
            found[f"random.model_device.{rank}"] = device
            found[f"random.device.{rank}"] = torch.cuda.get_rng_state()
        return found

    def load(self) -> Restored | None:
        """Load the latest checkpoint, saved under this plan or any other; None if there is none.

        Raises:
            InputError: it is damaged or of another model or optimizer.
        """
        found = find_latest(self._folder)
        if found is None:
            return None
        source, described = found
        reader = HuggingFaceStorageReader(str(source))
        try:
            sizes = {
                name: tuple(about.size)  # type: ignore[union-attr]
                for name, about in reader.read_metadata().state_dict_metadata.items()
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{source}: the checkpoint is damaged: {error}") from None
        tensors = model_tensors(self._model)
        _check_sizes(source, tensors, sizes)
        self._restore_groups(source, described)
        scalars = {name for name, size in sizes.items() if size == (1,)}
        tensors |= make_optimizer_state(self._model, self._optimizer, list(sizes), scalars)
        _check_sizes(source, tensors, sizes)
        drawn = {k: v.clone() for k, v in self._random_tensors().items() if k in sizes}
        # The planner reads the metadata once more, from the same reader.
        read_tensors(tensors | drawn, storage_reader=reader, process_group=self._group)
        self._restore_random(described, drawn)
        for name, stateful in self._stateful.items():
            if stateful is not None and described.get(name) is not None:
                stateful.load_state_dict(described[name])
        self._model.loss_scale = described["loss_scale"]
        return Restored(step=described["step"], extra=described["extra"])

    def _restore_groups(self, source: Path, described: Mapping[str, Any]) -> None:
        groups, saved = self._optimizer.param_groups, described["groups"]
        names = {id(parameter.value): parameter.name for parameter in self._model.own}
        if len(groups) != len(saved):
            raise InputError(
                f"{source}: the optimizer has {len(groups)} parameter groups, that of the "
                f"checkpoint {len(saved)}"
            )
        for number, (group, before) in enumerate(zip(groups, saved, strict=True)):
            held = set(before["names"])
            strange = [n for p in group["params"] if (n := names[id(p)]) not in held]
            if strange:
                raise InputError(
                    f"{source}: parameter {strange[0]!r} was not in group {number} of the optimizer"
                )
            group.update(before["options"])
        for parameter in self._model.own:
            self._optimizer.state[parameter.value].update(
                described["values"].get(parameter.name, {})
            )

    def _restore_random(
        self, described: Mapping[str, Any], drawn: Mapping[str, torch.Tensor]
    ) -> None:
        """The host's generators always; those of the model only where ranks mean the same."""
        torch.set_rng_state(drawn["random.host"])
        _restore_host_random(described["random"])
        rank = dist.get_rank()
        own = drawn.get(f"random.model.{rank}")
        if described["layout"] != self._model.plan.layout.model_dump(mode="json") or own is None:
            return
        device = drawn.get(f"random.model_device.{rank}", self._model.random_state.state[1])
        self._model.random_state.state = (own, device)
        if f"random.device.{rank}" in drawn:
            torch.cuda.set_rng_state(drawn[f"random.device.{rank}"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _check_sizes(
    source: Path, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, tensor in tensors.items():
        if name not in sizes:
            raise InputError(f"{source}: the checkpoint has no {name!r}: another model?")
        if tuple(tensor.shape) != sizes[name]:
            raise InputError(
                f"{source}: {name!r} has shape {sizes[name]}, {tuple(tensor.shape)} in this model"
            )


def _host_random() -> dict[str, Any]:
    """Python's and NumPy's generators, which may decide the data order."""
    version, numbers, gauss = random.getstate()
    found: dict[str, Any] = {"python": [version, list(numbers), gauss]}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = [kind, keys.tolist(), *rest]
    return found


def _restore_host_random(found: Mapping[str, Any]) -> None:
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in found:
        numpy.random.set_state(tuple(found["numpy"]))
