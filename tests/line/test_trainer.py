"""The Trainer, with and without adapters, and accelerate: the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from line_launch import EXAMPLES, losses, make_plan, run_python, without_line
from safetensors.torch import load_file

ACCELERATE = """
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
torch.moreh.option.enable_advanced_parallelization()
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained("./mistral-small")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(torch.load("mistral_dataset.pt"), batch_size=8, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch, labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.9f}", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer")
    done = run_python(made, str(EXAMPLES / "make_inputs.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    (made / "accelerated.py").write_text(ACCELERATE)
    plain = ACCELERATE.replace("torch.moreh.option.enable_advanced_parallelization()", "")
    (made / "plain_accelerated.py").write_text(plain)
    return made


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("data_shard=4", ()),
        ("tensor=2,pipeline=2", ()),
        ("data_shard=4", ("--accumulate", "2")),
        ("data_shard=4", ("--lora",)),
        ("pipeline=2,data_shard=2", ("--lora",)),
    ],
)
def test_trainer(folder: Path, layout: str, more: tuple[str, ...]) -> None:
    plan = make_plan(folder, "mistral-small", layout)
    script = str(EXAMPLES / "train_llm.py")
    plain = str(without_line(folder, "train_llm.py"))
    wanted = losses(run_python(folder, plain, "--output", "plain", *more))
    variables = {"PARAPLAN_DEVICES": "cpu:4", "PARAPLAN_PLAN": str(plan)}
    done = run_python(folder, script, "--output", "spread", *more, **variables)
    assert losses(done) == pytest.approx(wanted, rel=1e-5)
    name = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    saved, alone = (load_file(folder / where / name) for where in ("spread", "plain"))
    assert saved.keys() == alone.keys()
    for key, tensor in saved.items():
        # By norm: Adam divides by the gradient's size, so that single elements with gradients
        # near zero move by rounding alone.
        assert (tensor - alone[key]).norm() <= 1e-5 * alone[key].norm(), key


@pytest.mark.matrix
def test_accelerate(folder: Path) -> None:
    wanted = losses(run_python(folder, "plain_accelerated.py"))
    done = run_python(folder, "accelerated.py", PARAPLAN_DEVICES="cpu:4")
    assert len(wanted) == 4
    assert losses(done) == pytest.approx(wanted, rel=1e-5)
