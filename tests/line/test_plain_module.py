"""A hand-written loop around a model that is not from transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from line_launch import losses, run_python

SCRIPT = """
import torch
from torch import nn
import paraplan
LINE
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(32, 64)
    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

torch.manual_seed(0)
model = WRAP(Net())
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
for step in range(4):
    ids = torch.randint(0, 64, (8, 16))
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step(); schedule.step(); optimizer.zero_grad()
    print(f"loss {loss.item():.9f}\\nloss {norm.item():.9f}", flush=True)
print("loss", float(parameters[0].norm()), sum(p.numel() for p in model.parameters()), flush=True)
"""


def test_losses_norms_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    plain = SCRIPT.replace("LINE", "").replace("WRAP", "")
    line = "paraplan.enable_advanced_parallelization()"
    (tmp_path / "plain.py").write_text(plain)
    spread = SCRIPT.replace("LINE", line).replace("WRAP", "paraplan.parallelize")
    (tmp_path / "spread.py").write_text(spread)
    wanted = run_python(tmp_path, "plain.py")
    done = run_python(tmp_path, "spread.py", PARAPLAN_DEVICES="cpu:2")
    assert losses(done) == pytest.approx(losses(wanted), rel=1e-5)
    assert len(losses(done)) == 9
    assert done.stdout.split()[-1] == wanted.stdout.split()[-1], "the count of parameters"
