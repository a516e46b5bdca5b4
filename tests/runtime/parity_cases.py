"""Small models, plans and one training loop, for one process and for many alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from paraplan.layout import Layout, Precision, Recompute, mesh_axes
from paraplan.plan_file import Plan
from paraplan.plan_parts import (
    Breakdown,
    ClusterInfo,
    MemoryParts,
    ModelInfo,
    Prediction,
    Proof,
    Stage,
    TimeBasis,
    Workload,
)

ROWS = 8
LENGTH = 12
VOCABULARY = 64
STEPS = 6
ACCUMULATE = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _causal_lm(name: str, **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**_COMMON | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)  # type: ignore[no-any-return]


def _gpt2(dropout: float = 0.0) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


class PlainAttention(nn.Module):
    """Causal attention with heads of 8, as many as the projections are wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PlainMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(hidden)))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PlainAttention(width)
        self.mlp = PlainMlp(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))  # type: ignore[no-any-return]


class PlainModel(nn.Module):
    """Not from transformers: a table, residual blocks and a head; returns its logits."""

    base_model_tp_plan: ClassVar = {
        "layers.*.attention.q": "colwise",
        "layers.*.attention.k": "colwise",
        "layers.*.attention.v": "colwise",
        "layers.*.attention.out": "rowwise",
        "layers.*.mlp.up": "colwise",
        "layers.*.mlp.down": "rowwise",
    }

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList([PlainBlock(32) for _ in range(4)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _causal_lm("Llama"),
    "gpt2": _gpt2,
    "gpt2-dropout": lambda: _gpt2(0.2),
    "mistral": lambda: _causal_lm("Mistral", sliding_window=4),
    "qwen2": lambda: _causal_lm("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: _causal_lm("Qwen3", head_dim=8),
    "gemma2": lambda: _causal_lm("Gemma2", head_dim=8, sliding_window=4),
    "mixtral": lambda: _causal_lm("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek": lambda: _causal_lm(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "plain": PlainModel,
}
FAMILIES = {
    "gpt2": (
        ("transformer.wte", "transformer.wpe"),
        "transformer.h",
        ("transformer.ln_f", "lm_head"),
    ),
    "plain": (("table",), "layers", ("norm", "head")),
}
FAMILIES["lora"] = (
    ("base_model.model.model.embed_tokens",),
    "base_model.model.model.layers",
    ("base_model.model.model.norm", "base_model.model.lm_head"),
)
_LLAMA_LIKE = (("model.embed_tokens",), "model.layers", ("model.norm", "lm_head"))


def build(name: str) -> nn.Module:
    """A small model, the same weights each time."""
    torch.manual_seed(1)
    model = MODELS[name]()
    # Zero-initialised norms and biases hide mistakes in their gradients.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def make_plan(
    name: str,
    layout: Layout,
    *,
    recompute: Recompute = "none",
    cuts: Sequence[int] = (),
    layers: int = 4,
    precision: Precision = "fp32",
) -> Plan:
    """A plan with a real layout and real module paths; its predictions are made up.

    Args:
        cuts: index of the first layer of each stage but the first.
    """
    before, stem, after = FAMILIES.get(name, _LLAMA_LIKE)
    count = layout.pipeline * layout.virtual_stages
    edges = [0, *(cuts or [layers * i // count for i in range(1, count)]), layers]
    memory = MemoryParts(**dict.fromkeys(MemoryParts.model_fields, 0) | {"parameters": 1})
    stages = []
    for index in range(count):
        own = [f"{stem}.{layer}" for layer in range(edges[index], edges[index + 1])]
        modules = (
            (before if index == 0 else ()) + tuple(own) + (after if index == count - 1 else ())
        )
        stages.append(
            Stage(
                index=index,
                pipeline_rank=index % layout.pipeline,
                modules=modules,
                layers=len(own),
                recompute=(recompute,) * len(own),
                forward_seconds=1.0,
                backward_seconds=2.0,
                memory_bytes=1,
                memory=memory,
            )
        )
    return Plan(
        tool_version="test",
        model=ModelInfo(
            name=name,
            architecture=name,
            config_sha256="0",
            parameter_count=1,
            trainable_parameter_count=1,
        ),
        workload=Workload(
            global_batch=layout.global_batch,
            sequence_length=LENGTH,
            precision=precision,
            optimizer="adamw",
        ),
        cluster=ClusterInfo(
            name="test",
            device="cpu",
            devices=layout.devices,
            devices_per_node=layout.devices,
            nodes=1,
            cluster_sha256="0",
            device_sha256="0",
        ),
        layout=layout,
        mesh=mesh_axes(layout),
        stages=tuple(stages),
        prediction=Prediction(
            step_seconds=1.0,
            tokens_per_second=1.0,
            mfu=0.5,
            peak_memory_bytes=1,
            capacity_bytes=2,
            fits=True,
            breakdown=Breakdown(**dict.fromkeys(Breakdown.model_fields, 0.0) | {"forward": 1.0}),
            basis=TimeBasis(measured=0.0, interpolated=0.0, modelled=1.0),
        ),
        proof=Proof(
            status="estimated",
            bound_seconds=0.0,
            gap=1.0,
            layouts_considered=1,
            layouts_bounded=0,
            layouts_infeasible=0,
            layouts_solved=1,
            excluded={},
            solver="none",
            seconds=0.0,
        ),
    )


def make_batch(seed: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Random tokens; every row is padded to a different length, most labels of some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (rows,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compute_loss(model: nn.Module, batch: dict[str, torch.Tensor], *, plain: bool) -> torch.Tensor:
    """The model's own loss, or for a plain model one computed from its logits."""
    if not plain:
        return model(**batch).loss  # type: ignore[no-any-return]
    logits = model(batch["input_ids"])
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].reshape(-1)
    )


def train(
    model: nn.Module,
    *,
    plain: bool = False,
    rows: Callable[[int], int] = lambda step: ROWS,
    steps: int = STEPS,
) -> dict[str, list[float]]:
    """An ordinary loop: AdamW with groups, a scheduler, clipping, gradient accumulation.

    ``eps`` is above the default: attention does not see a bias of its keys, so that bias's
    gradient is rounding noise, which AdamW would blow up to steps of the full learning rate.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model.train()
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(ACCUMULATE):
            batch = make_batch(100 * step + part, rows(step))
            loss = compute_loss(model, batch, plain=plain)
            (loss / ACCUMULATE).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(norm.item())
        optimizer.step()
        scheduler.step()
    return {"losses": losses, "norms": norms}


def build_lora() -> nn.Module:
    """A frozen Llama with low-rank adapters on queries and values."""
    from peft import LoraConfig, get_peft_model

    base = build("llama")
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the second factor starts at zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
