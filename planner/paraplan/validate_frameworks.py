"""What the training frameworks of published runs do that the layout does not say.

A run's time depends on how its framework computes and exchanges: fused kernels or eager ones,
gradients reduced beside the backward or after it, stages cut by layers or by cost. `framework_of`
finds it in the words of a row; a row that names none is taken for what this project's own runtime
is: eager torch with FSDP2. Nothing here names a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from paraplan.engine import RUNTIME, Engine

Kernels = Literal["eager", "fused", "compiled"]


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework, as far as step time and memory depend on it.

    Attributes:
        name: as its authors call it.
        words: any of them in a row's ``framework``, ``source``, ``zero_or_fsdp`` or ``attn_impl``
            tells of it.
        kernels: of norms, activations, residual additions and the loss: eager torch, kernels
            written by hand, or torch.compile and XLA.
        fused_norm: norms are one kernel even where the rest is eager.
        reruns_head: full recompute reruns the head's product and the gathering of its logits, for
            the head is a layer as the others are.
        gated, tied: of its models, where it has one kind only; else the parameter count decides.
        fused_loss: cross entropy is one kernel that leaves its gradient in the logits.
        metrics: so many cross entropies more of each micro-batch's logits, by torch in fp32.
        torch_loss: the loss is torch's cross entropy of a shard of the logits.
        whole_logits: tensor ranks gather the logits, and each computes the loss over all of them.
        calls: launches of a layer's forward that are listed nowhere as ops (views, casts, copies,
            random states, the Python between them); a backward has twice as many.
        exchange_calls: the same for each of a layer's tensor exchanges in the forward.
        adapters, adapter_dropout: of a run of task ``lora``: beside queries, keys and values, or
            beside both of attention's projections; with dropout of their inputs.
        gradient_bytes: moved for each parameter to add a micro-batch's gradient to the sum; 0
            where there is nothing to add it to, or the product's own kernel does.
        sums_in_product: it does, to the sums that the engine keeps standing.
        sum_reduce_bytes: moved for each parameter by the reduction where gradients are summed in
            fp32; twice 4 where they are all-reduced although each rank needs its shard alone.
        attention: implementation where a row says only ``flash``.
        gathers_again: the backward gathers the inputs of column-parallel products again.
        keeps_scattered: the outputs of row-parallel products stay until the backward, scattered.
        pending_bytes: of each token and hidden element that wait for the tensor exchanges' stream
            at most, the host being ahead; without and with a pipeline, whose transfers hold it.
        cuts: stages hold equal numbers of layers, or are of about equal cost (`cost_cuts`), or
            the largest has as few parameters as possible.
        deepspeed_zero3: its runs with ZeRO-3 are DeepSpeed's of 2021: each weight is gathered and
            reduced as a list of parts (`validate_layout.part_seconds`), in fp16 as gradients are
            made, and shards alone are summed.
        crowded_wait_seconds: of each pipeline transfer in a run that needs more than its devices
            have: for its buffer the allocator returns memory and waits for the device.
        crowded_nodes: from how many nodes on every run's transfers wait so, full devices or not.
        pipeline_seconds: what a step takes longer, whatever its micro-batches, once there is a
            pipeline.
        wait_seconds: of each step of its tensor exchanges, on several nodes and in a pipeline.
        rerun_wait_seconds: of each micro-batch that is recomputed whole, for every doubling of
            the tensor ranks.
        engine_by_layout: how it exchanges depends on the layout (`validate_layout.engine_of`).
        engine: how it exchanges.
    """

    name: str
    words: tuple[str, ...] = ()
    kernels: Kernels = "eager"
    fused_norm: bool = False
    fused_loss: bool = False
    metrics: int = 0
    torch_loss: bool = False
    whole_logits: bool = False
    reruns_head: bool = False
    gated: bool | None = None
    tied: bool | None = None
    calls: int = 20
    exchange_calls: int = 0
    adapters: Literal["qkv", "attention"] = "attention"
    adapter_dropout: bool = True
    gradient_bytes: int = 0
    sums_in_product: bool = False
    sum_reduce_bytes: int = 4
    attention: str = "flash-attention-2"
    gathers_again: bool = False
    keeps_scattered: bool = False
    pending_bytes: tuple[int, int] = (0, 0)
    cuts: Literal["layers", "cost", "parameters"] = "layers"
    deepspeed_zero3: bool = False
    crowded_wait_seconds: float = 0.0
    crowded_nodes: float = math.inf
    pipeline_seconds: float = 0.0
    wait_seconds: float = 0.0
    rerun_wait_seconds: float = 0.0
    engine_by_layout: bool = False
    engine: Engine = RUNTIME


CORE = Framework(
    "Megatron Core and Transformer Engine",
    words=("megatron", "mlperf", "dgxc", "distributed-optimizer", "(te)", "cudnn"),
    kernels="fused",
    calls=20,
    sums_in_product=True,
    attention="cudnn",
    # User buffers: tensor exchanges in pieces beside the products. Gradients stay in bf16.
    engine=Engine(
        copies=False,
        hidden_tensor=0.6,
        reduce_bytes=2,
        gradient_bytes=2,
        standing_gradient_bytes=2,
        shards_context=True,
        keeps_outputs=False,
    ),
)

FRAMEWORKS: tuple[Framework, ...] = (
    Framework(
        "nanotron",
        words=("nanotron",),
        fused_norm=True,
        gated=True,
        calls=75,
        exchange_calls=10,
        gradient_bytes=10,  # bf16 gradient read, fp32 sum read and written
        gathers_again=True,
        keeps_scattered=True,
        pending_bytes=(64, 8),  # both: docs/accuracy.md, "nanotron's memory"
        cuts="cost",
        crowded_wait_seconds=0.265,  # both: docs/accuracy.md, "Two modes of nanotron"
        crowded_nodes=64,
        pipeline_seconds=0.03,  # docs/accuracy.md, "nanotron's steps"
        wait_seconds=0.31e-3,  # docs/accuracy.md, "nanotron's waits"
        engine_by_layout=True,
        engine=Engine(copies=False),
    ),
    Framework(
        "Megatron-DeepSpeed",
        words=("megatron-deepspeed", "deepspeed", "bigscience"),
        kernels="fused",
        gated=False,
        tied=True,
        calls=36,
        exchange_calls=3,
        gradient_bytes=6,
        sum_reduce_bytes=8,  # its BF16_Optimizer: buffered_allreduce_fallback
        engine=Engine(
            copies=False,
            overlaps_data=False,
            reduce_bytes=2,
            gradient_bytes=2,
            buffer_bytes=3e9,
            slices_transfers=True,
            reruns_whole=True,
        ),
    ),
    Framework(
        "Megatron-LM of 2022",
        words=("korthikanti",),
        kernels="fused",
        gated=False,
        tied=True,
        calls=40,
        sums_in_product=True,
        # The backward's exchanges run beside the products of the weights' gradients.
        engine=Engine(
            copies=False,
            overlaps_data=False,
            gradient_bytes=4,
            standing_gradient_bytes=4,
            slices_transfers=True,
            reruns_whole=True,
            hidden_tensor=0.4,
            keeps_outputs=False,
        ),
    ),
    Framework(
        "Megatron-LM of 2021",
        words=("sc'21", "fused-softmax"),
        kernels="fused",
        gated=False,
        tied=True,
        calls=40,
        gradient_bytes=10,  # fp16 gradient read, fp32 sum read and written
        deepspeed_zero3=True,
        engine=Engine(
            overlaps_data=False,
            gradient_bytes=4,
            standing_gradient_bytes=4,
            slices_transfers=True,
            reruns_whole=True,
            copies=False,
        ),
    ),
    Framework(
        "Aleph Alpha scaling",
        words=("aleph alpha", "hagemann"),
        gated=True,
        tied=False,
        whole_logits=True,
        reruns_head=True,  # its ParallelModule.forward
        cuts="parameters",  # of its two ways the one that its runs tell of: docs/accuracy.md
        calls=40,
        gradient_bytes=6,  # bf16, as the sum
        rerun_wait_seconds=0.02,  # docs/accuracy.md, "Aleph Alpha's waits"
        engine=Engine(
            overlaps_data=False, tensor_bytes=4, gradient_bytes=2, reruns_whole=True, copies=False
        ),
    ),
    Framework(
        "llm-foundry",
        words=("llm-foundry",),
        fused_norm=True,
        fused_loss=True,
        metrics=2,  # LanguageCrossEntropy and LanguagePerplexity: its `use_train_metrics`
        gated=False,
        tied=True,
        calls=20,
        attention="flash-attention-1",
        engine=Engine(copies=False),
    ),
    Framework(
        "torchtitan",
        words=("torchtitan",),
        torch_loss=True,
        gated=True,
        tied=False,
        engine=Engine(shards_context=True),
    ),
    Framework(
        "fms-fsdp",
        words=("fms-fsdp",),
        kernels="compiled",
        gated=True,
        tied=False,
        engine=Engine(copies=False),
    ),
    Framework(
        "MaxText",
        words=("maxtext", "jax"),
        kernels="compiled",
        calls=0,
        attention="cudnn",
        engine=Engine(copies=False),
    ),
    # The defaults of its recipes for adapters; MLPerf's benchmark has its own.
    replace(CORE, name="NeMo", words=("nemo",), adapters="qkv", adapter_dropout=False),
    CORE,
)
"""First match counts."""

PLAIN = Framework("eager torch with FSDP2", torch_loss=True)


def framework_of(texts: tuple[str, ...], compiled: bool) -> Framework:
    """The framework that the texts tell of.

    Args:
        compiled: the run says that it used torch.compile.
    """
    found = next(
        (one for text in texts for one in FRAMEWORKS if any(word in text for word in one.words)),
        PLAIN,
    )
    return _compiled(found) if compiled and found.kernels == "eager" else found


def _compiled(framework: Framework) -> Framework:
    return replace(framework, kernels="compiled", fused_norm=True, calls=framework.calls // 4)
