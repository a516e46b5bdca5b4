"""Small models that compute their loss themselves, their plans, and what each rank does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity_cases import FAMILIES, VOCABULARY, PlainModel, make_plan
from parity_work import LAYOUTS
from torch import nn

from paraplan.plan_file import Plan

Batch = dict[str, torch.Tensor]
ROWS = (8, 5, 1, 8)
"""Sequences of each step, where the plans are for 8."""


class ReturnsPair(PlainModel):
    """As nanoGPT: the script passes targets, the model returns ``(logits, loss)``."""

    def forward(  # type: ignore[override]
        self, ids: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = super().forward(ids)
        if targets is None:
            return logits, None
        flat = logits.reshape(-1, logits.shape[-1])
        return logits, nn.functional.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)


class AddsPenalty(ReturnsPair):
    """Its loss has a second term, which no rule says how to average."""

    def forward(  # type: ignore[override]
        self, ids: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, loss = super().forward(ids, targets)
        assert loss is not None
        return logits, loss + 1e-3 * logits.square().mean()


_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def _bert(head: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(vocab_size=VOCABULARY, **_ENCODER)
    return getattr(transformers, f"BertFor{head}")(config)  # type: ignore[no-any-return]


def _llama_classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {name: value for name, value in _ENCODER.items() if not name.endswith("prob")}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **_ENCODER))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=4,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pair": ReturnsPair,
    "bert": lambda: _bert("MaskedLM"),
    "bert-classifier": lambda: _bert("SequenceClassification"),
    "llama-classifier": _llama_classifier,
    "vit": _vit,
    "t5": _t5,
}
FAMILIES.update(
    {
        "pair": FAMILIES["plain"],
        "penalty": FAMILIES["plain"],
        "bert": (("bert.embeddings",), "bert.encoder.layer", ("cls",)),
        "bert-classifier": (
            ("bert.embeddings",),
            "bert.encoder.layer",
            ("bert.pooler", "classifier"),
        ),
        "llama-classifier": (("model.embed_tokens",), "model.layers", ("model.norm", "score")),
        "vit": (("vit.embeddings",), "vit.layers", ("vit.layernorm", "classifier")),
    }
)


def make_batch(name: str, seed: int, rows: int) -> Batch:
    """Random inputs; each row has another number of targets."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=draw)
    ignored = torch.rand(rows, 12, generator=draw) < torch.rand(rows, 1, generator=draw)
    classes = torch.randint(0, 3, (rows,), generator=draw)
    if name == "pair":
        return {"ids": ids, "targets": ids.roll(-1, dims=1).masked_fill(ignored, -1)}
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draw), "labels": classes}
    if name.endswith("classifier"):
        return {"input_ids": ids, "labels": classes}
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}


def build(name: str) -> nn.Module:
    torch.manual_seed(4)
    return MODELS[name]()


def train(name: str, model: nn.Module) -> dict[str, list[float]]:
    """Accumulates two batches a step, clips, and evaluates at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses, norms = [], []
    for step, rows in enumerate(ROWS):
        for part in range(2):
            output = model(**make_batch(name, 10 * step + part, rows))
            loss = output[1] if isinstance(output, tuple) else output.loss
            (loss / 2).backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        output = model(**make_batch(name, 99, 6))
    logits, loss = (output[0], output[1]) if isinstance(output, tuple) else output[1::-1]
    losses += [loss.item(), torch.square(logits).sum().item()]
    return {"losses": losses, "norms": norms}


def t5_plan(layout: str) -> Plan:
    """As the planner writes it: two runs of layers with modules between, all recomputed."""
    encoder = tuple(f"encoder.block.{layer}" for layer in range(4))
    decoder = tuple(f"decoder.block.{layer}" for layer in range(4))
    plan = make_plan("t5", LAYOUTS[layout])
    stage = plan.stages[0].model_copy(
        update={
            "modules": (
                "encoder.embed_tokens",
                *encoder,
                "encoder.final_layer_norm",
                "decoder.embed_tokens",
                *decoder,
                "decoder.final_layer_norm",
                "lm_head",
            ),
            "layers": 8,
            "recompute": ("full",) * 8,
        }
    )
    return plan.model_copy(update={"stages": (stage,)})


def train_under(cases: list[tuple[str, str]]) -> list[dict[str, list[float]]]:
    from paraplan_runtime import parallelize

    results = []
    for name, layout in cases:
        plan = t5_plan(layout) if name == "t5" else make_plan(name, LAYOUTS[layout])
        results.append(train(name, parallelize(build(name), plan, device_type="cpu")))
    return results


def refused_loss() -> str:
    from paraplan.errors import InputError
    from paraplan_runtime import parallelize

    model = parallelize(AddsPenalty(), make_plan("penalty", LAYOUTS["pipeline-2"]))
    try:
        model(**make_batch("pair", 0, 8))
    except InputError as error:
        return str(error)
    return "no error"
