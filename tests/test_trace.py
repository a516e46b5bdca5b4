"""Traced graphs against the models themselves, against closed forms and against real runs."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from paraplan.errors import InputError
from paraplan.graph import BlockVariant, ModelGraph, Op, Saved, cut_amounts, op_flops
from paraplan.models import ModelSource, preset_names, resolve_model
from paraplan.trace import backward_ratio, trace_model

# Counted by their publishers (model cards, safetensors indices), tied weights once; DeepSeek-V3
# without its multi-token-prediction module and without the router's correction biases, which
# are buffers.
PUBLISHED = {
    "bert-large": 335_174_458,
    "deepseek-v3": 671_026_404_352,
    "gemma-2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-405b": 405_853_388_800,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "t5-large": 737_668_096,
    "vit-huge": 632_045_800,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def config_source(folder: Path, **settings: Any) -> ModelSource:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return resolve_model(str(folder))


def trace(
    source: ModelSource, length: int = 32, degrees: tuple[int, ...] = (1,), dtype: str = "bfloat16"
) -> ModelGraph:
    return trace_model(source, sequence_length=length, compute_dtype=dtype, tensor_degrees=degrees)


@cache
def preset_graph(name: str, degrees: tuple[int, ...] = (1,), length: int = 256) -> ModelGraph:
    return trace(resolve_model(name), length, degrees)


def meta_model(name: str) -> torch.nn.Module:
    """The preset's model as transformers builds it, without any code of ours."""
    import transformers

    config = dict(resolve_model(name).config)
    architecture = config.pop("architectures")[0]
    with torch.device("meta"):
        made = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        return getattr(transformers, architecture)(made)  # type: ignore[no-any-return]


def flops(
    graph: ModelGraph, phase: str, kinds: tuple[str, ...] = ("gemm", "grouped_gemm", "attention")
) -> float:
    variants = [graph.blocks[item.block].variants[1] for item in graph.chain]
    return sum(
        op_flops(op, 1) * op.count
        for variant in variants
        for op in variant.ops
        if op.phase == phase and op.kind in kinds
    )


def total(saved: Saved) -> tuple[int, int]:
    parts = (saved.sharded, saved.replicated, saved.gathered)
    return sum(p.fixed for p in parts), sum(p.per_sequence for p in parts)


def layer(graph: ModelGraph, degree: int = 1) -> BlockVariant:
    return next(b for b in graph.blocks.values() if b.role == "layer").variants[degree]


@pytest.mark.parametrize("name", preset_names())
def test_parameter_counts_are_exact(name: str) -> None:
    graph = preset_graph(name)
    tensors = list(meta_model(name).parameters())
    counted = sum(p.numel() for p in tensors)
    variants = [graph.blocks[item.block].variants[1] for item in graph.chain]
    assert sum(one.trained_tensors for one in variants) == len(tensors)
    held = sum(graph.blocks[item.block].variants[1].parameters for item in graph.chain)
    assert graph.parameter_count == counted == held == PUBLISHED[name]
    assert graph.trainable_parameter_count == counted
    for block in graph.blocks.values():
        ratio = backward_ratio(block.variants[1])
        assert block.role == "embedding" or ratio is None or 2 <= ratio <= 2.5


def closed_form(name: str, length: int) -> float:
    """Forward FLOPs of one sequence: two per weight and token, and causal attention."""
    model = meta_model(name)
    config: Any = model.config
    weights = sum(
        module.weight.numel()  # type: ignore[operator]
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    )
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    if config.model_type in ("mistral", "phi3"):
        types = ["sliding_attention"] * config.num_hidden_layers
    pairs = 0
    for kind in types:
        reach = min(window, length) if kind == "sliding_attention" else length
        pairs += sum(min(i + 1, reach) for i in range(length))
    attention = 4 * config.num_attention_heads * head_dim * pairs
    return 2.0 * length * weights + attention


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("gpt2", 1024),
        ("llama-2-7b", 4096),
        ("llama-3-405b", 8192),
        ("mistral-7b", 8192),  # window 4096
        ("gemma-2-9b", 8192),  # every other layer has a window of 4096
        ("phi-3-mini", 4096),  # window 2047
        ("qwen2.5-32b", 4096),
        *((name, 2048) for name in ("llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b")),
        *((name, 2048) for name in ("qwen2.5-7b", "qwen2.5-72b")),
        ("gpt2-xl", 1024),
    ],
)
def test_dense_flops_have_their_closed_form(name: str, length: int) -> None:
    graph = preset_graph(name, length=length)
    assert flops(graph, "forward") == pytest.approx(closed_form(name, length), rel=1e-9)
    assert graph.model_flops_per_sequence == pytest.approx(
        flops(graph, "forward") + flops(graph, "backward"), rel=1e-12
    )


def test_backward_has_two_products_for_each_of_the_forward() -> None:
    graph = preset_graph("llama-3-8b", length=512)
    assert flops(graph, "backward", ("gemm",)) == 2 * flops(graph, "forward", ("gemm",))
    assert flops(graph, "backward", ("attention",)) == 2.5 * flops(graph, "forward", ("attention",))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_products_are_those_of_a_real_run(tmp_path: Path, model_type: str) -> None:
    """The whole model on the CPU, forward and backward, counted by torch."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    settings: dict[str, Any] = {
        "llama": LLAMA | {"num_key_value_heads": 2},
        "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64},
        "bert": {
            "architectures": ["BertForMaskedLM"],
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 96,
        },
        "t5": {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 3,
            "num_heads": 4,
            "vocab_size": 96,
            "decoder_start_token_id": 0,
            "is_encoder_decoder": True,
        },
    }[model_type]
    graph = trace(config_source(tmp_path, **({"model_type": model_type} | settings)))
    config = transformers.AutoConfig.for_model(
        model_type, **{k: v for k, v in settings.items() if k != "model_type"}
    )
    config.use_cache = False
    config._attn_implementation = "eager"
    model = getattr(transformers, graph.architecture)(config).train()
    ids = torch.randint(0, 96, (1, 32), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "bmm" not in str(op))
    assert flops(graph, "forward", ("gemm",)) + flops(graph, "backward", ("gemm",)) == products


def test_saved_activations_are_those_of_a_real_layer(tmp_path: Path) -> None:
    """``saved_tensors_hooks`` on one layer that runs on the CPU with its fused attention."""
    import transformers

    graph = trace(config_source(tmp_path, **LLAMA), dtype="float32")
    settings = {k: v for k, v in LLAMA.items() if k != "model_type"}
    config = transformers.LlamaConfig(**settings)
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.zeros((2, 32), dtype=torch.long)
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)  # so that no later tensor gets the same address
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(2, 32, 64, requires_grad=True)
    tables = model.model.rotary_emb(hidden, torch.arange(32)[None])
    first = model.model.layers[0]
    ours = {t.untyped_storage().data_ptr() for t in (*first.parameters(), *tables)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first(hidden, position_embeddings=tables)
    real = sum(size for address, size in sizes.items() if address not in ours)
    del ids
    fixed, per_sequence = total(layer(graph).saved["none"])
    assert fixed + 2 * per_sequence == real


def test_recomputation_keeps_less_and_runs_more() -> None:
    for name in ("llama-3-8b", "gpt2", "mixtral-8x7b", "deepseek-v3"):
        graph = preset_graph(name)
        for block in graph.blocks.values():
            if block.role != "layer":
                assert len({str(saved) for saved in block.variants[1].saved.values()}) == 1
                continue
            variant = block.variants[1]
            none, selective, full = (
                total(variant.saved[mode])[1] for mode in ("none", "selective", "full")
            )
            assert full < selective < none
            assert full == 256 * graph.hidden_size * 2  # the layer's input
            assert max(each.at(1) for each in variant.peak_bytes) >= none
            for op in variant.ops:
                assert not (op.phase == "backward" and op.reruns)
                if "selective" in op.reruns:
                    assert op.kind == "memory" and "full" in op.reruns


def test_full_recomputation_stops_before_the_last_product() -> None:
    """What the down projection returns is only added to the residual: nobody saved it."""
    variant = layer(preset_graph("llama-3-8b"))
    products = Counter(
        {tuple(op.dims): op.count for op in variant.ops if op.kind == "gemm" and not op.reruns}
    )
    forward = [op for op in variant.ops if op.phase == "forward"]
    left_out = [op for op in forward if op.kind != "memory" and "full" not in op.reruns]
    assert [(op.dims[2].fixed, op.dims[3].fixed, op.count) for op in left_out] == [(4096, 14336, 1)]
    assert products


def test_amounts_hold_for_other_micro_batches(tmp_path: Path) -> None:
    """A third of the model's own trace, at three sequences, is what the amounts say."""
    from paraplan.trace_layers import find_layers, outside_modules, structure
    from paraplan.trace_model import build_model
    from paraplan.trace_parts import Subject
    from paraplan.trace_pass import trace_pass
    from paraplan.trace_variant import live_bytes, saved_storages

    source = config_source(tmp_path, **LLAMA)
    graph = trace(source)
    built = build_model(source, sequence_length=32, compute_dtype="bfloat16")
    layers = find_layers(built.model)
    subject = Subject(
        model=built.model,
        layers=layers,
        structures={path: structure(module) for path, module in layers.items()},
        outside=outside_modules(built.model, layers),
    )
    steps = trace_pass(subject, built.runner(3), roles={}).steps
    for position, item in enumerate(graph.chain):
        part, variant = steps[position].part, graph.blocks[item.block].variants[1]
        sizes = part.log.births | part.inputs
        saved = sum(sizes[n] for n in saved_storages(part))
        fixed, per_sequence = total(variant.saved["none"])
        assert saved == fixed + 3 * per_sequence
        peak = max(each.at(3) for each in variant.peak_bytes)
        assert max(live_bytes(part)) == pytest.approx(peak, rel=0.01)
        read = sum(call.kernel.read_bytes for call in part.log.calls)
        assert read == sum(op.read_bytes.at(3) * op.count for op in variant.ops)


def test_tensor_ranks_divide_the_work() -> None:
    graph = preset_graph("llama-3-8b", degrees=(1, 2, 8))
    norms = 2 * 4096
    whole = layer(graph)
    for degree in (2, 8):
        part = layer(graph, degree)
        assert whole.parameters - norms == degree * (part.parameters - norms)
        work = {
            d: sum(op_flops(op, 1) * op.count for op in v.ops)
            for d, v in ((1, whole), (degree, part))
        }
        assert work[1] == degree * work[degree]
        message = 256 * 4096 * 2
        assert Counter((c.phase, c.message_bytes.at(1)) for c in part.collectives) == {
            ("forward", message): 2,
            ("backward", message): 2,
        }
        for name in ("embedding", "head"):
            one, split = (graph.blocks[name].variants[d] for d in (1, degree))
            small = 4096 if name == "head" else 0
            assert one.parameters - small == degree * (split.parameters - small)
        assert [c.phase for c in graph.blocks["embedding"].variants[degree].collectives] == [
            "forward"
        ]
        assert [c.phase for c in graph.blocks["head"].variants[degree].collectives] == ["backward"]
    assert not whole.collectives


def test_saved_activations_under_tensor_parallelism() -> None:
    """What is whole on every rank does not shrink, what is split does so exactly."""
    graph = preset_graph("llama-2-7b", degrees=(1, 2, 4))
    two, four = (layer(graph, degree).saved["none"] for degree in (2, 4))
    assert two.replicated == four.replicated
    assert two.gathered == four.gathered
    assert two.gathered.per_sequence == 2 * 256 * 4096 * 2  # inputs of attention and MLP
    assert two.sharded.per_sequence == 2 * four.sharded.per_sequence
    assert total(layer(graph).saved["none"])[1] == (
        two.replicated.per_sequence + two.gathered.per_sequence + 2 * two.sharded.per_sequence
    )


@pytest.mark.parametrize("name", ["gpt2", "bert-large", "t5-large", "vit-huge", "phi-3-mini"])
def test_models_without_a_plan_of_their_own_split_too(name: str) -> None:
    graph = preset_graph(name, degrees=(1, 2))
    for block in graph.blocks.values():
        if block.role == "layer":
            one, two = block.variants[1], block.variants[2]
            work = [sum(op_flops(op, 1) * op.count for op in v.ops) for v in (one, two)]
            assert work[0] == 2 * work[1]
            assert one.parameters / 2 < two.parameters < 0.52 * one.parameters
            attentions = sum(op.kind == "attention" and op.phase == "forward" for op in one.ops)
            forward = [c for c in two.collectives if c.phase == "forward"]
            assert len(forward) == attentions + 1


@pytest.mark.parametrize(
    ("name", "degree", "reason"),
    [
        ("mistral-7b", 16, "8 kv heads do not divide over tensor 16"),
        ("gpt2-xl", 2, "25 attention heads do not divide over tensor 2"),
        ("llama-3-8b", 3, "32 attention heads do not divide over tensor 3"),
    ],
)
def test_limits_of_tensor_parallelism(name: str, degree: int, reason: str) -> None:
    graph = preset_graph(name, degrees=(1, degree))
    assert graph.tensor_limits == {degree: reason}
    assert all(set(block.variants) == {1} for block in graph.blocks.values())


def test_experts() -> None:
    graph = preset_graph("mixtral-8x7b", degrees=(1, 2))
    variant = layer(graph)
    assert graph.experts == 8
    assert variant.expert_parameters == 8 * 3 * 4096 * 14336
    rows = 256 * 2  # two experts per token
    assert variant.expert_dispatch_bytes.at(1) == rows * 4096 * 2
    grouped = [op for op in variant.ops if op.kind == "grouped_gemm"]
    assert all(op.expert and op.dims[0].at(1) == 8 and op.dims[1].at(1) == rows for op in grouped)
    work = sum(op_flops(op, 1) * op.count for op in grouped if op.phase == "forward")
    assert work == 2 * rows * 3 * 4096 * 14336
    assert 2 * layer(graph, 2).expert_parameters == variant.expert_parameters


def test_flops_of_experts_and_of_an_encoder() -> None:
    """Mixtral: attention, router and two of eight experts; BERT: every token sees every other."""
    length = 1024
    matrices = 4096 * (2 * 4096 + 2 * 1024) + 4096 * 8 + 2 * 3 * 4096 * 14336
    pairs = length * (length + 1) // 2
    mixtral = 32 * (2 * length * matrices + 4 * 4096 * pairs) + 2 * length * 4096 * 32000
    assert flops(preset_graph("mixtral-8x7b", length=length), "forward") == pytest.approx(
        mixtral, rel=0.01
    )
    length = 512
    matrices = 24 * 12 * 1024**2 + 1024**2 + 1024 * 30522
    bert = 2 * length * matrices + 24 * 4 * 1024 * length**2
    assert flops(preset_graph("bert-large", length=length), "forward") == pytest.approx(
        bert, rel=0.01
    )


def test_layer_kinds() -> None:
    """Gemma-2 alternates windows, DeepSeek-V3 begins with dense layers, T5 has first layers."""
    kinds = {
        name: Counter(
            item.block
            for item in preset_graph(name).chain
            if item.block not in ("embedding", "head") and "bridge" not in item.block
        )
        for name in ("gemma-2-9b", "deepseek-v3", "t5-large")
    }
    assert list(kinds["gemma-2-9b"].values()) == [21, 21]
    assert list(kinds["deepseek-v3"].values()) == [3, 58]
    assert list(kinds["t5-large"].values()) == [1, 23, 1, 23]
    windows = {
        name: [op.window for op in block.variants[1].ops if op.kind == "attention"]
        for name, block in preset_graph("gemma-2-9b").blocks.items()
        if block.role == "layer"
    }
    assert sorted(windows.values(), key=str) == [[4096, 4096], [None, None]]


def test_chain_and_what_crosses_its_cuts() -> None:
    graph = preset_graph("llama-3-8b")
    assert len(graph.chain) == 34
    assert graph.chain[0].modules == ("model.embed_tokens",)
    assert graph.chain[4].modules == ("model.layers.3",)
    assert graph.chain[-1].modules == ("model.norm", "lm_head")
    hidden = 256 * 4096 * 2
    assert [cut.at(1) for cut in cut_amounts(graph)] == [0, *[hidden] * 33, 0]


def test_t5_decoder_reads_the_encoder_and_shares_position_biases() -> None:
    graph = preset_graph("t5-large")
    hidden, bias = 256 * 1024 * 2, 16 * 256 * 256 * 2
    cuts = cut_amounts(graph)
    assert cuts[1].at(1) == hidden
    assert cuts[10].at(1) == hidden + bias  # inside the encoder
    assert cuts[26].at(1) == 2 * hidden  # after the bridge: its own embedding, encoder's states
    assert cuts[40].at(1) == 2 * hidden + bias
    assert graph.chain[25].modules == ("encoder.final_layer_norm", "decoder.embed_tokens")
    assert graph.tied_parameters == 32_128 * 1024


def test_tied_embeddings_are_counted_once() -> None:
    tied, untied = preset_graph("gemma-2-9b"), preset_graph("llama-3-8b")
    assert tied.tied_parameters == tied.blocks["embedding"].variants[1].parameters == 917_504_000
    assert tied.blocks["head"].variants[1].parameters == 3584
    assert untied.tied_parameters == 0


def test_attention_has_a_gradient_for_position_biases() -> None:
    ops = preset_graph("t5-large").blocks["T5Block.1"].variants[1].ops
    backward = next(op for op in ops if op.name == "paraplan.attention_backward")
    assert backward.write_bytes.fixed == 16 * 256 * 256 * 2


FACTORY = """
import torch
from torch import nn
import torch.nn.functional as F


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, 4, 8).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, 32))


class Model(nn.Module):
    def __init__(self, check=False, unused=False):
        super().__init__()
        self.check = check
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.layers = nn.Sequential(*[Layer() for _ in range(3)])
        if unused:
            self.lost = nn.Linear(3, 3)

    def forward(self, ids):
        if self.check and ids.max() > 49:
            raise ValueError("no such token")
        first = self.embed(ids)
        hidden = self.layers(first)
        return F.cross_entropy(self.head(hidden + first).flatten(0, 1), ids.flatten())


class Silent(nn.Linear):
    def forward(self, x):
        super().forward(x)


IDS = torch.zeros((1, 16), dtype=torch.long)
make = lambda: (Model(), {"ids": IDS})
data_dependent = lambda: (Model(check=True), (IDS,))
unused = lambda: (Model(unused=True), (IDS,))
no_pair = lambda: Model()
no_loss = lambda: (Silent(2, 2), (torch.zeros(1, 2),))
fails = lambda: 1 / 0
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "traced_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "traced_factory"


def test_a_model_of_the_users(factory: str) -> None:
    graph = trace(resolve_model(f"{factory}:make"), dtype="float32")
    assert graph.parameter_count == 50 * 32 + (32 * 50 + 50) + 3 * (64 + 96 * 33 + 32 * 33)
    assert [item.block for item in graph.chain] == ["embedding", *["Layer"] * 3, "head"]
    attention = [op for op in layer(graph).ops if op.kind == "attention"]
    assert [op.causal for op in attention] == [True, True]
    skip = next(v for v in graph.values if v.producer == 0)
    assert skip.last_consumer == 4  # the head adds the embedding again
    assert "tensor-parallel rules" not in str(graph.tensor_limits)
    limits = trace(resolve_model(f"{factory}:make"), degrees=(1, 2)).tensor_limits
    assert limits == {2: "no tensor-parallel rules for a model that is not transformers'"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data_dependent", "cannot be traced without data"),
        ("unused", "lost"),
        ("no_pair", "must return"),
        ("no_loss", "returns nothing to train on"),
        ("fails", "ZeroDivisionError"),
        ("missing", "AttributeError"),
    ],
)
def test_factories_that_do_not_work(factory: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trace(resolve_model(f"{factory}:{name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "lama"},
        LLAMA | {"hidden_size": 63},
        LLAMA | {"num_key_value_heads": 3},
        LLAMA | {"hidden_act": "nonsense"},
        LLAMA | {"rope_theta": "hot"},
        LLAMA | {"intermediate_size": None},
        LLAMA | {"rope_scaling": {"rope_type": "nonsense"}},
        LLAMA | {"torch_dtype": "float17"},
        {"model_type": "albert"},  # one layer that runs twelve times
        {"model_type": "clip"},  # has no loss that we know
    ],
)
def test_bad_configs_are_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        trace(config_source(tmp_path, **settings))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "length"), [("gpt2", 2048), ("bert-large", 513), ("vit-huge", 64)]
)
def test_sequences_too_long(name: str, length: int) -> None:
    with pytest.raises(InputError, match=r"positions|fixed sequence length"):
        preset_graph(name, length=length)


def test_ops_say_what_they_do() -> None:
    for op in layer(preset_graph("llama-3-8b", degrees=(1, 2)), 2).ops:
        check_op(op)


def check_op(op: Op) -> None:
    lengths = {"gemm": 4, "grouped_gemm": 4, "attention": 7, "memory": 0}
    assert len(op.dims) == lengths[op.kind]
    assert op.read_bytes.at(1) + op.write_bytes.at(1) > 0
    assert all(
        value >= 0 for amount in (*op.dims, op.read_bytes, op.write_bytes) for value in amount
    )
    if op.kind == "gemm":
        batch, m, n, k = (dim.at(2) for dim in op.dims)
        item = 2 if op.dtype == "bfloat16" else 4
        assert op.read_bytes.at(2) == item * batch * (m * k + k * n)
        assert op.write_bytes.at(2) == item * batch * m * n
