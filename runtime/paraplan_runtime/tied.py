"""Weights that two modules share: on one stage they stay one, across stages they are kept equal.

Of an embedding that is tied to the head and stands on another stage, each of the two stages
holds a copy. Both add up their gradients, so that the same update keeps the copies equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from paraplan_runtime.gradients import GradientStash
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.stage import StagePaths


@dataclass(frozen=True)
class TiedWeights:
    """What is tied.

    Attributes:
        names: path of each parameter that shares another's storage -> the first path of it.
        across: first paths of those whose users stand on different stages.
        modules: ids of the modules that use a tied parameter.
    """

    names: Mapping[str, str]
    across: frozenset[str]
    modules: frozenset[int]

    def name_of(self, path: str) -> str:
        """The name that ``path`` has in the whole model's ``named_parameters()``."""
        return self.names.get(path, path)

    def stages_of(self, name: str) -> int:
        """Stages that hold a copy."""
        return 2 if name in self.across else 1

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` uses a tied parameter: it then gathers with the root."""
        return any(id(inner) in self.modules for inner in module.modules())

    def exchange(self, stash: GradientStash, ranks: Ranks) -> None:
        """Add up the gradients of the copies on first and last stage."""
        group = ranks.group("pipeline")
        last = group.size() - 1
        if not self.across or group.rank() not in (0, last):
            return
        peer = dist.get_global_rank(group, last - group.rank())
        for name in sorted(self.across):
            mine = stash.of(name)
            if mine is None:
                continue
            other = torch.empty_like(mine)
            requests = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, mine.contiguous(), peer, group),
                    dist.P2POp(dist.irecv, other, peer, group),
                ]
            )
            for request in requests:
                request.wait()
            mine.add_(other)


def find_tied(model: nn.Module, stages: tuple[StagePaths, ...]) -> TiedWeights:
    """Find the parameters that stand at several paths, and where."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    names: dict[str, str] = {}
    across = set()
    modules = set()
    for same in paths.values():
        if len(same) == 1:
            continue
        names |= {path: same[0] for path in same[1:]}
        holders = {_stage_of(path, stages) for path in same}
        if len(holders) > 1:
            across.add(same[0])
        modules |= {id(model.get_submodule(path.rpartition(".")[0])) for path in same}
    return TiedWeights(names, frozenset(across), frozenset(modules))


def _stage_of(path: str, stages: tuple[StagePaths, ...]) -> int:
    for stage in stages:
        for module in stage.modules:
            if path.startswith(f"{module}."):
                return stage.index
    return 0
