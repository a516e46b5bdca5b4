"""Training state on disk, through ``torch.distributed.checkpoint``: any plan resumes any other's.

A checkpoint is a folder ``step-N``: model and optimizer tensors as torch writes them, each rank
its own shards, and ``training.json`` with what is not a tensor. It is written beside its final
name and renamed when whole; only then does the file ``latest`` name it. A crash in the middle
of a save leaves the one before.

Tensors are stored in the model's own shapes. A fused weight, whose parts the tensor ranks split
one by one, is stored as its parts (``name#0``, ``name#1``, ..), so that other degrees can read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.tensor import DTensor, Shard

from paraplan.errors import InputError
from paraplan.plan_file import write_atomically
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.tensor import ParameterSplit

LATEST = "latest"
TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class Restored:
    """What ``load_checkpoint`` found beside the tensors.

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
    """

    def __init__(
        self, folder: str | Path, model: ParallelModel, optimizer: Any, scheduler: Any = None
    ) -> None:
        self._folder = Path(folder)
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._pending: Future[Any] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Saving runs beside training: its messages need a group of their own.
        self._group = dist.new_group(backend="gloo")

    def save(
        self, step: int, extra: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> None:
        """Save the state; all ranks call it together.

        The tensors are copied before this returns; writing goes on in the background, and a
        failure of it is raised by the next ``save`` or ``wait``.

        Args:
            step: names the checkpoint.
            extra: plain data of the script, stored as JSON.
        """
        self.wait()
        unfinished = self._folder / f".step-{step}"
        if dist.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write_atomically(unfinished / TRAINING_FILE, self._describe(step, extra or {}))
        else:
            self._groups()  # takes part in what rank 0 gathers
        dist.barrier(group=self._group)
        tensors = model_tensors(self._model) | optimizer_tensors(self._model, self._optimizer)
        staged = {name: on_host(tensor) for name, tensor in tensors.items()}
        # As dcp.async_save does; its own copying fails on DTensors that are views (torch 2.13).
        self._pending = self._writer.submit(
            write_tensors,
            staged | self._random_tensors(),
            checkpoint_id=unfinished,
            process_group=self._group,
        )
        self._step = step
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the last save and publish it; all ranks call it together."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.result()
        # Every rank has written before any may read.
        dist.barrier(group=self._group)
        if dist.get_rank() == 0:
            final = self._folder / f"step-{self._step}"
            shutil.rmtree(final, ignore_errors=True)
            (self._folder / f".step-{self._step}").rename(final)
            write_atomically(self._folder / LATEST, final.name)
        dist.barrier(group=self._group)

    def _describe(self, step: int, extra: Mapping[str, Any]) -> str:
        described = {
            "step": step,
            "extra": dict(extra),
            "groups": self._groups(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "layout": self._model.plan.layout.model_dump(mode="json"),
        }
        try:
            return json.dumps(described, indent=1)
        except TypeError as error:
            raise InputError(f"checkpoint: {error}: only plain data can be stored") from None

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

    def _random_tensors(self) -> dict[str, torch.Tensor]:
        return {
            "random.host": torch.get_rng_state(),
            f"random.model.{dist.get_rank()}": self._model.random_state.state[0],
        }

    def load(self) -> Restored | None:
        """Load the latest checkpoint, saved under this plan or any other; None if there is none.

        Raises:
            InputError: it is damaged or of another model.
        """
        marker = self._folder / LATEST
        if not marker.is_file():
            return None
        source = self._folder / marker.read_text().strip()
        try:
            described = json.loads((source / TRAINING_FILE).read_text())
            names = FileSystemReader(source).read_metadata().state_dict_metadata
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: cannot read the checkpoint: {error}") from None
        tensors = model_tensors(self._model)
        missing = sorted(set(tensors) - set(names))
        if missing:
            raise InputError(f"{source}: the checkpoint has no {missing[0]!r}: another model?")
        tensors |= self._empty_optimizer(described["groups"], names)
        random = {k: v.clone() for k, v in self._random_tensors().items() if k in names}
        read_tensors(tensors | random, checkpoint_id=source, process_group=self._group)
        torch.set_rng_state(random["random.host"])
        same = described["layout"] == self._model.plan.layout.model_dump(mode="json")
        own = random.get(f"random.model.{dist.get_rank()}")
        if same and own is not None:
            self._model.random_state.state = (own, self._model.random_state.state[1])
        if self._scheduler is not None and described["scheduler"] is not None:
            self._scheduler.load_state_dict(described["scheduler"])
        return Restored(step=described["step"], extra=described["extra"])

    def _empty_optimizer(
        self, groups: list[dict[str, Any]], names: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Give the optimizer states of the right shapes and return where to read them to."""
        own = {parameter.name: parameter.value for parameter in self._model.own}
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(saved["options"])
        for full in names:
            prefix, _, rest = full.partition(".")
            if prefix != "optimizer":
                continue
            name, _, key = rest.partition("#")[0].rpartition(".")
            if name not in own or key in self._optimizer.state[own[name]]:
                continue
            scalar = len(names[full].size) == 0
            value = torch.zeros((), dtype=torch.float32) if scalar else torch.zeros_like(own[name])
            self._optimizer.state[own[name]][key] = value
        return optimizer_tensors(self._model, self._optimizer)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def model_tensors(model: ParallelModel) -> dict[str, torch.Tensor]:
    """This rank's parameters and persistent buffers as they are stored."""
    result: dict[str, torch.Tensor] = {}
    for parameter in model.own:
        split = model.fused.get(parameter.name)
        result |= stored(f"model.{parameter.name}", parameter.value, split, model)
    for entry in model.entries:
        if not isinstance(entry.value, nn.Parameter):
            result[f"model.{entry.path}"] = entry.value
    return result


def optimizer_tensors(model: ParallelModel, optimizer: Any) -> dict[str, torch.Tensor]:
    """This rank's optimizer state as it is stored."""
    result: dict[str, torch.Tensor] = {}
    for parameter in model.own:
        split = model.fused.get(parameter.name)
        for key, value in optimizer.state.get(parameter.value, {}).items():
            if isinstance(value, torch.Tensor):
                name = f"optimizer.{parameter.name}.{key}"
                result |= stored(name, value, split, model)
    return result


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that training does not change."""
    if isinstance(tensor, DTensor):
        copy = tensor.to_local().to("cpu", copy=True).contiguous()
        return DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return tensor.detach().to("cpu", copy=True)


def stored(
    name: str, value: torch.Tensor, split: ParameterSplit | None, model: ParallelModel
) -> dict[str, torch.Tensor]:
    """A tensor under its name, or the parts of a fused one; they share its memory."""
    value = value.detach()
    if split is None or value.ndim == 0:  # AdamW's step count
        return {name: value}
    if not isinstance(value, DTensor):
        parts = value.chunk(split.parts, dim=split.dimension)
        return {f"{name}#{number}": part for number, part in enumerate(parts)}
    local, dimension = value.to_local(), split.dimension
    shape, placements = list(value.shape), list(value.placements)
    if model.plan.layout.tensor > 1:
        views = [local.select(dimension, part) for part in range(split.parts)]
        placements[-1] = Shard(dimension)
        del shape[dimension]
    else:
        shape[dimension] //= split.parts
        views = list(torch.split(local, shape[dimension], dim=dimension))
    stride = torch.empty(shape, device="meta").stride()
    return {
        f"{name}#{part}": DTensor.from_local(
            view,
            value.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )
        for part, view in enumerate(views)
    }
