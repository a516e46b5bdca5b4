"""From `plan` to training: the command's own plan file, applied by real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paraplan.cli import main

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SCRIPT = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig.from_pretrained("./tiny"))
if len(sys.argv) > 1:
    from paraplan import load_plan
    from paraplan_runtime import parallelize
    model = parallelize(model, load_plan(sys.argv[1]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
draw = torch.Generator().manual_seed(1)
for step in range(4):
    ids = torch.randint(0, 256, (8, 32), generator=draw)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if os.environ.get("RANK", "0") == "0":
        print("loss", loss.item(), flush=True)
"""


def losses(*command: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return [float(words[1]) for words in lines if words[:1] == ["loss"]]


def test_planned_layouts_train_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per-step losses within 1e-5 of one process, fp32: planned freely, and cut in two stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARAPLAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "train.py").write_text(SCRIPT)
    alone = losses("train.py")
    assert len(alone) == 4
    question = ["--model", "./tiny", "--device", "cpu", "--gpus", "2", "--seq-len", "32"]
    question += ["--global-batch", "8", "--precision", "fp32", "-q", "-o", "plan.json"]
    for fix in ([], ["--fix", "pipeline=2,recompute=full"]):
        assert main([*question, *fix]) == 0
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        together = losses(*launch, "train.py", "plan.json")
        assert together == pytest.approx(alone, rel=1e-5)


OWN_MODEL = """
import torch
from torch import nn
from torch.nn import functional

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, hidden):
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 32)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(32, 256, bias=False)
        self.head.weight = self.table.weight
    def forward(self, ids, targets=None):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        return logits, functional.cross_entropy(flat, targets.view(-1), ignore_index=-1)

def make():
    ids = torch.zeros(1, 16, dtype=torch.long)
    return Model(), {"ids": ids, "targets": ids}
"""
OWN_SCRIPT = """
import os, sys, torch
from own import Model
torch.manual_seed(0)
model = Model()
if len(sys.argv) > 1:
    from paraplan import load_plan
    from paraplan_runtime import parallelize
    model = parallelize(model, load_plan(sys.argv[1]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
draw = torch.Generator().manual_seed(1)
for step in range(4):
    ids = torch.randint(0, 256, (8, 16), generator=draw)
    targets = torch.where(torch.rand(8, 16, generator=draw) < 0.3, -1, ids)
    logits, loss = model(ids, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if os.environ.get("RANK", "0") == "0":
        print("loss", loss.item(), flush=True)
"""


def test_a_module_of_the_users_own_is_planned_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as module:callable in the folder where the command runs; returns (logits, loss)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARAPLAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(OWN_MODEL)
    (tmp_path / "train.py").write_text(OWN_SCRIPT)
    alone = losses("train.py")
    question = ["--model", "own:make", "--device", "cpu", "--gpus", "2", "--global-batch", "8"]
    question += ["--seq-len", "16", "--precision", "fp32", "-q", "-o", "plan.json"]
    assert main([*question, "--fix", "pipeline=2"]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert losses(*launch, "train.py", "plan.json") == pytest.approx(alone, rel=1e-5)
