"""Models built as usual and on meta, and what each rank does to make them real."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import MODELS, build, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS
from torch import nn


class OddModel(nn.Module):
    """Initialised in every way that the recorder has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(5, 7) * 0.3)
        self.orthogonal = nn.Parameter(torch.empty(40, 40))
        nn.init.orthogonal_(self.orthogonal)
        self.linear = nn.Linear(9, 11)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        self.table = nn.Embedding(12, 6, padding_idx=2)
        shared = nn.Parameter(torch.empty(6, 12))
        self.first = shared
        nn.init.kaiming_normal_(shared)
        self.second = shared
        self.copied = nn.Linear(6, 12, bias=False)
        self.copied.weight = nn.Parameter(self.table.weight.detach().clone())
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        )
        with torch.no_grad():
            self.first[:, 3].mul_(2).add_(self.scaled[0, :6])
            self.scaled[self.scaled > 0.2] = 0
            self.table.weight[1:3] += torch.rand(2, 6)
        self.register_buffer("sums", self.first.detach().sum(0))
        self.sparse = nn.Linear(3, 3)
        nn.init.sparse_(self.sparse.weight, 0.3)
        self.seeded = nn.Linear(3, 3)
        self.seeded.weight.data.normal_(generator=torch.Generator().manual_seed(5))
        if self.linear.weight.data.abs().max().item() > 0:
            self.linear.bias.data.fill_(float(self.linear.weight.data.sum()))
        self.half = nn.Linear(4, 4).to(torch.bfloat16)
        self.many = nn.ParameterList([nn.Parameter(torch.rand_like(self.scaled)) for _ in range(2)])
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.apply(self._again)

    def _again(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):
            module.weight.data.normal_(1, 0.1)


def fresh(name: str, seed: int = 3) -> nn.Module:
    """The model's own random initialisation."""
    torch.manual_seed(seed)
    return OddModel() if name == "odd" else MODELS[name]()


def initialise(cases: list[tuple[str, str]]) -> list[dict[str, torch.Tensor]]:
    """The whole state that ranks draw shard by shard, for each model and layout."""
    from paraplan_runtime import parallelize, parameters_on_meta

    states = []
    for name, layout in cases:
        with parameters_on_meta():
            source = fresh(name)
        model = parallelize(source, make_plan(name, LAYOUTS[layout]), device_type="cpu")
        states.append(model.state_dict())
    return states


def pretrain(name: str, layouts: list[str], folder: str) -> list[dict[str, Any]]:
    """State and loss of ``from_pretrained`` read slice by slice."""
    from paraplan_runtime import parallelize, parameters_on_meta

    results = []
    for layout in layouts:
        with parameters_on_meta():
            source = type(build(name)).from_pretrained(folder)  # type: ignore[attr-defined]
        model = parallelize(source, make_plan(name, LAYOUTS[layout]), device_type="cpu").train()
        loss = compute_loss(model, make_batch(0), plain=False)
        loss.backward()
        results.append({"state": model.state_dict(), "loss": loss.item()})
    return results


def differ(name: str) -> str:
    """What a rank says whose seed is not that of the others."""
    import torch.distributed as dist

    from paraplan.errors import InputError
    from paraplan_runtime import parallelize, parameters_on_meta

    with parameters_on_meta():
        source = fresh(name, seed=dist.get_rank())
    try:
        parallelize(source, make_plan(name, LAYOUTS["data-shard-2"]), device_type="cpu")
    except InputError as error:
        return str(error)
    return ""
