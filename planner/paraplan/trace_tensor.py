"""How tensor parallelism splits each model: one table, read by the tracer and by the runtime.

A rule names modules by path (``*`` stands for a number) and says what becomes of them:

  column    output features are split; the input is whole on every rank, so its gradient is summed
  row       input features are split; the outputs of the ranks are summed
  experts   each expert's inner size is split: a column and a row product inside one module
  heads     an embedding with one column per attention head (T5's relative position bias)
  vocabulary_embedding, vocabulary_head
            rows of the vocabulary are split, and with them logits and loss

The rules of most models are their own: transformers' ``base_model_tp_plan``. The tables here are
for the models without one, and for those whose plan leaves out what can be split (attention of
DeepSeek and Phi-3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Style = Literal["column", "row", "experts", "heads", "vocabulary_embedding", "vocabulary_head"]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What tensor parallelism does to the modules at ``path``.

    Attributes:
        path: module path from the model's root; ``*`` stands for one name.
        fused: names of the parts that one weight holds side by side; each is split by itself.
    """

    path: str
    style: Style
    fused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorTable:
    """Rules of one architecture.

    Attributes:
        divided: (module path, attribute) of numbers in modules that shrink with the degree.
        divided_config: the same in the model's config.
    """

    rules: tuple[TensorRule, ...]
    divided: tuple[tuple[str, str], ...] = ()
    divided_config: tuple[str, ...] = ()


_QKV = ("query", "key", "value")


def _rules(prefix: str, **styles: str) -> tuple[TensorRule, ...]:
    """Rules for the modules named in ``styles`` (space-separated paths) under ``prefix``."""
    return tuple(
        TensorRule(f"{prefix}.{path}", style)  # type: ignore[arg-type]
        for style, paths in styles.items()
        for path in paths.split()
    )


_TABLES: dict[str, TensorTable] = {
    "gpt2": TensorTable(
        rules=(
            TensorRule("transformer.h.*.attn.c_attn", "column", fused=_QKV),
            *_rules("transformer.h.*", column="mlp.c_fc", row="attn.c_proj mlp.c_proj"),
        ),
        divided=(("transformer.h.*.attn", "split_size"),),
    ),
    "bert": TensorTable(
        rules=_rules(
            "bert.encoder.layer.*",
            column="attention.self.query attention.self.key attention.self.value"
            " intermediate.dense",
            row="attention.output.dense output.dense",
        )
    ),
    "vit": TensorTable(
        rules=_rules(
            "vit.layers.*",
            column="attention.q_proj attention.k_proj attention.v_proj mlp.fc1",
            row="attention.o_proj mlp.fc2",
        )
    ),
    "t5": TensorTable(
        rules=tuple(
            rule
            for attention in ("SelfAttention", "EncDecAttention")
            for rule in _rules(
                f"*.block.*.layer.*.{attention}",
                column="q k v",
                row="o",
                heads="relative_attention_bias",
            )
        )
        + _rules("*.block.*.layer.*.DenseReluDense", column="wi wi_0 wi_1", row="wo"),
        divided=(
            ("*.block.*.layer.*.SelfAttention", "n_heads"),
            ("*.block.*.layer.*.EncDecAttention", "n_heads"),
        ),
    ),
    "phi3": TensorTable(
        rules=(
            TensorRule("model.layers.*.self_attn.qkv_proj", "column", fused=_QKV),
            TensorRule("model.layers.*.mlp.gate_up_proj", "column", fused=("gate", "up")),
            *_rules("model.layers.*", row="self_attn.o_proj mlp.down_proj"),
        ),
        divided=(("model.layers.*.self_attn", "num_key_value_heads"),),
        divided_config=("num_attention_heads",),
    ),
    "deepseek_v3": TensorTable(
        rules=(
            *_rules(
                "model.layers.*",
                column="self_attn.q_proj self_attn.q_b_proj self_attn.kv_b_proj"
                " mlp.gate_proj mlp.up_proj mlp.shared_experts.gate_proj"
                " mlp.shared_experts.up_proj",
                row="self_attn.o_proj mlp.down_proj mlp.shared_experts.down_proj",
                experts="mlp.experts",
            ),
        )
    ),
}
# Styles of transformers' plans that split a weight, and ours for them. The others (norms whose
# gradients are summed, projections that are gathered again) stay whole.
_PLAN_STYLES = {"colwise": "column", "rowwise": "row", "moe_tp_experts": "experts"}
_EXPERT_WEIGHT = re.compile(r"(?<!shared_)experts\.\w+$")  # the rule for its module covers it


def tensor_table(model_type: str, plan: Mapping[str, str] | None) -> TensorTable | None:
    """The rules of an architecture, vocabulary left out, or None if there are none.

    Args:
        plan: the model's own tensor-parallel plan, with paths from the model's root.
    """
    if model_type in _TABLES:
        return _TABLES[model_type]
    rules = tuple(
        TensorRule(path, _PLAN_STYLES[style])  # type: ignore[arg-type]
        for path, style in (plan or {}).items()
        if style in _PLAN_STYLES and not _EXPERT_WEIGHT.search(path)
    )
    return TensorTable(rules) if rules else None


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Paths that a rule means."""
    return [path for path in paths if fnmatchcase(path, pattern)]
