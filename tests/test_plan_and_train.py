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
