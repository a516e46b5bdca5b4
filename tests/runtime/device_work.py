"""What each rank does in the tests of the virtual single device; each returns plain data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parity_cases import LENGTH, VOCABULARY, build, compute_loss, make_batch, make_plan, train
from torch import nn

from paraplan.errors import InputError
from paraplan.layout import Layout, Precision

ODD_ROWS = (8, 5, 3, 1, 9, 16)
"""Sequences of the steps' batches where the plan is for 8."""

TWO_RANK_LAYOUTS = {
    "data": Layout(data_shard=2, zero_stage=2, micro_batch_size=2, micro_batches=2),
    "pipeline": Layout(pipeline=2, schedule="1f1b", micro_batch_size=2, micro_batches=4),
    "interleaved": Layout(
        pipeline=2,
        schedule="interleaved-1f1b",
        virtual_stages=2,
        micro_batch_size=2,
        micro_batches=4,
    ),
    "tensor": Layout(tensor=2, micro_batch_size=4, micro_batches=2),
    "sequence": Layout(tensor=2, sequence_parallel=True, micro_batch_size=4, micro_batches=2),
}


def parallel(name: str, layout: str, precision: Precision = "fp32") -> Any:
    from paraplan_runtime import parallelize

    plan = make_plan(name, TWO_RANK_LAYOUTS[layout], precision=precision)
    return parallelize(build(name), plan, device_type="cpu")


def odd_batches(layout: str) -> dict[str, Any]:
    return train(parallel("llama", layout), rows=ODD_ROWS.__getitem__)


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a script may read from an output, in training and in evaluation."""
    batch = make_batch(7)
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.train()
    trained = model(**batch)
    result = {"train loss": trained[0].detach(), "train logits": trained.logits.detach()}
    model.eval()
    with torch.no_grad():
        evaluated = model(**batch)
        result |= {"loss": evaluated["loss"], "logits": evaluated.logits}
        result["unlabelled"] = model(**unlabelled)[0]
    assert model(**unlabelled).loss is None
    return {name: value.clone() for name, value in result.items()}


def read_outputs(layout: str) -> dict[str, torch.Tensor]:
    return outputs(parallel("llama", layout))


def odd_lengths(model: nn.Module) -> dict[str, Any]:
    """Batches padded to their own longest row, as collators do: 11, 7 and 12 tokens."""
    losses, logits = [], []
    for seed, length in enumerate((11, 7, 12)):
        batch = {name: value[:, :length] for name, value in make_batch(seed).items()}
        output = model(**batch)
        output.loss.backward()
        losses.append(output.loss.item())
        logits.append(output.logits.detach())
    return {
        "losses": losses,
        "norm": nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(),
        "logits": logits,
    }


def parallel_odd_lengths(layout: str) -> dict[str, Any]:
    return odd_lengths(parallel("llama", layout))


def own_loss(model: nn.Module) -> dict[str, list[float]]:
    """A loss the script computes from the logits: here with label smoothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    losses, norms = [], []
    for step in range(4):
        batch = make_batch(step)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY),
            batch["labels"][:, 1:].reshape(-1),
            label_smoothing=0.1,
        )
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms}


def parallel_own_loss(layout: str) -> dict[str, list[float]]:
    return own_loss(parallel("llama", layout))


def different_data(layout: str) -> str:
    model = parallel("llama", layout)
    batch = make_batch(dist.get_rank())
    try:
        model(**batch)
    except InputError as error:
        return str(error)
    return "no error"


def autocast_losses(model: nn.Module) -> list[float]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [compute_loss(model, make_batch(seed), plain=False).item() for seed in range(3)]


def parallel_autocast(layout: str) -> list[float]:
    return autocast_losses(parallel("llama", layout))


def mixed_precision(layout: str) -> dict[str, Any]:
    model = parallel("llama", layout, "bf16")
    result = train(model)
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    return result | {"dtypes": dtypes}


def scaled_training(model: nn.Module) -> dict[str, Any]:
    """fp16 with a GradScaler whose first scales overflow: every rank must skip those steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
    losses, scales = [], []
    for step in range(12):
        loss = compute_loss(model, make_batch(step), plain=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return {"losses": losses, "scales": scales}


def parallel_scaled(layout: str) -> dict[str, Any]:
    return scaled_training(parallel("llama", layout, "fp16"))


def dropout(layout: str) -> dict[str, Any]:
    """Two equal halves of a batch, so that equal masks on both data ranks would show."""
    from parity_cases import MODELS

    from paraplan_runtime import parallelize
    from paraplan_runtime.gradients import local

    torch.manual_seed(3)
    source = MODELS["gpt2-dropout"]()
    plan = make_plan("gpt2", TWO_RANK_LAYOUTS[layout])
    model = parallelize(source, plan, device_type="cpu")
    half = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([half, half])
    before = torch.get_rng_state()
    logits = model(input_ids=ids).logits.detach()
    again = model(input_ids=ids).logits.detach()
    host_untouched = bool(torch.equal(before, torch.get_rng_state()))
    train(model, steps=2)
    copies = {n: t.clone() for n, t in model.state_dict().items() if "ln_" in n}
    own = {n: local(p).detach().clone() for n, p in model.named_parameters() if "ln_" in n}
    return {
        "halves differ": not torch.allclose(logits[:4], logits[4:]),
        "calls differ": not torch.allclose(logits, again),
        "host untouched": host_untouched,
        "own": own,
        "state": copies,
    }


def not_finite(layout: str) -> dict[str, Any]:
    model = parallel("llama", layout)
    loss = compute_loss(model, make_batch(0), plain=False)
    (loss * float("nan")).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    message = ""
    try:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        message = str(error)
    twice = ""
    loss = compute_loss(model, make_batch(1), plain=False)
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        twice = str(error)
    return {"norm": norm.item(), "message": message, "twice": twice}


def one_infinity(model: nn.Module, holder: int = 0) -> dict[str, Any]:
    """One element of one gradient is infinite: what a scaler does, then what clipping does.

    ``holder`` is the rank that holds the element.
    """
    from paraplan_runtime.gradients import local

    name = "model.layers.3.mlp.down_proj.weight"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for scaled in (True, False):
        loss = compute_loss(model, make_batch(0), plain=False)
        (scaler.scale(loss) if scaled else loss).backward()
        if not dist.is_initialized() or dist.get_rank() == holder:
            gradient = dict(model.named_parameters())[name].grad
            assert gradient is not None
            local(gradient).view(-1)[0] = float("inf")
        if scaled:
            scaler.step(optimizer)
            scaler.update()
            state = model.state_dict()
            skipped = all(torch.equal(state[key], before[key]) for key in before)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return {"skipped": skipped, "scale": scaler.get_scale(), "state": dict(model.state_dict())}


def stale_logits(layout: str) -> str:
    model = parallel("llama", layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(**make_batch(0))
    output.loss.backward()
    optimizer.step()
    try:
        _ = output.logits
    except InputError as error:
        return str(error)
    return "no error"


def everything(layout: str) -> dict[str, Any]:
    """All of the above in one set of processes: starting them is what costs time."""
    result: dict[str, Any] = {
        "odd": odd_batches(layout),
        "lengths": parallel_odd_lengths(layout),
        "outputs": read_outputs(layout),
        "own loss": parallel_own_loss(layout),
        "different": different_data(layout),
        "autocast": parallel_autocast(layout),
        "bf16": mixed_precision(layout),
        "scaled": parallel_scaled(layout),
        "dropout": dropout(layout),
        "not finite": not_finite(layout),
        "one infinity": one_infinity(
            parallel("llama", layout), holder=int(layout in ("pipeline", "interleaved"))
        ),
        "stale": stale_logits(layout),
    }
    return result
